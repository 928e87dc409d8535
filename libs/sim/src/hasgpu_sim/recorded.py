"""A recording of the live scaler as a load to simulate: what was asked of which functions on which devices.

Arrivals are those that the gateways counted; between two reports of a gateway they lie evenly or at random, as asked.
Devices do what the newest capacity tables say (there is no profile in a recording); a function's spec is its newest.
Cold starts take as long as they did: the median from an instance's first appearance to READY.
"""

from __future__ import annotations

import statistics
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random

from hasgpu_core.capacity import CapacityTable
from hasgpu_core.errors import InvalidError
from hasgpu_core.events import DemandEvent, DesiredInstance, DeviceEvent, FunctionEvent, InstanceEvent, NodeEvent
from hasgpu_core.function import FunctionSpec
from hasgpu_core.recording import InitialDesired, InstanceGone, RecordedInput, RecordedLoad, RecordedTick
from hasgpu_core.resources import DeviceInfo, InstanceState

from hasgpu_sim.arrivals import Process

LONGEST_REPORT_S = 30.0
"""Arrivals between two reports further apart than this are put into the last so many seconds."""


@dataclass(frozen=True, slots=True)
class RecordedFunction:
    """One function, and what the live system made of it."""

    spec: FunctionSpec
    tables: tuple[CapacityTable, ...]
    desired: tuple[DesiredInstance, ...]
    """When the recording began."""
    held: bool
    arrivals_s: Sequence[float]
    """From the recording's begin on."""
    requests: int
    answered: int
    late: int
    refused: int
    failed: int
    gpu_seconds: float
    """Integral of SM share times request of its instances."""
    actions: int
    violations: Sequence[tuple[float, float]]
    """(time, late or dropped so far)"""
    shares: Sequence[tuple[float, float]]
    """(time, GPUs requested)"""
    capacities: Sequence[tuple[float, float]]
    """(time, as the policy reckoned)"""


@dataclass(frozen=True, slots=True)
class RecordedScenario:
    """What a recording holds."""

    functions: tuple[RecordedFunction, ...]
    devices: tuple[DeviceInfo, ...]
    duration_s: float
    cold_start_s: float | None
    """None: no instance was started."""
    policies: tuple[str, ...]
    """That decided, in their order."""
    left_out: tuple[str, ...]
    """Functions without a prediction or without a request."""


def scenario_of_recording(load: RecordedLoad, process: Process, seed: int = 0) -> RecordedScenario:
    """Reads a recording as a load.

    Raises:
        InvalidError: It has no pass, no device or no function that was asked anything.
    """
    reader = _Reader(load, process, Random(seed))  # noqa: S311  a simulation is reproduced from its seed
    for entry in load.entries:
        reader.take(entry)
    return reader.result()


class _Reader:
    """Goes through the entries once."""

    def __init__(self, load: RecordedLoad, process: Process, rng: Random) -> None:
        times = [entry.at_s for entry in load.entries]
        ticks = [entry.at_s for entry in load.ticks]
        if not ticks:
            raise InvalidError("recording", expected="at least one pass of the scaler", got="none")
        self._begin_s, self._end_s = min(ticks), max(times)
        self._process, self._rng = process, rng
        self._specs: dict[str, FunctionSpec] = {}
        self._tables: dict[str, dict[str, CapacityTable]] = {}
        self._desired: dict[str, InitialDesired] = {}
        self._devices: dict[tuple[str, str], DeviceInfo] = {}
        self._arrivals: dict[str, array[float]] = {}
        self._reports: dict[tuple[str, str], tuple[float, DemandEvent]] = {}
        self._counts: dict[str, dict[str, int]] = {}
        self._violations: dict[str, list[tuple[float, float]]] = {}
        self._shares: dict[str, list[tuple[float, float]]] = {}
        self._capacities: dict[str, list[tuple[float, float]]] = {}
        self._instances: dict[tuple[str, str], tuple[float, float]] = {}
        """(since, share)"""
        self._gpu_seconds: dict[str, float] = {}
        self._starting: dict[str, float] = {}
        self._starts_s: list[float] = []
        self._actions: dict[str, int] = {}
        self._policies: dict[str, None] = {}

    def take(self, entry: RecordedInput | RecordedTick) -> None:
        """Takes the next entry in."""
        at_s = max(0.0, entry.at_s - self._begin_s)
        if isinstance(entry, RecordedTick):
            self._policies.setdefault(entry.policy or "unknown")
            for decision in entry.decisions:
                name = decision.function
                self._actions[name] = self._actions.get(name, 0) + len(decision.actions)
                self._capacities.setdefault(name, []).append((at_s, decision.capacity_rps))
            return
        match entry.event:
            case FunctionEvent(spec=spec):
                self._specs[spec.name] = spec
            case CapacityTable() as table:
                self._tables.setdefault(table.function, {})[table.device_model] = table
            case InitialDesired() as desired:
                self._desired.setdefault(desired.function, desired)
            case NodeEvent(devices=devices):
                self._devices |= {(info.node, info.gpu): info for info in devices}
            case DeviceEvent(device=info):
                self._devices[info.node, info.gpu] = info
            case InstanceEvent() as event:
                self._instance(event, at_s)
            case InstanceGone(function, instance):
                self._charge(function, instance, at_s, 0.0)
                self._starting.pop(instance, None)
            case DemandEvent() as event:
                self._demand(event, at_s)
            case _:
                pass

    def _instance(self, event: InstanceEvent, at_s: float) -> None:
        stopped = event.state in (InstanceState.STOPPED, InstanceState.FAILED)
        self._charge(event.function, event.instance, at_s, 0.0 if stopped else event.allocation.gpu_share)
        if event.state is InstanceState.READY:
            began_s = self._starting.pop(event.instance, None)
            if began_s is not None and began_s > 0:
                self._starts_s.append(at_s - began_s)
        elif event.state in (InstanceState.PENDING, InstanceState.LOADING):
            self._starting.setdefault(event.instance, at_s)

    def _charge(self, function: str, instance: str, at_s: float, share: float) -> None:
        since_s, before = self._instances.get((function, instance), (at_s, 0.0))
        self._gpu_seconds[function] = self._gpu_seconds.get(function, 0.0) + before * (at_s - since_s)
        self._instances[function, instance] = (at_s, share)
        if share != before:
            total = sum(own for (name, _), (_, own) in self._instances.items() if name == function)
            self._shares.setdefault(function, []).append((at_s, total))

    def _demand(self, event: DemandEvent, at_s: float) -> None:
        """Counts what came since the gateway's last report; the first one, or one of a new epoch, begins a count."""
        key = (event.function, event.gateway)
        before_s, before = self._reports.get(key, (at_s, event))
        self._reports[key] = (at_s, event)
        if before.epoch != event.epoch or event.arrived_count < before.arrived_count:
            return
        counts = self._counts.setdefault(
            event.function, dict.fromkeys(("arrived", "ok", "late", "refused", "failed"), 0)
        )
        for kind in counts:
            counts[kind] += getattr(event, f"{kind}_count") - getattr(before, f"{kind}_count")
        arrived = event.arrived_count - before.arrived_count
        length_s = min(LONGEST_REPORT_S, at_s - before_s)
        times = self._arrivals.setdefault(event.function, array("d"))
        start_s = at_s - length_s
        if self._process is Process.EVEN:
            times.extend(start_s + (i + 0.5) * length_s / arrived for i in range(arrived))
        else:
            times.extend(start_s + self._rng.random() * length_s for _ in range(arrived))
        bad = counts["late"] + counts["refused"] + counts["failed"]
        self._violations.setdefault(event.function, []).append((at_s, float(bad)))

    def result(self) -> RecordedScenario:
        """Returns what was found."""
        duration_s = self._end_s - self._begin_s
        for function, instance in list(self._instances):
            self._charge(function, instance, duration_s, 0.0)
        usable = [name for name in sorted(self._specs) if self._tables.get(name) and self._arrivals.get(name)]
        if not usable:
            raise InvalidError(
                "recording",
                expected="a function with a prediction and requests",
                got=f"none among {', '.join(sorted(self._specs)) or 'no function'}",
            )
        if not self._devices:
            raise InvalidError("recording", expected="at least one device", got="none")
        return RecordedScenario(
            tuple(self._function(name) for name in usable),
            tuple(info for _, info in sorted(self._devices.items())),
            duration_s,
            statistics.median(self._starts_s) if self._starts_s else None,
            tuple(self._policies),
            tuple(sorted(set(self._specs) - set(usable))),
        )

    def _function(self, name: str) -> RecordedFunction:
        counts: Mapping[str, int] = self._counts[name]
        desired = self._desired.get(name)
        return RecordedFunction(
            spec=self._specs[name],
            tables=tuple(table for _, table in sorted(self._tables[name].items())),
            desired=desired.instances if desired is not None else (),
            held=desired is not None and desired.held,
            arrivals_s=array("d", sorted(self._arrivals[name])),
            requests=counts["arrived"],
            answered=counts["ok"],
            late=counts["late"],
            refused=counts["refused"],
            failed=counts["failed"],
            gpu_seconds=self._gpu_seconds.get(name, 0.0),
            actions=self._actions.get(name, 0),
            violations=tuple(self._violations.get(name, ())),
            shares=tuple(self._shares.get(name, ())),
            capacities=tuple(self._capacities.get(name, ())),
        )
