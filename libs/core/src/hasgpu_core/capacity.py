"""What a share buys: predicted latency and capacity of every configuration of one function on one device model."""

from __future__ import annotations

import bisect
from collections.abc import Iterable
from dataclasses import dataclass, field

TAIL_FACTOR = 3.0
"""The 95th percentile of an exponential tail is -ln(0.05) = 3.0 times its mean."""


def capacity_rps(*, batch: int, latency_s: float, slo_s: float) -> float:
    """Returns the rate in items per second at which the 95th percentile of wait and run stays inside the objective.

    The server runs batches of `batch` in `latency_s` each, back to back. At utilisation rho the mean wait of an
    M/D/1 queue is `rho * latency / (2 (1 - rho))`; its tail is taken as exponential. Solving
    `latency + TAIL_FACTOR * wait = slo` for rho gives `rho = x / (1 + x)` with
    `x = 2 (slo - latency) / (TAIL_FACTOR * latency)`. 0.0 when the latency alone misses the objective.

    Source: M/D/1 mean wait, Pollaczek-Khinchine formula; exponential tail, Kingman's heavy-traffic approximation.
    """
    if latency_s <= 0 or latency_s >= slo_s:
        return 0.0
    slack = 2.0 * (slo_s - latency_s) / (TAIL_FACTOR * latency_s)
    return slack / (1.0 + slack) * batch / latency_s


@dataclass(frozen=True, slots=True)
class CapacityPoint:
    """One configuration's prediction."""

    batch: int
    sm_pct: int
    quota_permille: int
    latency_s: float
    """Mean latency of back-to-back batches, gate wait included."""
    capacity_rps: float
    """Items (rows) per second inside the objective; 0: not at any rate."""


@dataclass(frozen=True, slots=True)
class CapacityTable:
    """capacity.<fn>.<device model> (STATE), by rapp. Points form a full grid over batch, SM share and quota."""

    function: str
    function_revision: int
    device_model: str
    version: int
    """Of the prediction model."""
    computed_unix_ns: int
    slo_ms: int
    points: tuple[CapacityPoint, ...]
    basis: str = "profiled"
    """"profiled", or "static" while no measurement of this function exists."""
    infeasible_reason: str = ""
    """Why no configuration meets the objective; empty when one does."""
    correction_permille: int = 1_000
    """Factor in force of the online correction, on latencies that the quota decides."""
    run_correction_permille: int = 1_000
    """The same, on the others."""
    drift: str = ""
    """In words while the profile no longer describes the function; a new one is being measured then."""
    spread_permille: int = 1_000
    """Of batches of one configuration: so many times its predicted latency is what has to fit into the objective. It is
    in the points' capacities, not in their latencies."""
    profiled_max_batch: int = 0
    """The largest batch that was measured; larger ones are extrapolated. 0: none was."""
    _index: dict[tuple[int, int, int], CapacityPoint] = field(init=False, repr=False, compare=False, hash=False)
    _batches: tuple[int, ...] = field(init=False, repr=False, compare=False)
    _sms: tuple[int, ...] = field(init=False, repr=False, compare=False)
    _quotas: tuple[int, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        put = object.__setattr__
        put(self, "_index", {(p.batch, p.sm_pct, p.quota_permille): p for p in self.points})
        put(self, "_batches", tuple(sorted({p.batch for p in self.points})))
        put(self, "_sms", tuple(sorted({p.sm_pct for p in self.points})))
        put(self, "_quotas", tuple(sorted({p.quota_permille for p in self.points})))

    @property
    def batches(self) -> tuple[int, ...]:
        """Batch sizes of the grid, ascending."""
        return self._batches

    @property
    def sm_pcts(self) -> tuple[int, ...]:
        """SM shares of the grid, ascending."""
        return self._sms

    @property
    def quotas_permille(self) -> tuple[int, ...]:
        """Quotas of the grid, ascending."""
        return self._quotas

    def latency_s(self, batch: int, sm_pct: int, quota_permille: int) -> float | None:
        """Returns the predicted latency, or None for an empty table.

        A batch between grid sizes is interpolated; SM shares and quotas are rounded down to the grid (pessimistic).
        """
        if not self.points:
            return None
        sm_pct = _floor(self._sms, sm_pct)
        quota = _floor(self._quotas, quota_permille)
        below = _floor(self._batches, batch)
        at = bisect.bisect_left(self._batches, batch)
        low = self._index[below, sm_pct, quota].latency_s
        scale = max(1.0, quota / quota_permille) if quota_permille < quota else 1.0
        if at >= len(self._batches) or self._batches[at] == below or batch <= below:
            return low * scale * max(1.0, batch / below)
        above = self._batches[at]
        high = self._index[above, sm_pct, quota].latency_s
        return scale * (low + (high - low) * (batch - below) / (above - below))

    def best(self, sm_pct: int, quota_permille: int) -> CapacityPoint | None:
        """Returns the batch size with the largest capacity at a share (rounded down to the grid); None: empty table."""
        if not self.points or quota_permille < self._quotas[0] or sm_pct < self._sms[0]:
            return None
        sm_pct = _floor(self._sms, sm_pct)
        quota = _floor(self._quotas, quota_permille)
        return max(
            (self._index[batch, sm_pct, quota] for batch in self._batches), key=lambda p: (p.capacity_rps, -p.batch)
        )

    def capacity_rps(self, sm_pct: int, quota_permille: int) -> float:
        """Returns the largest rate that a share sustains inside the objective; 0.0 for none or an empty table."""
        point = self.best(sm_pct, quota_permille)
        return point.capacity_rps if point else 0.0

    def feasible(self) -> Iterable[CapacityPoint]:
        """Yields the configurations that meet the objective at some rate."""
        return (p for p in self.points if p.capacity_rps > 0)


def _floor(grid: tuple[int, ...], value: int) -> int:
    """The largest grid value not above `value`, else the smallest."""
    return grid[max(0, bisect.bisect_right(grid, value) - 1)]
