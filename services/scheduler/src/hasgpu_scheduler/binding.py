"""Which instance runs on which row: a pure function of what is wanted, planned and known of the nodes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from hasgpu_core.events import DesiredInstance, HorizontalScaleEvent, InstanceEvent, NodeEvent, PlannedInstance
from hasgpu_core.function import MIB
from hasgpu_core.policy.placement import NoRoom, Placement, Room, Ties, ordinal_key, placing_order
from hasgpu_core.resources import WHOLE_PERMILLE, Allocation, DeviceHealth, DeviceInfo, DeviceState, InstanceState, Row


@dataclass(frozen=True, slots=True)
class NodeView:
    """A node as a pass sees it."""

    event: NodeEvent | None
    """Its last heartbeat; None: only a plan is known of it."""
    alive: bool
    shunned: frozenset[str] = frozenset()
    """Devices that have been degraded for long: they get something new only where nothing else has room."""

    @property
    def usable(self) -> bool:
        """Whether new instances may go there."""
        return self.alive and self.event is not None and not self.event.draining

    @property
    def devices(self) -> Mapping[str, DeviceInfo]:
        """Its devices by name, without those that are lost; empty while it is unknown."""
        devices = self.event.devices if self.event else ()
        return {device.gpu: device for device in devices if device.health is not DeviceHealth.LOST}


@dataclass(frozen=True, slots=True)
class Unplaced:
    """An instance that is not (or not fully) where it should be, and why."""

    function: str
    desired: DesiredInstance
    reason: str


@dataclass(frozen=True, slots=True)
class Binding:
    """The outcome of a pass."""

    plans: Mapping[str, tuple[PlannedInstance, ...]]
    """By node, sorted by id; every node that has a plan or is alive."""
    unplaced: tuple[Unplaced, ...]
    notes: Mapping[str, str] = field(default_factory=dict)
    """Why each instance that was placed in this pass is where it is, by id."""


@dataclass(slots=True)
class _Slot:
    """An instance on a node while the pass works."""

    node: str
    planned: PlannedInstance
    ready: bool

    @property
    def row(self) -> tuple[str, str, int]:
        """(node, gpu, row)"""
        return self.node, self.planned.gpu, self.planned.row

    @property
    def comes(self) -> bool:
        """Whether it is to take over from one that still serves on another node."""
        return bool(self.planned.moving_from)

    @property
    def order(self) -> tuple[bool, bool, tuple[str, int]]:
        """Who keeps its place when a row is contended: what serves, then active before standby, then the oldest."""
        return (not self.ready, self.planned.standby, ordinal_key(self.planned.instance))


@dataclass(frozen=True, slots=True)
class _Waiting:
    """A wanted instance that needs a place."""

    desired: DesiredInstance
    function: str
    allocation: Allocation
    revision: int
    old: _Slot | None
    """Where it may stay when nothing else fits."""
    why: str


def device_states(
    nodes: Mapping[str, NodeView], plans: Mapping[str, Iterable[PlannedInstance]], *, shunned: bool = False
) -> list[DeviceState]:
    """Returns the devices of usable nodes with what the plans take of them, sorted by (node, gpu).

    `shunned`: those that are shunned, in place of the others.
    """
    states = []
    for name in sorted(nodes):
        if not nodes[name].usable:
            continue
        on: dict[str, list[PlannedInstance]] = {}
        for planned in plans.get(name, ()):
            on.setdefault(planned.gpu, []).append(planned)
        for gpu, info in sorted(nodes[name].devices.items()):
            if (gpu in nodes[name].shunned) != shunned:
                continue
            mine = on.get(gpu, [])
            used_bytes = sum(p.allocation.memory_bytes for p in mine)
            states.append(DeviceState(info=info, rows=rows_of(mine, info), memory_used_bytes=used_bytes))
    return states


def rows_of(planned: Iterable[PlannedInstance], device: DeviceInfo) -> tuple[Row, ...]:
    """Returns the rows that one device's instances make up; a row's SM share is what the device gives for theirs."""
    sm_pct: dict[int, int] = {}
    used: dict[int, int] = {}
    for entry in planned:
        sm_pct[entry.row] = max(sm_pct.get(entry.row, 0), device.given_sm_pct(entry.allocation.sm_pct))
        used[entry.row] = used.get(entry.row, 0) + entry.allocation.request_permille
    return tuple(Row(index=row, sm_pct=sm_pct[row], used_permille=used[row]) for row in sorted(sm_pct))


def bind(
    nodes: Mapping[str, NodeView],
    wanted: Mapping[str, HorizontalScaleEvent],
    plans: Mapping[str, Sequence[PlannedInstance]],
    reported: Mapping[str, InstanceEvent],
    warm: Mapping[str, frozenset[str]] | None = None,
) -> Binding:
    """Returns the plans that come closest to what is wanted.

    1. What is no longer wanted leaves its plan.
    2. An instance that moves between nodes is in two plans. Once it is READY on the new node it leaves the old one;
       when the new node can't take it any more it stays where it is; when the old one is lost, the new one is all there
       is.
    3. Shares follow the newest revision known (the last command, or what an agent reports); a row is never over-filled:
       who shrinks goes first, who finds no room to grow stays as it is and is listed.
    4. What has no place, or sits on a lost node, is placed by `hasgpu_core.policy.placement.Room`. So is what sits on a
       draining node and does not serve yet; what serves there stays until it has been moved (see
       `hasgpu_scheduler.moving`).
       When nothing fits, an instance of a lost or draining node stays in that node's plan (its worker may still serve,
       or come back) and is listed; any other waits, listed.

    Equal arguments give equal results; applying it to its own outcome changes nothing.

    Args:
        nodes: All nodes known.
        wanted: The last command of each function.
        plans: What the nodes' plans hold.
        reported: What agents said last of each instance.
        warm: By function, nodes that have its weights.
    """
    desired = {d.instance: (d, event) for event in wanted.values() for d in event.instances}
    slots = _kept_slots(nodes, plans, reported, desired)
    unplaced: dict[str, Unplaced] = {}
    waiting: list[_Waiting] = []
    slots = _follow(_settle_rows(slots, reported, desired, unplaced, waiting))
    coming = {slot.planned.instance: slot for slot in slots if slot.comes}
    slots, moving = _leave_nodes([slot for slot in slots if not slot.comes], nodes, desired)
    waiting.extend(moving)
    present = {slot.planned.instance for slot in slots} | {w.desired.instance for w in waiting}
    waiting.extend(
        _Waiting(d, event.function, d.allocation, event.revision, None, "new")
        for instance, (d, event) in desired.items()
        if instance not in present
    )
    staying = {slot.planned.instance for slot in slots}
    coming = {instance: slot for instance, slot in coming.items() if instance in staying}
    vacating = _vacating(slots, reported)
    notes = _place_all(slots, [*coming.values(), *vacating], waiting, nodes, unplaced, warm or {})
    result: dict[str, list[PlannedInstance]] = {name: [] for name in nodes if nodes[name].alive}
    result.update({name: [] for name in plans})
    for slot in slots:
        new = coming.get(slot.planned.instance)
        result[slot.node].append(replace(slot.planned, moving_from="", moving_to=new.node if new else ""))
    for slot in coming.values():
        result[slot.node].append(slot.planned)
    return Binding(
        plans={name: tuple(sorted(result[name], key=lambda p: ordinal_key(p.instance))) for name in sorted(result)},
        unplaced=tuple(unplaced[key] for key in sorted(unplaced, key=ordinal_key)),
        notes=notes,
    )


_Desired = Mapping[str, tuple[DesiredInstance, HorizontalScaleEvent]]


def _kept_slots(
    nodes: Mapping[str, NodeView],
    plans: Mapping[str, Sequence[PlannedInstance]],
    reported: Mapping[str, InstanceEvent],
    desired: _Desired,
) -> list[_Slot]:
    """What is planned and still wanted: one slot of each instance, two of one that moves between nodes.

    Of an id that two plans hold otherwise (a crash between two writes) one survives.
    """
    found: dict[str, list[_Slot]] = {}
    for node in sorted(plans, key=lambda name: (name not in nodes or not nodes[name].usable, name)):
        for planned in plans[node]:
            if planned.instance in desired:
                event = reported.get(planned.instance)
                ready = event is not None and event.node == node and event.state is InstanceState.READY
                found.setdefault(planned.instance, []).append(_Slot(node, planned, ready))
    slots = []
    for instance, of_instance in found.items():
        old = next((slot for slot in of_instance if not slot.comes), None)
        new = next((slot for slot in of_instance if slot.comes), None)
        if old is not None and new is not None:
            if not _takes(new, nodes) or new.planned.moving_from != old.node:
                new = None
            elif new.ready or not _serves(old, nodes, reported.get(instance)):
                old = None
        if old is not None:
            slots.append(old)
        if new is not None:
            if old is None:
                new.planned = replace(new.planned, moving_from="")
            slots.append(new)
    return slots


def _takes(slot: _Slot, nodes: Mapping[str, NodeView]) -> bool:
    """Whether what is to come on a slot still can."""
    view = nodes.get(slot.node)
    return view is not None and view.usable and slot.planned.gpu in view.devices


def _serves(slot: _Slot, nodes: Mapping[str, NodeView], event: InstanceEvent | None) -> bool:
    """Whether an instance that is to be replaced may still serve, for all that is known."""
    view = nodes.get(slot.node)
    if view is None or not view.alive:
        return False
    if view.event is not None and slot.planned.gpu not in view.devices:
        return False
    return event is None or event.state not in (InstanceState.FAILED, InstanceState.STOPPED)


def _vacating(slots: Sequence[_Slot], reported: Mapping[str, InstanceEvent]) -> list[_Slot]:
    """What still serves in another row of its node than planned: it holds that room until its successor is ready."""
    out = []
    for slot in slots:
        event = reported.get(slot.planned.instance)
        if (
            event is not None
            and event.state is InstanceState.READY
            and event.node == slot.node
            and (event.gpu, event.row) != (slot.planned.gpu, slot.planned.row)
        ):
            planned = replace(slot.planned, gpu=event.gpu, row=event.row, allocation=event.allocation)
            out.append(_Slot(slot.node, planned, ready=True))
    return out


def _follow(slots: list[_Slot]) -> list[_Slot]:
    """Gives what comes the share of what it is to replace; where there is no room for that, the move is given up."""
    old = {slot.planned.instance: slot for slot in slots if not slot.comes}
    used: dict[tuple[str, str, int], int] = {}
    for slot in slots:
        used[slot.row] = used.get(slot.row, 0) + slot.planned.allocation.request_permille
    kept = []
    for slot in slots:
        if slot.comes:
            source = old.get(slot.planned.instance)
            if source is None:
                continue
            share, now = source.planned.allocation, slot.planned.allocation
            more_permille = share.request_permille - now.request_permille
            is_other = share.sm_pct != now.sm_pct or share.memory_bytes > now.memory_bytes
            if is_other or more_permille > max(0, WHOLE_PERMILLE - used[slot.row]):
                continue
            used[slot.row] += more_permille
            slot.planned = replace(
                slot.planned,
                allocation=share,
                allocation_revision=source.planned.allocation_revision,
                standby=source.planned.standby,
            )
        kept.append(slot)
    return kept


def _settle_rows(
    slots: list[_Slot],
    reported: Mapping[str, InstanceEvent],
    desired: _Desired,
    unplaced: dict[str, Unplaced],
    waiting: list[_Waiting],
) -> list[_Slot]:
    """Brings the shares of every row up to date without over-filling it; returns the slots that keep their place."""
    rows: dict[tuple[str, str, int], list[_Slot]] = {}
    for slot in slots:
        rows.setdefault((slot.node, slot.planned.gpu, slot.planned.row), []).append(slot)
    kept: list[_Slot] = []
    for key in sorted(rows):
        stay = _newest_in_force(sorted(rows[key], key=lambda slot: slot.order), reported, desired, waiting)
        changes = [(slot, *desired[slot.planned.instance]) for slot in stay if not slot.comes]
        changes = [c for c in changes if c[2].revision >= c[0].planned.allocation_revision]
        changes.sort(key=lambda c: c[1].allocation.request_permille > c[0].planned.allocation.request_permille)
        leaving = set()
        for slot, want, event in changes:
            now = slot.planned.allocation
            growth = want.allocation.request_permille - now.request_permille
            free = _free_permille(stay)
            if want.allocation.sm_pct != now.sm_pct or want.allocation.memory_bytes > now.memory_bytes:
                # A row has one SM share, so another one means another row; more memory has to be looked for on the
                # whole device. The old place is kept until one is found.
                why = f"has {_words(now)}, wants {_words(want.allocation)}"
                waiting.append(_Waiting(want, event.function, want.allocation, event.revision, slot, why))
                leaving.add(want.instance)
            elif growth > max(free, 0):
                reason = (
                    f"stays at {now.request_permille} ‰: row {key[2]} of {key[0]}/{key[1]} has {free} ‰ free, "
                    f"{growth} ‰ more are wanted"
                )
                unplaced[want.instance] = Unplaced(event.function, want, reason)
            else:
                slot.planned = replace(
                    slot.planned,
                    allocation=want.allocation,
                    allocation_revision=event.revision,
                    standby=want.standby,
                )
        kept.extend(slot for slot in stay if slot.comes or slot.planned.instance not in leaving)
    return kept


def _words(allocation: Allocation) -> str:
    return f"{allocation.sm_pct} % of the SMs and {allocation.memory_bytes // MIB} MiB"


def _newest_in_force(
    members: list[_Slot], reported: Mapping[str, InstanceEvent], desired: _Desired, waiting: list[_Waiting]
) -> list[_Slot]:
    """Takes over what agents report in force where it is newer than the plan; returns who stays in the row.

    Shrinking is taken over first. Where a serving instance has grown into the room of one that is not ready yet, the
    latter looks for another place. What fits in no way (reports that arrive out of step) waits for the next report.
    """
    stay = list(members)
    growing = []
    for slot in members:
        event = _newer_report(slot, reported)
        if event is None:
            continue
        if event.allocation.request_permille <= slot.planned.allocation.request_permille:
            _take_over(slot, event)
        else:
            growing.append((slot, event))
    for slot, event in growing:
        need = event.allocation.request_permille - slot.planned.allocation.request_permille
        while slot.ready and need > _free_permille(stay):
            loading = [other for other in stay if other is not slot and not other.ready]
            if not loading:
                break
            out = next((other for other in loading if other.comes), loading[-1])
            stay.remove(out)
            if out.comes:
                continue  # it serves elsewhere and may stay there
            want, command = desired[out.planned.instance]
            why = f"row {out.planned.row} of {out.node}/{out.planned.gpu} filled up before it was ready"
            waiting.append(_Waiting(want, command.function, want.allocation, command.revision, None, why))
        if slot in stay and need <= _free_permille(stay):
            _take_over(slot, event)
    return stay


def _newer_report(slot: _Slot, reported: Mapping[str, InstanceEvent]) -> InstanceEvent | None:
    """What the slot's agent reports in force, when it is newer than the plan and fits the row's SM share."""
    event = reported.get(slot.planned.instance)
    if (
        event is None
        or event.node != slot.node
        or event.allocation_revision <= slot.planned.allocation_revision
        or event.allocation.sm_pct != slot.planned.allocation.sm_pct
        or event.allocation.request_permille <= 0
    ):
        return None
    return event


def _take_over(slot: _Slot, event: InstanceEvent) -> None:
    slot.planned = replace(slot.planned, allocation=event.allocation, allocation_revision=event.allocation_revision)


def _free_permille(slots: list[_Slot]) -> int:
    return WHOLE_PERMILLE - sum(slot.planned.allocation.request_permille for slot in slots)


def _leave_nodes(
    slots: list[_Slot], nodes: Mapping[str, NodeView], desired: _Desired
) -> tuple[list[_Slot], list[_Waiting]]:
    """Splits off what has to leave its node; a slot on a device that is gone can't stay in any case."""
    kept, moving = [], []
    for slot in slots:
        view = nodes.get(slot.node, NodeView(None, alive=False))
        want, event = desired[slot.planned.instance]
        missing = view.event is not None and slot.planned.gpu not in view.devices
        serves_on = view.alive and slot.ready and not missing
        if (view.usable and not missing) or serves_on or (view.alive and view.event is None):
            # On a draining node what serves is moved, not dropped. Alive and unknown: right after a start, before its
            # first heartbeat came; it has its time-out.
            kept.append(slot)
            continue
        if missing:
            why = f"device {slot.planned.gpu} of node {slot.node} is gone"
        elif not view.alive:
            why = f"node {slot.node} is lost"
        else:
            why = f"node {slot.node} drains"
        moving.append(
            _Waiting(
                want,
                event.function,
                slot.planned.allocation,
                slot.planned.allocation_revision,
                None if missing else slot,
                why,
            )
        )
    return kept, moving


def _place_all(
    slots: list[_Slot],
    moving: Sequence[_Slot],
    waiting: list[_Waiting],
    nodes: Mapping[str, NodeView],
    unplaced: dict[str, Unplaced],
    warm: Mapping[str, frozenset[str]],
) -> dict[str, str]:
    """Places what waits, in `placing_order`, and appends it to `slots`; returns why each is where it is.

    `moving` holds the second place of what is on the move.
    """
    if not waiting:
        return {}
    # Who may stay where it is holds that place until it has a better one, so nobody else can take it in between.
    held = [want.old for want in waiting if want.old is not None]
    taken: dict[str, list[PlannedInstance]] = {}
    others: dict[str, dict[str, int]] = {}
    for slot in (*slots, *held):
        taken.setdefault(slot.node, []).append(slot.planned)
        _count(others, slot, 1)
    for slot in moving:
        taken.setdefault(slot.node, []).append(slot.planned)
    good = device_states(nodes, taken)
    rooms = [Room(good)]
    if bad := device_states(nodes, taken, shunned=True):
        rooms.append(Room(bad))
    largest_bytes = max((state.info.memory_bytes for state in (*good, *bad)), default=0)
    notes = {}
    for want in sorted(
        waiting,
        key=lambda w: placing_order(
            w.allocation, w.desired.instance, standby=w.desired.standby, memory_bytes=largest_bytes
        ),
    ):
        instance = want.desired.instance
        if want.old is not None:
            _count(others, want.old, -1)
            for room in rooms:
                room.release(*want.old.row, want.old.planned.allocation)
        ties = Ties(others.get(want.function, {}), warm.get(want.function, frozenset()))
        found, room = _find(rooms, want.allocation, ties)
        if isinstance(found, NoRoom):
            why = found.reason if want.why == "new" else f"{want.why}; {found.reason}"
            unplaced[instance] = Unplaced(want.function, want.desired, why)
            if want.old is not None:
                _count(others, want.old, 1)
                slots.append(want.old)
                for room in rooms:
                    if room.knows(want.old.node, want.old.planned.gpu):
                        room.occupy(*want.old.row, want.old.planned.allocation)
            continue
        room.occupy(found.node, found.gpu, found.row, want.allocation)
        planned = PlannedInstance(
            function=want.function,
            instance=instance,
            gpu=found.gpu,
            row=found.row,
            allocation=want.allocation,
            allocation_revision=want.revision,
            standby=want.desired.standby,
        )
        slots.append(_Slot(found.node, planned, ready=False))
        _count(others, slots[-1], 1)
        unplaced.pop(instance, None)
        notes[instance] = f"{instance} to {found.node}/{found.gpu} row {found.row} ({want.why}; {found.reason})"
    return notes


def _find(rooms: Sequence[Room], allocation: Allocation, ties: Ties) -> tuple[Placement | NoRoom, Room]:
    """Looks in one room after the other; when all are full, the first says why."""
    first: Placement | NoRoom | None = None
    for room in rooms:
        found = room.place(allocation, ties)
        if isinstance(found, Placement):
            return found, room
        first = first or found
    assert first is not None, "there is a room, even if it is empty"
    return first, rooms[0]


def _count(others: dict[str, dict[str, int]], slot: _Slot, by: int) -> None:
    """Counts a function's instances by node."""
    of_function = others.setdefault(slot.planned.function, {})
    of_function[slot.node] = of_function.get(slot.node, 0) + by
    if of_function[slot.node] <= 0:
        del of_function[slot.node]
