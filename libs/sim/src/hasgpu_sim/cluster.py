"""Simulated scheduler, node agents and devices."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from hasgpu_core.events import DesiredInstance, DeviceEvent, InstanceEvent, NodeEvent, PlannedInstance
from hasgpu_core.observe import NODE_LOST_AFTER_S
from hasgpu_core.policy.placement import Placement, Ties, place
from hasgpu_core.policy.placement.migration import Bound, Move
from hasgpu_core.resources import PARKED_QUOTA_PERMILLE, WHOLE_PERMILLE, Allocation, DeviceState, InstanceState, Row

from hasgpu_sim.event_queue import EventQueue
from hasgpu_sim.gateway import FunctionGateway, Route
from hasgpu_sim.recording import InstanceGone
from hasgpu_sim.scenario import FunctionLoad, Scenario


@dataclass(slots=True)
class _Instance:
    """One bound instance."""

    function: str
    name: str
    node: str
    gpu: str
    row: int
    model: str
    allocation: Allocation
    """In force."""
    revision: int
    state: InstanceState
    standby: bool
    reason: str = ""


@dataclass(slots=True)
class _Meter:
    """One function's cost so far."""

    gpu_seconds: float = 0.0
    share: float = 0.0
    """Of its requests now, in GPUs."""
    borrowed: float = 0.0
    """Beyond them, now."""
    borrowed_gpu_seconds: float = 0.0
    """Part of the cost so far."""
    since_s: float = 0.0

    def at(self, now_s: float) -> float:
        """Brings the sum up to date and returns it."""
        passed_s = now_s - self.since_s
        self.gpu_seconds += self.share * passed_s
        self.borrow(max(0.0, self.borrowed) * passed_s)
        self.since_s = now_s
        return self.gpu_seconds

    def borrow(self, gpu_seconds: float) -> None:
        """Adds what was used beyond the requests."""
        self.gpu_seconds += gpu_seconds
        self.borrowed_gpu_seconds += gpu_seconds


class Cluster:
    """Binds what is desired to rows, starts, resizes and retires it, and tells of it in events.

    A place is chosen by the policy's own `place`. As a real agent does, a resize that would over-fill its row is
    refused, with what is free as the reason, and tried again at the next decision.
    """

    def __init__(
        self,
        scenario: Scenario,
        events: EventQueue,
        gateways: dict[str, FunctionGateway],
        emit: Callable[[InstanceEvent | InstanceGone], None],
    ) -> None:
        self._scenario = scenario
        self._events = events
        self._gateways = gateways
        self._emit = emit
        self._infos = {(i.node, i.gpu): i for i in sorted(scenario.devices, key=lambda i: (i.node, i.gpu))}
        self._loads: dict[str, FunctionLoad] = {load.spec.name: load for load in scenario.functions}
        self._instances: dict[str, _Instance] = {}
        self._of_function: dict[str, dict[str, _Instance]] = {name: {} for name in self._loads}
        self._on_device: dict[tuple[str, str], dict[str, _Instance]] = {key: {} for key in self._infos}
        self._states: dict[tuple[str, str], DeviceState] = {}
        self._desired: dict[str, tuple[int, tuple[DesiredInstance, ...]]] = {}
        self._unplaced: set[str] = set()
        self._warm: dict[str, set[str]] = {name: set() for name in self._loads}
        self._meters = {name: _Meter() for name in self._loads}
        self._lost: set[str] = set()
        self._draining: set[str] = set()
        self._shadows: dict[str, _Instance] = {}
        """By instance: its other place, the new one until it is READY there, the old one until that is empty."""
        self.moves: list[tuple[float, str, str, str]] = []
        self.gpus_peak = 0

    def gpu_seconds(self, function: str) -> float:
        """Returns the integral of SM share times request so far, and what was borrowed."""
        return self._meters[function].at(self._events.now_s)

    def borrowed_gpu_seconds(self, function: str) -> float:
        """Returns what of it was borrowed."""
        meter = self._meters[function]
        meter.at(self._events.now_s)
        return meter.borrowed_gpu_seconds

    def borrow(self, function: str, gpu_seconds: float) -> None:
        """Adds what a function used beyond its requests."""
        self._meters[function].borrow(gpu_seconds)

    def lend(self, function: str, gpus: float) -> None:
        """A function begins (or ends, below 0) to use so many GPUs beyond its requests."""
        meter = self._meters[function]
        meter.at(self._events.now_s)
        meter.borrowed += gpus

    def instances(self) -> list[tuple[str, str, Allocation, bool]]:
        """Returns (function, instance, allocation in force, ready) of what is bound."""
        return [
            (i.function, i.name, i.allocation, i.state is InstanceState.READY)
            for _, i in sorted(self._instances.items())
        ]

    def want(self, function: str, desired: tuple[DesiredInstance, ...], *, at_once: bool = False) -> None:
        """Takes a desired set; quotas change after the resize time, the set of instances after the binding time."""
        revision, before = self._desired.get(function, (0, ()))
        if desired == before and function not in self._unplaced and self._in_force(function, desired):
            return
        revision += desired != before
        self._desired[function] = (revision, desired)
        if at_once:
            self._resize(function, revision)
            self._bind(function, start_s=0.0)
            return
        timing = self._scenario.timing
        self._events.after(timing.resize_s, partial(self._resize, function, revision))
        self._events.after(timing.bind_s, partial(self._bind, function, start_s=timing.cold_start_s))

    def lose(self, node: str) -> None:
        """A node is gone with all that ran there; the scheduler places that anew when its heartbeat has lapsed."""
        self._lost.add(node)
        for shadow in [shadow for shadow in self._shadows.values() if shadow.node == node]:
            self._drop_shadow(shadow.name)
            self._gateways[shadow.function].lose(f"{shadow.name}~")
        for instance in [i for i in self._instances.values() if i.node == node]:
            self._remove(instance)
            self._gateways[instance.function].lose(instance.name)
        self._events.after(NODE_LOST_AFTER_S, self._rebind)

    def regain(self, node: str) -> None:
        """A lost node is back, empty."""
        self._lost.discard(node)
        self._rebind()

    def drain_node(self, node: str) -> None:
        """A node takes nothing new from now on."""
        self._draining.add(node)

    # Moves: what `moves.Mover` sees, and does

    def bound(self) -> list[Bound]:
        """All instances that have a place."""
        return [self._bound(instance) for _, instance in sorted(self._instances.items())]

    def devices(self) -> tuple[DeviceState, ...]:
        """Devices that may take something."""
        return tuple(device for device in self._device_states() if device.info.node not in self._draining)

    def leaving(self) -> list[Bound]:
        """What is on a node that drains."""
        return [item for item in self.bound() if item.node in self._draining]

    def waiting(self) -> list[tuple[str, Allocation]]:
        """Instances without a place, active ones first, then the largest."""
        found = [
            want
            for function in sorted(self._unplaced)
            for want in self._desired[function][1]
            if want.instance not in self._instances
        ]
        found.sort(key=lambda want: (want.standby, -want.allocation.gpu_share))
        return [(want.instance, want.allocation) for want in found]

    def serving(self) -> set[str]:
        """Instances that are READY and do not move."""
        return {
            name
            for name, instance in self._instances.items()
            if instance.state is InstanceState.READY and name not in self._shadows
        }

    def moving_count(self) -> int:
        """Moves under way."""
        return len(self._shadows)

    def ties_of(self, item: Bound) -> Ties:
        """Where the others of an instance's function are."""
        return self._ties(item.planned.function, without=item.planned.instance)

    def begin(self, move: Move) -> bool:
        """Takes the new place of an instance, which serves in the old one until it is READY there."""
        planned = move.bound.planned
        instance = self._instances.get(planned.instance)
        key = (move.to.node, move.to.gpu)
        if instance is None or planned.instance not in self.serving() or self._bound(instance) != move.bound:
            return False
        if key not in self._infos or key[0] in self._lost | self._draining:
            return False
        shadow = replace(
            instance, node=key[0], gpu=key[1], row=move.to.row, model=self._infos[key].model, reason="moves here"
        )
        self._shadows[instance.name] = shadow
        self._on_device[key][f"{instance.name}~"] = shadow
        self._states.pop(key, None)
        self._charge(shadow, shadow.allocation.gpu_share)
        self.gpus_peak = max(self.gpus_peak, sum(1 for held in self._on_device.values() if held))
        self._events.after(self._scenario.timing.cold_start_s, partial(self._arrive, instance, shadow))
        return True

    def _arrive(self, instance: _Instance, shadow: _Instance) -> None:
        """The new place is READY: requests go there, and the old one answers what it has."""
        name = instance.name
        if self._shadows.get(name) is not shadow or self._instances.get(name) is not instance:
            return
        if instance.state is not InstanceState.READY or not self._reshare_shadow(instance, shadow):
            self._drop_shadow(name)
            return
        old = (instance.node, instance.gpu)
        self._swap(instance, shadow)
        gateway = self._gateways[instance.function]
        gateway.move(name, partial(self._left, shadow))
        self._route(instance)
        self._tell(instance)
        self.moves.append((self._events.now_s, name, "/".join(old), f"{instance.node}/{instance.gpu}"))

    def _reshare_shadow(self, instance: _Instance, shadow: _Instance) -> bool:
        """Gives the new place the share that the instance has by now; False: its row has no room for it."""
        if shadow.allocation == instance.allocation:
            return True
        more = instance.allocation.request_permille - shadow.allocation.request_permille
        if shadow.allocation.sm_pct != instance.allocation.sm_pct or self._row_permille(shadow) + more > WHOLE_PERMILLE:
            return False
        self._charge(shadow, instance.allocation.gpu_share - shadow.allocation.gpu_share)
        shadow.allocation = instance.allocation
        self._states.pop((shadow.node, shadow.gpu), None)
        return True

    def _swap(self, instance: _Instance, shadow: _Instance) -> None:
        """The instance is where its shadow was, and the other way round."""
        old, new = (instance.node, instance.gpu), (shadow.node, shadow.gpu)
        del self._on_device[old][instance.name]
        del self._on_device[new][f"{instance.name}~"]
        (instance.node, instance.gpu), (shadow.node, shadow.gpu) = new, old
        instance.row, shadow.row = shadow.row, instance.row
        instance.model, shadow.model = shadow.model, instance.model
        self._on_device[new][instance.name] = instance
        self._on_device[old][f"{instance.name}~"] = shadow
        for key in (old, new):
            self._states.pop(key, None)

    def _left(self, shadow: _Instance) -> None:
        """The old place has answered its last batch."""
        if self._shadows.get(shadow.name) is shadow:
            self._drop_shadow(shadow.name)
            self._bind_unplaced()

    def _drop_shadow(self, name: str) -> None:
        shadow = self._shadows.pop(name)
        key = (shadow.node, shadow.gpu)
        self._charge(shadow, -shadow.allocation.gpu_share)
        self._on_device[key].pop(f"{name}~", None)
        self._states.pop(key, None)

    def _bound(self, instance: _Instance) -> Bound:
        planned = PlannedInstance(
            instance.function, instance.name, instance.gpu, instance.row, instance.allocation, instance.revision,
            standby=instance.standby,
        )  # fmt: skip
        return Bound(instance.node, planned, instance.model)

    def heartbeat(self, unix_ns: int) -> list[NodeEvent | DeviceEvent]:
        """Returns what the agents tell of nodes and devices."""
        nodes: dict[str, list[DeviceState]] = {}
        for device in self._device_states():
            nodes.setdefault(device.info.node, []).append(device)
        out: list[NodeEvent | DeviceEvent] = []
        for node, devices in sorted(nodes.items()):
            infos = tuple(d.info for d in devices)
            out.append(NodeEvent(node, f"{node}:0", infos, unix_ns, 0, draining=node in self._draining))
            out += [DeviceEvent(d.info, d.rows, d.memory_used_bytes, 0, unix_ns, 0) for d in devices]
        return out

    def _device_states(self) -> tuple[DeviceState, ...]:
        return tuple(self._device_state(key) for key in self._infos if key[0] not in self._lost)

    def _device_state(self, key: tuple[str, str]) -> DeviceState:
        state = self._states.get(key)
        if state is None:
            rows: dict[int, Row] = {}
            memory_bytes = 0
            for instance in self._on_device[key].values():
                allocation = instance.allocation
                row = rows.get(instance.row) or Row(instance.row, allocation.sm_pct, 0)
                rows[instance.row] = replace(row, used_permille=row.used_permille + allocation.request_permille)
                memory_bytes += allocation.memory_bytes
            state = self._states[key] = DeviceState(
                self._infos[key], tuple(rows[i] for i in sorted(rows)), memory_bytes
            )
        return state

    def _in_force(self, function: str, desired: tuple[DesiredInstance, ...]) -> bool:
        """Whether the cluster is, or is on its way to, what is desired: nothing was refused."""
        mine = self._of_function[function]
        for want in desired:
            instance = mine.get(want.instance)
            if instance is not None and (instance.reason or instance.allocation != want.allocation):
                return False
        return True

    def _resize(self, function: str, revision: int) -> None:
        """Puts quotas in force, shrinking before growing."""
        newest, desired = self._desired[function]
        if revision != newest:
            return
        changes = [(want, self._instances[want.instance]) for want in desired if want.instance in self._instances]
        changes.sort(key=lambda c: c[0].allocation.request_permille - c[1].allocation.request_permille)
        for want, instance in changes:
            more_permille = want.allocation.request_permille - instance.allocation.request_permille
            free_permille = WHOLE_PERMILLE - self._row_permille(instance)
            reason = ""
            if more_permille > free_permille:
                reason = f"row {instance.row} has {free_permille} ‰ free, {more_permille} ‰ more were asked"
            elif want.allocation != instance.allocation or want.standby != instance.standby:
                self._charge(instance, want.allocation.gpu_share - instance.allocation.gpu_share)
                instance.allocation, instance.standby, instance.revision = want.allocation, want.standby, revision
                self._states.pop((instance.node, instance.gpu), None)
                self._route(instance)
            elif not instance.reason:
                continue
            instance.reason = reason
            self._tell(instance)

    def _bind(self, function: str, *, start_s: float) -> None:
        """Brings the set of instances to what is desired now."""
        revision, desired = self._desired[function]
        wanted = {want.instance: want for want in desired}
        for instance in [i for i in self._of_function[function].values() if i.name not in wanted]:
            if instance.state is not InstanceState.DRAINING:
                instance.state = InstanceState.DRAINING
                self._tell(instance)
                self._gateways[function].drain(instance.name, partial(self._gone, instance))
        self._unplaced.discard(function)
        for want in desired:
            if want.instance in self._instances:
                continue
            outcome = place(want.allocation, self.devices(), self._ties(function))
            if not isinstance(outcome, Placement):
                self._unplaced.add(function)
                continue
            key = (outcome.node, outcome.gpu)
            instance = _Instance(
                function, want.instance, *key, outcome.row, self._infos[key].model, want.allocation, revision,
                InstanceState.LOADING, want.standby,
            )  # fmt: skip
            self._instances[want.instance] = self._of_function[function][want.instance] = instance
            self._on_device[key][want.instance] = instance
            self._charge(instance, want.allocation.gpu_share)
            self._states.pop(key, None)
            self.gpus_peak = max(self.gpus_peak, sum(1 for held in self._on_device.values() if held))
            if start_s > 0:
                self._tell(instance)
                self._events.after(start_s, partial(self._ready, instance))
            else:
                self._ready(instance)

    def _ties(self, function: str, *, without: str = "") -> Ties:
        """Where the function's other instances are, and where it has been: its weights stay on the node."""
        others: dict[str, int] = {}
        for instance in self._of_function[function].values():
            self._warm[function].add(instance.node)
            if instance.name != without:
                others[instance.node] = others.get(instance.node, 0) + 1
        return Ties(others, frozenset(self._warm[function]))

    def _ready(self, instance: _Instance) -> None:
        if self._instances.get(instance.name) is not instance or instance.state is InstanceState.DRAINING:
            return
        instance.state = InstanceState.READY
        self._tell(instance)
        self._route(instance)

    def _gone(self, instance: _Instance) -> None:
        if self._instances.get(instance.name) is not instance:
            return
        self._remove(instance)
        self._bind_unplaced()

    def _bind_unplaced(self) -> None:
        for function in sorted(self._unplaced):
            # Room appeared: what found no place is bound now.
            self._events.after(
                self._scenario.timing.bind_s,
                partial(self._bind, function, start_s=self._scenario.timing.cold_start_s),
            )

    def _remove(self, instance: _Instance) -> None:
        if instance.name in self._shadows:
            self._drop_shadow(instance.name)
        self._charge(instance, -instance.allocation.gpu_share)
        key = (instance.node, instance.gpu)
        self._instances.pop(instance.name, None)
        self._of_function[instance.function].pop(instance.name, None)
        self._on_device[key].pop(instance.name, None)
        self._states.pop(key, None)
        self._emit(InstanceGone(instance.function, instance.name))

    def _rebind(self) -> None:
        for function in self._desired:
            self._bind(function, start_s=self._scenario.timing.cold_start_s)

    def _route(self, instance: _Instance) -> None:
        """Tells the gateway of an active ready instance; a standby gets no requests."""
        if instance.state is not InstanceState.READY:
            return
        gateway = self._gateways[instance.function]
        parked = instance.standby and instance.allocation.request_permille <= PARKED_QUOTA_PERMILLE
        route = gateway.route(instance.name)
        if parked:
            if route is not None:
                gateway.drain(instance.name, _nothing)
            return
        allocation = instance.allocation
        if route is not None:
            route.quota_permille, route.limit_permille = allocation.request_permille, allocation.limit_permille
            gateway.reshare(route)
            if route.draining:
                gateway.undrain(route)
            return
        load = self._loads[instance.function]
        table = next(table for table in load.tables if table.device_model == instance.model)
        gateway.set_route(
            Route(
                instance.name,
                (instance.node, instance.gpu, instance.row),
                table,
                load.surfaces.get(instance.model),
                allocation.sm_pct,
                allocation.request_permille,
                allocation.limit_permille,
            )
        )

    def _row_permille(self, instance: _Instance) -> int:
        rows = self._device_state((instance.node, instance.gpu)).rows
        return sum(row.used_permille for row in rows if row.index == instance.row)

    def _charge(self, instance: _Instance, more: float) -> None:
        """Adds the cost until now, and changes the share from now on."""
        meter = self._meters[instance.function]
        meter.at(self._events.now_s)
        meter.share = max(0.0, meter.share + more)

    def _tell(self, instance: _Instance) -> None:
        self._emit(
            InstanceEvent(
                function=instance.function,
                instance=instance.name,
                node=instance.node,
                gpu=instance.gpu,
                row=instance.row,
                state=instance.state,
                reason=instance.reason,
                address="",
                allocation=instance.allocation,
                allocation_revision=instance.revision,
                function_revision=1,
                device_model=instance.model,
                plan_revision=instance.revision,
            )
        )


def _nothing() -> None:
    """Nothing is to be done when a parked instance has answered its last batch."""
