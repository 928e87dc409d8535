"""A function's predictions on a grid, monotone by construction, and between its places."""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
from hasgpu_core.errors import InvalidError
from numpy.typing import ArrayLike, NDArray

from hasgpu_predictor.physical import Array


@dataclass(frozen=True, slots=True)
class Axes:
    """A grid; each axis ascending and without repeats."""

    batches: tuple[int, ...]
    sm_pcts: tuple[int, ...]
    quotas_permille: tuple[int, ...]

    def validate(self) -> None:
        """Raises InvalidError, naming the axis, the bound and what came."""
        for name, values, high in (
            ("batches", self.batches, 4_096),
            ("sm_pcts", self.sm_pcts, 100),
            ("quotas_permille", self.quotas_permille, 1_000),
        ):
            if not values:
                raise InvalidError(name, expected="at least one", got="none")
            if values[0] < 1 or values[-1] > high:
                raise InvalidError(name, expected=f"1..{high}", got=f"{values[0]}..{values[-1]}")
            if any(a >= b for a, b in pairwise(values)):
                raise InvalidError(name, expected="ascending values without repeats", got=str(list(values)))

    def configurations(self) -> Array:
        """Returns all places, batch-major, shape (n, 3)."""
        grids = np.meshgrid(
            np.array(self.batches, float),
            np.array(self.sm_pcts, float),
            np.array(self.quotas_permille, float),
            indexing="ij",
        )
        return np.stack([grid.ravel() for grid in grids], axis=1)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Lengths of the axes."""
        return len(self.batches), len(self.sm_pcts), len(self.quotas_permille)


def batch_axis(max_batch: int, also: Iterable[int] = ()) -> tuple[int, ...]:
    """Returns 1, 2, 4, ... and `max_batch`, with those of `also` that are in range."""
    powers = {1 << k for k in range(max_batch.bit_length())}
    return tuple(sorted(b for b in powers | {max_batch, *also} if 1 <= b <= max_batch))


def canonical_axes(max_batch: int, *, batches: Iterable[int] = (), sm_pcts: Iterable[int] = ()) -> Axes:
    """Returns the grid that a function's surface is computed on, whatever is asked of it later.

    SM shares of 1 and 5 to 100 by 5 and those of `sm_pcts` (a device's rungs, measured ones), quotas of 1, 10, and 50
    to 1000 by 50 per mille.
    """
    return Axes(
        batch_axis(max_batch, batches),
        tuple(sorted({1, *range(5, 101, 5), *sm_pcts})),
        (1, 10, *range(50, 1001, 50)),
    )


def monotone(values: Array) -> Array:
    """Returns a surface near `values` that never falls with the batch and never rises with SM share or quota.

    Each axis in turn is replaced by its isotonic regression of least absolute error: errors are told in per cent of
    single places, and where measured surfaces step, a median misses fewer of them than a mean. Of the best
    regressions the least one is taken, which keeps order between lines (if one line is nowhere above another, nor is
    its regression), so that a later axis does not undo an earlier one; what is monotone already stays as it is. Shape
    (batch, SM, quota).

    Source: Robertson, Wright, Dykstra, Order Restricted Statistical Inference (1988), chapter 1.
    """
    for axis, rises in ((2, False), (1, False), (0, True)):
        lines = np.moveaxis(values, axis, -1)
        lines = _isotonic(lines) if rises else _isotonic(lines[..., ::-1])[..., ::-1]
        values = np.moveaxis(lines, -1, axis)
    return np.ascontiguousarray(values)


def _isotonic(lines: Array) -> Array:
    """Isotonic regressions (non-decreasing, least absolute error) along the last axis."""
    flat = lines.reshape(-1, lines.shape[-1]).copy()
    falling = np.flatnonzero((np.diff(flat, axis=1) < 0).any(axis=1))
    if len(falling):
        flat[falling] = [_isotonic_line(line) for line in flat[falling].tolist()]
    return flat.reshape(lines.shape)


def _isotonic_line(line: list[float]) -> list[float]:
    """The least of the best regressions of one line.

    The smallest sum of errors up to a place, as a function of the value there, is convex and falls up to its least
    minimiser; the heap (largest first) holds where its slope changes below that.
    """
    heap: list[float] = []
    best = []
    for value in line:
        if heap and -heap[0] > value:
            heapq.heappush(heap, -value)
            heapq.heapreplace(heap, -value)
        else:
            heapq.heappush(heap, -value)
        best.append(-heap[0])
    for place in range(len(best) - 2, -1, -1):
        best[place] = min(best[place], best[place + 1])
    return best


@dataclass(frozen=True, slots=True)
class Surface:
    """Predicted latency of every configuration of a grid, and of those between by interpolation."""

    axes: Axes
    latency_s: Array
    """Shape of the axes: batch, SM, quota. Mean of back-to-back batches, gate wait included."""
    basis: str
    """"profiled", "transferred" (from operators and a few probes) or "static"."""
    low_s: Array | None = None
    """5 % of measured latencies are expected below; as `latency_s`; None: unknown."""
    high_s: Array | None = None
    """5 % are expected above."""
    measured_max_batch: int = 0
    """The largest batch that was measured of the function; larger ones are extrapolated. 0: none was."""

    def extrapolated(self, batch: ArrayLike) -> NDArray[np.bool_]:
        """Marks batches larger than any that was measured, of the same shape; none where nothing was (see `basis`)."""
        return np.asarray((np.asarray(batch, float) > self.measured_max_batch) & (self.measured_max_batch > 0))

    def scaled(self, factor: float) -> Surface:
        """Returns the surface with every latency times `factor`."""
        if factor == 1.0:
            return self
        low_s, high_s = (None if bound is None else bound * factor for bound in (self.low_s, self.high_s))
        return replace(self, latency_s=self.latency_s * factor, low_s=low_s, high_s=high_s)

    def bounds_at(self, batch: ArrayLike, sm_pct: ArrayLike, quota_permille: ArrayLike) -> tuple[Array, Array] | None:
        """Returns the interval's ends in seconds, as `at`; None: unknown."""
        if self.low_s is None or self.high_s is None:
            return None
        low, high = (replace(self, latency_s=bound) for bound in (self.low_s, self.high_s))
        return low.at(batch, sm_pct, quota_permille), high.at(batch, sm_pct, quota_permille)

    def at(self, batch: ArrayLike, sm_pct: ArrayLike, quota_permille: ArrayLike) -> Array:
        """Returns latencies in seconds for arrays of equal shape, or for a grid by broadcasting.

        Linear in the logarithms between places, so that monotone stays monotone. A configuration outside of the grid
        takes the edge's value; a larger batch grows in proportion.
        """
        batch = np.asarray(batch, float)
        b, s, q = np.broadcast_arrays(batch, np.asarray(sm_pct, float), np.asarray(quota_permille, float))
        logs = np.log(self.latency_s)
        total = np.zeros(b.shape)
        corners = [
            _between(axis, x)
            for axis, x in zip(
                (self.axes.batches, self.axes.sm_pcts, self.axes.quotas_permille), (b, s, q), strict=True
            )
        ]
        for db in (0, 1):
            for ds in (0, 1):
                for dq in (0, 1):
                    weight = np.ones(b.shape)
                    index = []
                    for (low, high, part), side in zip(corners, (db, ds, dq), strict=True):
                        weight = weight * (part if side else 1.0 - part)
                        index.append(high if side else low)
                    total += weight * logs[index[0], index[1], index[2]]
        return np.asarray(np.exp(total) * np.maximum(1.0, b / self.axes.batches[-1]))


def _between(axis: tuple[int, ...], x: Array) -> tuple[np.ndarray, np.ndarray, Array]:
    """Indices below and above, and the part of the way between them, in logarithms."""
    grid = np.log(np.array(axis, float))
    place = np.clip(np.log(x), grid[0], grid[-1])
    low = np.clip(np.searchsorted(grid, place, side="right") - 1, 0, len(grid) - 1)
    high = np.minimum(low + 1, len(grid) - 1)
    width = np.where(high > low, grid[high] - grid[low], 1.0)
    return low, high, (place - grid[low]) / width
