"""Intervals from errors made on what a model had not seen (split conformal prediction, one quantile a regime).

Source: Lei et al., Distribution-free predictive inference for regression (2018); by regime: Vovk, Mondrian conformal
predictors (2005).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from hasgpu_predictor.operators import Array

BINS_COUNT = 8
ROWS_PER_BIN_MIN = 30
LEVEL = 0.90


@dataclass(frozen=True, slots=True)
class Intervals:
    """Bounds of log(measured / predicted) by a key that tells the regime."""

    edges: tuple[float, ...]
    """Between bins, ascending."""
    low: tuple[float, ...]
    """One more than edges."""
    high: tuple[float, ...]

    @classmethod
    def fit(cls, keys: Array, log_errors: Array) -> Intervals | None:
        """Fits to errors on held-out rows, both of shape (n,); None with fewer than ROWS_PER_BIN_MIN rows."""
        count = len(keys)
        if count < ROWS_PER_BIN_MIN:
            return None
        bins = max(1, min(BINS_COUNT, count // ROWS_PER_BIN_MIN))
        edges = np.unique(np.quantile(keys, np.arange(1, bins) / bins)) if bins > 1 else np.zeros(0)
        place = np.searchsorted(edges, keys, side="right")
        low, high = [], []
        for k in range(len(edges) + 1):
            here = log_errors[place == k]
            here = here if len(here) >= 10 else log_errors
            tail = (1 - LEVEL) / 2
            low.append(float(np.quantile(here, max(0.0, tail - tail / len(here)))))
            high.append(float(np.quantile(here, min(1.0, 1 - tail + tail / len(here)))))
        return cls(tuple(edges.tolist()), tuple(low), tuple(high))

    def at(self, keys: ArrayLike) -> tuple[Array, Array]:
        """Returns factors (low, high) on a prediction, shape of the keys; low is at most 1, high at least 1."""
        place = np.searchsorted(np.asarray(self.edges), np.asarray(keys, float), side="right")
        low, high = np.minimum(0.0, self.low), np.maximum(0.0, self.high)
        return np.exp(low[place]), np.exp(high[place])
