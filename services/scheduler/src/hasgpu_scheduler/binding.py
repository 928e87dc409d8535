"""Which instance runs on which row: a pure function of what is wanted, planned and known of the nodes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from hasgpu_core.events import DesiredInstance, HorizontalScaleEvent, InstanceEvent, NodeEvent, PlannedInstance
from hasgpu_core.function import MIB
from hasgpu_core.policy.placement import NoRoom, place
from hasgpu_core.resources import WHOLE_PERMILLE, Allocation, DeviceHealth, DeviceInfo, DeviceState, InstanceState, Row


@dataclass(frozen=True, slots=True)
class NodeView:
    """A node as a pass sees it."""

    event: NodeEvent | None
    """Its last heartbeat; None: only a plan is known of it."""
    alive: bool

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


def ordinal_key(instance: str) -> tuple[str, int]:
    """Returns a key that sorts `f-2` before `f-10`."""
    match = re.fullmatch(r"(.*)-(\d+)", instance)
    return (match[1], int(match[2])) if match else (instance, 0)


def device_states(nodes: Mapping[str, NodeView], plans: Mapping[str, Iterable[PlannedInstance]]) -> list[DeviceState]:
    """Returns the devices of usable nodes with what the plans take of them, sorted by (node, gpu)."""
    states = []
    for name in sorted(nodes):
        if not nodes[name].usable:
            continue
        planned = tuple(plans.get(name, ()))
        for gpu, info in sorted(nodes[name].devices.items()):
            mine = [p for p in planned if p.gpu == gpu]
            states.append(
                DeviceState(
                    info=info, rows=rows_of(mine, info), memory_used_bytes=sum(p.allocation.memory_bytes for p in mine)
                )
            )
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
    plans: Mapping[str, tuple[PlannedInstance, ...]],
    reported: Mapping[str, InstanceEvent],
) -> Binding:
    """Returns the plans that come closest to what is wanted.

    1. What is no longer wanted leaves its plan.
    2. Shares follow the newest revision known (the last command, or what an agent reports); a row is never over-filled:
       who shrinks goes first, who finds no room to grow stays as it is and is listed.
    3. What has no place, or sits on a lost or draining node, is placed with `hasgpu_core.policy.placement.place`. When
       nothing fits, an instance of a lost or draining node stays in that node's plan (its worker may still serve, or
       come back) and is listed; any other waits, listed.

    Equal arguments give equal results; applying it to its own outcome changes nothing.
    """
    desired = {d.instance: (d, event) for event in wanted.values() for d in event.instances}
    slots = _kept_slots(nodes, plans, reported, desired)
    unplaced: dict[str, Unplaced] = {}
    waiting: list[_Waiting] = []
    slots = _settle_rows(slots, reported, desired, unplaced, waiting)
    slots, moving = _leave_nodes(slots, nodes, desired)
    waiting.extend(moving)
    present = {slot.planned.instance for slot in slots} | {w.desired.instance for w in waiting}
    waiting.extend(
        _Waiting(d, event.function, d.allocation, event.revision, None, "new")
        for instance, (d, event) in desired.items()
        if instance not in present
    )
    notes = _place_all(slots, waiting, nodes, unplaced)
    result: dict[str, list[PlannedInstance]] = {name: [] for name in nodes if nodes[name].alive}
    result.update({name: [] for name in plans})
    for slot in slots:
        result[slot.node].append(slot.planned)
    return Binding(
        plans={name: tuple(sorted(result[name], key=lambda p: ordinal_key(p.instance))) for name in sorted(result)},
        unplaced=tuple(unplaced[key] for key in sorted(unplaced, key=ordinal_key)),
        notes=notes,
    )


_Desired = Mapping[str, tuple[DesiredInstance, HorizontalScaleEvent]]


def _kept_slots(
    nodes: Mapping[str, NodeView],
    plans: Mapping[str, tuple[PlannedInstance, ...]],
    reported: Mapping[str, InstanceEvent],
    desired: _Desired,
) -> list[_Slot]:
    """What is planned and still wanted; of an id that two plans hold (a crash between two writes) one survives."""
    slots: dict[str, _Slot] = {}
    for node in sorted(plans, key=lambda name: (name not in nodes or not nodes[name].usable, name)):
        for planned in plans[node]:
            if planned.instance in desired and planned.instance not in slots:
                event = reported.get(planned.instance)
                ready = event is not None and event.node == node and event.state is InstanceState.READY
                slots[planned.instance] = _Slot(node, planned, ready)
    return list(slots.values())


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
        changes = [(slot, *desired[slot.planned.instance]) for slot in stay]
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
        kept.extend(slot for slot in stay if slot.planned.instance not in leaving)
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
            out = loading[-1]
            stay.remove(out)
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
        if (view.usable and not missing) or (view.alive and view.event is None):
            # Alive and unknown: right after a start, before its first heartbeat came; it has its time-out.
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
    waiting: list[_Waiting],
    nodes: Mapping[str, NodeView],
    unplaced: dict[str, Unplaced],
) -> dict[str, str]:
    """Places what waits, active instances first, and appends it to `slots`; returns why each is where it is."""
    notes = {}
    # Who may stay where it is holds that place until it has a better one, so nobody else can take it in between.
    slots.extend(want.old for want in waiting if want.old is not None)
    # The order of `hasgpu_core.policy.placement.rebind`.
    for want in sorted(
        waiting, key=lambda w: (w.desired.standby, -w.allocation.gpu_share, ordinal_key(w.desired.instance))
    ):
        others: dict[str, list[PlannedInstance]] = {}
        for slot in slots:
            if slot is not want.old:
                others.setdefault(slot.node, []).append(slot.planned)
        found = place(want.allocation, device_states(nodes, others))
        instance = want.desired.instance
        if isinstance(found, NoRoom):
            unplaced[instance] = Unplaced(
                want.function, want.desired, found.reason if want.why == "new" else f"{want.why}; {found.reason}"
            )
            continue
        if want.old is not None:
            slots.remove(want.old)
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
        unplaced.pop(instance, None)
        notes[instance] = f"{instance} to {found.node}/{found.gpu} row {found.row} ({want.why}; {found.reason})"
    return notes
