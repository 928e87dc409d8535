"""Simulated scheduler, node agents and devices."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from hasgpu_core.events import DesiredInstance, DeviceEvent, InstanceEvent, NodeEvent
from hasgpu_core.policy.placement import Placement, place
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
        self._loads: dict[str, FunctionLoad] = {load.spec.name: load for load in scenario.functions}
        self._instances: dict[str, _Instance] = {}
        self._desired: dict[str, tuple[int, tuple[DesiredInstance, ...]]] = {}
        self._gpu_seconds: dict[str, float] = dict.fromkeys(self._loads, 0.0)
        self._charged_s = 0.0

    def gpu_seconds(self, function: str) -> float:
        """Returns the integral of SM share times request so far."""
        self._charge()
        return self._gpu_seconds[function]

    def instances(self) -> list[tuple[str, str, Allocation, bool]]:
        """Returns (function, instance, allocation in force, ready) of what is bound."""
        return [
            (i.function, i.name, i.allocation, i.state is InstanceState.READY)
            for _, i in sorted(self._instances.items())
        ]

    def want(self, function: str, desired: tuple[DesiredInstance, ...], *, at_once: bool = False) -> None:
        """Takes a desired set; quotas change after the resize time, the set of instances after the binding time."""
        revision, before = self._desired.get(function, (0, ()))
        revision += desired != before
        self._desired[function] = (revision, desired)
        if at_once:
            self._resize(function, revision)
            self._bind(function, start_s=0.0)
            return
        timing = self._scenario.timing
        self._events.after(timing.resize_s, lambda: self._resize(function, revision))
        self._events.after(timing.bind_s, lambda: self._bind(function, start_s=timing.cold_start_s))

    def heartbeat(self, unix_ns: int) -> list[NodeEvent | DeviceEvent]:
        """Returns what the agents tell of nodes and devices."""
        nodes: dict[str, list[DeviceState]] = {}
        for device in self._device_states():
            nodes.setdefault(device.info.node, []).append(device)
        out: list[NodeEvent | DeviceEvent] = []
        for node, devices in sorted(nodes.items()):
            out.append(NodeEvent(node, f"{node}:0", tuple(d.info for d in devices), unix_ns, 0))
            out += [DeviceEvent(d.info, d.rows, d.memory_used_bytes, 0, unix_ns, 0) for d in devices]
        return out

    def _device_states(self) -> tuple[DeviceState, ...]:
        states = []
        for info in sorted(self._scenario.devices, key=lambda i: (i.node, i.gpu)):
            rows: dict[int, Row] = {}
            memory_bytes = 0
            for instance in self._instances.values():
                if (instance.node, instance.gpu) != (info.node, info.gpu):
                    continue
                allocation = instance.allocation
                row = rows.get(instance.row) or Row(instance.row, allocation.sm_pct, 0)
                rows[instance.row] = replace(row, used_permille=row.used_permille + allocation.request_permille)
                memory_bytes += allocation.memory_bytes
            states.append(DeviceState(info, tuple(rows[i] for i in sorted(rows)), memory_bytes))
        return tuple(states)

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
                self._charge()
                instance.allocation, instance.standby, instance.revision = want.allocation, want.standby, revision
                self._route(instance)
            elif not instance.reason:
                continue
            instance.reason = reason
            self._tell(instance)

    def _bind(self, function: str, *, start_s: float) -> None:
        """Brings the set of instances to what is desired now."""
        revision, desired = self._desired[function]
        wanted = {want.instance: want for want in desired}
        for instance in [i for i in self._instances.values() if i.function == function and i.name not in wanted]:
            if instance.state is not InstanceState.DRAINING:
                instance.state = InstanceState.DRAINING
                self._tell(instance)
                self._gateways[function].drain(instance.name, lambda gone=instance: self._gone(gone))  # type: ignore[misc]  # a default argument binds the loop variable
        for want in desired:
            if want.instance in self._instances:
                continue
            outcome = place(want.allocation, self._device_states())
            if not isinstance(outcome, Placement):
                continue
            model = next(d.model for d in self._scenario.devices if (d.node, d.gpu) == (outcome.node, outcome.gpu))
            self._charge()
            instance = self._instances[want.instance] = _Instance(
                function, want.instance, outcome.node, outcome.gpu, outcome.row, model, want.allocation, revision,
                InstanceState.LOADING, want.standby,
            )  # fmt: skip
            if start_s > 0:
                self._tell(instance)
                self._events.after(start_s, lambda started=instance: self._ready(started))  # type: ignore[misc]  # as above
            else:
                self._ready(instance)

    def _ready(self, instance: _Instance) -> None:
        if self._instances.get(instance.name) is not instance or instance.state is InstanceState.DRAINING:
            return
        instance.state = InstanceState.READY
        self._tell(instance)
        self._route(instance)

    def _gone(self, instance: _Instance) -> None:
        self._charge()
        self._instances.pop(instance.name, None)
        self._emit(InstanceGone(instance.function, instance.name))
        if any(want.instance not in self._instances for _, wants in self._desired.values() for want in wants):
            for function in self._desired:
                self._events.after(self._scenario.timing.bind_s, lambda name=function: self._again(name))  # type: ignore[misc]  # as above

    def _again(self, function: str) -> None:
        """Room appeared: what found no place is bound now."""
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
                gateway.drain(instance.name, lambda: None)
            return
        if route is not None:
            route.quota_permille = instance.allocation.request_permille
            return
        tables = self._loads[instance.function].tables
        table = next(table for table in tables if table.device_model == instance.model)
        allocation = instance.allocation
        gateway.set_route(Route(instance.name, table, allocation.sm_pct, allocation.request_permille))

    def _row_permille(self, instance: _Instance) -> int:
        place_ = (instance.node, instance.gpu, instance.row)
        return sum(i.allocation.request_permille for i in self._instances.values() if (i.node, i.gpu, i.row) == place_)

    def _charge(self) -> None:
        """Adds the cost since the last change."""
        elapsed_s = self._events.now_s - self._charged_s
        self._charged_s = self._events.now_s
        for instance in self._instances.values():
            self._gpu_seconds[instance.function] += elapsed_s * instance.allocation.gpu_share

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
