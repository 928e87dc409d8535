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

PEAK_SHARE = 0.3
"""Part of the device that each function's highest rate should need. The two together then need somewhat more than the
half of the SMs in whose row both first instances start, so that the peak adds an instance elsewhere; the rest of the
device is for the services and the load generator, which run on the same cores."""
UTILISATION = 0.9
"""Part of its capacity that the scaler lets a rate fill (`ScalingSettings.target_utilisation`)."""
SLO_LATENCIES = 6.0
"""The objective, in latencies of one request at half the device and half its time."""
SLO_STEP_MS = 50
SMALLEST_SLO_MS = 400
"""On two busy cores a process may wait for some tens of milliseconds for a core, whatever its share of the device, and
the load trebles from one stage to the next, which the scaler answers in a second or two."""
MOST_PEAK_RPS = 60.0
"""A request costs the gateway and the load generator about as much as a small model; they need cores too."""


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


def plan_function(name: str, surface: Mapping[str, Any], *, slo_ms: int, replay_s: float) -> FunctionPlan:
    """Scales the published rates so that the highest needs the function's part of a device; raises UnavailableError."""
    share_rps = _capacity_rps(surface, PEAK_SHARE)
    if share_rps <= 0:
        raise UnavailableError(f"{name}: no share of this machine meets an objective of {slo_ms} ms")
    peak_rps = min(MOST_PEAK_RPS, UTILISATION * share_rps)
    factor = peak_rps / max(HASGPU_RATES_RPS)
    stage_s = replay_s / len(HASGPU_RATES_RPS)
    due_s = spread([rate * factor for rate in HASGPU_RATES_RPS], stage_s)
    latency_ms = _latency_us(surface, sm_pct=50, quota_permille=500) / 1e3
    notes = (
        f"Objective {slo_ms} ms: {SLO_LATENCIES:g} times the {latency_ms:.0f} ms predicted for one request at half the "
        f"device and half its time (at least {SMALLEST_SLO_MS} ms).",
        f"Load: the published rates times {factor:.3f}; their peak of {peak_rps:.1f} requests/s fills "
        f"{100 * peak_rps / share_rps:.0f} % of the capacity predicted for {100 * PEAK_SHARE:.0f} % of the device.",
    )
    return FunctionPlan(name, slo_ms, factor, due_s, notes)


def _capacity_rps(surface: Mapping[str, Any], share: float) -> float:
    """The largest capacity that costs at most a share of the device; 0.0 for none."""
    affordable = [
        point["capacity_millirps"]
        for point in surface["points"]
        if point["sm_pct"] / 100 * point["quota_permille"] / 1_000 <= share + 1e-9
    ]
    return max(affordable, default=0) / 1e3


def _latency_us(surface: Mapping[str, Any], *, sm_pct: int, quota_permille: int) -> int:
    """Of one request at the grid point nearest to a share."""
    points = [point for point in surface["points"] if point["batch"] == 1]
    if not points:
        raise UnavailableError("the predicted surface is empty")
    nearest = min(points, key=lambda p: (abs(p["sm_pct"] - sm_pct), abs(p["quota_permille"] - quota_permille)))
    return int(nearest["latency_us"])
