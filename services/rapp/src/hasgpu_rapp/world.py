"""What rapp has heard of functions, nodes and instances. No I/O: payloads are decoded by the caller."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from hasgpu_core.events import BatchObservation, FunctionEvent, InstanceEvent, NodeEvent
from hasgpu_predictor import ObservedBatch, workload_digest

HEARTBEAT_LAPSE_S = 10.0
"""A node not heard of for so long is not asked to measure."""


@dataclass(frozen=True, slots=True)
class DeviceModel:
    """What the nodes say of one kind of device."""

    name: str
    backend: str
    sm_rungs_pct: tuple[int, ...]
    """Of all devices of the model, ascending."""


@dataclass(frozen=True, slots=True)
class ProfilePlace:
    """A device that a profile can be measured on."""

    node: str
    address: str
    gpu: str


@dataclass(slots=True)
class _Node:
    event: NodeEvent
    heard_s: float


@dataclass(slots=True)
class World:
    """The last values of `function.>` and `node.>`, and how far each instance's observations have been read."""

    functions: dict[str, FunctionEvent] = field(default_factory=dict)
    workload_since: dict[str, int] = field(default_factory=dict)
    """First revision of each function with its present workload; instances of older ones tell nothing of it."""
    batches_read: dict[str, tuple[str, int]] = field(default_factory=dict)
    """By instance: its function, and how many of its batches were taken in."""
    _nodes: dict[str, _Node] = field(default_factory=dict)

    def function(self, event: FunctionEvent) -> bool:
        """Takes a function's newest revision; tells whether its workload is another than before."""
        name = event.spec.name
        before = self.functions.get(name)
        self.functions[name] = event
        if before is not None and workload_digest(before.spec) == workload_digest(event.spec):
            return False
        self.workload_since[name] = event.revision if before is not None else 0
        return before is not None

    def function_gone(self, name: str) -> None:
        """Forgets a function."""
        self.functions.pop(name, None)
        self.workload_since.pop(name, None)

    def node(self, event: NodeEvent, *, now_s: float, unix_ns: int) -> None:
        """Takes a heartbeat. One that was sent long ago (a last value read at start) counts from when it was sent."""
        age_s = max(0.0, (unix_ns - event.observed_unix_ns) / 1e9) if event.observed_unix_ns else 0.0
        self._nodes[event.node] = _Node(event, now_s - age_s)

    def node_gone(self, node: str) -> None:
        """Forgets a node."""
        self._nodes.pop(node, None)

    def device_models(self) -> dict[str, DeviceModel]:
        """Returns every device model of a node that was heard of, sorted by name; lapsed nodes may come back."""
        rungs: dict[str, set[int]] = {}
        backends: dict[str, str] = {}
        for device in (d for name in sorted(self._nodes) for d in self._nodes[name].event.devices):
            rungs.setdefault(device.model, set()).update(device.sm_rungs_pct or (100,))
            backends.setdefault(device.model, device.backend)
        return {name: DeviceModel(name, backends[name], tuple(sorted(rungs[name]))) for name in sorted(rungs)}

    def places(self, device_model: str, *, now_s: float) -> list[ProfilePlace]:
        """Returns the live devices of a model, those of draining nodes last."""
        return [place for _, place in sorted(self._live(device_model, now_s), key=lambda item: item[0])]

    def _live(self, device_model: str, now_s: float) -> Iterator[tuple[tuple[bool, str, str], ProfilePlace]]:
        for node in self._nodes.values():
            if now_s - node.heard_s > HEARTBEAT_LAPSE_S or not node.event.address:
                continue
            for device in node.event.devices:
                if device.model == device_model:
                    place = ProfilePlace(node.event.node, node.event.address, device.gpu)
                    yield (node.event.draining, place.node, place.gpu), place

    def new_batches(self, event: InstanceEvent) -> list[ObservedBatch]:
        """Returns the batches of an instance event that were not read before, oldest first.

        An event repeats the newest observations; the instance's cumulative count tells which are new. A count that
        fell belongs to a new worker.
        """
        _, read = self.batches_read.get(event.instance, ("", 0))
        fresh_count = event.batches_count - read if event.batches_count >= read else event.batches_count
        self.batches_read[event.instance] = (event.function, event.batches_count)
        fresh = event.observations[max(0, len(event.observations) - fresh_count) :]
        return [_observed(observation) for observation in fresh]

    def read_of(self, function: str) -> dict[str, int]:
        """Returns how many batches of each instance of a function were taken in."""
        return {name: count for name, (of, count) in self.batches_read.items() if of == function}

    def instance_gone(self, instance: str) -> None:
        """Forgets an instance; ids are never used twice."""
        self.batches_read.pop(instance, None)


def _observed(observation: BatchObservation) -> ObservedBatch:
    run_ns = 0
    if observation.gate_wait_ns is not None:
        run_ns = max(0, observation.latency_ns - observation.gate_wait_ns)
    return ObservedBatch(
        observation.batch,
        observation.sm_pct,
        observation.device_time_ns / 1e9,
        run_ns / 1e9,
        observation.request_permille,
        observation.latency_ns / 1e9,
    )
