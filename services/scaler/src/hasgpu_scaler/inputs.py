"""Messages from the bus into the core."""

from __future__ import annotations

import logging

from hasgpu_core.errors import InvalidError
from hasgpu_core.ports import Message, StateChange
from hasgpu_runtime import wire

from hasgpu_scaler.announce import Announcer
from hasgpu_scaler.core import ScalerCore
from hasgpu_scaler.tracing import DecisionTraces

WATCHED = ("function.>", "instance.>", "node.>", "capacity.>", "scale.vertical.>")
SUBSCRIBED = ("demand.>", "device.>")

_log = logging.getLogger(__name__)


class Inputs:
    """Feeds core and announcer; what can't be read is logged and left out."""

    def __init__(self, core: ScalerCore, announcer: Announcer, traces: DecisionTraces) -> None:
        self._core = core
        self._announcer = announcer
        self._traces = traces

    def on_change(self, change: StateChange, now_s: float) -> bool:
        """Takes a last value in; returns whether a pass is due before its time."""
        kind, _, rest = change.subject.partition(".")
        try:
            match kind:
                case "function":
                    return self._function(rest, change.payload, now_s)
                case "instance":
                    return self._instance(rest, change.payload)
                case "node":
                    return self._node(rest, change.payload, now_s)
                case "capacity":
                    return self._capacity(rest, change.payload)
                case "scale":
                    self._vertical(rest, change.payload)
        except InvalidError:
            _log.exception("%s can't be read and is left out", change.subject)
        return False

    def on_message(self, message: Message, now_s: float) -> bool:
        """Takes demand or telemetry in; returns whether a pass is due: requests wait."""
        try:
            if message.subject.startswith("demand."):
                demand = wire.decode_demand(message.payload)
                self._core.observer.apply_demand(demand, now_s)
                self._traces.heard(demand)
                return demand.queued_count > 0
            self._core.observer.apply_device(wire.decode_device(message.payload), now_s)
        except InvalidError:
            _log.exception("%s can't be read and is left out", message.subject)
        return False

    def _function(self, name: str, payload: bytes | None, now_s: float) -> bool:
        if payload is None:
            self._core.on_function_gone(name, now_s)
            return False
        return self._core.on_function(wire.decode_function(payload))

    def _instance(self, rest: str, payload: bytes | None) -> bool:
        if payload is None:
            function, _, instance = rest.partition(".")
            self._announcer.on_instance_gone(instance)
            return self._core.on_instance_gone(function, instance)
        event = wire.decode_instance(payload)
        self._announcer.on_instance(event)
        return self._core.on_instance(event)

    def _node(self, name: str, payload: bytes | None, now_s: float) -> bool:
        if payload is None:
            self._core.observer.remove_node(name)
        else:
            self._core.observer.apply_node(wire.decode_node(payload), now_s)
        return False

    def _capacity(self, rest: str, payload: bytes | None) -> bool:
        if payload is None:
            function, _, device_model = rest.partition(".")
            self._core.observer.remove_table(function, device_model)
        else:
            self._core.observer.apply_table(wire.decode_capacity(payload))
        return True

    def _vertical(self, rest: str, payload: bytes | None) -> None:
        # A host name may hold dots, an instance's id never does.
        node, _, instance = rest.removeprefix("vertical.").rpartition(".")
        self._announcer.on_vertical(node, instance, wire.decode_vertical(payload) if payload is not None else None)
