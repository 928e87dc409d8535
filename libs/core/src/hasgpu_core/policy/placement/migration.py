"""Moves of instances that run: to empty a device, to free a whole GPU, to make room for one that waits.

Everything here is a pure function of what is bound; nothing is carried out. A move is made by starting the instance in
its new place, awaiting READY, and only then draining the old one, so for a while it holds room in both. The plans here
therefore never count room that a move is still to free: each move fits beside all that is bound now and the moves
before it. They can be carried out in their order, one at a time or several, stopped anywhere, and the capacity of no
function falls meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum

from hasgpu_core.events import PlannedInstance
from hasgpu_core.policy.placement.places import NoRoom, Placement, Ties
from hasgpu_core.policy.placement.rebinding import placing_order
from hasgpu_core.policy.placement.room import Room
from hasgpu_core.resources import WHOLE_PCT, WHOLE_PERMILLE, Allocation, DeviceState

MOST_TRIED = 16
"""Devices that a plan tries to empty: the ones with the least on them."""


class Purpose(Enum):
    """What moves are for."""

    EVACUATE = "evacuate"
    """A device or node is to hold nothing any more."""
    MAKE_ROOM = "make-room"
    FREE_GPU = "free-gpu"


@dataclass(frozen=True, slots=True)
class Bound:
    """An instance and where it is."""

    node: str
    planned: PlannedInstance
    model: str = ""
    """Of its device; a move to another model would change what its share is worth. "": any will do."""

    @property
    def device(self) -> tuple[str, str]:
        """(node, gpu)"""
        return self.node, self.planned.gpu


@dataclass(frozen=True, slots=True)
class Move:
    """One instance to another row."""

    bound: Bound
    """Where it is."""
    to: Placement


@dataclass(frozen=True, slots=True)
class MigrationPlan:
    """Moves, in the order in which they are to be made, and what they are good for."""

    purpose: Purpose
    moves: tuple[Move, ...]
    reason: str


TiesOf = Callable[[Bound], Ties]
"""Where else an instance's function is, and its weights are."""


def free_gpu(
    devices: Sequence[DeviceState],
    bound: Iterable[Bound],
    *,
    pinned: Collection[str],
    headroom_permille: int,
    most_moves: int,
    ties_of: TiesOf,
) -> MigrationPlan | None:
    """Returns moves after which a GPU that now holds something holds nothing, or None.

    Tried are the GPUs with the fewest instances. All instances of one have to fit on other GPUs in use, so the number
    of GPUs in use falls by one with each plan, and no plan can undo another: moving back would have to open a GPU.

    Args:
        devices: All that can be used, with the room of all that is bound taken.
        bound: What is bound, on them or elsewhere.
        pinned: Instances that may not be moved (they moved lately, or are not ready).
        headroom_permille: A row that gets an instance beside others keeps at least so much free, so that quotas can
            still grow where they are; without it the scaler would soon start another instance, on the freed GPU.
        most_moves: Instances that one plan may move.
        ties_of: See `TiesOf`.
    """
    on = _by_device(bound)
    in_use = [d for d in devices if on.get((d.info.node, d.info.gpu))]
    candidates = sorted(
        in_use, key=lambda d: (len(on[d.info.node, d.info.gpu]), _share(on, d), d.info.node, d.info.gpu)
    )
    for victim in candidates[:MOST_TRIED]:
        key = (victim.info.node, victim.info.gpu)
        leaving = on[key]
        if len(leaving) > most_moves or any(b.planned.instance in pinned for b in leaving):
            continue
        others = [d for d in in_use if d is not victim and d.info.model == victim.info.model]
        moves = _elsewhere(leaving, others, headroom_permille, ties_of)
        if moves is not None:
            reason = f"frees {key[0]}/{key[1]}: {len(in_use)} GPUs in use become {len(in_use) - 1}"
            return MigrationPlan(Purpose.FREE_GPU, moves, reason)
    return None


def make_room(
    waiting: Allocation,
    devices: Sequence[DeviceState],
    bound: Iterable[Bound],
    *,
    pinned: Collection[str],
    most_moves: int,
    ties_of: TiesOf,
) -> MigrationPlan | None:
    """Returns the fewest moves found after which an allocation that fits nowhere fits somewhere, or None.

    On each device that could hold the allocation if it were empty, whole rows (those with the least on them first) are
    moved to other devices until there is room; so are single instances of a row of the same SM share. Moves that are
    not needed in the end are left out.
    """
    on = _by_device(bound)
    best: tuple[MigrationPlan, DeviceState] | None = None
    able = [d for d in devices if _could_hold(d, waiting) and on.get((d.info.node, d.info.gpu))]
    by_most_free = sorted(able, key=lambda d: (sum(r.sm_pct for r in d.rows), d.info.node, d.info.gpu))
    for device in by_most_free[:MOST_TRIED]:
        here = on[device.info.node, device.info.gpu]
        for group in _groups(device, here, waiting):
            longest = most_moves if best is None else len(best[0].moves) - 1
            if not 0 < len(group) <= longest or any(b.planned.instance in pinned for b in group):
                continue
            others = [d for d in devices if d is not device and d.info.model == device.info.model]
            moves = _elsewhere(group, others, 0, ties_of)
            if moves is not None:
                where = f"{device.info.node}/{device.info.gpu}"
                asked = f"SM {waiting.sm_pct} %, {waiting.request_permille} ‰"
                best = MigrationPlan(Purpose.MAKE_ROOM, moves, f"makes room for {asked} on {where}"), device
    return best[0] if best is not None else None


def evacuate(
    leaving: Iterable[Bound], devices: Sequence[DeviceState], *, why: str, ties_of: TiesOf
) -> tuple[MigrationPlan, tuple[tuple[Bound, NoRoom], ...]]:
    """Returns moves for all that has to leave its device, and what fits nowhere, which stays where it is.

    Args:
        leaving: What is to leave.
        devices: Those that may take it; the ones to be emptied are not among them. Those of its own model come first.
        why: In words.
        ties_of: See `TiesOf`.
    """
    models = sorted({device.info.model for device in devices})
    rooms = {model: Room([d for d in devices if d.info.model == model]) for model in models}
    moves, stuck = [], []
    for item in _in_order(leaving, devices):
        allocation = item.planned.allocation
        reasons = []
        for model in sorted(models, key=lambda name: (name != item.model, name)):
            outcome = rooms[model].place(allocation, ties_of(item))
            if isinstance(outcome, Placement):
                rooms[model].occupy(outcome.node, outcome.gpu, outcome.row, allocation)
                moves.append(Move(item, outcome))
                break
            reasons.append(outcome.reason)
        else:
            stuck.append((item, NoRoom("; ".join(reasons) or "no other device is known")))
    return MigrationPlan(Purpose.EVACUATE, tuple(moves), why), tuple(stuck)


def _elsewhere(
    leaving: Sequence[Bound], devices: Sequence[DeviceState], headroom_permille: int, ties_of: TiesOf
) -> tuple[Move, ...] | None:
    """Places all of them, or returns None."""
    room = Room(devices)
    moves = []
    for item in _in_order(leaving, devices):
        allocation = item.planned.allocation
        roomy_permille = min(WHOLE_PERMILLE, allocation.request_permille + headroom_permille)
        outcome = room.place(replace(allocation, request_permille=roomy_permille), ties_of(item))
        if isinstance(outcome, NoRoom):
            return None
        room.occupy(outcome.node, outcome.gpu, outcome.row, allocation)
        moves.append(Move(item, outcome))
    return tuple(moves)


def _groups(device: DeviceState, here: Sequence[Bound], waiting: Allocation) -> Iterable[tuple[Bound, ...]]:
    """Sets of instances without which the allocation fits on the device, small ones first."""
    given_pct = device.info.given_sm_pct(waiting.sm_pct)
    rows: dict[int, list[Bound]] = {}
    for item in sorted(here, key=lambda b: (b.planned.allocation.request_permille, b.planned.instance)):
        rows.setdefault(item.planned.row, []).append(item)
    for row in device.rows:
        if row.sm_pct != given_pct:
            continue
        free_permille, memory_bytes, group = row.free_permille, device.free_memory_bytes, list[Bound]()
        # The largest first: the fewest moves.
        for item in reversed(rows.get(row.index, [])):
            if free_permille >= waiting.request_permille and memory_bytes >= waiting.memory_bytes:
                break
            group.append(item)
            free_permille += item.planned.allocation.request_permille
            memory_bytes += item.planned.allocation.memory_bytes
        if free_permille >= waiting.request_permille and memory_bytes >= waiting.memory_bytes:
            yield tuple(group)
    whole, free_pct, memory_bytes = list[Bound](), device.free_sm_pct, device.free_memory_bytes
    widths = {row.index: row.sm_pct for row in device.rows}
    for index in sorted(rows, key=lambda i: (len(rows[i]), -widths.get(i, 0), i)):
        if free_pct >= given_pct and memory_bytes >= waiting.memory_bytes:
            break
        whole += rows[index]
        free_pct += widths.get(index, 0)
        memory_bytes += sum(item.planned.allocation.memory_bytes for item in rows[index])
    if free_pct >= given_pct and memory_bytes >= waiting.memory_bytes:
        yield tuple(whole)


def _could_hold(device: DeviceState, allocation: Allocation) -> bool:
    info = device.info
    given_pct = info.given_sm_pct(allocation.sm_pct)
    return given_pct in info.sm_rungs_pct and given_pct <= WHOLE_PCT and allocation.memory_bytes <= info.memory_bytes


def _in_order(leaving: Iterable[Bound], devices: Iterable[DeviceState]) -> list[Bound]:
    largest_bytes = max((device.info.memory_bytes for device in devices), default=0)
    return sorted(
        leaving,
        key=lambda b: placing_order(
            b.planned.allocation, b.planned.instance, standby=b.planned.standby, memory_bytes=largest_bytes
        ),
    )


def _by_device(bound: Iterable[Bound]) -> Mapping[tuple[str, str], list[Bound]]:
    on: dict[tuple[str, str], list[Bound]] = {}
    for item in bound:
        on.setdefault(item.device, []).append(item)
    return on


def _share(on: Mapping[tuple[str, str], list[Bound]], device: DeviceState) -> float:
    return sum(b.planned.allocation.gpu_share for b in on[device.info.node, device.info.gpu])
