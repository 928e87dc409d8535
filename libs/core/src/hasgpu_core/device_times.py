"""How long a batch holds the device, at any batch and SM share, from some that were measured.

Between measured cells it is linear in the batch and linear in 1 / SM share: work grows with the batch beside a fixed
part, and is spread over the SMs beside a part that is not. Where the measured cells are monotone (a larger batch is
never faster, a larger share never slower), so is everything between and outside them.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping, Sequence

Cell = tuple[int, int]
"""(batch, sm_pct)"""
_LAST_BATCH = 65_536
_SMS_PCT = (1, 100)


class DeviceTimes:
    """One model's device times.

    Args:
        measured_us: Device time of each measured (batch, sm_pct) at the whole quota; at least one.

    Attributes:
        batches: Of the measured cells, ascending.
        sm_pcts: Likewise.
    """

    def __init__(self, measured_us: Mapping[Cell, float]) -> None:
        if not measured_us:
            raise ValueError("device times need one measured cell or more")
        self.batches = tuple(sorted({batch for batch, _ in measured_us}))
        self.sm_pcts = tuple(sorted({sm_pct for _, sm_pct in measured_us}))
        self._cells_us = dict(measured_us)
        self._guessed: set[Cell] = set()
        self._fill_holes(measured_us)
        self._all_batches, self._all_sms_pct = self.batches, self.sm_pcts
        self._extend()

    def device_time_us(self, batch: int, sm_pct: int) -> float:
        """Returns how long a batch holds the device, in microseconds; exact at measured cells.

        Outside the measured batches and shares it goes on along the line of the nearest two (`covers` tells).
        """
        batches = _around(self._all_batches, min(max(batch, 1), _LAST_BATCH))
        points = []
        for column in _around(self._all_sms_pct, sm_pct):
            along = [(float(row), self._cells_us[row, column]) for row in batches]
            points.append((1.0 / column, _line(along, batch)))
        return _line(sorted(points), 1.0 / sm_pct)

    def covers(self, batch: int, sm_pct: int) -> bool:
        """Returns whether (batch, sm_pct) lies among measured cells, so that nothing is extrapolated."""
        if not (self.batches[0] <= batch <= self.batches[-1] and self.sm_pcts[0] <= sm_pct <= self.sm_pcts[-1]):
            return False
        return not any(
            (corner, column) in self._guessed
            for corner in _around(self.batches, batch)
            for column in _around(self.sm_pcts, sm_pct)
        )

    def _fill_holes(self, measured_us: Mapping[Cell, float]) -> None:
        """Gives the cells of the measured grid that were left out a time between those of their neighbours."""
        for batch in self.batches:
            for sm_pct in self.sm_pcts:
                if (batch, sm_pct) in measured_us:
                    continue
                column = sorted(b for b, s in measured_us if s == sm_pct)
                row = sorted(s for b, s in measured_us if b == batch)
                by_batch = _line([(float(b), measured_us[b, sm_pct]) for b in _around(column, batch)], batch)
                by_sm = _line(sorted((1.0 / s, measured_us[batch, s]) for s in _around(row, sm_pct)), 1.0 / sm_pct)
                inside_batches = column[0] < batch < column[-1]
                inside_sms = row[0] < sm_pct < row[-1]
                time_us = (by_batch + by_sm) / 2
                if inside_batches != inside_sms:
                    time_us = by_batch if inside_batches else by_sm
                elif not inside_batches:
                    self._guessed.add((batch, sm_pct))
                    near_batch, near_sm = _nearest(column, batch), _nearest(row, sm_pct)
                    # With the fourth corner known, batch and share are taken to scale independently of each other.
                    if corner_us := measured_us.get((near_batch, near_sm)):
                        time_us = measured_us[near_batch, sm_pct] * measured_us[batch, near_sm] / corner_us
                self._put((batch, sm_pct), time_us)

    def _extend(self) -> None:
        """Adds the ends of what can be asked for, so that every question lies between cells."""
        for sm_pct in _SMS_PCT:
            if sm_pct in self.sm_pcts:
                continue
            columns = _around(self.sm_pcts, sm_pct)
            for batch in self.batches:
                points = sorted((1.0 / s, self._cells_us[batch, s]) for s in columns)
                self._put((batch, sm_pct), _line(points, 1.0 / sm_pct))
        self._all_sms_pct = tuple(sorted({*self.sm_pcts, *_SMS_PCT}))
        for batch in (1, _LAST_BATCH):
            if batch in self.batches:
                continue
            rows = _around(self.batches, batch)
            for sm_pct in self._all_sms_pct:
                self._put((batch, sm_pct), _line([(float(b), self._cells_us[b, sm_pct]) for b in rows], batch))
        self._all_batches = tuple(sorted({*self.batches, 1, _LAST_BATCH}))

    def _put(self, cell: Cell, time_us: float) -> None:
        """Adds a cell, moved in between those that have to be faster and those that have to be slower."""
        batch, sm_pct = cell
        known = self._cells_us.items()
        low = max((us for (b, s), us in known if b <= batch and s >= sm_pct), default=0.0)
        high = min((us for (b, s), us in known if b >= batch and s <= sm_pct), default=math.inf)
        self._cells_us[cell] = min(max(time_us, low), high) if low <= high else time_us


def _around(grid: Sequence[int], value: int) -> Sequence[int]:
    """The one grid value that is equal, else the two around `value`, else the two at its end of the grid."""
    at = bisect.bisect_left(grid, value)
    if at < len(grid) and grid[at] == value:
        return grid[at : at + 1]
    first = min(max(at - 1, 0), max(len(grid) - 2, 0))
    return grid[first : first + 2]


def _nearest(grid: Sequence[int], value: int) -> int:
    return min(grid, key=lambda one: abs(one - value))


def _line(points: Sequence[tuple[float, float]], x: float) -> float:
    """The line through one or two points at x; all numbers are positive.

    Outside the points it does not fall with x, and below them not faster than in proportion. One point alone: in
    proportion above it (all of the work scales), constant below (none of it does), so that neither side is too fast.
    """
    (x0, y0), (x1, y1) = points[0], points[-1]
    if x0 == x1:
        return y0 * max(1.0, x / x0)
    if x0 <= x <= x1:
        return y0 + (y1 - y0) * (x - x0) / (x1 - x0)
    if x > x1:
        return y1 + max(0.0, y1 - y0) * (x - x1) / (x1 - x0)
    return min(y0, max(y0 * x / x0, y0 - max(0.0, y1 - y0) * (x0 - x) / (x1 - x0)))
