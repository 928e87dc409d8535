"""Writes the subjects of this node's instances; what could not be written is written later."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping

from hasgpu_core.errors import UnavailableError
from hasgpu_core.events import InstanceEvent, instance_subject
from hasgpu_core.ports import Bus
from hasgpu_runtime.wire import encode

log = logging.getLogger(__name__)


class BusPublisher:
    """Implements `hasgpu_node_agent.reconciler.Publisher`.

    Args:
        bus: Where to write.
        event: Returns what an instance's subject should say now and its trace headers; None: nothing (it has gone).
        published: Called with each event that was written.
    """

    def __init__(
        self,
        bus: Bus,
        event: Callable[[str], tuple[InstanceEvent, Mapping[str, str]] | None],
        published: Callable[[InstanceEvent], None],
    ) -> None:
        self._bus = bus
        self._event = event
        self._published = published
        self._dirty: dict[str, None] = {}
        self._gone: dict[str, str] = {}
        self._lock = asyncio.Lock()
        self._wake = asyncio.Event()

    def mark(self, instance: str) -> None:
        """The instance changed; its subject is written soon."""
        self._dirty[instance] = None
        self._gone.pop(instance, None)
        self._wake.set()

    def gone(self, function: str, instance: str) -> None:
        """The instance went for good; its subject is deleted soon."""
        self._dirty.pop(instance, None)
        self._gone[instance] = function
        self._wake.set()

    async def flush(self, instance: str) -> None:
        """Writes the instance's subject now; when the bus is away it is written later."""
        self.mark(instance)
        try:
            await self._write(instance)
        except UnavailableError as error:
            log.warning("%s can't be told yet: %s", instance, error)

    async def wait(self) -> None:
        """Returns once there is something to write."""
        await self._wake.wait()

    async def write_all(self) -> None:
        """Writes and deletes what is due; raises UnavailableError when the bus is away (the rest stays due)."""
        self._wake.clear()
        try:
            for instance in list(self._dirty):
                await self._write(instance)
            for instance, function in list(self._gone.items()):
                async with self._lock:
                    if self._gone.get(instance) == function:
                        await self._bus.delete(instance_subject(function, instance))
                        self._gone.pop(instance, None)
        except UnavailableError:
            self._wake.set()
            raise

    async def _write(self, instance: str) -> None:
        async with self._lock:
            if instance not in self._dirty:
                return
            del self._dirty[instance]
            found = self._event(instance)
            if found is None:
                return
            event, headers = found
            try:
                await self._bus.put(instance_subject(event.function, event.instance), encode(event), headers)
            except UnavailableError:
                if instance not in self._gone:
                    self._dirty[instance] = None
                raise
            self._published(event)
