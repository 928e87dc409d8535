"""How much load the demo sends, and which objective it sets: both from what the system predicts of this machine.

The published load is made for a V100; a laptop's two cores serve a fraction of it. So each function's rates are
multiplied by a factor, such that its peak needs a chosen part of the device, and its objective is a multiple of the
latency that the profile predicts. Both choices are made once, before the replay, and are printed and reported.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hasgpu_core.errors import UnavailableError

from hasgpu_cli.rates import HASGPU_RATES_RPS, spread

TOGETHER_SHARE = 0.48
"""Part of the device that the functions' highest rates should need together. With what the scaler keeps free on top,
that is somewhat more than the half of the SMs in whose row their first instances start, so that the peak adds an
instance elsewhere; the rest of the device is for the services and the load generator, which run on the same cores."""
MOST_SHARE = 0.32
"""Part of the device that one function's highest rate may need."""
UTILISATION = 0.9
"""Part of its capacity that the scaler lets a rate fill (`ScalingSettings.target_utilisation`)."""
SLO_LATENCIES = 6.0
"""The objective, in latencies of one request at half the device and half its time."""
SLO_STEP_MS = 50
SMALLEST_SLO_MS = 400
"""On two busy cores a process may wait for some tens of milliseconds for a core, whatever its share of the device, and
the load trebles from one stage to the next, which the scaler answers in a second or two."""
FULL_ROW = 0.95
"""The peak should need this much of the time of some row in which several first instances sit (with the steps of the
quotas, and the capacity that the scaler keeps free, that is more than all of it), ..."""
FULL_ROW_ALONE = 1.4
"""... or this much of a row with one, whose prediction may turn out too low by as much: quotas alone must not do."""
MOST_PEAK_RPS = 45.0
"""A request costs the gateway and the load generator about as much as a small model; they need cores too."""


MOST_FULL_ROW_RPS = 120.0
"""The same, for the function that has to fill its row."""


@dataclass(frozen=True, slots=True)
class FirstInstance:
    """Where a function's first instance sits."""

    row: tuple[str, str, int]
    """Node, GPU and row."""
    sm_pct: int


@dataclass(frozen=True, slots=True)
class FunctionPlan:
    """The load of one function."""

    name: str
    slo_ms: int
    factor: float
    due_s: Sequence[float]
    notes: tuple[str, ...]


def choose_slo_ms(surface: Mapping[str, Any]) -> int:
    """The objective: SLO_LATENCIES times the predicted latency at about half the SMs and half the time, rounded up."""
    latency_ms = _latency_us(surface, sm_pct=50, quota_permille=500) / 1e3
    return max(SMALLEST_SLO_MS, math.ceil(SLO_LATENCIES * latency_ms / SLO_STEP_MS) * SLO_STEP_MS)


def plan_functions(
    surfaces: Mapping[str, Mapping[str, Any]],
    *,
    slos_ms: Mapping[str, int],
    replay_s: float,
    first: Mapping[str, FirstInstance],
) -> list[FunctionPlan]:
    """Scales the published rates for each function so that the peaks together need their part of the device.

    The parts are equal, except that what a function can't use because MOST_PEAK_RPS bounds it goes to the others. Then
    the row for which least is missing is given so much load that it is full at the peak, if none is so far: the demo
    is to show both ways of scaling. Raises UnavailableError when a function's part meets its objective at no rate.
    """
    left_share = TOGETHER_SHARE
    peaks_rps: dict[str, float] = {}
    fastest_first = sorted(surfaces, key=lambda name: (-_capacity_rps(surfaces[name], MOST_SHARE), name))
    for index, name in enumerate(fastest_first):
        share = min(MOST_SHARE, left_share / (len(fastest_first) - index))
        capacity_rps = _capacity_rps(surfaces[name], share)
        if capacity_rps <= 0:
            raise UnavailableError(
                f"{name}: {100 * share:.0f} % of this device meets an objective of {slos_ms[name]} ms at no rate"
            )
        peaks_rps[name] = min(MOST_PEAK_RPS, UTILISATION * capacity_rps)
        left_share -= _share_for(surfaces[name], peaks_rps[name] / UTILISATION)
    peaks_rps |= _fill_a_row(surfaces, peaks_rps, first)
    return [
        _plan(name, surface, slo_ms=slos_ms[name], peak_rps=peaks_rps[name], replay_s=replay_s)
        for name, surface in surfaces.items()
    ]


def _fill_a_row(
    surfaces: Mapping[str, Mapping[str, Any]], peaks_rps: Mapping[str, float], first: Mapping[str, FirstInstance]
) -> dict[str, float]:
    """Returns the higher peaks that fill the row for which least is missing; none when one is full or none can be."""
    rows: dict[tuple[str, str, int], list[str]] = {}
    for name, instance in first.items():
        rows.setdefault(instance.row, []).append(name)
    choices: list[tuple[float, dict[str, float]]] = []
    for names in rows.values():
        sm_pct = first[names[0]].sm_pct
        whole_rps = {name: _capacity_rps(surfaces[name], sm_pct / 100, sm_pct=sm_pct) for name in names}
        if min(whole_rps.values()) <= 0:
            continue
        # Of the row's time; capacity grows a little faster than the quota, so this is on the low side.
        needed = sum(peaks_rps[name] / UTILISATION / whole_rps[name] for name in names)
        wanted = FULL_ROW if len(names) > 1 else FULL_ROW_ALONE
        if needed >= wanted:
            return {}
        higher = {name: peaks_rps[name] * wanted / needed for name in names}
        if max(higher.values()) <= MOST_FULL_ROW_RPS:
            choices.append(((wanted - needed) * sm_pct, higher))
    return min(choices, key=lambda choice: choice[0])[1] if choices else {}


def _plan(name: str, surface: Mapping[str, Any], *, slo_ms: int, peak_rps: float, replay_s: float) -> FunctionPlan:
    share = _share_for(surface, peak_rps / UTILISATION)
    factor = peak_rps / max(HASGPU_RATES_RPS)
    stage_s = replay_s / len(HASGPU_RATES_RPS)
    due_s = spread([rate * factor for rate in HASGPU_RATES_RPS], stage_s)
    latency_ms = _latency_us(surface, sm_pct=50, quota_permille=500) / 1e3
    notes = (
        f"Objective {slo_ms} ms: {SLO_LATENCIES:g} times the {latency_ms:.0f} ms predicted for one request at half the "
        f"device and half its time (at least {SMALLEST_SLO_MS} ms).",
        f"Load: the published rates times {factor:.3f}; their peak of {peak_rps:.1f} requests/s needs "
        f"{100 * share:.0f} % of the device, as predicted.",
    )
    return FunctionPlan(name, slo_ms, factor, due_s, notes)


def _share_for(surface: Mapping[str, Any], rate_rps: float) -> float:
    """The smallest share whose capacity covers a rate; that of the whole device when none does."""
    enough = [
        point["sm_pct"] / 100 * point["quota_permille"] / 1_000
        for point in surface["points"]
        if point["capacity_millirps"] / 1e3 >= rate_rps - 1e-6
    ]
    return min(enough, default=1.0)


def _capacity_rps(surface: Mapping[str, Any], share: float, *, sm_pct: int | None = None) -> float:
    """The largest capacity that costs at most a share of the device (at that SM share, if given); 0.0 for none."""
    affordable = [
        point["capacity_millirps"]
        for point in surface["points"]
        if point["sm_pct"] / 100 * point["quota_permille"] / 1_000 <= share + 1e-9 and sm_pct in (None, point["sm_pct"])
    ]
    return max(affordable, default=0) / 1e3


def _latency_us(surface: Mapping[str, Any], *, sm_pct: int, quota_permille: int) -> int:
    """Of one request at the grid point nearest to a share."""
    points = [point for point in surface["points"] if point["batch"] == 1]
    if not points:
        raise UnavailableError("the predicted surface is empty")
    nearest = min(points, key=lambda p: (abs(p["sm_pct"] - sm_pct), abs(p["quota_permille"] - quota_permille)))
    return int(nearest["latency_us"])
