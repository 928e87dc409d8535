"""Places for instances, found by looking at every device: right for a few placements at a time."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from hasgpu_core.events import PlannedInstance
from hasgpu_core.function import MIB
from hasgpu_core.resources import WHOLE_PCT, WHOLE_PERMILLE, Allocation, DeviceHealth, DeviceState, Row

SHARED_ROW, USED_GPU, EMPTY_GPU = range(3)
"""The kinds of place, in the order of preference. Within a kind no place opens more GPUs or rows than another."""
LOOK_AT = 64
"""So many of the tightest places of a kind are compared by where the function's other instances and weights are."""
_NAMED = 4
"""Devices named in a reason; of a large cluster nobody reads more."""

Key = tuple[int, int, str, str, int]
"""(kind, what is free there, node, gpu, row); row -1: a new one."""


@dataclass(frozen=True, slots=True)
class Placement:
    """A row of a device, existing or new."""

    node: str
    gpu: str
    row: int
    new_row: bool
    reason: str


@dataclass(frozen=True, slots=True)
class NoRoom:
    """Nothing fits; the reason says what is free."""

    reason: str


@dataclass(frozen=True, slots=True)
class Rebound:
    """A lost instance and where it goes now."""

    planned: PlannedInstance
    """As it was bound before."""
    outcome: Placement | NoRoom


@dataclass(frozen=True, slots=True)
class Ties:
    """What ties a new instance to nodes, beyond its size."""

    others: Mapping[str, int] = field(default_factory=dict)
    """Instances that the function has already, by node."""
    warm: frozenset[str] = frozenset()
    """Nodes that have the function's weights: they fetched and unpacked its artifact for an instance before."""

    @property
    def binding(self) -> bool:
        """Whether they can make a difference at all."""
        return bool(self.others or self.warm)

    def score(self, node: str) -> tuple[bool, bool, int]:
        """Returns how little a node suits, the first difference counts.

        1. Whether all instances of the function would be on this node, so that its loss would be the function's.
        2. Whether the weights would have to be fetched.
        3. How many of the function's instances are there: what the node's loss would take with it.
        """
        alone = bool(self.others) and set(self.others) == {node}
        return alone, node not in self.warm, self.others.get(node, 0)

    @property
    def best(self) -> tuple[bool, bool, int]:
        """Returns a score that no node can be better than; where one has it, no other needs to be looked at."""
        return min([(False, True, 0), *(self.score(node) for node in self.warm)])


NO_TIES = Ties()


def place(allocation: Allocation, devices: Sequence[DeviceState], ties: Ties = NO_TIES) -> Placement | NoRoom:
    """Returns where an allocation fits.

    Preference, as HAS-GPU's released placement: a row with the same SM share and room for the request, the fullest
    first; else a new row on a GPU in use, the one with the least SMs free; else on an empty GPU. Ties go by (node,
    gpu, row), so the answer is deterministic. Only healthy devices that have the memory free and offer the SM share as
    a rung, or round it up to one, are looked at. A row without instances is as good as none.

    Spreading and affinity (`Ties.score`) decide among the `LOOK_AT` tightest places of the best kind, so they never
    cost a row or a GPU more at the time.
    """
    best_kind, keys = EMPTY_GPU, list[Key]()
    for device in devices:
        for key in _keys(allocation, device):
            if key[0] < best_kind:
                best_kind, keys = key[0], [key]
            elif key[0] == best_kind:
                keys.append(key)
    if not keys:
        return NoRoom(no_room_reason(allocation, devices))
    key = tied(heapq.nsmallest(LOOK_AT, keys), ties) if ties.binding else min(keys)
    device = next(d for d in devices if (d.info.node, d.info.gpu) == (key[2], key[3]))
    return placement(key, unused_index([row.index for row in live_rows(device)]), ties)


def tied(keys: Iterable[Key], ties: Ties) -> Key:
    """Returns the key that suits the ties best, the tightest of those; `keys` come tightest first, at least one."""
    best: tuple[tuple[bool, bool, int], Key] | None = None
    goal = ties.best
    for key in keys:
        score = ties.score(key[2])
        if best is None or score < best[0]:
            best = (score, key)
            if score <= goal:
                break
    assert best is not None, "at least one key is given"
    return best[1]


def most_permille(sm_pct: int, memory_bytes: int, devices: Iterable[DeviceState]) -> int:
    """Returns the largest request that `place` has room for with an SM share and memory; 0: none."""
    most = 0
    for device in devices:
        given_pct = device.info.given_sm_pct(sm_pct)
        if not _takes(device, given_pct, memory_bytes):
            continue
        free_sm_pct = WHOLE_PCT
        for row in device.rows:
            if row.used_permille > 0:
                free_sm_pct -= row.sm_pct
                if row.sm_pct == given_pct:
                    most = max(most, row.free_permille)
        if given_pct <= free_sm_pct:
            return WHOLE_PERMILLE
    return most


def occupy(devices: Sequence[DeviceState], placement: Placement, allocation: Allocation) -> tuple[DeviceState, ...]:
    """Returns the devices with an allocation placed, so that the next placement sees the room taken."""
    return tuple(
        _with_request(device, placement.row, allocation)
        if (device.info.node, device.info.gpu) == (placement.node, placement.gpu)
        else device
        for device in devices
    )


def live_rows(device: DeviceState) -> tuple[Row, ...]:
    """Returns the rows that hold something, by index; an empty row is only a remembrance and its SMs are free."""
    return tuple(sorted((row for row in device.rows if row.used_permille > 0), key=lambda row: row.index))


def placement(key: Key, new_index: int, ties: Ties) -> Placement:
    """Returns the placement that a key stands for; `new_index` is what a new row of its device would be called."""
    kind, free, node, gpu, row = key
    where = f"{node}/{gpu}"
    why = _tie_words(node, ties)
    if kind == SHARED_ROW:
        return Placement(node, gpu, row, False, f"shares row {row} of {where} ({free} ‰ free){why}")
    state = f"which is in use ({free} % of its SMs free)" if kind == USED_GPU else "which was empty"
    return Placement(node, gpu, new_index, True, f"new row {new_index} on {where}, {state}{why}")


def unused_index(taken: Iterable[int]) -> int:
    """Returns the lowest row index that is not taken."""
    indices = set(taken)
    index = 0
    while index in indices:
        index += 1
    return index


def no_room_reason(allocation: Allocation, devices: Sequence[DeviceState]) -> str:
    """Says what was asked and what the devices have free: those with the most SMs free, and how many there are."""
    asked = f"SM {allocation.sm_pct} %, {allocation.request_permille} ‰ and {allocation.memory_bytes // MIB} MiB"
    if not devices:
        return f"no room for {asked}: no device is known"
    devices = [device for device in devices if device.info.health is not DeviceHealth.LOST]
    if not devices:
        return f"no room for {asked}: no device is healthy"
    able = [d for d in devices if d.info.given_sm_pct(allocation.sm_pct) in d.info.sm_rungs_pct]
    if not able:
        rungs = sorted({rung for device in devices for rung in device.info.sm_rungs_pct})
        return f"no device gives SM {allocation.sm_pct} %: they offer {', '.join(map(str, rungs))} %"
    largest_bytes = max(device.info.memory_bytes for device in able)
    if allocation.memory_bytes > largest_bytes:
        largest = f"the largest that gives SM {allocation.sm_pct} % has {largest_bytes // MIB} MiB in all"
        return f"no device can ever hold {allocation.memory_bytes // MIB} MiB: {largest}"
    chosen = heapq.nsmallest(_NAMED, devices, key=lambda d: (-_free_sm_pct(d), d.info.node, d.info.gpu))
    free = [_free_words(device) for device in sorted(chosen, key=lambda d: (d.info.node, d.info.gpu))]
    more = [f"{len(devices) - _NAMED} more have no more SMs free"] if len(devices) > _NAMED else []
    return f"no room for {asked}: " + "; ".join(free + more)


def _free_words(device: DeviceState) -> str:
    shares = [f"SM {_free_sm_pct(device)} %", f"{device.free_memory_bytes // MIB} MiB"]
    shares += [f"row {row.index} (SM {row.sm_pct} %): {row.free_permille} ‰" for row in live_rows(device)]
    return f"{device.info.node}/{device.info.gpu} has free {', '.join(shares)}"


def _free_sm_pct(device: DeviceState) -> int:
    return WHOLE_PCT - sum(row.sm_pct for row in device.rows if row.used_permille > 0)


def _keys(allocation: Allocation, device: DeviceState) -> Iterable[Key]:
    """The places that a device has for an allocation."""
    info = device.info
    sm_pct = info.given_sm_pct(allocation.sm_pct)
    if not _takes(device, sm_pct, allocation.memory_bytes):
        return
    free_sm_pct, rows = WHOLE_PCT, 0
    for row in device.rows:
        if row.used_permille <= 0:
            continue
        rows += 1
        free_sm_pct -= row.sm_pct
        if row.sm_pct == sm_pct and row.free_permille >= allocation.request_permille:
            yield SHARED_ROW, row.free_permille, info.node, info.gpu, row.index
    if sm_pct <= free_sm_pct and allocation.request_permille <= WHOLE_PERMILLE:
        yield USED_GPU if rows else EMPTY_GPU, free_sm_pct, info.node, info.gpu, -1


def _takes(device: DeviceState, sm_pct: int, memory_bytes: int) -> bool:
    """Whether a device takes an SM share that it gives, and memory, if its rows have the room."""
    is_lost = device.info.health is DeviceHealth.LOST
    return not is_lost and sm_pct in device.info.sm_rungs_pct and memory_bytes <= device.free_memory_bytes


def _tie_words(node: str, ties: Ties) -> str:
    words = []
    if ties.others and node not in ties.others:
        words.append("none of the function's others is on this node")
    if node in ties.warm:
        words.append("the node has its weights")
    return "; " + ", ".join(words) if words else ""


def _with_request(device: DeviceState, index: int, allocation: Allocation) -> DeviceState:
    rows = {row.index: row for row in live_rows(device)}
    row = rows.get(index) or Row(index, device.info.given_sm_pct(allocation.sm_pct), 0)
    rows[index] = replace(row, used_permille=row.used_permille + allocation.request_permille)
    return replace(
        device,
        rows=tuple(rows[i] for i in sorted(rows)),
        memory_used_bytes=device.memory_used_bytes + allocation.memory_bytes,
    )
