"""How long a batch takes on a simulated device, and what of that it borrowed.

`table`: the measured latency at the batch, the SM share and the quota (the request) in force at its start. Nothing is
lent: a share has its request and no more.

`device-time`: the batch needs the device time of the profile at quota 100, and the gate gives it out as the live one
does: an instance's bucket fills at its request's rate up to one window's worth; while it has tokens the batch runs, and
after that at the rate of the request. While no other instance of the row is busy it may run on up to its limit, out of
a second bucket that fills at the limit's rate; while n are busy each gets an n-th part of the row, if that is less.
What it uses beyond its request is charged as borrowed. Between segments of at most 5 ms the real gate overshoots by
less than one; here device time is a fluid.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from hasgpu_core.resources import WHOLE_PERMILLE

WINDOW_S = 0.040
"""Of the gate."""


class Physics(Enum):
    """Which of them."""

    TABLE = "table"
    DEVICE_TIME = "device-time"


@dataclass(slots=True)
class Bucket:
    """Device time that may be used, in seconds."""

    tokens_s: float = 0.0
    filled_s: float = 0.0
    """When it was last brought up to date."""

    def fill(self, now_s: float, permille: int) -> None:
        """Adds what has come since, up to one window's worth."""
        rate = permille / WHOLE_PERMILLE
        self.tokens_s = min(rate * WINDOW_S, self.tokens_s + rate * max(0.0, now_s - self.filled_s))
        self.filled_s = now_s

    def run(self, device_s: float, permille: int) -> float:
        """Takes a batch's device time; returns how long it takes until all of it has been given."""
        rate = permille / WHOLE_PERMILLE
        if rate >= 1.0:
            took_s = device_s
        else:
            burst_s = min(device_s, self.tokens_s / (1.0 - rate))
            took_s = burst_s + (device_s - burst_s) / rate
            self.tokens_s -= burst_s * (1.0 - rate)
        self.filled_s += took_s
        return took_s


@dataclass(slots=True)
class Gate:
    """One instance's two buckets."""

    request: Bucket
    limit: Bucket

    def run(
        self, now_s: float, device_s: float, *, request_permille: int, limit_permille: int, alone: bool
    ) -> tuple[float, float]:
        """Returns how long a batch takes, and the device time that it borrows beyond its request.

        Args:
            now_s: Its start.
            device_s: What it needs.
            request_permille: Guaranteed.
            limit_permille: To be used while `alone`.
            alone: No other instance of the row is busy.
        """
        self.request.fill(now_s, request_permille)
        self.limit.fill(now_s, limit_permille)
        if not alone or limit_permille <= request_permille:
            return self.request.run(device_s, request_permille), 0.0
        own_s = self.request.tokens_s
        took_s = self.limit.run(device_s, limit_permille)
        paid_s = own_s + took_s * request_permille / WHOLE_PERMILLE
        self.request.tokens_s = max(0.0, paid_s - device_s)
        self.request.filled_s = now_s + took_s
        return took_s, max(0.0, device_s - paid_s)
