"""Moves of instances that serve: which begin, which are done, which are given up.

A move begins by a change of plans and ends by one; in between the node agents do the work.

- To another node: both plans name the instance, the new one with `moving_from`, the old one with `moving_to`. The new
  agent starts it and tells of it only when it is READY; then the scheduler takes it out of the old plan, whose agent
  drains it.
- To another device or row of its node: the plan names the new place. The agent starts a successor there, and drains the
  old worker when that is READY.

So the stored plans hold all that a restarted scheduler needs to go on. What is still to be moved is not stored: it is
found again from the state of things.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from hasgpu_core.events import DesiredInstance, InstanceEvent, PlannedInstance
from hasgpu_core.policy.placement import Ties, live_rows, unused_index
from hasgpu_core.policy.placement.migration import Bound, MigrationPlan, Move, Purpose, evacuate, free_gpu, make_room
from hasgpu_core.resources import WHOLE_PCT, Allocation, DeviceState, InstanceState

from hasgpu_scheduler.binding import Binding, NodeView, Unplaced, device_states

MOST_WAITING_TRIED = 4
"""Of the instances that wait, so many are tried at a look: each costs a search over the devices."""
RETRY_S = 60.0
"""An instance whose move was given up is not moved again before."""
_HOLDING = (InstanceState.LOADING, InstanceState.READY, InstanceState.DRAINING)


@dataclass(frozen=True, slots=True)
class MovingSettings:
    """How much is moved, and how often."""

    at_once: int = 2
    """Moves under way at a time; 0: nothing is ever moved."""
    period_s: float = 30.0
    """Between two looks for a GPU to free or room to make. A plan is begun when two looks in a row find it."""
    cooldown_s: float = 600.0
    """After a move, and after it was placed, an instance stays where it is for so long, unless it must leave."""
    timeout_s: float = 300.0
    """A move whose new instance is not READY by then is given up."""
    headroom_permille: int = 100
    """Left free in a row that gets an instance beside others."""
    most_moves: int = 16
    """Of one plan."""
    degraded_after_s: float = 30.0
    """A device degraded for longer gets nothing new and is emptied."""


@dataclass(frozen=True, slots=True)
class Happening:
    """Something worth telling."""

    kind: str
    """One of those named in scheduler.proto."""
    reason: str
    function: str = ""
    instance: str = ""
    node: str = ""


@dataclass(frozen=True, slots=True)
class UnderWay:
    """A move that has begun."""

    function: str
    instance: str
    source: str
    """"node/gpu", as of the other."""
    target: str
    reason: str


@dataclass(frozen=True, slots=True)
class Moved:
    """What a step makes of the plans."""

    plans: Mapping[str, tuple[PlannedInstance, ...]]
    notes: Mapping[str, str]
    stuck: tuple[Unplaced, ...]
    happenings: tuple[Happening, ...]


@dataclass(frozen=True, slots=True)
class _Begun:
    since_s: float
    reason: str
    source: tuple[str, str]
    target: tuple[str, str]
    ours: bool
    """Begun by this process as a move; else it may be a change of its share that needs another row."""


@dataclass(slots=True)
class _Step:
    """One step's working copy."""

    plans: dict[str, list[PlannedInstance]]
    nodes: Mapping[str, NodeView]
    reported: Mapping[str, InstanceEvent]
    warm: Mapping[str, frozenset[str]]
    now_s: float
    notes: dict[str, str] = field(default_factory=dict)
    happenings: list[Happening] = field(default_factory=list)

    def bound(self) -> list[Bound]:
        """What is bound, without what is still to take over."""
        models = {name: {gpu: d.model for gpu, d in view.devices.items()} for name, view in self.nodes.items()}
        return [
            Bound(node, p, models.get(node, {}).get(p.gpu, ""))
            for node in sorted(self.plans)
            for p in self.plans[node]
            if not p.moving_from
        ]

    def ready(self, node: str, planned: PlannedInstance) -> bool:
        """Whether an instance serves where it is planned."""
        event = self.reported.get(planned.instance)
        return event is not None and event.state is InstanceState.READY and _place(event) == _spot(node, planned)

    def devices(self) -> list[DeviceState]:
        """The devices that may take something, with the room of all that is planned there or has not left yet."""
        taken: dict[str, list[PlannedInstance]] = {node: list(entries) for node, entries in self.plans.items()}
        planned = {(*_spot(node, p), p.instance) for node, entries in self.plans.items() for p in entries}
        for event in self.reported.values():
            if event.state in _HOLDING and event.gpu and (*_place(event), event.instance) not in planned:
                taken.setdefault(event.node, []).append(
                    PlannedInstance(event.function, event.instance, event.gpu, event.row, event.allocation, 0)
                )
        return device_states(self.nodes, taken)

    def has_room_for(self, node: str, planned: PlannedInstance) -> bool:
        """Whether an instance fits into a row beside all else that is planned, itself elsewhere left out."""
        taken = {n: [p for p in entries if p.instance != planned.instance] for n, entries in self.plans.items()}
        both = (*device_states(self.nodes, taken), *device_states(self.nodes, taken, shunned=True))
        device = next((d for d in both if (d.info.node, d.info.gpu) == (node, planned.gpu)), None)
        return device is not None and _fits(device, planned.row, planned.allocation)

    def ties_of(self, item: Bound) -> Ties:
        """Where the others of an instance's function are, itself left out."""
        function = item.planned.function
        others: dict[str, int] = {}
        for node, entries in self.plans.items():
            for p in entries:
                if p.function == function and p.instance != item.planned.instance:
                    others[node] = others.get(node, 0) + 1
        return Ties(others, self.warm.get(function, frozenset()))


class Migrator:
    """Decides, one step a pass, what moves."""

    def __init__(self, settings: MovingSettings) -> None:
        self._settings = settings
        self._begun: dict[str, _Begun] = {}
        self._moved_s: dict[str, float] = {}
        self._placed_s: dict[str, float] = {}
        self._retry_at_s: dict[str, float] = {}
        self._stuck: tuple[Unplaced, ...] = ()
        self._queue: list[Move] = []
        self._purpose = Purpose.EVACUATE
        self._reason = ""
        self._looked_s: float | None = None
        self._seen: tuple[Purpose, str] | None = None
        self._under_way: tuple[UnderWay, ...] = ()

    @property
    def under_way(self) -> tuple[UnderWay, ...]:
        """As of the last step."""
        return self._under_way

    @property
    def calm_until_s(self) -> float:
        """Until when a step would do again what the last one did, as long as nothing else changes.

        While something moves or is about to, not at all. Else until the next look for better places, or until an
        instance whose move was given up may be moved again.
        """
        if self._begun or self._queue:
            return -math.inf
        looks_s = math.inf if self._looked_s is None else self._looked_s + self._settings.period_s
        return min(looks_s, *self._retry_at_s.values(), math.inf) if self._settings.at_once > 0 else math.inf

    def reset(self) -> None:
        """Forgets what it meant to do; moves that have begun are in the plans."""
        self._begun.clear()
        self._queue.clear()
        self._looked_s = self._seen = None

    def step(
        self,
        now_s: float,
        binding: Binding,
        nodes: Mapping[str, NodeView],
        reported: Mapping[str, InstanceEvent],
        warm: Mapping[str, frozenset[str]],
    ) -> Moved:
        """Follows the moves under way and begins what may begin; with nothing to do the plans come back as they are."""
        step = _Step({n: list(entries) for n, entries in binding.plans.items()}, nodes, reported, warm, now_s)
        self._rest(now_s, binding.notes)
        self._give_up_late(step)
        going = self._going(step)
        self._note_ended(step, going)
        if self._settings.at_once > 0:
            self._fill_queue(step, binding, going)
            while self._queue and len(going) < self._settings.at_once:
                move = self._queue.pop(0)
                if not self._begin(step, move, going):
                    self._queue.clear()
        self._under_way = tuple(self._shown(step, going))
        plans = {node: tuple(entries) for node, entries in step.plans.items()}
        return Moved(plans, step.notes, self._stuck, tuple(step.happenings))

    def _rest(self, now_s: float, placed: Iterable[str]) -> None:
        """Notes what was placed just now, and forgets what has rested long enough."""
        for instance in placed:
            self._placed_s[instance] = now_s
        since_s = now_s - self._settings.cooldown_s
        self._placed_s = {i: at_s for i, at_s in self._placed_s.items() if at_s > since_s}
        self._moved_s = {i: at_s for i, at_s in self._moved_s.items() if at_s > since_s}
        self._retry_at_s = {i: at_s for i, at_s in self._retry_at_s.items() if at_s > now_s}

    # Moves under way

    def _going(self, step: _Step) -> dict[str, tuple[tuple[str, str], tuple[str, str]]]:
        """The moves under way: (node, gpu) of the old place and of the new one, by instance."""
        going = {}
        for node, entries in step.plans.items():
            for p in entries:
                event = step.reported.get(p.instance)
                if p.moving_from:
                    source = next((q.gpu for q in step.plans.get(p.moving_from, ()) if q.instance == p.instance), "")
                    going[p.instance] = ((p.moving_from, source), (node, p.gpu))
                elif (
                    event is not None
                    and event.node == node
                    and event.state is InstanceState.READY
                    and (event.gpu, event.row) != (p.gpu, p.row)
                ):
                    going[p.instance] = ((node, event.gpu), (node, p.gpu))
        for instance, (source_at, target_at) in going.items():
            if instance not in self._begun:
                self._begun[instance] = _Begun(step.now_s, "found under way", source_at, target_at, ours=False)
        return going

    def _note_ended(self, step: _Step, going: Mapping[str, object]) -> None:
        where = {p.instance: (node, p) for node, entries in step.plans.items() for p in entries if not p.moving_from}
        for instance in [i for i in self._begun if i not in going]:
            begun = self._begun.pop(instance)
            found = where.get(instance)
            if found is None:
                continue  # it is not wanted any more
            node, planned = found
            arrived = (node, planned.gpu) == begun.target
            took = f"after {step.now_s - begun.since_s:.1f} s"
            if arrived:
                self._moved_s[instance] = step.now_s
                text = f"{instance} has moved from {'/'.join(begun.source)} to {'/'.join(begun.target)} {took}"
                step.happenings.append(Happening("moved", text, planned.function, instance, node))
            else:
                self._retry_at_s[instance] = step.now_s + RETRY_S
                text = f"{instance} does not move to {'/'.join(begun.target)}: it could not be taken there"
                step.happenings.append(Happening("move-given-up", text, planned.function, instance, node))

    def _give_up_late(self, step: _Step) -> None:
        """Takes back the moves whose new instance does not get ready."""
        late = [i for i, begun in self._begun.items() if step.now_s - begun.since_s > self._settings.timeout_s]
        for instance in late:
            begun = self._begun[instance]
            if not self._take_back(step, instance):
                continue
            del self._begun[instance]
            self._queue.clear()
            self._retry_at_s[instance] = step.now_s + max(RETRY_S, self._settings.timeout_s)
            text = f"{instance} was not ready on {'/'.join(begun.target)} within {self._settings.timeout_s:g} s"
            step.notes[instance] = text
            step.happenings.append(Happening("move-given-up", text, "", instance, begun.target[0]))

    def _take_back(self, step: _Step, instance: str) -> bool:
        """Plans an instance where it still serves; False: it has no place there any more, or it is no move of ours."""
        event = step.reported.get(instance)
        for node, entries in step.plans.items():
            for p in entries:
                if p.instance != instance:
                    continue
                if p.moving_from:
                    entries.remove(p)
                    old = step.plans[p.moving_from]
                    old[:] = [replace(q, moving_to="") if q.instance == instance else q for q in old]
                    return True
                if event is not None and event.node == node and self._begun[instance].ours:
                    back = replace(p, gpu=event.gpu, row=event.row)
                    if step.has_room_for(node, back):
                        entries[entries.index(p)] = back
                        return True
        return False

    # New moves

    def _fill_queue(self, step: _Step, binding: Binding, going: Mapping[str, object]) -> None:
        """Plans moves: at once for what must leave, now and then for better places."""
        leaving = [b for b in step.bound() if self._must_leave(step, b) and b.planned.instance not in going]
        if leaving:
            if not (self._queue and self._purpose is Purpose.EVACUATE):
                plan, stuck = evacuate(leaving, step.devices(), why="its device is to be emptied", ties_of=step.ties_of)
                self._take(plan)
                self._stuck = tuple(
                    Unplaced(b.planned.function, _as_desired(b.planned), f"{_why(step, b)}; {no_room.reason}")
                    for b, no_room in stuck
                )
            return
        self._stuck = ()
        if self._queue or going:
            return
        if self._looked_s is not None and step.now_s - self._looked_s < self._settings.period_s:
            return
        self._looked_s = step.now_s
        plan_found = self._better(step, binding)
        seen = (plan_found.purpose, plan_found.reason) if plan_found is not None else None
        if plan_found is not None and seen == self._seen:
            self._take(plan_found)
            step.happenings.append(Happening("migration", f"{plan_found.reason}, by {_words(plan_found.moves)}"))
        self._seen = seen

    def _better(self, step: _Step, binding: Binding) -> MigrationPlan | None:
        """Moves that make room for something that waits, else moves that free a GPU."""
        bound, devices = step.bound(), step.devices()
        pinned = {b.planned.instance for b in bound if not step.ready(b.node, b.planned)}
        pinned |= {*self._moved_s, *self._retry_at_s}
        somewhere = {b.planned.instance for b in bound}
        waiting = [item for item in binding.unplaced if item.desired.instance not in somewhere]
        waiting.sort(key=lambda item: (item.desired.standby, -item.desired.allocation.gpu_share))
        for item in waiting[:MOST_WAITING_TRIED]:
            most = self._settings.most_moves
            plan = make_room(
                item.desired.allocation, devices, bound, pinned=pinned, most_moves=most, ties_of=step.ties_of
            )
            if plan is not None:
                return replace(plan, reason=f"{item.desired.instance} waits: {plan.reason}")
        return free_gpu(
            devices,
            bound,
            pinned=pinned | set(self._placed_s),
            headroom_permille=self._settings.headroom_permille,
            most_moves=self._settings.most_moves,
            ties_of=step.ties_of,
        )

    def _take(self, plan: MigrationPlan) -> None:
        self._queue = [m for m in plan.moves if m.bound.planned.instance not in self._begun]
        self._purpose, self._reason = plan.purpose, plan.reason

    def _must_leave(self, step: _Step, item: Bound) -> bool:
        """Whether an instance serves on a node that drains or a device that has been degraded for long."""
        view = step.nodes.get(item.node)
        if view is None or not view.alive or view.event is None or item.planned.gpu not in view.devices:
            return False
        if not (view.event.draining or item.planned.gpu in view.shunned):
            return False
        return step.ready(item.node, item.planned) and item.planned.instance not in self._retry_at_s

    def _begin(self, step: _Step, move: Move, going: dict[str, tuple[tuple[str, str], tuple[str, str]]]) -> bool:
        """Changes the plans so that a move begins; False: things are not as they were when it was planned."""
        instance, source = move.bound.planned.instance, move.bound.node
        entries = step.plans.get(source, [])
        planned = next((p for p in entries if p.instance == instance and not p.moving_from), None)
        if planned is None or (planned.gpu, planned.row) != (move.bound.planned.gpu, move.bound.planned.row):
            return False
        if instance in going or not step.ready(source, planned):
            return False
        to = (move.to.node, move.to.gpu)
        device = next((d for d in step.devices() if (d.info.node, d.info.gpu) == to), None)
        row = _row_for(move, device) if device is not None else None
        if row is None:
            return False
        at, node = entries.index(planned), move.to.node
        why = _why(step, move.bound) if self._purpose is Purpose.EVACUATE else self._reason
        if node == source:
            entries[at] = replace(planned, gpu=move.to.gpu, row=row)
        else:
            entries[at] = replace(planned, moving_to=node)
            step.plans.setdefault(node, []).append(
                replace(planned, gpu=move.to.gpu, row=row, moving_from=source, moving_to="")
            )
        going[instance] = ((source, planned.gpu), to)
        self._begun[instance] = _Begun(step.now_s, why, *going[instance], ours=True)
        text = f"{instance} moves from {source}/{planned.gpu} to {'/'.join(to)} row {row} ({why})"
        step.notes[instance] = text
        step.happenings.append(Happening("move-started", text, planned.function, instance, node))
        return True

    def _shown(self, step: _Step, going: Mapping[str, tuple[tuple[str, str], tuple[str, str]]]) -> Iterable[UnderWay]:
        functions = {p.instance: p.function for entries in step.plans.values() for p in entries}
        for instance, (source, target) in sorted(going.items()):
            begun = self._begun[instance]
            yield UnderWay(functions[instance], instance, "/".join(source), "/".join(target), begun.reason)


def _row_for(move: Move, device: DeviceState) -> int | None:
    """The row of a move's target, if there is still room as there was when it was planned."""
    taken = {row.index for row in live_rows(device)}
    index = unused_index(taken) if move.to.new_row and move.to.row in taken else move.to.row
    if not move.to.new_row and index not in taken:
        return None
    return index if _fits(device, index, move.bound.planned.allocation) else None


def _fits(device: DeviceState, index: int, allocation: Allocation) -> bool:
    """Whether a row, or a new one of that index, has room."""
    rows = {row.index: row for row in live_rows(device)}
    given_pct = device.info.given_sm_pct(allocation.sm_pct)
    if allocation.memory_bytes > device.free_memory_bytes:
        return False
    if index not in rows:
        return given_pct <= WHOLE_PCT - sum(row.sm_pct for row in rows.values())
    return rows[index].sm_pct == given_pct and rows[index].free_permille >= allocation.request_permille


def _place(event: InstanceEvent) -> tuple[str, str, int]:
    return event.node, event.gpu, event.row


def _spot(node: str, planned: PlannedInstance) -> tuple[str, str, int]:
    return node, planned.gpu, planned.row


def _words(moves: Sequence[Move]) -> str:
    return ", ".join(f"{m.bound.planned.instance} to {m.to.node}/{m.to.gpu} row {m.to.row}" for m in moves)


def _as_desired(planned: PlannedInstance) -> DesiredInstance:
    return DesiredInstance(planned.instance, planned.allocation, planned.standby)


def _why(step: _Step, item: Bound) -> str:
    view = step.nodes[item.node]
    if view.event is not None and view.event.draining:
        return f"node {item.node} drains"
    device = view.devices.get(item.planned.gpu)
    return f"{item.node}/{item.planned.gpu} is degraded: {device.health_reason if device else 'it is gone'}"
