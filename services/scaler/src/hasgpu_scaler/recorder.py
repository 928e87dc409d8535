"""Keeping what the scaler saw and decided, so that it can be explained and replayed later.

The observer that the policy's snapshots come from is the one that is listened to: what it takes in is what is written,
so a replay of the file gives the snapshots back. Only the process that decides writes. Segments begin with everything
known, and whoever keeps them may drop the oldest.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from hasgpu_core.capacity import CapacityTable
from hasgpu_core.events import DemandEvent, DesiredInstance, DeviceEvent, FunctionEvent, InstanceEvent, NodeEvent
from hasgpu_core.observe import ClusterObserver
from hasgpu_core.policy.scaling import Decision
from hasgpu_core.ports import Clock
from hasgpu_core.recording import (
    FunctionGone,
    InitialDesired,
    InstanceGone,
    NodeGone,
    RecordedEvent,
    RecordedInput,
    RecordedTick,
    TableGone,
    entry_line,
    header_line,
)

IDLE_EVERY_S = 5.0
"""A decision that changes nothing is written at most so often for a function (and whenever it ends or begins one that
does)."""
DEMAND_KEPT_S = 15.0
"""Reports of gateways that a new segment begins with: rates are differences of them."""
MOST_REPORTS = 64
"""Of those, of one gateway and function."""


class Segments(Protocol):
    """Where lines go."""

    def begin(self, header: str, base: Iterable[str], unix_ns: int) -> None:
        """Begins a segment."""
        ...

    def write(self, lines: list[str], unix_ns: int) -> None:
        """Adds lines to it."""
        ...

    def is_full(self, unix_ns: int) -> bool:
        """Whether the next pass should begin a new segment."""
        ...

    def close(self) -> None:
        """Ends the segment."""
        ...


@dataclass(slots=True)
class _Told:
    """The last decision written of a function."""

    at_s: float
    acted: bool
    actions: object


class Recorder:
    """Turns what comes in and what is decided into lines."""

    def __init__(self, segments: Segments, clock: Clock) -> None:
        self._segments = segments
        self._clock = clock
        self._known: dict[tuple[str, ...], RecordedInput] = {}
        self._demand: dict[tuple[str, str], deque[RecordedInput]] = {}
        self._told: dict[str, _Told] = {}
        self._held: set[str] = set()
        self._decided: dict[str, tuple[tuple[DesiredInstance, ...], int]] = {}
        self._lines: list[str] = []
        self._writes = False
        self._fresh = True

    # What comes in

    def known_keys(self) -> list[tuple[str, ...]]:
        """Returns the keys of what is known."""
        return list(self._known)

    def take(self, key: tuple[str, ...], event: RecordedEvent) -> None:
        """Notes an event; `key` says which earlier one it takes the place of."""
        entry = RecordedInput(self._clock.now_s(), event)
        self._known[key] = entry
        self._write(entry)

    def drop(self, keys: Iterable[tuple[str, ...]], event: RecordedEvent) -> None:
        """Notes that something is gone."""
        for key in keys:
            self._known.pop(key, None)
        self._write(RecordedInput(self._clock.now_s(), event))

    def forget_function(self, name: str) -> None:
        """Notes that a function is gone, with all that was known of it."""
        held = [key for key in self._known if key[0] in ("function", "capacity", "desired") and key[1] == name]
        self.drop(held, FunctionGone(name))
        for key in [key for key in self._demand if key[0] == name]:
            del self._demand[key]
        self._told.pop(name, None)
        self._decided.pop(name, None)
        self._held.discard(name)

    def demand(self, event: DemandEvent) -> None:
        """Notes a gateway's report."""
        entry = RecordedInput(self._clock.now_s(), event)
        reports = self._demand.setdefault((event.function, event.gateway), deque(maxlen=MOST_REPORTS))
        while reports and reports[0].at_s < entry.at_s - DEMAND_KEPT_S:
            reports.popleft()
        reports.append(entry)
        self._write(entry)

    def desired(self, function: str, instances: tuple[DesiredInstance, ...], next_ordinal: int) -> None:
        """Notes what is desired: what the policy decided is in its pass already, all else is an input."""
        value = InitialDesired(function, instances, next_ordinal, function in self._held)
        entry = RecordedInput(self._clock.now_s(), value)
        self._known["desired", function] = entry
        if self._decided.get(function) != (instances, next_ordinal):
            self._decided[function] = (instances, next_ordinal)
            self._write(entry)

    def held(self, function: str, held: bool) -> None:
        """Notes that a function is held by hand, or not any more."""
        if held == (function in self._held):
            return
        (self._held.add if held else self._held.discard)(function)
        instances, ordinal = self._decided.get(function, ((), 0))
        entry = RecordedInput(self._clock.now_s(), InitialDesired(function, instances, ordinal, held))
        self._known["desired", function] = entry
        self._write(entry)

    # What is decided

    def tick(self, policy: str, acted: tuple[Decision, ...], advised: tuple[Decision, ...], now_s: float) -> None:
        """Writes a pass; the first one begins a segment."""
        unix_ns = self._clock.unix_ns()
        if not self._writes or self._segments.is_full(unix_ns):
            self._flush(unix_ns)
            self._begin(policy, unix_ns, before_s=now_s)
        for decision in acted:
            self._decided[decision.function] = (decision.desired, decision.next_ordinal)
        told = RecordedTick(
            now_s,
            tuple(d for d in acted if self._is_news(d, now_s, acted=True)),
            tuple(d for d in advised if self._is_news(d, now_s, acted=False)),
            policy,
        )
        self._write(told)
        self._flush(unix_ns)

    def stop(self) -> None:
        """Another process decides now: the segment ends."""
        if self._writes:
            self._flush(self._clock.unix_ns())
            self._segments.close()
        self._writes = False
        self._fresh = True
        self._lines.clear()

    def _begin(self, policy: str, unix_ns: int, *, before_s: float) -> None:
        entries = [*self._known.values(), *(entry for reports in self._demand.values() for entry in reports)]
        entries.sort(key=lambda entry: entry.at_s)
        offset_ns = unix_ns - round(self._clock.now_s() * 1e9)
        head = header_line(unix_offset_ns=offset_ns, policy=policy, fresh=self._fresh)
        base = (entry_line(RecordedInput(min(e.at_s, before_s), e.event), base=True) for e in entries)
        self._segments.begin(head, base, unix_ns)
        self._told.clear()
        self._writes, self._fresh = True, False

    def _is_news(self, decision: Decision, now_s: float, *, acted: bool) -> bool:
        before = self._told.get(decision.function)
        new = (
            before is None
            or before.acted != acted
            or bool(decision.actions and (acted or before.actions != decision.actions))
            or bool(before.actions) != bool(decision.actions)
            or now_s - before.at_s >= IDLE_EVERY_S
        )
        if new:
            self._told[decision.function] = _Told(now_s, acted, decision.actions)
        return new

    def _write(self, entry: RecordedInput | RecordedTick) -> None:
        if self._writes:
            self._lines.append(entry_line(entry))

    def _flush(self, unix_ns: int) -> None:
        if self._writes and self._lines:
            self._segments.write(self._lines, unix_ns)
        self._lines = []


class RecordingObserver(ClusterObserver):
    """An observer that tells a recorder what it takes in."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def apply_function(self, event: FunctionEvent) -> None:
        """As the observer's."""
        super().apply_function(event)
        self._recorder.take(("function", event.spec.name), event)

    def remove_function(self, name: str) -> None:
        """As the observer's."""
        super().remove_function(name)
        self._recorder.forget_function(name)

    def apply_demand(self, event: DemandEvent, now_s: float) -> None:
        """As the observer's."""
        super().apply_demand(event, now_s)
        self._recorder.demand(event)

    def apply_instance(self, event: InstanceEvent) -> None:
        """As the observer's."""
        super().apply_instance(event)
        self._recorder.take(("instance", event.function, event.instance), event)

    def remove_instance(self, function: str, instance: str) -> None:
        """As the observer's."""
        super().remove_instance(function, instance)
        self._recorder.drop([("instance", function, instance)], InstanceGone(function, instance))

    def apply_device(self, event: DeviceEvent, now_s: float) -> None:
        """As the observer's."""
        super().apply_device(event, now_s)
        self._recorder.take(("device", event.device.node, event.device.gpu), event)

    def apply_node(self, event: NodeEvent, now_s: float) -> None:
        """As the observer's."""
        super().apply_node(event, now_s)
        self._recorder.take(("node", event.node), event)

    def remove_node(self, name: str) -> None:
        """As the observer's."""
        super().remove_node(name)
        gone = [key for key in self._recorder.known_keys() if key[0] in ("node", "device") and key[1] == name]
        self._recorder.drop(gone, NodeGone(name))

    def apply_table(self, table: CapacityTable) -> None:
        """As the observer's."""
        super().apply_table(table)
        self._recorder.take(("capacity", table.function, table.device_model), table)

    def remove_table(self, function: str, device_model: str) -> None:
        """As the observer's."""
        super().remove_table(function, device_model)
        self._recorder.drop([("capacity", function, device_model)], TableGone(function, device_model))

    def set_desired(self, function: str, instances: Iterable[DesiredInstance], next_ordinal: int) -> None:
        """As the observer's."""
        kept = tuple(sorted(instances, key=lambda item: item.instance))
        super().set_desired(function, kept, next_ordinal)
        self._recorder.desired(function, kept, next_ordinal)

    def set_held(self, function: str, held: bool) -> None:
        """As the observer's."""
        super().set_held(function, held)
        self._recorder.held(function, held)
