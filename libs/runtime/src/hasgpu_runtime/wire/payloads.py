"""Events to and from bytes, as they travel on the bus and lie in the store."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from google.protobuf.message import DecodeError, Message
from hasgpu.events.v1 import events_pb2
from hasgpu_core import events
from hasgpu_core.capacity import CapacityTable
from hasgpu_core.errors import InvalidError

from hasgpu_runtime.wire import messages

Event = (
    events.FunctionEvent
    | events.DemandEvent
    | events.InstanceEvent
    | events.NodeEvent
    | events.DeviceEvent
    | events.VerticalScaleEvent
    | events.HorizontalScaleEvent
    | events.PlanEvent
    | CapacityTable
)
"""What `encode` takes."""

_M = TypeVar("_M", bound=Message)

_TO_PROTO: Mapping[type, Callable[[Any], Message]] = {
    events.FunctionEvent: messages.function_event_to_proto,
    events.DemandEvent: messages.demand_event_to_proto,
    events.InstanceEvent: messages.instance_event_to_proto,
    events.NodeEvent: messages.node_event_to_proto,
    events.DeviceEvent: messages.device_event_to_proto,
    events.VerticalScaleEvent: messages.vertical_to_proto,
    events.HorizontalScaleEvent: messages.horizontal_to_proto,
    events.PlanEvent: messages.plan_to_proto,
    CapacityTable: messages.capacity_table_to_proto,
}


def encode(event: Event) -> bytes:
    """Returns an event's payload; raises InvalidError when a value does not fit its field (a negative count, say)."""
    try:
        return _TO_PROTO[type(event)](event).SerializeToString()
    except ValueError as error:
        raise InvalidError(type(event).__name__, expected="numbers that fit the wire", got=str(error)) from error


def decode_function(payload: bytes) -> events.FunctionEvent:
    """Reads a payload of `function.<fn>`; raises InvalidError."""
    return messages.function_event_from_proto(_parse(events_pb2.FunctionEvent, payload))


def decode_demand(payload: bytes) -> events.DemandEvent:
    """Reads a payload of `demand.<fn>.<gateway>`; raises InvalidError."""
    return messages.demand_event_from_proto(_parse(events_pb2.DemandEvent, payload))


def decode_instance(payload: bytes) -> events.InstanceEvent:
    """Reads a payload of `instance.<fn>.<id>`; raises InvalidError."""
    return messages.instance_event_from_proto(_parse(events_pb2.InstanceEvent, payload))


def decode_node(payload: bytes) -> events.NodeEvent:
    """Reads a payload of `node.<node>`; raises InvalidError."""
    return messages.node_event_from_proto(_parse(events_pb2.NodeEvent, payload))


def decode_device(payload: bytes) -> events.DeviceEvent:
    """Reads a payload of `device.<node>.<gpu>`; raises InvalidError."""
    return messages.device_event_from_proto(_parse(events_pb2.DeviceEvent, payload))


def decode_capacity(payload: bytes) -> CapacityTable:
    """Reads a payload of `capacity.<fn>.<device model>`; raises InvalidError."""
    return messages.capacity_table_from_proto(_parse(events_pb2.CapacityEvent, payload))


def decode_vertical(payload: bytes) -> events.VerticalScaleEvent:
    """Reads a payload of `scale.vertical.<node>.<instance>`; raises InvalidError."""
    return messages.vertical_from_proto(_parse(events_pb2.VerticalScaleEvent, payload))


def decode_horizontal(payload: bytes) -> events.HorizontalScaleEvent:
    """Reads a payload of `scale.horizontal.<fn>`; raises InvalidError."""
    return messages.horizontal_from_proto(_parse(events_pb2.HorizontalScaleEvent, payload))


def decode_plan(payload: bytes) -> events.PlanEvent:
    """Reads a payload of `plan.<node>`; raises InvalidError."""
    return messages.plan_from_proto(_parse(events_pb2.PlanEvent, payload))


def _parse(kind: type[_M], payload: bytes) -> _M:
    try:
        return kind.FromString(payload)
    except DecodeError as error:
        raise InvalidError(
            f"payload of {len(payload)} bytes", expected=f"a {kind.DESCRIPTOR.full_name}", got=str(error)
        ) from error
