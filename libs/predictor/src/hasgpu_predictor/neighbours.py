"""What a function's own points say around a configuration: kernel means along each axis of the grid.

A kernel is a product of exp(-distance / length) over the three axes, so that sums over all points are contractions of
a small dense tensor (batch, SM, quota), and a whole surface costs well under a millisecond. A short length keeps to
points that share the coordinate exactly: the host's state changes between runs of measurements, and neighbours on one
axis share it while others don't.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from hasgpu_predictor.physical import Array

SAME = 0.01
"""A length that only the same coordinate passes."""
KERNELS: tuple[tuple[str, float, float, float], ...] = (
    ("sm_near", SAME, 1.0, SAME),
    ("sm_wide", SAME, 4.0, SAME),
    ("sm_batch", 1.0, 1.0, SAME),
    ("quota_all", 3.0, 8.0, SAME),
    ("quota_near", SAME, SAME, 0.5),
    ("batch_near", 0.7, SAME, SAME),
    ("all_near", 0.7, 1.5, 0.4),
    ("batch_any_quota_near", 2.0, SAME, 0.5),
)
"""Name; lengths in octaves of batch, steps of 5 % SM, octaves of quota."""
SM_STEP_PCT = 5.0
SHRINK = 0.02
"""Weight of a value of 0 in every mean, so that points far away say nothing."""


class Neighbours:
    """Values at places of a grid, holes allowed.

    Args:
        configurations: Shape (n, 3): batch, sm_pct, quota_permille; no repeats.
        values: Shape (n,).
    """

    def __init__(self, configurations: Array, values: Array) -> None:
        places = _places(configurations)
        self._axes: list[Array] = []
        index = []
        for column in places.T:
            axis, at = np.unique(column, return_inverse=True)
            self._axes.append(axis)
            index.append(at)
        shape = tuple(max(1, len(axis)) for axis in self._axes)
        both = np.zeros((2, *shape))
        if len(values):
            both[0][tuple(index)] = values
            both[1][tuple(index)] = 1.0
        self._both = both
        self._empty = not len(values)

    def around(self, configurations: Array) -> tuple[Array, Array]:
        """Returns kernel means and weights, each of shape (n, len(KERNELS)); 0 where no point is near."""
        places = _places(configurations)
        count = len(places)
        if self._empty:
            return np.zeros((count, len(KERNELS))), np.zeros((count, len(KERNELS)))
        axes, index = zip(*(np.unique(column, return_inverse=True) for column in places.T), strict=True)
        on_grid = len(axes[0]) * len(axes[1]) * len(axes[2]) <= 8 * count + 2_000
        asked = axes if on_grid else tuple(places.T)
        distances = [np.abs(a[:, None] - b[None, :]) for a, b in zip(asked, self._axes, strict=True)]
        weights: dict[tuple[int, float], Array] = {}
        sums = np.empty((len(KERNELS), 2, count))
        for k, (_, *lengths) in enumerate(KERNELS):
            factors = []
            for axis, length in enumerate(lengths):
                if (axis, length) not in weights:
                    weights[axis, length] = np.exp(-distances[axis] / length)
                factors.append(weights[axis, length])
            sums[k] = _on_grid(self._both, factors, index) if on_grid else _row_by_row(self._both, factors)
        total = sums[:, 1].T
        return sums[:, 0].T / (total + SHRINK), total


def _on_grid(both: Array, factors: list[Array], index: tuple[NDArray[np.intp], ...]) -> Array:
    kb, ks, kq = factors
    part = both @ kq.T  # (2, b, s, q')
    part = np.tensordot(part, ks, axes=(2, 1))  # (2, b, q', s')
    part = np.tensordot(part, kb, axes=(1, 1))  # (2, q', s', b')
    return np.asarray(part[:, index[2], index[1], index[0]])


def _row_by_row(both: Array, factors: list[Array]) -> Array:
    kb, ks, kq = factors
    part = np.einsum("xbsq,nq->xbsn", both, kq)
    part = np.einsum("xbsn,ns->xbn", part, ks)
    return np.asarray(np.einsum("xbn,nb->xn", part, kb))


def _places(configurations: Array) -> Array:
    batch, sm, quota = configurations.T
    return np.stack([np.log2(batch), sm / SM_STEP_PCT, np.log2(quota)], axis=1)
