"""A bounded correction of a function's surface by what its instances really take.

Device time is compared, not latency: latency contains the wait at the gate, which depends on what the neighbours do.
One factor a (function, device model): the median of observed over predicted device time of the newest batches.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from hasgpu_predictor.physical import PhysicalModel

OBSERVATIONS_MAX = 200
OBSERVATIONS_MIN = 20
"""Fewer batches than that correct nothing."""
FACTOR_MIN, FACTOR_MAX = 0.5, 2.0
DEAD_BAND = 0.10
"""A factor within 10 % of the one in force changes nothing, so that tables are not republished for noise."""


@dataclass(frozen=True, slots=True)
class ObservedBatch:
    """One executed batch."""

    batch: int
    sm_pct: int
    device_time_s: float


class Correction:
    """Collects observed batches of one function on one device model."""

    def __init__(self) -> None:
        self.factor = 1.0
        """In force."""
        self._observed: deque[ObservedBatch] = deque(maxlen=OBSERVATIONS_MAX)

    @property
    def observed_count(self) -> int:
        """Batches remembered, at most OBSERVATIONS_MAX."""
        return len(self._observed)

    def observe(self, batches: Iterable[ObservedBatch]) -> None:
        """Adds batches, oldest first; those without device time or size are left out."""
        self._observed.extend(b for b in batches if b.device_time_s > 0 and b.batch > 0 and b.sm_pct > 0)

    def ratio(self, physical: PhysicalModel) -> float | None:
        """Returns the median of observed over predicted device time; None with fewer than OBSERVATIONS_MIN batches."""
        if len(self._observed) < OBSERVATIONS_MIN:
            return None
        batch = np.array([b.batch for b in self._observed], float)
        sm = np.array([b.sm_pct for b in self._observed], float)
        observed_s = np.array([b.device_time_s for b in self._observed])
        return float(np.median(observed_s / physical.device_time_s(batch, sm)))

    def update(self, physical: PhysicalModel) -> bool:
        """Takes the clipped ratio as the factor when it is out of the dead band; tells whether the factor changed."""
        ratio = self.ratio(physical)
        if ratio is None:
            return False
        wanted = min(FACTOR_MAX, max(FACTOR_MIN, ratio))
        if abs(wanted / self.factor - 1.0) <= DEAD_BAND:
            return False
        self.factor = wanted
        return True
