"""How long a batch takes on a simulated device, and what of that it borrowed.

`table`: the measured latency at the batch, the SM share and the quota (the request) in force at its start. Nothing is
lent: a share has its request and no more.

`device-time`: the batch needs the device time of the profile at quota 100, and the gate gives it out as the live one
does, in segments: an instance's bucket fills at its request's rate up to one window's worth, and while it has tokens
the next segment runs, though that may overdraw it (the debt is carried); without tokens it waits, or borrows, as far as
a second bucket that fills at the limit's rate allows. While n instances of a row are busy, each gets an n-th part of it
as its limit, if that is less. A segment that began without tokens is charged as borrowed, whole; while nobody else is
busy, an instance is charged after `CREDIT_S` at the earliest. That matters where a request is small: a segment that
begins with a millisecond of tokens is all the instance's own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum

from hasgpu_core.resources import WHOLE_PERMILLE

WINDOW_S = 0.040
"""Of the gate."""
SEGMENT_S = 0.005
"""Longest segment; a batch is as many of these as it takes, and a rest."""
CREDIT_S = WINDOW_S / 4
"""What may be used in one while nobody waits, as far as the bucket lets."""
_LEAST_S = 1e-9
"""Of device time: so much or less is none."""


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
            limit_permille: To be used where the row is idle.
            alone: No other instance of the row is busy.
        """
        at_s, left_s, borrowed_s = now_s, device_s, 0.0
        lends = limit_permille > request_permille
        self._fill(at_s, request_permille, limit_permille)
        while left_s > _LEAST_S:
            bounded = lends and limit_permille < WHOLE_PERMILLE
            if bounded and self.limit.tokens_s <= _LEAST_S:
                at_s += (2 * _LEAST_S - self.limit.tokens_s) * WHOLE_PERMILLE / limit_permille
                self._fill(at_s, request_permille, limit_permille)
                continue
            entitled = self.request.tokens_s > _LEAST_S
            if not entitled and not lends:
                at_s += (2 * _LEAST_S - self.request.tokens_s) * WHOLE_PERMILLE / request_permille
                self._fill(at_s, request_permille, limit_permille)
                continue
            most_s = SEGMENT_S
            if alone:
                credit_s = min(CREDIT_S, self.request.tokens_s) if entitled else CREDIT_S
                credit_s = min(credit_s, self.limit.tokens_s) if bounded else credit_s
                most_s *= max(1, math.ceil(credit_s / SEGMENT_S - _LEAST_S))
            used_s = min(left_s, most_s)
            left_s -= used_s
            at_s += used_s
            # Charged at its end: a bucket that was full meanwhile has not filled.
            self._fill(at_s, request_permille, limit_permille)
            self.limit.tokens_s -= used_s
            if entitled:
                self.request.tokens_s -= used_s
            else:
                borrowed_s += used_s
        return at_s - now_s, borrowed_s

    def _fill(self, at_s: float, request_permille: int, limit_permille: int) -> None:
        self.request.fill(at_s, request_permille)
        self.limit.fill(at_s, limit_permille)
