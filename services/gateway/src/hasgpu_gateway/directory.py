"""What the gateway knows from the bus: functions, their instances and their predictions. Last values, kept current."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from typing import TypeVar

from hasgpu_core.capacity import CapacityTable
from hasgpu_core.errors import InvalidError
from hasgpu_core.events import FunctionEvent, InstanceEvent
from hasgpu_core.ports import Bus, CaughtUp, StateChange
from hasgpu_runtime import wire

_V = TypeVar("_V")

log = logging.getLogger(__name__)

PATTERNS = ("function.>", "instance.>", "capacity.>")


class Directory:
    """The bus's view of all functions. Listeners are called, on the event loop, with the name of what changed."""

    def __init__(self) -> None:
        self.functions: dict[str, FunctionEvent] = {}
        self._instances: dict[str, dict[str, InstanceEvent]] = {}
        self._tables: dict[str, dict[str, CapacityTable]] = {}
        self._listeners: list[Callable[[str], None]] = []
        self._caught_up_listeners: list[Callable[[], None]] = []
        self.caught_up = False
        """All that was known when the watch began has been read."""

    def listen(self, changed: Callable[[str], None]) -> None:
        """Adds a listener; it is called with a function's name."""
        self._listeners.append(changed)

    def unlisten(self, changed: Callable[[str], None]) -> None:
        """Takes a listener away."""
        self._listeners.remove(changed)

    def on_caught_up(self, listener: Callable[[], None]) -> None:
        """Adds a listener for each time that all last values are read: at the start and when the bus is back."""
        self._caught_up_listeners.append(listener)

    def instances(self, function: str) -> Mapping[str, InstanceEvent]:
        """Returns a function's instances by id."""
        return self._instances.get(function, {})

    def tables(self, function: str) -> Mapping[str, CapacityTable]:
        """Returns a function's capacity tables by device model."""
        return self._tables.get(function, {})

    async def run(self, bus: Bus) -> None:
        """Follows the bus for ever."""
        async with bus.watch(*PATTERNS) as changes:
            async for change in changes:
                if isinstance(change, CaughtUp):
                    self.caught_up = True
                    for caught_up in self._caught_up_listeners:
                        caught_up()
                else:
                    self.apply(change)

    async def wait_until(self, condition: Callable[[], bool], *, timeout_s: float) -> bool:
        """Waits until the view meets a condition; False when it did not in time."""
        changed = asyncio.Event()

        def wake(_: str) -> None:
            changed.set()

        self.listen(wake)
        try:
            async with asyncio.timeout(timeout_s):
                while not condition():
                    changed.clear()
                    await changed.wait()
        except TimeoutError:
            return False
        finally:
            self.unlisten(wake)
        return True

    def apply(self, change: StateChange) -> None:
        """Takes a change in; a payload that can't be read is logged and left out."""
        kind, _, rest = change.subject.partition(".")
        function, _, part = rest.partition(".")
        try:
            match kind:
                case "function":
                    self._apply_function(function, change.payload)
                case "instance":
                    instance = wire.decode_instance(change.payload) if change.payload else None
                    _put(self._instances, function, part, instance)
                case "capacity":
                    table = wire.decode_capacity(change.payload) if change.payload else None
                    _put(self._tables, function, part, table)
        except InvalidError as error:
            log.warning("%s can't be read and is left out: %s", change.subject, error)
            return
        for listener in tuple(self._listeners):
            listener(function)

    def _apply_function(self, name: str, payload: bytes | None) -> None:
        if not payload:
            self.functions.pop(name, None)
            return
        event = wire.decode_function(payload)
        known = self.functions.get(name)
        if known is None or event.revision >= known.revision:
            self.functions[name] = event


def _put(values: dict[str, dict[str, _V]], function: str, key: str, value: _V | None) -> None:
    """Sets or, with None, removes; a function with nothing left is removed too."""
    if value is not None:
        values.setdefault(function, {})[key] = value
        return
    of_function = values.get(function, {})
    of_function.pop(key, None)
    if not of_function:
        values.pop(function, None)
