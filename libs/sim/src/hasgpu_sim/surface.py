"""Measured latency surfaces: what a batch takes at every (batch, SM share, quota) of a profile.

A profile may lack cells. A missing cell is filled along the axis that interpolates best: of the two measured neighbours
on each side, quotas in log(latency) over log(quota) (time sharing makes latency about inverse in the quota), SM shares
and batches in log(latency) over log of the share or the batch; the mean of the axes that have neighbours on both sides,
else of those with one side (the nearest value is taken, nothing is extrapolated). That repeats until the grid is full.
"""

from __future__ import annotations

import csv
import gzip
import io
import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from hasgpu_core.capacity import CapacityPoint, CapacityTable, capacity_rps
from hasgpu_core.errors import InvalidError, NotFoundError
from hasgpu_core.profile import Profile
from hasgpu_core.resources import WHOLE_PERMILLE

COLUMNS = ("model", "batch", "sm_pct", "quota_pct", "latency_ms")
Cell = tuple[int, int, int]
"""(batch, sm_pct, quota_permille)"""
_QUOTAS_PERMILLE = tuple(range(100, 1001, 100))


@dataclass(frozen=True, slots=True)
class Surface:
    """One model's latencies in seconds over a full grid."""

    model: str
    device_model: str
    cells_s: Mapping[Cell, float]
    filled: frozenset[Cell] = frozenset()
    """Cells that were not measured."""
    device_times_s: Mapping[tuple[int, int], float] = field(default_factory=dict)
    """For how long a batch holds the device, by (batch, sm_pct); without: its latency at the whole quota."""
    _points: dict[int, tuple[CapacityPoint, ...]] = field(default_factory=dict, init=False, repr=False, compare=False)
    batches: tuple[int, ...] = field(init=False)
    sm_pcts: tuple[int, ...] = field(init=False)
    quotas_permille: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        put = object.__setattr__
        for index, name in enumerate(("batches", "sm_pcts", "quotas_permille")):
            put(self, name, tuple(sorted({cell[index] for cell in self.cells_s})))

    @property
    def reference_s(self) -> float:
        """Latency of one request with the whole device: what an SLO is a multiple of."""
        return self.cells_s[self.batches[0], self.sm_pcts[-1], self.quotas_permille[-1]]

    def latency_s(self, batch: int, sm_pct: int, quota_permille: int) -> float:
        """Returns the latency; batches between grid sizes on a line, SM shares and quotas rounded down to the grid.

        Below the smallest quota the latency grows in inverse proportion to the quota.
        """
        sm_pct = _floor(self.sm_pcts, sm_pct)
        quota = _floor(self.quotas_permille, quota_permille)
        return max(1.0, quota / quota_permille) * self._at(batch, lambda b: self.cells_s[b, sm_pct, quota])

    def device_s(self, batch: int, sm_pct: int) -> float:
        """Returns for how long a batch holds the device; the rest of its latency at the whole quota is the host's."""
        if not self.device_times_s:
            return self.latency_s(batch, sm_pct, WHOLE_PERMILLE)
        sm_pct = _floor(self.sm_pcts, sm_pct)
        return self._at(batch, lambda b: self.device_times_s[b, sm_pct])

    def _at(self, batch: int, value: Callable[[int], float]) -> float:
        """What lies at a batch, on a line between values at grid sizes."""
        at = bisect_left(self.batches, batch)
        if at < len(self.batches) and self.batches[at] == batch:
            return value(batch)
        if at == len(self.batches):
            last = self.batches[-1]
            return value(last) * batch / last
        low, high = self.batches[max(at - 1, 0)], self.batches[at]
        return value(low) + (value(high) - value(low)) * (batch - low) / max(1, high - low)

    def table(self, function: str, slo_ms: int) -> CapacityTable:
        """Returns the surface as a capacity table, as rapp would publish it; says when nothing meets the objective."""
        slo_s = slo_ms / 1e3
        points = self._points.get(slo_ms)
        if points is None:  # functions of one model and objective share them
            points = self._points[slo_ms] = tuple(
                CapacityPoint(
                    *cell,
                    latency_s=latency_s,
                    capacity_rps=round(capacity_rps(batch=cell[0], latency_s=latency_s, slo_s=slo_s), 3),
                )
                for cell, latency_s in sorted(self.cells_s.items())
            )
        fastest_s = min(self.cells_s.values())
        reason = ""
        if fastest_s >= slo_s:
            reason = f"no configuration meets {slo_ms} ms: the fastest possible takes {fastest_s * 1e3:.1f} ms"
        return CapacityTable(
            function, 1, self.device_model, 1, 0, slo_ms, points, basis="profiled", infeasible_reason=reason
        )


def load_v100(folder: Path, models: Iterable[str] | None = None) -> dict[str, Surface]:
    """Reads `latency.csv.gz` of a HAS-GPU profile folder.

    Args:
        folder: Or the file itself.
        models: Those wanted; None: all.

    Raises:
        InvalidError: Columns are missing, or a figure can't be; names file and line.
        NotFoundError: The profile lacks a model; says which it has.
    """
    path = folder / "latency.csv.gz" if folder.is_dir() else folder
    cells: dict[str, dict[Cell, float]] = {}
    with gzip.open(path, "rt", encoding="utf-8") as file:
        rows = csv.DictReader(file)
        absent = [name for name in COLUMNS if name not in (rows.fieldnames or [])]
        if absent:
            raise InvalidError(f"profile {path}", expected=f"columns {', '.join(COLUMNS)}", got=f"no {absent[0]}")
        for number, row in enumerate(rows, start=2):
            cell, latency_s = _parsed(path, number, row)
            cells.setdefault(row["model"], {})[cell] = latency_s
    wanted = sorted(cells) if models is None else list(models)
    for model in wanted:
        if model not in cells:
            raise NotFoundError("profile model", model, f"the profile has {', '.join(sorted(cells))}")
    return {model: filled_surface(model, "v100", cells[model]) for model in wanted}


def _parsed(path: Path, number: int, row: Mapping[str, str]) -> tuple[Cell, float]:
    try:
        cell = (int(row["batch"]), int(row["sm_pct"]), 10 * int(row["quota_pct"]))
        latency_s = float(row["latency_ms"]) / 1e3
    except (ValueError, TypeError) as error:
        raise InvalidError(f"profile {path}, line {number}", expected="numbers", got=str(error)) from error
    if not (cell[0] >= 1 and 1 <= cell[1] <= 100 and 10 <= cell[2] <= 1000 and 0 < latency_s < math.inf):
        raise InvalidError(
            f"profile {path}, line {number}",
            expected="batch >= 1, sm_pct and quota_pct in 1..100, latency above 0",
            got=f"{cell}, {latency_s * 1e3} ms",
        )
    return cell, latency_s


def from_profile(profile: Profile, model: str, *, emulated: bool = False) -> Surface:
    """Returns a hasgpu profile's surface: measured latencies where there are any, else device time over quota.

    Args:
        profile: The profile.
        model: One of its models.
        emulated: Of the device that is emulated from it, which passes a batch's device time and no time of a host.

    Raises:
        NotFoundError: The profile has no such model.
    """
    times = profile.device_times(model)
    cells: dict[Cell, float] = {}
    device_s: dict[tuple[int, int], float] = {}
    for batch in times.batches:
        for sm_pct in times.sm_pcts:
            device_s[batch, sm_pct] = times.device_time_us(batch, sm_pct) / 1e6
            for quota in _QUOTAS_PERMILLE:
                cells[batch, sm_pct, quota] = device_s[batch, sm_pct] * WHOLE_PERMILLE / quota
    measured = {
        (row.batch, row.sm_pct, row.quota_permille): row.latency_us / 1e6 for row in profile.rows if row.model == model
    }
    if not emulated:
        cells |= {cell: latency_s for cell, latency_s in measured.items() if cell in cells}
    return Surface(model, profile.header.device_model, cells, frozenset(set(cells) - set(measured)), device_s)


def load_surfaces(path: Path, models: Iterable[str] | None = None) -> dict[str, Surface]:
    """Reads a profile of either kind: a HAS-GPU folder or `.csv.gz`, or a hasgpu profile file.

    Raises as `load_v100` and `Profile.parse`.
    """
    if path.is_dir() or path.suffix == ".gz":
        return load_v100(path, models)
    profile = Profile.parse(io.TextIOWrapper(path.open("rb"), encoding="utf-8").read())
    return {model: from_profile(profile, model) for model in (models or sorted(profile.header.models))}


def device_time_surface(surface: Surface) -> Surface:
    """Returns the surface under the `device-time` physics: device time over the quota, and what the host adds."""
    cells = {}
    for batch, sm_pct, quota in surface.cells_s:
        device_s = surface.device_s(batch, sm_pct)
        host_s = max(0.0, surface.cells_s[batch, sm_pct, surface.quotas_permille[-1]] - device_s)
        cells[batch, sm_pct, quota] = device_s * WHOLE_PERMILLE / quota + host_s
    return replace(surface, cells_s=cells)


def filled_surface(model: str, device_model: str, measured_s: Mapping[Cell, float]) -> Surface:
    """Returns a full grid from measured cells (see the module). Raises InvalidError when there is none."""
    if not measured_s:
        raise InvalidError(f"profile of {model}", expected="at least one measured cell", got="none")
    axes = [sorted({cell[i] for cell in measured_s}) for i in range(3)]
    known = dict(measured_s)
    missing = {(b, s, q) for b in axes[0] for s in axes[1] for q in axes[2]} - set(known)
    filled = frozenset(missing)
    while missing:
        found = {cell: value for cell in sorted(missing) if (value := _guess(cell, axes, known)) is not None}
        if not found:
            raise InvalidError(f"profile of {model}", expected="cells that connect", got=f"{len(missing)} apart")
        known |= found
        missing -= set(found)
    return Surface(model, device_model, known, filled)


def _guess(cell: Cell, axes: Sequence[Sequence[int]], known: Mapping[Cell, float]) -> float | None:
    """The mean over axes of the interpolation between the nearest known cells; None: no neighbour is known."""
    inside, outside = [], []
    for axis in range(3):
        line = axes[axis]
        at = line.index(cell[axis])
        low = next((v for v in reversed(line[:at]) if _with(cell, axis, v) in known), None)
        high = next((v for v in line[at + 1 :] if _with(cell, axis, v) in known), None)
        if low is not None and high is not None:
            low_log, high_log = math.log(known[_with(cell, axis, low)]), math.log(known[_with(cell, axis, high)])
            part = math.log(cell[axis] / low) / math.log(high / low)
            inside.append(low_log + (high_log - low_log) * part)
        elif low is not None or high is not None:
            near = low if low is not None else high
            assert near is not None
            outside.append(math.log(known[_with(cell, axis, near)]))
    logs = inside or outside
    return math.exp(sum(logs) / len(logs)) if logs else None


def _with(cell: Cell, axis: int, value: int) -> Cell:
    changed = list(cell)
    changed[axis] = value
    return changed[0], changed[1], changed[2]


def _floor(grid: tuple[int, ...], value: int) -> int:
    return grid[max(0, bisect_right(grid, value) - 1)]
