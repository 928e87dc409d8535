"""Places for many instances: the same answers as `place`, from sorted lists in place of a look at every device."""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice

from hasgpu_core.policy.placement.places import (
    EMPTY_GPU,
    LOOK_AT,
    NO_TIES,
    SHARED_ROW,
    USED_GPU,
    Key,
    NoRoom,
    Placement,
    Ties,
    live_rows,
    no_room_reason,
    placement,
    tied,
    unused_index,
)
from hasgpu_core.resources import WHOLE_PCT, WHOLE_PERMILLE, Allocation, DeviceHealth, DeviceState, Row

_Entry = tuple[int, str, str, int]
"""(what is free, node, gpu, row); row -1: the device itself."""
_Lists = dict[int, list[_Entry]]
"""By how much memory the devices have free, in powers of two: those with too little are not walked over."""
_Ladder = tuple[int, tuple[int, ...]]
"""(granule, rungs): devices of one ladder give the same SM share for the same one asked."""


@dataclass(slots=True)
class _Shelf:
    """The places that devices of one ladder have, tightest first."""

    rows: dict[int, _Lists] = field(default_factory=dict)
    """By SM share."""
    used: _Lists = field(default_factory=dict)
    empty: _Lists = field(default_factory=dict)


@dataclass(slots=True)
class _Device:
    """One device while it fills up."""

    state: DeviceState
    """As it came."""
    shelf: _Shelf
    rows: dict[int, Row]
    free_sm_pct: int
    free_memory_bytes: int


class Room:
    """The room on many devices; placements take it and give it back.

    `place` here and the function of that name answer alike (a property test holds them together). A placement among n
    devices takes about log(n) comparisons, as long as few devices have between half and all of the memory asked for.
    """

    def __init__(self, devices: Sequence[DeviceState]) -> None:
        self._shelves: dict[_Ladder, _Shelf] = {}
        self._devices: dict[tuple[str, str], _Device] = {}
        self._failed: dict[int, list[tuple[int, int, str]]] = {}
        self._given: dict[int, list[tuple[_Shelf, int]]] = {}
        for state in devices:
            info = state.info
            ladder = (info.sm_granule_pct, info.sm_rungs_pct)
            shelf = self._shelves.setdefault(ladder, _Shelf())
            rows = {row.index: row for row in live_rows(state)}
            free_sm_pct = WHOLE_PCT - sum(row.sm_pct for row in rows.values())
            device = _Device(state, shelf, rows, free_sm_pct, state.free_memory_bytes)
            self._devices[info.node, info.gpu] = device
            self._put_on(device, rows)

    def place(self, allocation: Allocation, ties: Ties = NO_TIES) -> Placement | NoRoom:
        """Returns where an allocation fits, as `hasgpu_core.policy.placement.place` would; takes nothing."""
        for permille, memory_bytes, reason in self._failed.get(allocation.sm_pct, ()):
            if allocation.request_permille >= permille and allocation.memory_bytes >= memory_bytes:
                return NoRoom(reason)
        for kind in (SHARED_ROW, USED_GPU, EMPTY_GPU):
            keys = self._keys(kind, allocation)
            first = next(keys, None)
            if first is None:
                continue
            key = tied((first, *islice(keys, LOOK_AT - 1)), ties) if ties.binding else first
            rows = self._devices[key[2], key[3]].rows if kind != SHARED_ROW else ()
            return placement(key, unused_index(rows), ties)
        reason = no_room_reason(allocation, self.states())
        self._failed.setdefault(allocation.sm_pct, []).append(
            (allocation.request_permille, allocation.memory_bytes, reason)
        )
        return NoRoom(reason)

    def occupy(self, node: str, gpu: str, index: int, allocation: Allocation) -> None:
        """Takes the room of an instance; the row is made where there is none of that index."""
        device = self._devices[node, gpu]
        row = device.rows.get(index)
        sm_pct = row.sm_pct if row is not None else device.state.info.given_sm_pct(allocation.sm_pct)
        used_permille = (row.used_permille if row is not None else 0) + allocation.request_permille
        self._change(device, Row(index, sm_pct, used_permille), -allocation.memory_bytes)

    def release(self, node: str, gpu: str, index: int, allocation: Allocation) -> None:
        """Gives the room of an instance back; a row that holds nothing any more is none."""
        device = self._devices.get((node, gpu))
        if device is None:
            return
        self._failed.clear()
        row = device.rows[index]
        row = replace(row, used_permille=row.used_permille - allocation.request_permille)
        self._change(device, row, allocation.memory_bytes)

    def knows(self, node: str, gpu: str) -> bool:
        """Whether it has the device."""
        return (node, gpu) in self._devices

    def free_permille(self, node: str, gpu: str, index: int, sm_pct: int) -> int:
        """Returns the request that still fits into a row of this share, or into a new one in its place; 0: none."""
        device = self._devices.get((node, gpu))
        if device is None:
            return 0
        row = device.rows.get(index)
        given_pct = device.state.info.given_sm_pct(sm_pct)
        if row is None:
            return WHOLE_PERMILLE if given_pct <= device.free_sm_pct else 0
        return row.free_permille if row.sm_pct == given_pct else 0

    def states(self) -> list[DeviceState]:
        """Returns the devices with what is taken now, in the order in which they came."""
        return [
            replace(
                device.state,
                rows=tuple(device.rows[i] for i in sorted(device.rows)),
                memory_used_bytes=device.state.info.memory_bytes - device.free_memory_bytes,
            )
            for device in self._devices.values()
        ]

    @property
    def gpus_used(self) -> int:
        """Devices that hold something."""
        return sum(1 for device in self._devices.values() if device.rows)

    def _keys(self, kind: int, allocation: Allocation) -> Iterator[Key]:
        """The places of one kind, tightest first."""
        found = []
        for shelf, given_pct in self._able(allocation):
            if kind == SHARED_ROW:
                lists, needed = shelf.rows.get(given_pct, {}), allocation.request_permille
            else:
                lists, needed = shelf.used if kind == USED_GPU else shelf.empty, given_pct
                if allocation.request_permille > WHOLE_PERMILLE:
                    continue
            least = _size(allocation.memory_bytes)
            for size, entries in lists.items():
                if size >= least:
                    first = bisect_left(entries, (needed, "", "", -1))
                    if first < len(entries):
                        found.append(map(entries.__getitem__, range(first, len(entries))))
        for entry in found[0] if len(found) == 1 else heapq.merge(*found):
            if self._devices[entry[1], entry[2]].free_memory_bytes >= allocation.memory_bytes:
                yield kind, *entry

    def _able(self, allocation: Allocation) -> list[tuple[_Shelf, int]]:
        """The ladders that give the SM share, each with what it gives."""
        able = self._given.get(allocation.sm_pct)
        if able is None:
            able = []
            for (granule_pct, rungs), shelf in self._shelves.items():
                asked = allocation.sm_pct
                given = asked if granule_pct <= 1 else min((rung for rung in rungs if rung >= asked), default=asked)
                if given in rungs:
                    able.append((shelf, given))
            self._given[allocation.sm_pct] = able
        return able

    def _change(self, device: _Device, row: Row, memory_bytes: int) -> None:
        """Sets a row (used by nothing: takes it away) and changes the free memory."""
        free_memory_bytes = device.free_memory_bytes + memory_bytes
        same = _size(free_memory_bytes) == _size(device.free_memory_bytes)
        before = device.rows.get(row.index)
        if same and before is not None and row.used_permille > 0:
            # Only what the row has free is other than before: the device and its other rows stay where they are.
            self._relist(device, before, row)
            device.rows[row.index] = row
            device.free_memory_bytes = free_memory_bytes
            return
        listed = (row.index,) if same else tuple(device.rows)
        self._take_off(device, listed)
        if row.index not in device.rows:
            device.free_sm_pct -= row.sm_pct
        if row.used_permille > 0:
            device.rows[row.index] = row
        else:
            del device.rows[row.index]
            device.free_sm_pct += row.sm_pct
        device.free_memory_bytes = free_memory_bytes
        self._put_on(device, (row.index,) if same else tuple(device.rows))

    def _relist(self, device: _Device, before: Row, after: Row) -> None:
        """Puts a row where it belongs with what it has free now."""
        info, size = device.state.info, _size(device.free_memory_bytes)
        if info.health is DeviceHealth.LOST:
            return
        entries = device.shelf.rows[before.sm_pct][size]
        _drop(entries, (before.free_permille, info.node, info.gpu, before.index))
        insort(entries, (after.free_permille, info.node, info.gpu, after.index))

    def _take_off(self, device: _Device, indices: Iterable[int]) -> None:
        """Takes a device and rows of it from the lists, before they change."""
        info, size = device.state.info, _size(device.free_memory_bytes)
        if info.health is DeviceHealth.LOST:
            return
        lists = device.shelf.used if device.rows else device.shelf.empty
        _drop(lists[size], (device.free_sm_pct, info.node, info.gpu, -1))
        for index in indices:
            row = device.rows.get(index)
            if row is not None:
                _drop(device.shelf.rows[row.sm_pct][size], (row.free_permille, info.node, info.gpu, index))

    def _put_on(self, device: _Device, indices: Iterable[int]) -> None:
        """Puts them back, as they are now."""
        info, size = device.state.info, _size(device.free_memory_bytes)
        if info.health is DeviceHealth.LOST:
            return
        lists = device.shelf.used if device.rows else device.shelf.empty
        insort(lists.setdefault(size, []), (device.free_sm_pct, info.node, info.gpu, -1))
        for index in indices:
            row = device.rows.get(index)
            if row is not None:
                lists = device.shelf.rows.setdefault(row.sm_pct, {})
                insort(lists.setdefault(size, []), (row.free_permille, info.node, info.gpu, index))


def _size(memory_bytes: int) -> int:
    """The power of two, in units of 64 MiB, that an amount of memory is below."""
    return max(0, memory_bytes >> 26).bit_length()


def _drop(entries: list[_Entry], entry: _Entry) -> None:
    del entries[bisect_left(entries, entry)]
