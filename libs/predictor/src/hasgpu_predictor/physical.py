"""A physical estimate of device time and latency, fitted to a function's points. The learnt model corrects it.

**Device time** of a batch of b on an SM share s (per cent):

    d(b, s) = floor + (fixed + per_item * b) * (100 / s) ** exponent

`floor` is what no SM share speeds up (launching, one-threaded parts), `fixed` and `per_item` the affine growth with
the batch, `exponent` (0..1.25) how well the work scales with SMs (Amdahl-like; 1: perfectly). All terms are
non-negative, so d never grows with SMs and never falls with the batch. What the formula misses at the measured
(b, s) is spread over their neighbourhood (inverse squared distance in octaves).

**Gate.** An instance's bucket is refilled at its quota q and holds at most one window's worth (q * 40 ms); overuse is
carried as debt, a segment takes at most 5 ms. Batches that run back to back never find a full bucket, and debt loses
nothing in the long run, so the mean latency is the time that the refill takes, or the undisturbed run if longer:

    latency(b, s, q) = max(d + overhead, d / q)

A batch that comes after a rest of a window runs its first q * 40 ms at full speed; back-to-back figures are on the
safe side for it. The last segment overshoots the bucket by at most 5 ms, which the next batch pays.

**Points without device time** (the V100 profiles: another system's gate, which meters launching on the host instead):
d is then the latency at the largest quota, and a quota bounds the latency from below by a curve read from the points
at each quota, whatever the device time: `latency = max(d, curve(q))`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations

import numpy as np
from hasgpu_core.errors import InvalidError
from numpy.typing import ArrayLike, NDArray

from hasgpu_predictor.profile import ProfilePoint

Array = NDArray[np.float64]

WINDOW_S = 0.040
"""Over which the gate enforces a quota."""
SEGMENT_S = 0.005
"""Longest device time between two gate passes of a model that can be cut."""

PRIOR_EXPONENT = 0.8
PRIOR_FIXED_SHARE = 0.25
"""Of the device time at batch 1, when nothing tells the fixed from the per-item part."""
PRIOR_WEIGHT = 0.05
"""Of a prior row against a measured one: decides only where the points say nothing (one batch size, one SM share)."""
_EXPONENTS = np.arange(0.0, 1.2501, 0.05)
_UNDISTURBED_QUANTILE = 0.2
"""Of the latencies beyond device time: taken for that of a host that does nothing else."""
_NEAR = 0.02
"""Squared octaves within which a measured neighbour counts as the place itself."""


@dataclass(frozen=True, slots=True)
class DeviceTime:
    """d(b, s): parameters of the formula and its misfit at the measured places."""

    floor_s: float
    fixed_s: float
    per_item_s: float
    exponent: float
    node_places: Array = field(default_factory=lambda: np.zeros((0, 2)), repr=False)
    """Measured places, shape (n, 2): log2 batch, log2 SM share."""
    node_log_ratios: Array = field(default_factory=lambda: np.zeros(0), repr=False)
    """Natural log of measured over formula there, shape (n,)."""

    def formula_s(self, batch: ArrayLike, sm_pct: ArrayLike) -> Array:
        """The formula alone, in seconds; broadcasts."""
        b, s = np.asarray(batch, float), np.asarray(sm_pct, float)
        return np.asarray(self.floor_s + (self.fixed_s + self.per_item_s * b) * (100.0 / s) ** self.exponent)

    def at(self, batch: ArrayLike, sm_pct: ArrayLike) -> Array:
        """Formula and neighbourhood misfit, in seconds; broadcasts."""
        base = self.formula_s(batch, sm_pct)
        if not len(self.node_log_ratios):
            return base
        b, s = np.broadcast_arrays(np.asarray(batch, float), np.asarray(sm_pct, float))
        places = np.stack([np.log2(b).ravel(), np.log2(s).ravel()], axis=1)
        misfit, _ = neighbourhood(places, self.node_places, self.node_log_ratios)
        return np.asarray(base * np.exp(misfit).reshape(base.shape))


@dataclass(frozen=True, slots=True)
class PhysicalModel:
    """Device time and latency of one function on one device model."""

    device: DeviceTime
    overhead_s: float
    """Latency beyond the device time at a full quota (host work between batches)."""
    curve_quotas: Array = field(default_factory=lambda: np.zeros(0), repr=False)
    """Quotas (0..1) of the host-metered curve, ascending; empty: device time is metered."""
    curve_s: Array = field(default_factory=lambda: np.zeros(0), repr=False)
    longest_segment_s: float = SEGMENT_S
    points_count: int = 0
    """0: static."""

    @property
    def device_metered(self) -> bool:
        """Whether a quota divides device time."""
        return not len(self.curve_quotas)

    def device_time_s(self, batch: ArrayLike, sm_pct: ArrayLike) -> Array:
        """Device time of a batch, in seconds; broadcasts."""
        return self.device.at(batch, sm_pct)

    def quota_bound_s(self, device_time_s: ArrayLike, quota_permille: ArrayLike) -> Array:
        """Latency that the quota forces, however fast the device, in seconds; broadcasts."""
        quota = np.asarray(quota_permille, float) / 1e3
        if self.device_metered:
            return np.asarray(np.asarray(device_time_s, float) / quota)
        return _curve_at(self.curve_quotas, self.curve_s, quota)

    def latency_s(self, batch: ArrayLike, sm_pct: ArrayLike, quota_permille: ArrayLike) -> Array:
        """Mean latency of back-to-back batches, in seconds; broadcasts."""
        device_time_s = self.device_time_s(batch, sm_pct)
        return np.maximum(device_time_s + self.overhead_s, self.quota_bound_s(device_time_s, quota_permille))


def neighbourhood(places: Array, node_places: Array, node_values: Array) -> tuple[Array, Array]:
    """Returns the inverse-squared-distance mean of the nodes' values at `places`, and its total weight.

    Args:
        places: shape (n, k). node_places: shape (m, k), m >= 1. node_values: shape (m,).

    Returns:
        Two arrays of shape (n,). Far from all nodes the mean shrinks to 0.
    """
    squares = (places**2).sum(1)[:, None] + (node_places**2).sum(1)[None, :] - 2.0 * places @ node_places.T
    weights = 1.0 / (np.maximum(squares, 0.0) + _NEAR) ** 1.5
    total = weights.sum(1)
    return weights @ node_values / (total + 1.0), total


def fit_physical(points: Sequence[ProfilePoint]) -> PhysicalModel:
    """Fits the estimate to at least one point; raises InvalidError for none."""
    if not points:
        raise InvalidError("points", expected="at least one", got="none")
    batch = np.array([p.batch for p in points], float)
    sm = np.array([p.sm_pct for p in points], float)
    quota = np.array([p.quota_permille for p in points], float) / 1e3
    latency_s = np.array([p.latency_s for p in points])
    measured_s = np.array([p.device_time_s for p in points])
    longest_s = max(p.longest_segment_s for p in points) or SEGMENT_S
    metered = measured_s > 0
    if metered.any():
        device = _fit_device(batch[metered], sm[metered], measured_s[metered])
        return PhysicalModel(
            device, _overhead_s(latency_s, measured_s, quota), longest_segment_s=longest_s, points_count=len(points)
        )
    undisturbed = _undisturbed(batch, sm, quota)
    device = _fit_device(batch[undisturbed], sm[undisturbed], latency_s[undisturbed])
    quotas, curve_s = _read_curve(batch, sm, quota, latency_s)
    return PhysicalModel(device, 0.0, quotas, curve_s, longest_s, len(points))


def _overhead_s(latency_s: Array, measured_s: Array, quota: Array) -> float:
    """What latency has beyond device time where the gate hardly waits; unmeasured: a twentieth of device time.

    A low quantile: work of others on the host only ever adds to it, at times a hundredfold, and so moves a median of
    few points to where no batch is on a quiet host. (What it adds while the function serves is the correction's.)
    """
    free = (measured_s > 0) & (quota >= 0.95)
    if free.any():
        return float(max(0.0, np.quantile(latency_s[free] - measured_s[free], _UNDISTURBED_QUANTILE)))
    return float(0.05 * np.median(measured_s[measured_s > 0]))


def _undisturbed(batch: Array, sm: Array, quota: Array) -> NDArray[np.bool_]:
    """Marks the points of each (batch, SM) whose quota disturbs least: from 70 % up, else its largest."""
    best: dict[tuple[float, float], float] = {}
    for place, q in zip(zip(batch, sm, strict=True), quota, strict=True):
        best[place] = max(best.get(place, 0.0), q)
    return np.array(
        [q >= min(0.7, best[place]) for place, q in zip(zip(batch, sm, strict=True), quota, strict=True)], bool
    )


def _fit_device(batch: Array, sm: Array, device_time_s: Array) -> DeviceTime:
    """Least squares of relative errors over the exponents, with weak prior rows; then the misfit at each place."""
    prior_b = np.array([1.0, 8.0, 1.0, 8.0])
    prior_s = np.array([100.0, 100.0, 25.0, 25.0])
    shape = _prior_shape(batch, sm)
    scale = float(np.exp(np.mean(np.log(device_time_s / shape))))
    prior_d = scale * _prior_shape(prior_b, prior_s)
    b, s = np.concatenate([batch, prior_b]), np.concatenate([sm, prior_s])
    d = np.concatenate([device_time_s, prior_d])
    weight = np.concatenate([np.ones(len(batch)), np.full(4, PRIOR_WEIGHT)]) / d
    best: tuple[float, Array, float] | None = None
    for exponent in _EXPONENTS:
        speed = (100.0 / s) ** exponent
        columns = np.stack([np.ones_like(b), speed, b * speed], axis=1) * weight[:, None]
        error, terms = _nonnegative(columns, d * weight)
        if best is None or error < best[0] - 1e-12:
            best = error, terms, float(exponent)
    assert best is not None
    _, terms, exponent_ = best
    fitted = DeviceTime(float(terms[0]), float(terms[1]), float(terms[2]), exponent_)
    ratios: dict[tuple[float, float], list[float]] = {}
    logs = np.log(device_time_s / fitted.formula_s(batch, sm))
    for place, ratio in zip(zip(batch, sm, strict=True), logs, strict=True):
        ratios.setdefault((float(place[0]), float(place[1])), []).append(float(ratio))
    places = np.log2(np.array(list(ratios), float))
    return DeviceTime(
        fitted.floor_s,
        fitted.fixed_s,
        fitted.per_item_s,
        exponent_,
        places,
        np.array([float(np.median(values)) for values in ratios.values()]),
    )


def _prior_shape(batch: Array, sm: Array) -> Array:
    """Device time of the prior, 1.0 at batch 1 on all SMs."""
    return (PRIOR_FIXED_SHARE + (1 - PRIOR_FIXED_SHARE) * batch) * (100.0 / sm) ** PRIOR_EXPONENT


def _nonnegative(columns: Array, target: Array) -> tuple[float, Array]:
    """Least squares with non-negative terms, exactly, by trying every set of active columns (there are three)."""
    count = columns.shape[1]
    gram, moment, power = columns.T @ columns, columns.T @ target, float(target @ target)
    best_error, best = power, np.zeros(count)
    for size in range(1, count + 1):
        for active in combinations(range(count), size):
            chosen = list(active)
            terms, *_ = np.linalg.lstsq(gram[np.ix_(chosen, chosen)], moment[chosen], rcond=None)
            if (terms < 0).any():
                continue
            error = power - 2 * float(terms @ moment[chosen]) + float(terms @ gram[np.ix_(chosen, chosen)] @ terms)
            if error < best_error:
                best_error, best = error, np.zeros(count)
                best[chosen] = terms
    return best_error, best


def _read_curve(batch: Array, sm: Array, quota: Array, latency_s: Array) -> tuple[Array, Array]:
    """At each quota the median latency of the fastest third of its configurations; made non-increasing."""
    quotas = np.unique(quota)
    curve = []
    work = batch / sm
    for q in quotas:
        here = quota == q
        light = here & (work <= np.quantile(work[here], 1 / 3))
        curve.append(float(np.median(latency_s[light])))
    return quotas, np.maximum.accumulate(np.array(curve)[::-1])[::-1].copy()


def _curve_at(quotas: Array, curve_s: Array, quota: Array) -> Array:
    """Interpolates log latency over log quota; below the smallest measured quota it grows as 1 / quota."""
    inside = np.exp(np.interp(np.log(quota), np.log(quotas), np.log(curve_s)))
    return np.asarray(inside * np.maximum(1.0, quotas[0] / quota))


STATIC_CPU_FIXED_S = 0.015
STATIC_CPU_S_PER_MIB = 0.0006
STATIC_GPU_FIXED_S = 0.004
STATIC_GPU_S_PER_MIB = 0.00002
"""Device time at batch 1 on a whole device: a fixed part and one that grows with the weights. Orders of magnitude
only: they serve until the first measurement."""


def static_physical(*, artifact_bytes: int, backend: str, slo_s: float) -> PhysicalModel:
    """Guesses a function of which nothing was measured, from the size of its artifact (seconds, see the constants).

    A guess must not forbid a function to run, and so to be measured: batch 1 on a whole device is taken to need at
    most a third of the objective.
    """
    mib = artifact_bytes / 2**20
    if backend == "cpu":
        whole_s = STATIC_CPU_FIXED_S + STATIC_CPU_S_PER_MIB * mib
    else:
        whole_s = STATIC_GPU_FIXED_S + STATIC_GPU_S_PER_MIB * mib
    whole_s = min(whole_s, slo_s / 3)
    fixed_s, per_item_s = PRIOR_FIXED_SHARE * whole_s, (1 - PRIOR_FIXED_SHARE) * whole_s
    return PhysicalModel(DeviceTime(0.0, fixed_s, per_item_s, PRIOR_EXPONENT), 0.05 * whole_s)
