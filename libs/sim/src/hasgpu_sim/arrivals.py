"""When requests arrive."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from random import Random


class Process(Enum):
    """How arrivals lie inside a stretch of constant rate."""

    EVEN = "even"
    """One every 1 / rate seconds (HAS-GPU's client)."""
    POISSON = "poisson"
    """Exponential gaps."""


@dataclass(frozen=True, slots=True)
class RateStep:
    """A stretch of constant rate."""

    duration_s: float
    rate_rps: float


HASGPU_RATES_RPS = (
    *(8, 5, 5, 5, 5, 5, 5, 5, 7, 15, 14, 5, 15, 15, 15, 13, 5, 6, 15, 5, 5, 5, 5, 5, 15),
    *(15, 15, 15, 10, 5, 8, 15, 9, 15, 15, 15, 14, 13, 15, 15, 13, 15, 15, 15, 15, 15, 15, 15, 12, 6),
)
"""The workload that HAS-GPU was measured on: 50 stages of 5 s, 2,690 requests."""


def hasgpu_steps(*, stage_s: float = 5.0, scale: float = 1.0) -> tuple[RateStep, ...]:
    """Returns HAS-GPU's workload, its rates multiplied by `scale`."""
    return tuple(RateStep(stage_s, rate * scale) for rate in HASGPU_RATES_RPS)


def arrival_times_s(steps: Iterable[RateStep], process: Process, rng: Random) -> Sequence[float]:
    """Returns the arrival times from 0 on, ascending; `rng` is used for Poisson only."""
    times: list[float] = []
    start_s = 0.0
    for step in steps:
        end_s = start_s + step.duration_s
        if step.rate_rps > 0 and process is Process.EVEN:
            count = round(step.duration_s * step.rate_rps)
            times += [start_s + i * step.duration_s / count for i in range(count)]
        elif step.rate_rps > 0:
            at_s = start_s + rng.expovariate(step.rate_rps)
            while at_s < end_s:
                times.append(at_s)
                at_s += rng.expovariate(step.rate_rps)
        start_s = end_s
    return times
