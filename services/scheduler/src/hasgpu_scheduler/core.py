"""What the scheduler knows and decides, without touching the world: events and times in, plans out."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from hasgpu_core.events import HorizontalScaleEvent, InstanceEvent, NodeEvent, PlanEvent, PlannedInstance
from hasgpu_core.policy.placement import NoRoom, Placement, place
from hasgpu_core.resources import Allocation, DeviceHealth, InstanceState

from hasgpu_scheduler.binding import Binding, NodeView, Unplaced, bind, device_states
from hasgpu_scheduler.moving import Happening, Migrator, MovingSettings, UnderWay
from hasgpu_scheduler.whatif import Hypothesis, Outcome, suppose

TOMBSTONE_S = 600.0
"""How long a deleted function's last revision is remembered, so that a late command of it is known to be stale."""
REMEMBERED = 1_000
"""Happenings that are kept to be shown."""
GHOST_S = 90.0
"""After so long a lost node is not awaited any more by what it last said of instances that no plan has: longer than its
workers serve on without their agent."""
_HAS_WEIGHTS = (InstanceState.LOADING, InstanceState.READY, InstanceState.DRAINING)


@dataclass(frozen=True, slots=True)
class NodeRecord:
    """A node and when it was last heard of, by this process's clock."""

    event: NodeEvent | None
    """None: only a plan is known of it, or its heartbeat was withdrawn."""
    received_s: float
    alive: bool


@dataclass(frozen=True, slots=True)
class PassResult:
    """What a pass wants done."""

    plans: tuple[PlanEvent, ...]
    """Changed plans, in the order in which they have to be written: those that give up an instance first."""
    unplaced: tuple[Unplaced, ...]
    lost: tuple[str, ...]
    """Nodes declared lost in this pass."""
    returned: tuple[str, ...]
    """Nodes heard of again since the last pass."""
    happenings: tuple[Happening, ...] = ()
    """What is worth telling of this pass, oldest first."""


class SchedulerCore:
    """The scheduler's state machine; one task drives it."""

    def __init__(self, *, node_timeout_s: float, silence_s: float, moving: MovingSettings | None = None) -> None:
        """Starts empty.

        Args:
            node_timeout_s: a node without a new heartbeat for this long is lost.
            silence_s: when nothing at all was heard for this long, it is the bus that was away: no node is blamed,
                and all get a whole `node_timeout_s` from its return on.
            moving: What is moved, and how often; None: as `MovingSettings` has it.
        """
        self._node_timeout_s = node_timeout_s
        self._silence_s = silence_s
        self._heard_s: float | None = None
        self._nodes: dict[str, NodeRecord] = {}
        self._wanted: dict[str, HorizontalScaleEvent] = {}
        self._emptied_s: dict[str, float] = {}
        self._plans: dict[str, PlanEvent] = {}
        self._announced: dict[str, PlanEvent] = {}
        self._reported: dict[str, InstanceEvent] = {}
        self._unplaced: tuple[Unplaced, ...] = ()
        self._changed_nodes: set[str] = set()
        self._moving = moving or MovingSettings()
        self._migrator = Migrator(self._moving)
        self._degraded_s: dict[tuple[str, str], float] = {}
        self._warm: dict[str, set[str]] = {}
        self._told_unplaced: dict[str, str] = {}
        self._loaded_s = 0.0
        self._calm_until_s = -math.inf
        """Until when a pass would change nothing and say nothing, as long as nothing comes in."""
        self.happenings: deque[tuple[int, Happening]] = deque(maxlen=REMEMBERED)
        """What was told lately, with the time in nanoseconds since 1970; the shell fills it in."""

    # What comes in.

    def load(self, plans: Iterable[PlanEvent], wanted: Iterable[HorizontalScaleEvent], now_s: float) -> None:
        """Takes over what the store holds (at the start of every leadership) and gives every node a new grace."""
        self._plans = {plan.node: plan for plan in plans}
        self._wanted = {event.function: event for event in wanted}
        self._emptied_s = {event.function: now_s for event in self._wanted.values() if not event.instances}
        self._loaded_s = now_s
        self._calm_until_s = -math.inf
        self._nodes = {
            name: replace(record, received_s=now_s)
            for name, record in self._nodes.items()
            if record.event is not None or name in self._plans
        }
        for name in self._plans:
            self._nodes.setdefault(name, NodeRecord(None, now_s, alive=True))
        self._migrator.reset()

    def heard(self, now_s: float) -> None:
        """Notes that the bus delivers; after a silence all nodes get a new grace."""
        if self._heard_s is None or now_s - self._heard_s > self._silence_s:
            self.grace(now_s)
        self._heard_s = now_s

    def grace(self, now_s: float) -> None:
        """Takes all live nodes as heard of now: what they sent may have been missed."""
        for name, record in self._nodes.items():
            if record.alive:
                self._nodes[name] = replace(record, received_s=now_s)

    def on_node(self, event: NodeEvent, now_s: float) -> bool:
        """Takes a heartbeat in; returns whether a pass is due (new, back, drains, other devices)."""
        old = self._nodes.get(event.node)
        if old is not None and not old.alive and old.event == event:
            return False  # the last words of a lost node, delivered again
        self._nodes[event.node] = NodeRecord(event, now_s, alive=True)
        self._note_health(event, now_s)
        changed = (
            old is None
            or not old.alive
            or old.event is None
            or (old.event.devices, old.event.draining) != (event.devices, event.draining)
        )
        if changed:
            self._calm_until_s = -math.inf
        if old is not None and not old.alive:
            self._changed_nodes.add(event.node)
        return changed

    def on_node_gone(self, node: str) -> None:
        """The node's agent took its heartbeat back (an orderly end): it is lost at once."""
        record = self._nodes.get(node)
        if record is not None:
            self._nodes[node] = NodeRecord(None, record.received_s, alive=False)
            self._calm_until_s = -math.inf

    def on_instance(self, event: InstanceEvent) -> bool:
        """Takes an instance's status in; returns whether its share or state differs from what was known."""
        old = self._reported.get(event.instance)
        self._reported[event.instance] = event
        if old is None or _binds(old) != _binds(event):
            self._calm_until_s = -math.inf
        if event.state in _HAS_WEIGHTS and event.node:
            self._warm.setdefault(event.function, set()).add(event.node)
        return old is None or (old.allocation_revision, old.state) != (event.allocation_revision, event.state)

    def on_instance_gone(self, instance: str) -> bool:
        """The agent has stopped the instance; returns whether it was known."""
        self._calm_until_s = -math.inf
        return self._reported.pop(instance, None) is not None

    def on_announced(self, node: str, plan: PlanEvent | None) -> None:
        """Notes what the bus holds as the node's plan (None: nothing)."""
        if plan is None:
            self._announced.pop(node, None)
        else:
            self._announced[node] = plan

    def is_stale(self, command: HorizontalScaleEvent) -> bool:
        """Whether a newer revision of the function has been accepted before."""
        known = self._wanted.get(command.function)
        return known is not None and command.revision < known.revision

    def accept(self, command: HorizontalScaleEvent, now_s: float) -> None:
        """Makes a command the function's wanted state (once it is stored); the same revision may come again."""
        self._wanted[command.function] = command
        self._calm_until_s = -math.inf
        if command.instances:
            self._emptied_s.pop(command.function, None)
        else:
            self._emptied_s.setdefault(command.function, now_s)

    # What is decided.

    def decide(self, now_s: float, *, fencing_token: int) -> PassResult:
        """Runs a pass: who is lost, then what runs where.

        The changed plans take effect here when `commit` is called with each, once it is stored. While nothing has come
        in that a pass looks at, and no time has passed that it waits for, it is not made again.
        """
        lost = self._lapse(now_s)
        if not lost and now_s < self._calm_until_s:
            return PassResult((), self._unplaced, (), ())
        views = self.views(now_s)
        warm = self._warm_nodes()
        binding = bind(views, self._wanted, self.planned(), self._reported, warm)
        moved = self._migrator.step(now_s, binding, views, self._reported, warm)
        stuck = {item.desired.instance for item in moved.stuck}
        unplaced = tuple(item for item in binding.unplaced if item.desired.instance not in stuck) + moved.stuck
        binding = Binding(moved.plans, unplaced, {**binding.notes, **moved.notes})
        returned = tuple(sorted(self._changed_nodes))
        happenings = (*self._told(binding, moved.notes, lost, returned), *moved.happenings)
        self._unplaced = binding.unplaced
        changed = [
            PlanEvent(
                node=node,
                revision=self._next_revision(node),
                instances=instances,
                fencing_token=fencing_token,
                reason=self._reason(node, instances, binding, lost),
            )
            for node, instances in binding.plans.items()
            if node not in self._plans or self._plans[node].instances != instances
        ]
        changed.sort(key=lambda plan: (not self._gives_up(plan), plan.node))
        self._changed_nodes.clear()
        if not changed and not happenings:
            self._calm_until_s = min(self._migrator.calm_until_s, self._shunned_from_s(now_s))
        return PassResult(tuple(changed), binding.unplaced, lost, returned, happenings)

    def commit(self, plan: PlanEvent) -> None:
        """Notes that a plan is stored: it is the truth from now on."""
        self._plans[plan.node] = plan
        self._calm_until_s = -math.inf

    def unannounced(self) -> tuple[PlanEvent, ...]:
        """Returns the stored plans that the bus does not hold yet, except of nodes that are gone for good."""
        return tuple(
            plan
            for node, plan in sorted(self._plans.items())
            if self._announced.get(node) != plan and not self._is_forgotten(node)
        )

    def to_purge(self) -> tuple[str, ...]:
        """Returns nodes that ended in order and run nothing, whose plan the bus still holds."""
        return tuple(node for node in sorted(self._announced) if self._is_forgotten(node))

    def to_forget(self, now_s: float) -> tuple[str, ...]:
        """Returns functions deleted long enough ago that nothing of them can come any more."""
        return tuple(sorted(fn for fn, since_s in self._emptied_s.items() if now_s - since_s > TOMBSTONE_S))

    def forget(self, function: str) -> None:
        """Drops a deleted function."""
        self._wanted.pop(function, None)
        self._calm_until_s = -math.inf
        self._warm.pop(function, None)
        self._emptied_s.pop(function, None)

    def ghosts(self, now_s: float) -> tuple[InstanceEvent, ...]:
        """Returns what nodes that have been lost for long said last of instances that no plan has.

        An agent takes back what it said when the instance has gone; of these nobody else would.
        """
        planned = {p.instance for plan in self._plans.values() for p in plan.instances}
        return tuple(
            event
            for name, event in sorted(self._reported.items())
            if name not in planned and event.node and self._lost_for_s(event.node, now_s) >= GHOST_S
        )

    def _lost_for_s(self, node: str, now_s: float) -> float:
        record = self._nodes.get(node)
        if record is None:  # it left before this leadership began
            return now_s - self._loaded_s
        return 0.0 if record.alive else now_s - max(record.received_s, self._loaded_s)

    def suspects(self, now_s: float) -> tuple[PlanEvent, ...]:
        """Returns the plans to announce again to hear whether the bus delivers: nothing was heard for a while."""
        if self._heard_s is not None and now_s - self._heard_s < self._silence_s / 3:
            return ()
        return tuple(self._announced[node] for node in sorted(self._announced))[:1]

    # What others may look at.

    @property
    def unplaced(self) -> tuple[Unplaced, ...]:
        """As of the last pass."""
        return self._unplaced

    @property
    def nodes(self) -> Mapping[str, NodeRecord]:
        """All nodes known, by name."""
        return self._nodes

    @property
    def plans(self) -> Mapping[str, PlanEvent]:
        """The stored plans, by node."""
        return self._plans

    @property
    def shown_plans(self) -> Mapping[str, PlanEvent]:
        """The stored plans where this process leads, what is announced of the others where it does not."""
        return {**self._announced, **self._plans}

    @property
    def wanted(self) -> Mapping[str, HorizontalScaleEvent]:
        """The last accepted command of each function."""
        return self._wanted

    @property
    def moves(self) -> tuple[UnderWay, ...]:
        """The moves under way, as of the last pass."""
        return self._migrator.under_way

    def views(self, now_s: float) -> dict[str, NodeView]:
        """Returns the nodes as placement sees them."""
        shunned: dict[str, set[str]] = {}
        for (node, gpu), since_s in self._degraded_s.items():
            if now_s - since_s >= self._moving.degraded_after_s:
                shunned.setdefault(node, set()).add(gpu)
        return {
            name: NodeView(record.event, record.alive, frozenset(shunned.get(name, ())))
            for name, record in self._nodes.items()
        }

    def planned(self) -> dict[str, tuple[PlannedInstance, ...]]:
        """Returns what each node's plan holds."""
        return {node: plan.instances for node, plan in self._plans.items()}

    def what_if(self, allocation: Allocation, now_s: float) -> Placement | NoRoom:
        """Returns where an allocation would go now; changes nothing."""
        shown = {node: plan.instances for node, plan in self.shown_plans.items()}
        return place(allocation, device_states(self.views(now_s), shown))

    def suppose(self, hypothesis: Hypothesis, now_s: float) -> Outcome:
        """Returns what a pass would do if things were otherwise; changes nothing. Raises as `whatif.suppose`."""
        shown = {node: plan.instances for node, plan in self.shown_plans.items()}
        return suppose(hypothesis, self.views(now_s), self._wanted, shown, self._reported, self._warm_nodes())

    def _warm_nodes(self) -> dict[str, frozenset[str]]:
        return {function: frozenset(nodes) for function, nodes in self._warm.items()}

    def _note_health(self, event: NodeEvent, now_s: float) -> None:
        """Notes since when each device of a node has been degraded."""
        degraded = {(event.node, d.gpu) for d in event.devices if d.health is DeviceHealth.DEGRADED}
        for key in [key for key in self._degraded_s if key[0] == event.node and key not in degraded]:
            del self._degraded_s[key]
        for key in degraded:
            self._degraded_s.setdefault(key, now_s)

    def _shunned_from_s(self, now_s: float) -> float:
        """When the next device will have been degraded for so long that it is shunned."""
        after_s = self._moving.degraded_after_s
        return min((s + after_s for s in self._degraded_s.values() if now_s - s < after_s), default=math.inf)

    def _told(
        self, binding: Binding, of_moves: Mapping[str, str], lost: tuple[str, ...], returned: tuple[str, ...]
    ) -> list[Happening]:
        """What this pass does, in words; what finds no place is told once, and again when the reason changes."""
        out = [Happening("node-lost", f"node {node} is lost: no heartbeat", node=node) for node in lost]
        out += [Happening("node-back", f"node {node} is back", node=node) for node in returned]
        for node, entries in binding.plans.items():
            for p in entries:
                if p.instance in binding.notes and p.instance not in of_moves:
                    out.append(Happening("placed", binding.notes[p.instance], p.function, p.instance, node))
        reasons = {item.desired.instance: item.reason for item in binding.unplaced}
        for item in binding.unplaced:
            instance = item.desired.instance
            if self._told_unplaced.get(instance) != item.reason:
                out.append(Happening("unplaced", f"{instance}: {item.reason}", item.function, instance))
        self._told_unplaced = reasons
        return out

    def _lapse(self, now_s: float) -> tuple[str, ...]:
        """Declares lost who was silent for too long while the bus was not."""
        if self._heard_s is None or now_s - self._heard_s > self._silence_s:
            return ()
        lost = []
        for name, record in sorted(self._nodes.items()):
            if record.alive and now_s - record.received_s > self._node_timeout_s:
                self._nodes[name] = replace(record, alive=False)
                lost.append(name)
        return tuple(lost)

    def _next_revision(self, node: str) -> int:
        """One more than any revision known, be it stored or (after a loss of the store) only announced."""
        stored, announced = self._plans.get(node), self._announced.get(node)
        return 1 + max(stored.revision if stored else 0, announced.revision if announced else 0)

    def _gives_up(self, plan: PlanEvent) -> bool:
        old = self._plans.get(plan.node)
        return old is not None and not {p.instance for p in old.instances} <= {p.instance for p in plan.instances}

    def _is_forgotten(self, node: str) -> bool:
        record, plan = self._nodes.get(node), self._plans.get(node)
        return (record is None or (record.event is None and not record.alive)) and (plan is None or not plan.instances)

    def _reason(
        self, node: str, instances: tuple[PlannedInstance, ...], binding: Binding, lost: tuple[str, ...]
    ) -> str:
        """Says in words what a new plan changes."""
        old = {p.instance: p for p in self._plans[node].instances} if node in self._plans else {}
        new = {p.instance: p for p in instances}
        parts = [binding.notes.get(instance, f"{instance} added") for instance in new if instance not in old]
        gone = [instance for instance in old if instance not in new]
        if gone:
            parts.append(f"{', '.join(gone)} out" + (f" (node {node} is lost)" if node in lost else ""))
        kept = [i for i in new if i in old]
        parts += [binding.notes[i] for i in kept if i in binding.notes and new[i] != old[i]]
        changed = [
            f"{i} {new[i].allocation.request_permille} ‰" for i in kept if new[i].allocation != old[i].allocation
        ]
        if changed:
            parts.append(f"shares: {', '.join(changed)}")
        return "; ".join(parts) or "runs nothing yet"


def _binds(event: InstanceEvent) -> tuple[object, ...]:
    """What of an instance's status a pass looks at."""
    return event.node, event.gpu, event.row, event.state, event.allocation, event.allocation_revision
