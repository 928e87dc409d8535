"""From a latency surface to the capacity table that policies take as data."""

from __future__ import annotations

from collections.abc import Sequence

from hasgpu_core.capacity import CapacityPoint, CapacityTable, capacity_rps
from hasgpu_core.resources import PARKED_QUOTA_PERMILLE, WHOLE_PERMILLE

from hasgpu_predictor.physical import Array
from hasgpu_predictor.surface import Axes, Surface, batch_axis

SPREAD_FACTOR = 1.15
"""Margin for the spread of execution. Predictions are means, objectives are high percentiles: a batch is taken to run
15 % longer than its mean when the objective is checked, while throughput counts the mean. Queueing has a tail of its
own in `hasgpu_core.capacity.capacity_rps`. A fixed choice, until predictions carry intervals of their own."""
TABLE_QUOTA_STEP_PERMILLE = 50
LATENCY_MAX_S = 3_600.0
"""Longer predictions are cut to it: no objective reaches there, and the wire has 32 bits of microseconds."""


def table_axes(*, max_batch: int, sm_rungs_pct: Sequence[int]) -> Axes:
    """Returns the published grid: batches 1, 2, 4, ... and the limit, the device's rungs, and quotas.

    Quotas are the parked one (10 ‰) and 50 to 1000 ‰ by 50.
    """
    quotas = range(TABLE_QUOTA_STEP_PERMILLE, WHOLE_PERMILLE + 1, TABLE_QUOTA_STEP_PERMILLE)
    return Axes(batch_axis(max_batch), tuple(sorted(set(sm_rungs_pct))), (PARKED_QUOTA_PERMILLE, *quotas))


def surface_points(surface: Surface, axes: Axes, *, slo_ms: int) -> tuple[CapacityPoint, ...]:
    """Returns the predictions of a grid, batch-major, with what rate each sustains inside the objective.

    Raises InvalidError for axes that can't be.
    """
    axes.validate()
    configurations = axes.configurations()
    latencies_s = surface.at(*configurations.T).clip(max=LATENCY_MAX_S)
    return capacity_points(configurations, latencies_s, slo_ms=slo_ms)


def capacity_points(configurations: Array, latencies_s: Array, *, slo_ms: int) -> tuple[CapacityPoint, ...]:
    """Returns what rate each configuration sustains inside the objective, margin and queueing included.

    Args:
        configurations: Shape (n, 3): batch, sm_pct, quota_permille.
        latencies_s: Shape (n,), means.
    """
    slo_s = slo_ms / 1e3
    points = []
    for (batch, sm_pct, quota), latency_s in zip(
        configurations.astype(int).tolist(), latencies_s.tolist(), strict=True
    ):
        left_s = slo_s - (SPREAD_FACTOR - 1.0) * latency_s
        rate_rps = capacity_rps(batch=batch, latency_s=latency_s, slo_s=left_s)
        points.append(CapacityPoint(batch, sm_pct, quota, latency_s, rate_rps))
    return tuple(points)


def capacity_table(
    surface: Surface,
    *,
    function: str,
    function_revision: int,
    device_model: str,
    version: int,
    computed_unix_ns: int,
    slo_ms: int,
    axes: Axes,
) -> CapacityTable:
    """Returns the table of a function on a device model over a grid (see `table_axes`).

    A profiled table in which no configuration meets the objective says so in words; a static one is a guess and never
    calls an objective impossible.
    """
    points = surface_points(surface, axes, slo_ms=slo_ms)
    reason = ""
    if surface.basis == "profiled" and not any(point.capacity_rps > 0 for point in points):
        reason = _infeasible(points, slo_ms)
    return CapacityTable(
        function=function,
        function_revision=function_revision,
        device_model=device_model,
        version=version,
        computed_unix_ns=computed_unix_ns,
        slo_ms=slo_ms,
        points=points,
        basis=surface.basis,
        infeasible_reason=reason,
        spread_permille=round(SPREAD_FACTOR * 1e3),
    )


def _infeasible(points: Sequence[CapacityPoint], slo_ms: int) -> str:
    fastest = min(points, key=lambda p: (round(p.latency_s, 6), p.batch, -p.sm_pct, -p.quota_permille))
    takes_ms = fastest.latency_s * 1e3
    return (
        f"the fastest configuration, batch {fastest.batch} at {fastest.sm_pct} % SM and "
        f"{fastest.quota_permille / 10:g} % quota, takes {takes_ms:.3g} ms "
        f"({takes_ms * SPREAD_FACTOR:.3g} ms with the margin for spread); the objective is {slo_ms} ms"
    )
