"""Events in, the snapshot that policies decide from out; the scaler and the simulator use the same container."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace

from hasgpu_core.capacity import CapacityTable
from hasgpu_core.cluster import ClusterSnapshot, FunctionView, InstanceView
from hasgpu_core.demand import DemandTracker
from hasgpu_core.events import DemandEvent, DesiredInstance, DeviceEvent, FunctionEvent, InstanceEvent, NodeEvent
from hasgpu_core.policy.placement import Placement, occupy, place
from hasgpu_core.resources import WHOLE_PERMILLE, DeviceHealth, DeviceInfo, DeviceState, InstanceState, Row

NODE_LOST_AFTER_S = 5.0
"""A node that neither beat nor sent telemetry for this long is taken for lost."""

_DeviceKey = tuple[str, str]
_BoundRoom = tuple[tuple[DeviceState, ...], Mapping[tuple[str, str], str]]
"""Devices with the room of all instances taken, and the device models of desired instances that are not bound yet."""


@dataclass(slots=True)
class _Node:
    """A node that was heard of."""

    heard_s: float
    """-inf: its heartbeat was deleted."""
    draining: bool = False
    devices: dict[str, DeviceInfo] = field(default_factory=dict)
    telemetry: dict[str, DeviceEvent] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Desired:
    instances: tuple[DesiredInstance, ...]
    next_ordinal: int


class ClusterObserver:
    """Holds the newest of every event; `snapshot` is a pure function of what it holds and of the time.

    Applying an event twice does nothing. The instances of a function's view are those desired; others (being retired)
    only take their room. While nothing was set as desired for a function, whatever instances of it run are taken over
    as desired, so that a scaler without memory does not start them all anew.

    The rows of the snapshot hold for each instance the larger of the request desired and the request in force, and
    room for desired instances that are not bound yet where `place` would put them, so that decisions made before the
    agents report back do not fill a row twice.
    """

    def __init__(self, *, demand: DemandTracker | None = None, node_lost_after_s: float = NODE_LOST_AFTER_S) -> None:
        self._demand = demand or DemandTracker()
        self._node_lost_after_s = node_lost_after_s
        self._functions: dict[str, FunctionEvent] = {}
        self._instances: dict[str, dict[str, InstanceEvent]] = {}
        self._nodes: dict[str, _Node] = {}
        self._tables: dict[str, dict[str, CapacityTable]] = {}
        self._desired: dict[str, _Desired] = {}
        self._held: set[str] = set()
        self._version = 0
        self._bound_cache: tuple[tuple[int, tuple[str, ...]], _BoundRoom] | None = None

    # What comes in

    def apply_function(self, event: FunctionEvent) -> None:
        """A function was deployed or updated; an older revision than the one held is left out."""
        held = self._functions.get(event.spec.name)
        if held is None or event.revision >= held.revision:
            self._functions[event.spec.name] = event
            self._version += 1

    def remove_function(self, name: str) -> None:
        """A function went. Its instances keep their room until their own events go."""
        self._version += 1
        for held in (self._functions, self._tables, self._desired):
            held.pop(name, None)
        self._held.discard(name)
        self._demand.forget(name)

    def apply_demand(self, event: DemandEvent, now_s: float) -> None:
        """A gateway reported."""
        self._demand.observe(event, now_s)

    def apply_instance(self, event: InstanceEvent) -> None:
        """An instance changed."""
        self._version += 1
        self._instances.setdefault(event.function, {})[event.instance] = event

    def remove_instance(self, function: str, instance: str) -> None:
        """An instance is gone; one still desired shows as PENDING from here on."""
        self._version += 1
        instances = self._instances.get(function, {})
        instances.pop(instance, None)
        if not instances:
            self._instances.pop(function, None)

    def apply_device(self, event: DeviceEvent, now_s: float) -> None:
        """A device sent its telemetry; that is a sign of life of its node too."""
        node = self._nodes.setdefault(event.device.node, _Node(now_s))
        node.heard_s = max(node.heard_s, now_s)
        before = node.telemetry.get(event.device.gpu)
        if before is None or _tells(before) != _tells(event) or node.devices.get(event.device.gpu) != event.device:
            self._version += 1
        node.devices[event.device.gpu] = event.device
        node.telemetry[event.device.gpu] = event

    def apply_node(self, event: NodeEvent, now_s: float) -> None:
        """A node's heart beat. Devices that it no longer names are gone."""
        node = self._nodes.setdefault(event.node, _Node(now_s))
        node.heard_s = max(node.heard_s, now_s)
        devices = {device.gpu: device for device in event.devices}
        if node.draining != event.draining or node.devices != devices:
            self._version += 1
        node.draining = event.draining
        node.devices = devices

    def remove_node(self, name: str) -> None:
        """A node left: its devices are gone, its instances lost."""
        self._version += 1
        self._nodes[name] = _Node(-math.inf)

    def apply_table(self, table: CapacityTable) -> None:
        """A prediction came."""
        self._tables.setdefault(table.function, {})[table.device_model] = table

    def remove_table(self, function: str, device_model: str) -> None:
        """A prediction was taken back."""
        self._tables.get(function, {}).pop(device_model, None)

    def set_desired(self, function: str, instances: Iterable[DesiredInstance], next_ordinal: int) -> None:
        """What is wanted of a function from now on, and the ordinal of its next new instance."""
        desired = _Desired(tuple(sorted(instances, key=lambda d: d.instance)), next_ordinal)
        if self._desired.get(function) != desired:
            self._desired[function] = desired
            self._version += 1

    def set_held(self, function: str, held: bool) -> None:
        """Whether a function is held by hand."""
        if held:
            self._held.add(function)
        else:
            self._held.discard(function)

    # What goes out

    def snapshot(self, now_s: float, functions: Collection[str] | None = None) -> ClusterSnapshot:
        """Returns all that a decision at `now_s` may look at; of the named functions alone, if any are named."""
        devices, predicted = self._room(now_s)
        names = self._functions if functions is None else [name for name in functions if name in self._functions]
        views = []
        for name in sorted(names):
            event, wanted = self._functions[name], self._wanted(name)
            views.append(
                FunctionView(
                    spec=event.spec,
                    revision=event.revision,
                    demand=self._demand.view(name, now_s),
                    instances=tuple(
                        self._instance_view(name, want, predicted.get((name, want.instance), ""), now_s)
                        for want in wanted.instances
                    ),
                    tables=dict(self._tables.get(name, {})),
                    held=name in self._held,
                    next_ordinal=wanted.next_ordinal,
                )
            )
        return ClusterSnapshot(tuple(views), devices)

    def _room(self, now_s: float) -> _BoundRoom:
        """What is free on the live devices; worked out anew only when something changed or a node fell silent."""
        key = (self._version, tuple(name for name in self._nodes if self._lost(name, now_s)))
        if self._bound_cache is not None and self._bound_cache[0] == key:
            return self._bound_cache[1]
        wanted = {name: self._wanted(name) for name in {*self._functions, *self._desired}}
        devices = self._devices_with_bound(wanted, now_s)
        predicted: dict[tuple[str, str], str] = {}
        for name in sorted(wanted):
            for want in wanted[name].instances:
                if self._bound(name, want.instance, now_s) is not None:
                    continue
                outcome = place(want.allocation, devices)
                if isinstance(outcome, Placement):
                    devices = occupy(devices, outcome, want.allocation)
                    node = self._nodes[outcome.node]
                    predicted[name, want.instance] = node.devices[outcome.gpu].model
        self._bound_cache = (key, (devices, predicted))
        return devices, predicted

    def _lost(self, name: str, now_s: float) -> bool:
        """Whether a node is known to be gone; one never heard of is not."""
        node = self._nodes.get(name)
        return node is not None and now_s - node.heard_s > self._node_lost_after_s

    def _bound(self, function: str, instance: str, now_s: float) -> InstanceEvent | None:
        """An instance's event while it tells where the instance is."""
        event = self._instances.get(function, {}).get(instance)
        if event is None or not event.node or self._lost(event.node, now_s):
            return None
        return event

    def _wanted(self, function: str) -> _Desired:
        desired = self._desired.get(function)
        if desired is not None:
            return desired
        running = [
            DesiredInstance(event.instance, event.allocation)
            for event in self._instances.get(function, {}).values()
            if event.state not in (InstanceState.STOPPED, InstanceState.DRAINING)
        ]
        ordinals = [_ordinal(function, name) for name in self._instances.get(function, {})]
        return _Desired(tuple(sorted(running, key=lambda d: d.instance)), max(ordinals, default=-1) + 1)

    def _instance_view(self, function: str, want: DesiredInstance, predicted_model: str, now_s: float) -> InstanceView:
        event = self._bound(function, want.instance, now_s)
        if event is not None:
            return InstanceView(
                instance=want.instance,
                allocation=want.allocation,
                state=event.state,
                node=event.node,
                gpu=event.gpu,
                row=event.row,
                device_model=event.device_model,
                standby=want.standby,
                reason=event.reason,
                in_force_permille=event.allocation.request_permille,
            )
        known = self._instances.get(function, {}).get(want.instance)
        reason = f"node {known.node} is lost" if known is not None and known.node else ""
        return InstanceView(
            instance=want.instance,
            allocation=want.allocation,
            state=InstanceState.PENDING,
            device_model=predicted_model,
            standby=want.standby,
            reason=reason,
        )

    def _devices_with_bound(self, wanted: dict[str, _Desired], now_s: float) -> tuple[DeviceState, ...]:
        """The live devices with the room of all instances whose place is known."""
        rows: dict[_DeviceKey, dict[int, Row]] = {}
        memory_bytes: dict[_DeviceKey, int] = {}
        for function, instances in self._instances.items():
            wants = wanted[function].instances if function in wanted else ()
            requests = {want.instance: want.allocation.request_permille for want in wants}
            for name, event in instances.items():
                if event.state is InstanceState.STOPPED and name not in requests:
                    continue
                request_permille = max(requests.get(name, 0), event.allocation.request_permille)
                key = (event.node, event.gpu)
                info = self._nodes[event.node].devices.get(event.gpu) if event.node in self._nodes else None
                sm_pct = event.allocation.sm_pct if info is None else info.given_sm_pct(event.allocation.sm_pct)
                _add(rows.setdefault(key, {}), event.row, sm_pct, request_permille)
                memory_bytes[key] = memory_bytes.get(key, 0) + event.allocation.memory_bytes
        devices = []
        for name, node in sorted(self._nodes.items()):
            if node.draining or self._lost(name, now_s):
                continue
            for gpu, info in sorted(node.devices.items()):
                if info.health is DeviceHealth.LOST:
                    continue
                key = (name, gpu)
                telemetry = node.telemetry.get(gpu)
                used_bytes = memory_bytes.get(key, 0)
                device_rows = rows.get(key, {})
                if telemetry is not None:
                    device_rows = _merged(device_rows, telemetry.rows)
                    used_bytes = max(used_bytes, telemetry.memory_used_bytes)
                device = DeviceState(info, tuple(device_rows[i] for i in sorted(device_rows)), used_bytes)
                devices.append(device)
        return tuple(devices)


def _tells(event: DeviceEvent) -> tuple[tuple[Row, ...], int]:
    """What of a device's telemetry a snapshot shows."""
    return event.rows, event.memory_used_bytes


def _add(rows: dict[int, Row], index: int, sm_pct: int, request_permille: int) -> None:
    row = rows.get(index) or Row(index, sm_pct, 0)
    rows[index] = replace(
        row,
        sm_pct=max(row.sm_pct, sm_pct),
        used_permille=min(WHOLE_PERMILLE, row.used_permille + request_permille),
    )


def _merged(rows: dict[int, Row], reported: Iterable[Row]) -> dict[int, Row]:
    """Per row the larger of the instances' sum and what the agent reports, whose empty rows are left out."""
    merged = dict(rows)
    for row in reported:
        if row.used_permille <= 0:
            continue
        own = merged.get(row.index)
        merged[row.index] = (
            row
            if own is None
            else Row(row.index, max(own.sm_pct, row.sm_pct), max(own.used_permille, row.used_permille))
        )
    return merged


def _ordinal(function: str, instance: str) -> int:
    """The number in an instance's name; -1 when it has none."""
    suffix = instance.removeprefix(f"{function}-")
    return int(suffix) if suffix.isdecimal() else -1
