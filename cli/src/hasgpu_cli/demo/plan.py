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

PEAK_SHARES: Mapping[str, float] = {"minilm": 0.25, "resnet18": 0.25}
"""Part of a whole device's capacity that a function's highest rate needs; half is left to the services and the load
generator, which run on the same cores."""
SLO_LATENCIES = 6.0
"""The objective, in latencies of one request at half the device and half its time."""
SLO_STEP_MS = 50
SMALLEST_SLO_MS = 250
"""On two busy cores a process may wait for some tens of milliseconds for a core, whatever its share of the device."""


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
    whole_rps = max((point["capacity_millirps"] for point in surface["points"]), default=0) / 1e3
    if whole_rps <= 0:
        raise UnavailableError(f"{name}: no configuration meets an objective of {slo_ms} ms on this machine")
    peak_rps = PEAK_SHARES[name] * whole_rps
    factor = peak_rps / max(HASGPU_RATES_RPS)
    stage_s = replay_s / len(HASGPU_RATES_RPS)
    due_s = spread([rate * factor for rate in HASGPU_RATES_RPS], stage_s)
    latency_ms = _latency_us(surface, sm_pct=50, quota_permille=500) / 1e3
    notes = (
        f"Objective {slo_ms} ms: {SLO_LATENCIES:g} times the {latency_ms:.0f} ms predicted for one request at half the "
        f"device and half its time (at least {SMALLEST_SLO_MS} ms).",
        f"Load: the published rates times {factor:.3f}, so that the peak of {peak_rps:.1f} requests/s needs "
        f"{100 * PEAK_SHARES[name]:.0f} % of the {whole_rps:.1f} requests/s predicted for the whole device.",
    )
    return FunctionPlan(name, slo_ms, factor, due_s, notes)


def _latency_us(surface: Mapping[str, Any], *, sm_pct: int, quota_permille: int) -> int:
    """Of one request at the grid point nearest to a share."""
    points = [point for point in surface["points"] if point["batch"] == 1]
    if not points:
        raise UnavailableError("the predicted surface is empty")
    nearest = min(points, key=lambda p: (abs(p["sm_pct"] - sm_pct), abs(p["quota_permille"] - quota_permille)))
    return int(nearest["latency_us"])
