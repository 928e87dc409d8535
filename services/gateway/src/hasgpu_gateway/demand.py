"""What one gateway saw of one function's demand."""

from __future__ import annotations

import math
from collections import deque

from hasgpu_core.events import DemandEvent

_MAX_SAMPLES = 8_192


class DemandMeter:
    """Cumulative counters of a function, and the latencies of the last few seconds."""

    def __init__(self, function: str, *, window_s: float) -> None:
        self._function = function
        self._window_s = window_s
        self._samples: deque[tuple[float, float]] = deque(maxlen=_MAX_SAMPLES)
        self.arrived_count = 0
        """Valid requests, refused ones included."""
        self.arrived_items_count = 0
        """Their items (rows)."""
        self.ok_count = 0
        self.failed_count = 0
        """Took a place in line and got no answer: errors, timeouts, callers that went away."""
        self.expired_count = 0
        """Those of the failed whose time was up."""
        self.refused_count = 0
        """Turned away at once."""
        self.late_count = 0
        """Answered, but later than the objective."""

    def arrived(self, items_count: int) -> None:
        """Counts a valid request, before it is known whether it is taken."""
        self.arrived_count += 1
        self.arrived_items_count += items_count

    def failed(self, *, expired: bool) -> None:
        """Counts a request that took a place in line and got no answer."""
        self.failed_count += 1
        self.expired_count += expired

    def answered(self, now_s: float, latency_s: float, *, slo_s: float) -> None:
        """Counts an answer."""
        self.ok_count += 1
        if latency_s > slo_s:
            self.late_count += 1
        self._samples.append((now_s, latency_s))

    def event(
        self,
        *,
        gateway: str,
        epoch: str,
        now_s: float,
        observed_unix_ns: int,
        queued_count: int,
        queued_items_count: int,
        in_flight_count: int,
        oldest_wait_s: float,
    ) -> DemandEvent:
        """Returns the report of now; without an answer in the window its percentiles are None."""
        while self._samples and self._samples[0][0] < now_s - self._window_s:
            self._samples.popleft()
        latencies = sorted(latency for _, latency in self._samples)
        return DemandEvent(
            function=self._function,
            gateway=gateway,
            epoch=epoch,
            observed_unix_ns=observed_unix_ns,
            arrived_count=self.arrived_count,
            ok_count=self.ok_count,
            failed_count=self.failed_count,
            refused_count=self.refused_count,
            late_count=self.late_count,
            queued_count=queued_count,
            in_flight_count=in_flight_count,
            oldest_wait_ms=round(oldest_wait_s * 1e3),
            window_count=len(latencies),
            p50_ms=_percentile_ms(latencies, 0.50),
            p95_ms=_percentile_ms(latencies, 0.95),
            p99_ms=_percentile_ms(latencies, 0.99),
            arrived_items_count=self.arrived_items_count,
            queued_items_count=queued_items_count,
        )


def _percentile_ms(ascending_s: list[float], share: float) -> int | None:
    """The nearest-rank percentile, rounded up to a whole millisecond; None of nothing."""
    if not ascending_s:
        return None
    return math.ceil(ascending_s[max(0, math.ceil(share * len(ascending_s)) - 1)] * 1e3)
