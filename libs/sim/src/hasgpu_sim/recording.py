"""A load as the scaler saw it, with the decisions made, fed to another shell of the same policy.

The values and the file's lines are those of `hasgpu_core.recording`, which the live scaler writes.
"""

from __future__ import annotations

import gzip
import io
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

from hasgpu_core.capacity import CapacityTable
from hasgpu_core.errors import InvalidError
from hasgpu_core.events import DemandEvent, DeviceEvent, FunctionEvent, InstanceEvent, NodeEvent
from hasgpu_core.observe import ClusterObserver
from hasgpu_core.policy.scaling import Decision, PolicyState, ScalingPolicy
from hasgpu_core.recording import (
    FunctionGone,
    InitialDesired,
    InstanceGone,
    NodeGone,
    RecordedEvent,
    RecordedInput,
    RecordedLoad,
    RecordedTick,
    TableGone,
    lines_of,
    parse,
)

__all__ = [
    "FunctionGone",
    "InitialDesired",
    "InstanceGone",
    "Loop",
    "NodeGone",
    "RecordedEvent",
    "RecordedInput",
    "RecordedLoad",
    "RecordedTick",
    "TableGone",
    "apply",
    "read_recording",
    "replay",
    "write_recording",
]


def apply(observer: ClusterObserver, event: RecordedEvent, now_s: float) -> None:
    """Hands a recorded event to an observer."""
    match event:
        case FunctionEvent():
            observer.apply_function(event)
        case FunctionGone(function):
            observer.remove_function(function)
        case DemandEvent():
            observer.apply_demand(event, now_s)
        case InstanceEvent():
            observer.apply_instance(event)
        case InstanceGone(function, instance):
            observer.remove_instance(function, instance)
        case DeviceEvent():
            observer.apply_device(event, now_s)
        case NodeEvent():
            observer.apply_node(event, now_s)
        case NodeGone(node):
            observer.remove_node(node)
        case CapacityTable():
            observer.apply_table(event)
        case TableGone(function, device_model):
            observer.remove_table(function, device_model)
        case InitialDesired():
            observer.set_desired(event.function, event.instances, event.next_ordinal)
            observer.set_held(event.function, event.held)


class Loop:
    """The scaler's loop without its shell: an observer, a policy and the policy's memory."""

    def __init__(self, policy: ScalingPolicy, observer: ClusterObserver | None = None) -> None:
        self.observer = observer or ClusterObserver()
        self._policy = policy
        self._state = PolicyState()

    def tick(self, now_s: float, functions: Collection[str] | None = None) -> tuple[Decision, ...]:
        """Makes one pass, over the named functions or all; what it decides is what is desired from then on."""
        snapshot = self.observer.snapshot(now_s, functions)
        decisions, state = self._policy.decide(snapshot, self._state, now_s)
        if functions is not None:
            state = replace(state, functions={**self._state.functions, **state.functions})
        self._state = state
        for decision in decisions:
            self.observer.set_desired(decision.function, decision.desired, decision.next_ordinal)
        return decisions


def replay(load: RecordedLoad, policy: ScalingPolicy) -> tuple[RecordedTick, ...]:
    """Feeds a recording through a policy anew and returns what it decides at each tick."""
    loop = Loop(policy)
    ticks = []
    for entry in load.entries:
        if isinstance(entry, RecordedInput):
            apply(loop.observer, entry.event, entry.at_s)
        else:
            ticks.append(RecordedTick(entry.at_s, loop.tick(entry.at_s)))
    return tuple(ticks)


def read_recording(path: Path) -> RecordedLoad:
    """Reads a recording's file, plain or gzipped (also of several members, the last one cut off).

    Raises InvalidError when it can't be read or is none.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InvalidError(f"recording {path}", expected="a file", got=str(error.strerror or error)) from error
    return read_recording_bytes(data, f"recording {path}")


def read_recording_bytes(data: bytes, source: str = "recording") -> RecordedLoad:
    """As `read_recording`, of a file's content."""
    if data[:2] != b"\x1f\x8b":
        return parse(io.StringIO(data.decode("utf-8", errors="replace")), source)
    text = bytearray()
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(data)) as file:
            while chunk := file.read(1 << 20):
                text += chunk
    except (EOFError, OSError) as error:
        if not text:
            raise InvalidError(source, expected="gzipped lines", got=str(error)) from error
    return parse(io.StringIO(text.decode("utf-8", errors="replace")), source)


def write_recording(load: RecordedLoad, path: Path, policy: str = "") -> None:
    """Writes a recording's file; gzipped where the name ends in .gz."""
    text = "\n".join(lines_of(load, policy)) + "\n"
    data = text.encode()
    path.write_bytes(gzip.compress(data, 6) if path.suffix == ".gz" else data)
