"""What the learnt model sees of a configuration: one extractor for training, serving and simulation.

Every feature is a float; logarithms are to base 2 (an octave), times are in seconds before the logarithm.

The per-function columns come from the function's own points (probes). To keep training honest, the rows of a
function are cut into folds and the features of a fold are computed from the other folds' points only: at serving
time too, a configuration asked about is not among the points. The target is the natural log of measured latency over
the physical estimate.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hasgpu_predictor.neighbours import KERNELS, Neighbours
from hasgpu_predictor.physical import WINDOW_S, Array, PhysicalModel, fit_physical
from hasgpu_predictor.profile import ProfilePoint

FEATURES: tuple[str, ...] = (
    "batch_log2",
    "sm_pct_log2",
    "quota_permille_log2",
    "batch_per_sm_log2",
    "physical_latency_s_log2",
    "device_time_s_log2",
    "quota_bound_s_log2",
    "quota_bound_per_device_time_log2",
    "windows_per_batch_log2",
    "segment_per_token_log2",
    "function_device_time_s_log2",
    "function_floor_share",
    "function_fixed_share",
    "function_exponent",
    "function_overhead_share",
    "function_points_log2",
    *(f"neighbours_{name}_log_residual" for name, *_ in KERNELS),
    *(f"neighbours_{name}_weight_log2" for name, *_ in KERNELS),
)
"""Names in column order. `segment_per_token`: the longest segment over a window's worth of quota; the `function_`
columns describe the fitted physical model at batch 1 on the whole device; the `neighbour_` columns the function's own
points around the configuration (natural log of measured over physical latency, and how near they are)."""


class FunctionView:
    """A function's points, its physical model, and what its points say about the model's misfit."""

    def __init__(self, points: Sequence[ProfilePoint], physical: PhysicalModel | None = None) -> None:
        self.physical = fit_physical(points) if physical is None else physical
        self._count = len(points)
        configurations = np.array([p.configuration for p in points], float).reshape(-1, 3)
        latency_s = np.array([p.latency_s for p in points], float)
        residuals = np.log(latency_s / self.physical.latency_s(*configurations.T))
        self._neighbours = Neighbours(configurations, residuals)

    def features(self, configurations: Array) -> Array:
        """Returns shape (n, len(FEATURES)) for configurations of shape (n, 3): batch, sm_pct, quota_permille."""
        batch, sm, quota = configurations.T
        physical, device = self.physical, self.physical.device
        device_time_s = physical.device_time_s(batch, sm)
        bound_s = physical.quota_bound_s(device_time_s, quota)
        latency_s = np.maximum(device_time_s + physical.overhead_s, bound_s)
        tokens_s = quota / 1e3 * WINDOW_S
        whole_s = float(device.formula_s(1.0, 100.0))
        misfit, weight = self._neighbours.around(configurations)
        ones = np.ones(len(batch))
        columns = (
            np.log2(batch),
            np.log2(sm),
            np.log2(quota),
            np.log2(batch / sm),
            np.log2(latency_s),
            np.log2(device_time_s),
            np.log2(bound_s),
            np.log2(bound_s / device_time_s),
            np.log2(device_time_s / tokens_s),
            np.log2(physical.longest_segment_s / tokens_s),
            np.log2(whole_s) * ones,
            device.floor_s / whole_s * ones,
            device.fixed_s / whole_s * ones,
            device.exponent * ones,
            physical.overhead_s / whole_s * ones,
            np.log2(1 + self._count) * ones,
            *misfit.T,
            *np.log2(weight + 1e-3).T,
        )
        return np.stack(columns, axis=1)


def training_rows(points: Sequence[ProfilePoint], *, folds_count: int, rng: np.random.Generator) -> tuple[Array, Array]:
    """Returns a function's training rows: features (n, len(FEATURES)) and targets (n,), each from the other folds.

    A function with a single point gives none (there is nothing to predict it from).
    """
    count = len(points)
    if count < 2:
        return np.zeros((0, len(FEATURES))), np.zeros(0)
    folds = rng.permutation(count) % min(folds_count, count)
    configurations = np.array([p.configuration for p in points], float)
    latency_s = np.array([p.latency_s for p in points])
    features, targets = np.zeros((count, len(FEATURES))), np.zeros(count)
    for fold in np.unique(folds):
        held = folds == fold
        view = FunctionView([p for p, out in zip(points, held, strict=True) if not out])
        features[held] = view.features(configurations[held])
        targets[held] = np.log(latency_s[held] / view.physical.latency_s(*configurations[held].T))
    return features, targets
