"""Where the rows of a device lie, and the steps from one layout to another: pure.

A row is a range of SMs in per cent. Ranges of different rows are disjoint and begin at multiples of the device's unit
(its smallest partition). A worker takes a changed range only from its next segment on, so until it has confirmed a
change, both its ranges count as in force.

To get from one layout to another, in this order:

1. a range that only shrinks, or moves to where nobody else may be, is written at once;
2. while something is on its way, the rest waits for it;
3. when nothing moves by itself any more, those that stand in each other's way are marked exclusive (whoever is marked
   takes its SMs in the device's ledger, so that overlapping ranges never run at once), and once all of them have
   confirmed that, ranges may overlap;
4. when all are where they should be, the marks are taken off.

Each write brings a range to its place or marks one, so it ends.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

from hasgpu_core.resources import WHOLE_PCT, DeviceInfo

K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True, slots=True)
class Lease:
    """The SMs that a worker may use."""

    first_pct: int
    """0..99."""
    width_pct: int
    """1..100."""
    exclusive: bool = False
    """Its range may overlap with another row's: each segment takes it in the device's ledger first."""

    @property
    def end_pct(self) -> int:
        """The first per cent that is not in it."""
        return self.first_pct + self.width_pct

    @property
    def range_pct(self) -> tuple[int, int]:
        """First and width."""
        return self.first_pct, self.width_pct

    def overlaps(self, other: Lease) -> bool:
        """Whether they have an SM in common."""
        return self.first_pct < other.end_pct and other.first_pct < self.end_pct

    def is_within(self, other: Lease) -> bool:
        """Whether all its SMs are the other's too."""
        return other.first_pct <= self.first_pct and self.end_pct <= other.end_pct


WHOLE = Lease(0, WHOLE_PCT)


def unit_pct(device: DeviceInfo) -> int:
    """Returns the per cent at whose multiples partitions of a device begin: its smallest one."""
    return min(device.sm_rungs_pct, default=1) if device.sm_granule_pct > 1 and has_places(device) else 1


def has_places(device: DeviceInfo) -> bool:
    """Whether it matters where a partition lies; on a CPU and under an MPS percentage only its width does."""
    return device.backend == "emulated" or device.mode in ("mps+green", "timeshare")


def fits(widths_pct: Iterable[int], unit_pct: int) -> bool:
    """Whether rows of these widths can lie side by side; only the last may end between two multiples of the unit."""
    widths = tuple(widths_pct)
    waste = max((_padded(width, unit_pct) - width for width in widths), default=0)
    return sum(_padded(width, unit_pct) for width in widths) - waste <= WHOLE_PCT


def lay_out(present: Mapping[int, int], widths_pct: Mapping[int, int], unit_pct: int) -> dict[int, int] | None:
    """Returns where each row begins, in per cent; None when they don't fit.

    Rows stay where they are if they can, others go into the first gap that is wide enough; only when there is none, all
    move together.

    Args:
        present: Where rows begin now; those without a width are gone.
        widths_pct: Of the rows, by index.
        unit_pct: Rows begin at its multiples.
    """
    if not fits(widths_pct.values(), unit_pct):
        return None
    places: dict[int, Lease] = {}
    for row in sorted((r for r in present if r in widths_pct), key=lambda r: (present[r], r)):
        place = Lease(present[row], widths_pct[row])
        is_aligned = place.first_pct % unit_pct == 0 and place.end_pct <= WHOLE_PCT
        if is_aligned and not any(place.overlaps(other) for other in places.values()):
            places[row] = place
    for row in sorted((r for r in widths_pct if r not in places), key=lambda r: (-widths_pct[r], r)):
        found = _gap(places.values(), widths_pct[row], unit_pct)
        if found is None:
            return _packed(present, widths_pct, unit_pct)
        places[row] = found
    return {row: place.first_pct for row, place in places.items()}


def _gap(places: Iterable[Lease], width_pct: int, unit_pct: int) -> Lease | None:
    taken = tuple(places)
    for first_pct in range(0, WHOLE_PCT - width_pct + 1, unit_pct):
        place = Lease(first_pct, width_pct)
        if not any(place.overlaps(other) for other in taken):
            return place
    return None


def _packed(present: Mapping[int, int], widths_pct: Mapping[int, int], unit_pct: int) -> dict[int, int]:
    """All rows from the left, in their present order; the one that wastes most goes to the end."""
    order = sorted(widths_pct, key=lambda r: (present.get(r, WHOLE_PCT), r))
    last = max(order, key=lambda r: _padded(widths_pct[r], unit_pct) - widths_pct[r])
    if _padded(widths_pct[last], unit_pct) > widths_pct[last]:
        order.remove(last)
        order.append(last)
    firsts: dict[int, int] = {}
    first_pct = 0
    for row in order:
        firsts[row] = first_pct
        first_pct += _padded(widths_pct[row], unit_pct)
    return firsts


def _padded(width_pct: int, unit_pct: int) -> int:
    return -(-width_pct // unit_pct) * unit_pct


@dataclass(frozen=True, slots=True)
class Holder(Generic[K]):
    """A worker: what it has and what it should have."""

    key: K
    row: int
    possible: tuple[Lease, ...]
    """All that may be in force, the newest last; one: it has confirmed it."""
    goal: tuple[int, int]
    """First and width in per cent."""

    @property
    def newest(self) -> Lease:
        """As last written."""
        return self.possible[-1]

    @property
    def is_settled(self) -> bool:
        """Whether it has confirmed all that was written."""
        return len(self.possible) == 1

    @property
    def is_marked(self) -> bool:
        """Whether all that may be in force is exclusive."""
        return all(lease.exclusive for lease in self.possible)


def next_leases(holders: Sequence[Holder[K]], *, always_exclusive: bool = False) -> dict[K, Lease]:
    """Returns what may be written now, by worker; to be asked again when something was confirmed.

    Empty with all settled: all are where they should be.

    Args:
        holders: All workers of one device that may still run something; the goals of different rows are disjoint.
        always_exclusive: The marks are never taken off.
    """
    if all(h.is_settled and h.newest.range_pct == h.goal and h.newest.exclusive == always_exclusive for h in holders):
        return {}
    now = {h.key: h for h in holders}
    writes: dict[K, Lease] = {}

    def write(holder: Holder[K], lease: Lease) -> None:
        writes[holder.key] = lease
        now[holder.key] = replace(holder, possible=(*holder.possible, lease))

    away = [h for h in holders if h.is_settled and h.newest.range_pct != h.goal]
    for may_overlap in (False, True):
        for holder in away:
            goal = Lease(*holder.goal, holder.newest.exclusive)
            if holder.key in writes:
                continue
            in_the_way = _in_the_way(holder, goal, now.values())
            marked = may_overlap and holder.is_marked and all(other.is_marked for other in in_the_way)
            if goal.is_within(holder.newest) or not in_the_way or marked:
                write(holder, goal)
    if writes or not all(h.is_settled for h in holders):
        return writes
    if away:
        concerned = {h.key: h for holder in away for h in (holder, *_in_the_way(holder, Lease(*holder.goal), holders))}
        return {key: replace(h.newest, exclusive=True) for key, h in concerned.items() if not h.newest.exclusive}
    return {
        h.key: replace(h.newest, exclusive=always_exclusive)
        for h in holders
        if h.newest.exclusive != always_exclusive and (always_exclusive or not _in_the_way(h, h.newest, holders))
    }


def _in_the_way(holder: Holder[K], goal: Lease, holders: Iterable[Holder[K]]) -> list[Holder[K]]:
    return [h for h in holders if h.row != holder.row and any(goal.overlaps(lease) for lease in h.possible)]


def is_free(row: int, lease: Lease, holders: Iterable[Holder[K]]) -> bool:
    """Whether no worker of another row may use any SM of a range."""
    return not any(h.row != row and any(lease.overlaps(other) for other in h.possible) for h in holders)
