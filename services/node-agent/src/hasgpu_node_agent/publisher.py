"""Writes the subjects of this node's instances; what could not be written is written later."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping
from weakref import WeakValueDictionary

from hasgpu_core.errors import InvalidError, UnavailableError
from hasgpu_core.events import InstanceEvent, instance_subject
from hasgpu_core.ports import Bus, CaughtUp
from hasgpu_runtime.wire import decode_instance, encode

log = logging.getLogger(__name__)

LOOK_TIMEOUT_S = 2.0
AT_ONCE = 16
"""Subjects written at a time: looking whose a subject is takes the bus some tens of milliseconds, and a node that stops
has to look for each of its instances."""


class BusPublisher:
    """Implements `hasgpu_node_agent.reconciler.Publisher`.

    An instance keeps its id when it is bound to another node, so its subject has another writer from then on. A node
    that was taken for lost and is back must not hide what the new one says: of an instance that is not planned here
    any more, or moves between nodes, it writes and deletes only what it wrote itself.

    Args:
        bus: Where to write.
        node: This node.
        event: Returns what an instance's subject should say now and its trace headers; None: nothing (it has gone).
        published: Called with each event that was written.
        speaks: Tells whether this node has the say on an instance.
    """

    def __init__(
        self,
        bus: Bus,
        node: str,
        event: Callable[[str], tuple[InstanceEvent, Mapping[str, str]] | None],
        published: Callable[[InstanceEvent], None],
        speaks: Callable[[str], bool],
    ) -> None:
        self._bus = bus
        self._node = node
        self._speaks = speaks
        self._event = event
        self._published = published
        self._dirty: dict[str, None] = {}
        self._gone: dict[str, str] = {}
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        """By instance: what is written to one subject keeps its order."""
        self._places = asyncio.Semaphore(AT_ONCE)
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
            await self._all(self._write, self._dirty)
            await self._all(self._delete, self._gone)
        except UnavailableError:
            self._wake.set()
            raise

    async def _all(self, write: Callable[[str], Awaitable[None]], instances: Iterable[str]) -> None:
        """Writes or deletes all, some at a time; raises what the first of those that failed did."""

        async def in_place(instance: str) -> None:
            async with self._places:
                await write(instance)

        outcomes = await asyncio.gather(*map(in_place, list(instances)), return_exceptions=True)
        for outcome in outcomes:
            if outcome is not None:
                raise outcome

    def _lock(self, instance: str) -> asyncio.Lock:
        return self._locks.setdefault(instance, asyncio.Lock())

    async def _delete(self, instance: str) -> None:
        async with self._lock(instance):
            function = self._gone.get(instance)
            if function is None:
                return
            if not await self._is_anothers(function, instance):
                await self._bus.delete(instance_subject(function, instance))
            # It may have been planned here again meanwhile.
            if self._gone.get(instance) == function:
                del self._gone[instance]

    async def _write(self, instance: str) -> None:
        async with self._lock(instance):
            if instance not in self._dirty:
                return
            del self._dirty[instance]
            found = self._event(instance)
            if found is None:
                return
            event, headers = found
            try:
                if not self._speaks(instance) and await self._is_anothers(event.function, instance):
                    return
                await self._bus.put(instance_subject(event.function, event.instance), encode(event), headers)
            except UnavailableError:
                if instance not in self._gone:
                    self._dirty[instance] = None
                raise
            self._published(event)

    async def _is_anothers(self, function: str, instance: str) -> bool:
        """Whether another node has the instance by now; raises UnavailableError when the bus does not tell."""
        try:
            async with (
                asyncio.timeout(LOOK_TIMEOUT_S),
                self._bus.watch(instance_subject(function, instance)) as changes,
            ):
                payload: bytes | None = None
                async for change in changes:
                    if isinstance(change, CaughtUp):
                        break
                    payload = change.payload
                return payload is not None and decode_instance(payload).node != self._node
        except TimeoutError as error:
            raise UnavailableError(f"the bus does not tell who has {instance}") from error
        except InvalidError:
            return False
