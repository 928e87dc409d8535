"""What a device was promised and what it was used: the integrals behind `device.<node>.<gpu>`."""

from __future__ import annotations

from collections.abc import Iterable

from hasgpu_core.resources import WHOLE_PCT, WHOLE_PERMILLE

from hasgpu_node_agent.row_guard import WorkerKey


class AllocationMeter:
    """Integral of SM share times request over time: the cost of what is reserved, used or not."""

    def __init__(self, now_s: float) -> None:
        self._at_s = now_s
        self._share = 0.0
        self._total_gpu_s = 0.0

    def accrue(self, share: float, now_s: float) -> None:
        """Counts the share reserved until now; `share` (0..1 of the GPU) is reserved from now on."""
        self._total_gpu_s += self._share * max(0.0, now_s - self._at_s)
        self._at_s = now_s
        self._share = share

    @property
    def gpu_ns(self) -> int:
        """GPU-nanoseconds until the last `accrue`."""
        return round(self._total_gpu_s * 1e9)


class BusyMeter:
    """Share of a period for which the device was held, each worker weighted by its SM share."""

    def __init__(self, now_s: float) -> None:
        self._at_s = now_s
        self._used_ns: dict[WorkerKey, int] = {}

    def take(self, workers: Iterable[tuple[WorkerKey, int, int]], now_s: float) -> int:
        """Returns per mille of the time since the last call; 0 when none has passed.

        Args:
            workers: Key, SM share in per cent and cumulative device time in ns of each. The first time that a worker
                is seen, what it used before does not count.
            now_s: Monotonic.
        """
        period_ns = (now_s - self._at_s) * 1e9
        held_ns = 0.0
        seen: dict[WorkerKey, int] = {}
        for key, sm_pct, used_ns in workers:
            held_ns += max(0, used_ns - self._used_ns.get(key, used_ns)) * sm_pct / WHOLE_PCT
            seen[key] = used_ns
        self._used_ns = seen
        self._at_s = now_s
        return round(held_ns / period_ns * WHOLE_PERMILLE) if period_ns > 0 else 0
