"""Which configurations to measure next, so that the error of a function's surface falls fastest for the seconds spent.

What is not yet known of a surface is taken for a Gaussian process on the natural log of true over estimated latency:
a level, slopes along the octaves of batch, SM share and quota that wander, a curve of the quota alone, local misfit. A
measurement shrinks it; which one shrinks the mean variance over the whole grid most for each second that it costs is
taken first, then the same again. Seconds are known before: they come from the estimate, and from how often the node
agent runs a batch for a point.

A smaller quota is planned only where the same batch and SM share are measured at the whole quota first: the agent needs
that to know when the bucket is empty.

Source: greedy choice of Gaussian observations, Krause, Singh, Guestrin (2008); for each unit of cost, Khuller, Moss,
Naor (1999).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from hasgpu_core.errors import InvalidError
from hasgpu_core.resources import WHOLE_PERMILLE
from numpy.typing import NDArray

from hasgpu_predictor.physical import WINDOW_S, Array, PhysicalModel
from hasgpu_predictor.profile import ProfilePoint

Cell = tuple[int, int, int]
"""(batch, sm_pct, quota_permille)."""

PROBE_QUOTAS_PERMILLE = (1_000, 700, 500, 300, 200, 100, 50)
CANDIDATES_MAX = 2_000
REPETITIONS = 12
"""Of a batch at the whole quota; the node agent's."""
REPETITIONS_MAX = 1_000
DRAINED_FACTOR = 4.0
"""The node agent's: so many times the repetitions that empty the bucket."""
OVERHEAD_S = 0.02
"""Of each point: the share takes effect, the request goes to the worker and back."""
POINT_BUDGET_SHARE = 1 / 16
"""A point is not repeated for longer than this part of the budget, but at least ..."""
REPETITIONS_MIN = 3

_LEVEL_KNOWN, _LEVEL_GUESSED = 0.10, 0.60
"""Standard deviations of the natural logarithm: of an estimate fitted to points, of a guess without any."""
_SLOPE_BATCH, _SLOPE_SM = 0.15, 0.15
"""For each octave."""
_WALK_BATCH, _WALK_SM = 0.15, 0.15
"""For the root of an octave: a slope does not stay what it was, so that the far ends have to be seen."""
_SLOPE_QUOTA_METERED, _SLOPE_QUOTA = 0.05, 0.30
"""Where the quota divides device time physics tells the slope; else it has to be measured."""
_CURVE_METERED, _CURVE, _CURVE_LENGTH = 0.04, 0.15, 1.0
_LOCAL, _LOCAL_LENGTH = 0.15, 1.5
_NOISE = 0.03


@dataclass(frozen=True, slots=True)
class Probe:
    """One measurement of a plan."""

    cell: Cell
    cost_s: float
    """Expected."""
    expected_error_pct: float
    """Root of the mean squared error over the grid that is expected once it is made."""


def probe_candidates(batches: Iterable[int], sm_rungs_pct: Iterable[int]) -> list[Cell]:
    """Returns the usual grid: batches and rungs at PROBE_QUOTAS_PERMILLE."""
    sms = sorted(set(sm_rungs_pct))
    return [(batch, sm, quota) for batch in sorted(set(batches)) for sm in sms for quota in PROBE_QUOTAS_PERMILLE]


def plan_probes(
    physical: PhysicalModel,
    candidates: Sequence[Cell],
    *,
    budget_s: float,
    known: Sequence[ProfilePoint] = (),
    slack: float = 1.0,
) -> list[Probe]:
    """Returns what to measure inside the budget, in order; equal arguments give equal plans.

    Args:
        physical: Fitted to `known`; a guess (`static_physical`) when nothing is.
        candidates: What can be measured, and the grid over which the error counts. Those measured already are not
            planned again.
        budget_s: The expected costs add up to it at most; the first probe is planned in any case.
        known: Measured before.
        slack: So many times the budget is planned, for when the estimate's costs turn out too high; the one who
            measures stops in time.

    Raises:
        InvalidError: No candidate, too many, one that can't be, or no budget.
    """
    _validate(candidates, budget_s)
    cells = list(dict.fromkeys(candidates))
    measured = {point.configuration for point in known}
    everything = cells + sorted(measured - set(cells))
    covariance = _prior(np.array(everything, float), physical)
    count = len(cells)
    place = {cell: index for index, cell in enumerate(everything)}
    for cell in sorted(measured):
        _condition(covariance, place[cell])
    costs = probe_costs_s(physical, cells, budget_s=budget_s)
    full = {cell[:2] for cell in measured if cell[2] == WHOLE_PERMILLE}
    offered = {cell[:2] for cell in cells if cell[2] == WHOLE_PERMILLE}
    open_ = np.array([cell not in measured for cell in cells])
    left_s, plan = slack * budget_s, list[Probe]()
    while open_.any():
        ready = [cell[2] == WHOLE_PERMILLE or cell[:2] in full or cell[:2] not in offered for cell in cells]
        chosen = _best(covariance, count, costs, open_ & np.array(ready), left_s if plan else math.inf)
        if chosen is None:
            break
        _condition(covariance, chosen)
        open_[chosen] = False
        left_s -= float(costs[chosen])
        if cells[chosen][2] == WHOLE_PERMILLE:
            full.add(cells[chosen][:2])
        error = math.sqrt(max(0.0, float(np.diagonal(covariance)[:count].mean())))
        plan.append(Probe(cells[chosen], float(costs[chosen]), 100 * error))
    return plan


def probe_costs_s(physical: PhysicalModel, cells: Sequence[Cell], *, budget_s: float) -> Array:
    """Returns what measuring each cell is expected to take, in seconds, shape (n,)."""
    batch, sm, quota = np.array(cells, float).T
    latency_s = physical.latency_s(batch, sm, quota)
    whole_s = physical.latency_s(batch, sm, np.full(len(batch), float(WHOLE_PERMILLE)))
    device_s = physical.device_time_s(batch, sm)
    share = quota / WHOLE_PERMILLE
    spent_s = device_s - share * np.maximum(whole_s, device_s)
    drain = np.where(
        (quota < WHOLE_PERMILLE) & (spent_s > 0), DRAINED_FACTOR * share * WINDOW_S / np.maximum(spent_s, 1e-6), 0.0
    )
    repetitions = np.minimum(REPETITIONS_MAX, REPETITIONS + np.ceil(drain))
    longest_s = np.maximum(REPETITIONS_MIN * latency_s, POINT_BUDGET_SHARE * budget_s)
    return np.asarray(OVERHEAD_S + np.minimum(repetitions * latency_s, longest_s))


def _validate(candidates: Sequence[Cell], budget_s: float) -> None:
    if not 1 <= len(candidates) <= CANDIDATES_MAX:
        raise InvalidError("candidates", expected=f"1..{CANDIDATES_MAX} of them", got=str(len(candidates)))
    if not (math.isfinite(budget_s) and budget_s > 0):
        raise InvalidError("budget", expected="above 0 s", got=f"{budget_s} s")
    for cell in candidates:
        for name, value, high in zip(("batch", "sm_pct", "quota_permille"), cell, (4_096, 100, 1_000), strict=True):
            if not 1 <= value <= high:
                raise InvalidError(f"candidate.{name}", expected=f"1..{high}", got=str(value))


def _prior(cells: Array, physical: PhysicalModel) -> Array:
    """Covariance of the natural log of true over estimated latency, shape (n, n)."""
    octaves = np.log2(cells / np.array([1.0, 100.0, float(WHOLE_PERMILLE)]))
    level = _LEVEL_KNOWN if physical.points_count else _LEVEL_GUESSED
    metered = physical.device_metered
    slopes = np.array([_SLOPE_BATCH, _SLOPE_SM, _SLOPE_QUOTA_METERED if metered else _SLOPE_QUOTA])
    scaled = octaves * slopes
    apart = np.abs(octaves[:, None, :] - octaves[None, :, :])
    curve = _CURVE_METERED if metered else _CURVE
    batch, shrunk = octaves[:, 0], -octaves[:, 1]
    return np.asarray(
        level**2
        + scaled @ scaled.T
        + _WALK_BATCH**2 * np.minimum(batch[:, None], batch[None, :])
        + _WALK_SM**2 * np.minimum(shrunk[:, None], shrunk[None, :])
        + curve**2 * np.exp(-apart[:, :, 2] / _CURVE_LENGTH)
        + _LOCAL**2 * np.exp(-apart.sum(2) / _LOCAL_LENGTH)
    )


def _condition(covariance: Array, index: int) -> None:
    """Takes a measurement in, in place."""
    column = covariance[:, index].copy()
    covariance -= np.outer(column, column) / (column[index] + _NOISE**2)


def _best(covariance: Array, count: int, costs: Array, allowed: NDArray[np.bool_], left_s: float) -> int | None:
    """The candidate whose measurement takes most variance off the grid for each second; None when none fits."""
    allowed = allowed & (costs <= left_s)
    if not allowed.any():
        return None
    grid = covariance[:count, :count]
    gains = (grid**2).sum(0) / (np.diagonal(grid) + _NOISE**2) / count
    return int(np.argmax(np.where(allowed, gains / costs, -1.0)))
