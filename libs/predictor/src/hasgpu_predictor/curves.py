"""Latency that a quota and the host force on a model, read from its probes and from models with probes like them.

At a given quota a light batch takes a time that depends on how long the host needs to launch it, and hardly on the
device: `curve(quota)`. Measured curves are quantised by the gate's windows, so that a smooth interpolation between
probed quotas is wrong; but models with like probes have like curves. The bank keeps the curves of the training models
and takes the shape between the probes from the nearest ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hasgpu_predictor.operators import Array, Workload

NEIGHBOURS_MIN = 15
_LENGTH = 0.05
"""Of the mean squared difference of log probes."""
_WEIGHT_HOST, _WEIGHT_LAUNCHES = 0.2, 0.05
"""Of squared differences: log of the host-bound time of the graph probes, natural log of the launches."""
_UNKNOWN = 0.05
_NARROW = 20
"""Channels a group up to which a grouped convolution is narrow."""
_STEP_RIDGE = 0.02
"""Penalty of the step's weights."""


def groups_per_launch(workload: Workload) -> Array:
    """Groups of narrow and of all grouped convolutions, over the number of kernels, shape (2,)."""
    grouped = [k for k in workload.kernels if k.kind == "grouped"]
    narrow = sum(k.groups for k in grouped if k.columns <= _NARROW)
    return np.array([narrow, sum(k.groups for k in grouped)], float) / max(1, len(workload.kernels))


@dataclass(frozen=True, slots=True)
class BatchSteps:
    """How a launch curve changes with the batch.

    From batch 4 the library runs a grouped convolution with more kernels, in proportion to its groups; below it the
    curve lies lower, and what narrow groups do at batch 2, wide ones do at batch 1 already. Models without grouped
    convolutions have one curve.
    """

    weights: Array
    """Shape (2, 2): of `groups_per_launch`, at batch 1 and at batch 2; natural logarithm."""

    @classmethod
    def fit(cls, groups: Array, steps: Array) -> BatchSteps:
        """Ridge regression.

        Args:
            groups: Shape (n, 2): `groups_per_launch` of models.
            steps: Shape (n, 2): natural log of the curve at batch 1 and 2 over the curve from batch 4; NaN: unknown.
        """
        weights = np.zeros((2, 2))
        for k in range(2):
            known = np.isfinite(steps[:, k]) & (groups[:, 1] > 0)
            some = groups[known]
            weights[k] = np.linalg.solve(some.T @ some + _STEP_RIDGE * np.eye(2), some.T @ steps[known, k])
        return cls(weights)

    def at(self, groups: Array, batch: Array) -> Array:
        """Returns the step at each batch, shape of `batch`: 0 from batch 4."""
        one, two = np.minimum(0.0, self.weights @ groups)
        return np.where(batch < 2, one, np.where(batch < 4, two, 0.0))


@dataclass(frozen=True, slots=True)
class CurveBank:
    """Measured curves of training models, over one axis of quotas."""

    quotas_pct: Array
    """Shape (k,), ascending."""
    cells: Array
    """Shape (n, k): natural log of ms of single (batch, SM) lines, NaN where the device decided."""
    curves: Array
    """Shape (n, k): the line's model at its batch, median over SM shares."""
    groups: NDArray[np.int64]
    """Shape (n,): the model of each line."""
    host: Array
    """Shape (n,): log ms of the graph probes at large shares; NaN: not measured."""
    launches: Array
    """Shape (n,): natural log of the number of kernels."""

    def without(self, models: NDArray[np.int64]) -> CurveBank:
        """Returns the bank without some models."""
        keep = ~np.isin(self.groups, models)
        names = ("cells", "curves", "groups", "host", "launches")
        return CurveBank(self.quotas_pct, *(getattr(self, name)[keep] for name in names))

    def curve(self, probed: Array, host: float, launches: float) -> Array:
        """Returns natural log of ms at each quota, never rising with it, shape (k,).

        Args:
            probed: Shape (k,): natural log of ms of the model's probes at each quota, NaN where there is none or the
                device decided it. All NaN: the curve of models with as many launches.
            host: As in the bank; NaN: unknown.
            launches: As in the bank.
        """
        use = np.flatnonzero(np.isfinite(probed))
        logs = np.log(self.quotas_pct)
        usable = np.isfinite(self.cells[:, use]).all(1) if len(use) else np.ones(len(self.cells), bool)
        given = np.interp(logs, logs[use], probed[use]) if len(use) else np.zeros(len(logs))
        if not usable.any():
            if not len(use):
                return np.full(len(logs), np.log(np.exp(launches) * 0.07))
            return np.asarray(given)
        cells, curves = self.cells[usable], self.curves[usable]
        apart = ((cells[:, use] - probed[use]) ** 2).mean(1) if len(use) else np.zeros(len(cells))
        hosts = (self.host[usable] - host) ** 2
        weight_host, weight_launches = (_WEIGHT_HOST, _WEIGHT_LAUNCHES) if len(use) else (1.0, 1.0)
        apart = apart + weight_host * np.where(np.isfinite(hosts), hosts, _UNKNOWN)
        apart = apart + weight_launches * (self.launches[usable] - launches) ** 2
        nearest = np.partition(apart, min(NEIGHBOURS_MIN, len(apart) - 1))[min(NEIGHBOURS_MIN, len(apart) - 1)]
        weight = np.exp(-(apart - apart.min()) / 2 / max(_LENGTH**2, nearest))
        offsets = curves - _through(cells, use, logs) if len(use) else curves
        known = np.isfinite(offsets)
        mass = weight[:, None] * known
        mean = (mass * np.where(known, offsets, 0.0)).sum(0) / np.maximum(mass.sum(0), 1e-12)
        return np.asarray(np.maximum.accumulate((given + mean)[::-1])[::-1])


def _through(cells: Array, use: NDArray[np.int64], logs: Array) -> Array:
    """Each line read at the probed quotas only, and interpolated as a model's own probes are, shape (n, k)."""
    place = np.clip(np.searchsorted(logs[use], logs, side="right") - 1, 0, max(0, len(use) - 2))
    if len(use) == 1:
        return np.repeat(cells[:, use], len(logs), axis=1)
    low, high = use[place], use[place + 1]
    part = np.clip((logs - logs[low]) / (logs[high] - logs[low]), 0.0, 1.0)
    return np.asarray(cells[:, low] * (1 - part) + cells[:, high] * part)
