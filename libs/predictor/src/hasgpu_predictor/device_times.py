"""Device time of a model that was never run: rooflines fitted to other models, and a Gaussian process on their misfit.

1. The time is a non-negative combination of roofline columns (`operators.roofline_matrix`), fitted to the places
   (batch, SM share) of the training models where the device, not the host, decides the latency.
2. What that misses, as a natural logarithm, is a Gaussian process over (model, batch, SM share): models of like
   composition miss alike (kernel on `Workload.summary`), and one model misses alike at neighbouring places. Probes of
   the model itself are further observations, so one device-bound probe moves the whole surface.

Sources: non-negative least squares, Lawson and Hanson (1974); Gaussian process regression, Rasmussen and Williams
(2006), algorithm 2.1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hasgpu_predictor.operators import COLUMNS, SUMMARY, Array, DataSheet, Workload, roofline_matrix

FLOOR_MS = 1e-3
PLACES_PER_MODEL_MAX = 20
"""Device-bound places of one training model in the process: more of one surface add nothing."""
_LENGTH_MODEL, _LENGTH_BATCH, _LENGTH_SM = 0.5, 0.75, 1.0
_VARIANCES = (0.0075, 0.04, 0.0025, 0.02)
"""Of the logarithm: alike models (all places, place by place), the model itself (all places, place by place). Found by
coordinate search, errors cross-validated over models."""
_NOISE_LOG = 0.02
_REPEATS = 4
"""Of the folds that the misfit is computed in: a model's misfit depends on who shares its fold."""
_SCALES: dict[str, float] = {
    "intensity_log2": 0.69,
    "pointwise_flops_share": 2.0,
    "spatial_flops_share": 2.0,
    "grouped_flops_share": 2.0,
    "linear_flops_share": 2.0,
    "depthwise_bytes_share": 3.0,
    "cat_bytes_share": 3.0,
    "layernorm_bytes_share": 3.0,
    "grouped_bytes_share": 3.0,
    "group_width_log2": 0.5,
    "flops_log2": 0.35,
    "columns_log2": 0.69,
    "launches_log2": 0.35,
}
"""Of the summary in the kernel of likeness."""
SUMMARY_SCALE = np.array([_SCALES.get(name, 0.0) for name in SUMMARY])
"""Shape (len(SUMMARY),): by which likeness between models is told."""


@dataclass(frozen=True, slots=True)
class Observation:
    """A device-bound measurement."""

    batch: float
    sm_pct: float
    log_ms: float
    noise_log: float
    """Standard deviation of the natural logarithm."""


@dataclass(frozen=True, slots=True)
class Places:
    """Device-bound places of training models; arrays of equal length."""

    model: NDArray[np.int64]
    batch: Array
    sm_pct: Array
    log_ms: Array


@dataclass(frozen=True, slots=True)
class DeviceTimeModel:
    """Fitted to training models."""

    sheet: DataSheet
    theta: Array
    """Shape (len(COLUMNS),): weights of the columns, 0 or more."""
    points: Array
    """Shape (n, 2 + len(SUMMARY)): log2 batch, log2 SM share, summary of the places in the process."""
    groups: NDArray[np.int64]
    """Shape (n,): the model of each."""
    residuals: Array
    """Shape (n,): log of measured over the rooflines' time there, each from a fit without its model's fold."""
    solved: Array
    """Shape (n,): inverse covariance times residuals."""
    factor: Array
    """Shape (n, n): lower Cholesky factor."""

    def base_log_ms(self, workload: Workload, batch: Array, sm_pct: Array) -> Array:
        """Log of the rooflines' time, shape (n,)."""
        return _log_times(roofline_matrix(workload, self.sheet, batch, sm_pct), self.theta)

    def at(
        self, workload: Workload, batch: Array, sm_pct: Array, observations: Sequence[Observation] = ()
    ) -> tuple[Array, Array]:
        """Returns natural log of the device time in ms and its standard deviation, each of shape (n,)."""
        count = len(batch)
        b = np.concatenate([batch, [o.batch for o in observations]])
        s = np.concatenate([sm_pct, [o.sm_pct for o in observations]])
        asked = np.column_stack([np.log2(b), np.log2(s), np.broadcast_to(workload.summary, (len(b), len(SUMMARY)))])
        base = self.base_log_ms(workload, b, s)
        cross = _covariance(asked, self.points, same=None)
        mean = base + (cross @ self.solved if len(self.solved) else 0.0)
        covariance = _covariance(asked, asked, same=True)
        if len(self.solved):
            half = _forward(self.factor, cross.T)
            covariance = covariance - half.T @ half
        if observations:
            noise = np.diag([o.noise_log**2 + _NOISE_LOG**2 for o in observations])
            gain = np.linalg.solve(covariance[count:, count:] + noise, covariance[count:]).T
            told = np.array([o.log_ms for o in observations])
            update = gain @ (told - mean[count:])
            covariance = covariance - gain @ covariance[count:]
            mean = mean + update
        spread = np.sqrt(np.maximum(0.0, np.diag(covariance)))
        return mean[:count], spread[:count]


def fit_device_times(
    workloads: Sequence[Workload],
    places: Places,
    sheet: DataSheet,
    *,
    folds_count: int,
    rng: np.random.Generator,
    sums: Array | None = None,
) -> DeviceTimeModel:
    """Fits rooflines and process. Few or no places give the plain rooflines (each column at its face value).

    Args:
        workloads: Of the training models.
        places: Theirs.
        sheet: Of the device.
        folds_count: Of models, for the misfit that the process learns.
        rng: Draws the folds.
        sums: Shape (k, len(COLUMNS)): only these sums of columns are weighted, for when the models are too few to tell
            all columns apart; None: each column by itself.
    """
    matrices = np.zeros((len(places.batch), len(COLUMNS)))
    for model in np.unique(places.model):
        at = places.model == model
        matrices[at] = roofline_matrix(workloads[model], sheet, places.batch[at], places.sm_pct[at])
    theta = _fit_columns(matrices, places, sums)
    residuals = np.zeros(len(places.batch))
    for _ in range(_REPEATS):
        fold_of = rng.permutation(len(workloads)) % folds_count
        for fold in range(folds_count):
            held = np.isin(places.model, np.flatnonzero(fold_of == fold))
            if held.any() and (~held).any():
                kept = Places(*(getattr(places, name)[~held] for name in ("model", "batch", "sm_pct", "log_ms")))
                times = _log_times(matrices[held], _fit_columns(matrices[~held], kept, sums))
                residuals[held] += (places.log_ms[held] - times) / _REPEATS
    chosen: list[int] = []
    for model in np.unique(places.model):
        rows = np.flatnonzero(places.model == model)
        chosen += list(rng.permutation(rows)[:PLACES_PER_MODEL_MAX])
    take = np.sort(np.array(chosen, int))
    points = np.column_stack(
        [
            np.log2(places.batch[take]),
            np.log2(places.sm_pct[take]),
            np.array([workloads[m].summary for m in places.model[take]]).reshape(len(take), len(SUMMARY)),
        ]
    )
    groups = places.model[take]
    covariance = _covariance(points, points, same=groups[:, None] == groups[None, :])
    factor = np.linalg.cholesky(covariance + _NOISE_LOG**2 * np.eye(len(take))) if len(take) else np.zeros((0, 0))
    solved = np.linalg.solve(factor.T, np.linalg.solve(factor, residuals[take])) if len(take) else np.zeros(0)
    return DeviceTimeModel(sheet, theta, points, groups, residuals[take], solved, np.asarray(factor, float))


def _fit_columns(matrix: Array, places: Places, sums: Array | None = None) -> Array:
    """Weighted non-negative least squares of relative errors, models with many places weigh little more than others."""
    from scipy.optimize import nnls  # type: ignore[import-untyped]  # has no types

    if sums is not None:
        return np.asarray(_fit_columns(matrix @ sums.T, places) @ sums)

    if len(matrix) < 10 and matrix.shape[1] == len(COLUMNS):
        face = np.zeros(len(COLUMNS))
        names = ("launches", "pointwise_flops", "spatial_flops", "linear_flops", "depthwise_memory", "element_memory",
                 "grouped_memory", "layernorm_memory", "pool_memory", "cat_memory")  # fmt: skip
        face[[COLUMNS.index(name) for name in names]] = 1.0
        return face
    _, inverse, counts = np.unique(places.model, return_inverse=True, return_counts=True)
    measured = np.exp(places.log_ms)
    weight = 1.0 / measured / counts[inverse] ** 0.35
    theta, _ = nnls(matrix * weight[:, None], measured * weight)
    off = np.abs(_log_times(matrix, theta) - places.log_ms)
    weight = weight / np.maximum(1.0, off / 0.15)
    theta, _ = nnls(matrix * weight[:, None], measured * weight)
    return np.asarray(theta)


def _log_times(matrix: Array, theta: Array) -> Array:
    return np.log(np.maximum(FLOOR_MS, matrix @ theta))


def _covariance(a: Array, b: Array, *, same: bool | NDArray[np.bool_] | None) -> Array:
    """Between places of shape (n, 2 + len(SUMMARY)); `same`: which pairs are of one model (None: none)."""
    likes_all, likes_place, own_all, own_place = _VARIANCES
    za, zb = a[:, 2:] * SUMMARY_SCALE, b[:, 2:] * SUMMARY_SCALE
    apart = (za**2).sum(1)[:, None] + (zb**2).sum(1)[None, :] - 2 * za @ zb.T
    alike = np.exp(-np.maximum(apart, 0.0) / 2 / _LENGTH_MODEL**2)
    steps = ((a[:, 0][:, None] - b[:, 0][None, :]) / _LENGTH_BATCH) ** 2
    steps = steps + ((a[:, 1][:, None] - b[:, 1][None, :]) / _LENGTH_SM) ** 2
    near = np.exp(-steps / 2)
    total = alike * (likes_all + likes_place * near)
    if same is None:
        return np.asarray(total)
    return np.asarray(total + np.asarray(same, float) * (own_all + own_place * near))


def _forward(factor: Array, right: Array) -> Array:
    from scipy.linalg import solve_triangular  # type: ignore[import-untyped]  # has no types

    return np.asarray(solve_triangular(factor, right, lower=True, check_finite=False))
