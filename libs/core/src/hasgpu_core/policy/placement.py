"""Where an instance goes: node, GPU and row."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from hasgpu_core.events import PlannedInstance
from hasgpu_core.resources import WHOLE_PCT, WHOLE_PERMILLE, Allocation, DeviceHealth, DeviceState, Row

_SHARED_ROW, _USED_GPU, _EMPTY_GPU = range(3)
"""The order of preference."""

_Key = tuple[int, int, str, str, int]
"""(preference, what is free there, node, gpu, row)."""


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


def place(allocation: Allocation, devices: Sequence[DeviceState]) -> Placement | NoRoom:
    """Returns where an allocation fits.

    Preference, as HAS-GPU's released placement: a row with the same SM share and room for the request, the fullest
    first; else a new row on a GPU in use, the one with the least SMs free; else on an empty GPU. Ties go by (node,
    gpu, row), so the answer is deterministic. Only healthy devices that have the memory free and offer the SM share as
    a rung, or round it up to one, are looked at. A row without instances is as good as none.
    """
    best: tuple[_Key, DeviceState] | None = None
    for device in devices:
        info = device.info
        sm_pct = info.given_sm_pct(allocation.sm_pct)
        if not _takes(device, sm_pct, allocation.memory_bytes):
            continue
        free_sm_pct, rows = WHOLE_PCT, 0
        for row in device.rows:
            if row.used_permille <= 0:
                continue
            rows += 1
            free_sm_pct -= row.sm_pct
            if row.sm_pct == sm_pct and row.free_permille >= allocation.request_permille:
                key = (_SHARED_ROW, row.free_permille, info.node, info.gpu, row.index)
                if best is None or key < best[0]:
                    best = (key, device)
        if sm_pct <= free_sm_pct and allocation.request_permille <= WHOLE_PERMILLE:
            key = (_USED_GPU if rows else _EMPTY_GPU, free_sm_pct, info.node, info.gpu, -1)
            if best is None or key < best[0]:
                best = (key, device)
    if best is None:
        return NoRoom(_no_room(allocation, devices))
    return _placement(*best)


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


def rebind(lost: Iterable[PlannedInstance], devices: Sequence[DeviceState]) -> tuple[Rebound, ...]:
    """Returns new places for instances whose node is gone, or whose plan has to be made anew.

    Active instances go before standbys, larger shares before smaller ones, then by id, so that equal arguments give
    equal answers. `devices` are the live ones, without the room of the lost instances; each placement takes its room
    from those after it. What fits nowhere has NoRoom as its outcome and should be tried again when room appears.
    """
    out = []
    room = tuple(devices)
    order = sorted(lost, key=lambda p: (p.standby, -p.allocation.gpu_share, p.function, p.instance))
    for planned in order:
        outcome = place(planned.allocation, room)
        if isinstance(outcome, Placement):
            room = occupy(room, outcome, planned.allocation)
        out.append(Rebound(planned, outcome))
    return tuple(out)


def live_rows(device: DeviceState) -> tuple[Row, ...]:
    """Returns the rows that hold something, by index; an empty row is only a remembrance and its SMs are free."""
    return tuple(sorted((row for row in device.rows if row.used_permille > 0), key=lambda row: row.index))


def _takes(device: DeviceState, sm_pct: int, memory_bytes: int) -> bool:
    """Whether a device takes an SM share that it gives, and memory, if its rows have the room."""
    is_lost = device.info.health is DeviceHealth.LOST
    return not is_lost and sm_pct in device.info.sm_rungs_pct and memory_bytes <= device.free_memory_bytes


def _placement(key: _Key, device: DeviceState) -> Placement:
    kind, free, node, gpu, row = key
    where = f"{node}/{gpu}"
    if kind == _SHARED_ROW:
        return Placement(node, gpu, row, False, f"shares row {row} of {where} ({free} ‰ free)")
    index = _unused_index(live_rows(device))
    state = f"which is in use ({free} % of its SMs free)" if kind == _USED_GPU else "which was empty"
    return Placement(node, gpu, index, True, f"new row {index} on {where}, {state}")


def _with_request(device: DeviceState, index: int, allocation: Allocation) -> DeviceState:
    rows = {row.index: row for row in live_rows(device)}
    row = rows.get(index) or Row(index, device.info.given_sm_pct(allocation.sm_pct), 0)
    rows[index] = replace(row, used_permille=row.used_permille + allocation.request_permille)
    return replace(
        device,
        rows=tuple(rows[i] for i in sorted(rows)),
        memory_used_bytes=device.memory_used_bytes + allocation.memory_bytes,
    )


def _unused_index(rows: Sequence[Row]) -> int:
    taken = {row.index for row in rows}
    return next(i for i in range(len(taken) + 1) if i not in taken)


def _no_room(allocation: Allocation, devices: Sequence[DeviceState]) -> str:
    """Says what was asked and what each device has free."""
    asked = f"SM {allocation.sm_pct} %, {allocation.request_permille} ‰ and {allocation.memory_bytes >> 20} MiB"
    if not devices:
        return f"no room for {asked}: no device is known"
    devices = [device for device in devices if device.info.health is not DeviceHealth.LOST]
    if not devices:
        return f"no room for {asked}: no device is healthy"
    if all(device.info.given_sm_pct(allocation.sm_pct) not in device.info.sm_rungs_pct for device in devices):
        rungs = sorted({rung for device in devices for rung in device.info.sm_rungs_pct})
        return f"no device gives SM {allocation.sm_pct} %: they offer {', '.join(map(str, rungs))} %"
    free = []
    for device in sorted(devices, key=lambda d: (d.info.node, d.info.gpu)):
        rows = live_rows(device)
        shares = [f"SM {WHOLE_PCT - sum(row.sm_pct for row in rows)} %", f"{device.free_memory_bytes >> 20} MiB"]
        shares += [f"row {row.index} (SM {row.sm_pct} %): {row.free_permille} ‰" for row in rows]
        free.append(f"{device.info.node}/{device.info.gpu} has free {', '.join(shares)}")
    return f"no room for {asked}: " + "; ".join(free)
