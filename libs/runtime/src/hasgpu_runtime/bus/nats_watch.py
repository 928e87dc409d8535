"""A watch over STATE subjects on a push consumer of its own, made anew whenever it may have missed something."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any

import nats.errors
import nats.js.api
import nats.js.errors
from hasgpu_core.ports import CaughtUp, Clock, StateChange
from nats.aio.msg import Msg

from hasgpu_runtime.bus import nats_streams
from hasgpu_runtime.bus.queues import ChangeQueue
from hasgpu_runtime.bus.subjects import matches
from hasgpu_runtime.tasks import end_task

_log = logging.getLogger(__name__)

DELETED_HEADER = "hasgpu-deleted"
HEARTBEAT_S = 1.0
SILENCE_S = 3.5
"""Without a message or heartbeat for so long the consumer is taken for lost."""
_INACTIVE_S = 10.0
"""After which the server drops a consumer that nobody listens to."""
_RETRY_S = 0.2


def own_headers(headers: Mapping[str, str] | None) -> dict[str, str]:
    """Returns the headers that the sender set, without the broker's and ours."""
    return {
        key: value
        for key, value in (headers or {}).items()
        if not key.lower().startswith("nats-") and key != DELETED_HEADER
    }


class Watch:
    """Delivers last values, CaughtUp and changes into `queue`, for as long as it runs."""

    def __init__(
        self,
        client: Any,
        js: Any,
        clock: Clock,
        patterns: tuple[str, ...],
        wait_connected: Callable[[], Awaitable[None]],
    ) -> None:
        self._client = client
        self._js = js
        self._clock = clock
        self._filters = _disjoint(patterns)
        self._wait_connected = wait_connected
        self._known: set[str] = set()
        self._restart = asyncio.Event()
        self.queue = ChangeQueue()

    def restart(self) -> None:
        """Makes it read all last values again."""
        self._restart.set()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Runs it in a task for the length of the block; a first pass that fails is tried again."""
        task = asyncio.create_task(self._run(), name=f"watch {' '.join(self._filters)}")
        try:
            yield
        finally:
            await end_task(task)

    async def _run(self) -> None:
        while True:
            await self._wait_connected()
            self._restart.clear()
            try:
                await self._pass()
            except nats.js.errors.NotFoundError:
                await self._make_streams()
            except (nats.errors.Error, TimeoutError, OSError) as error:
                _log.debug("watch of %s starts again: %r", self._filters, error)
                await self._clock.sleep(_RETRY_S)

    async def _make_streams(self) -> None:
        try:
            await nats_streams.ensure(self._js)
        except (nats.errors.Error, TimeoutError, OSError) as error:
            _log.debug("streams can't be made: %r", error)
            await self._clock.sleep(_RETRY_S)

    async def _pass(self) -> None:
        """One consumer's life; returns when a new one is needed."""
        api = nats.js.api
        reading = _Pass(self._known, self.queue, self._restart)
        inbox = self._client.new_inbox()
        subscription = await self._client.subscribe(inbox, cb=reading.receive)
        try:
            info = await self._js.add_consumer(
                nats_streams.STATE,
                config=api.ConsumerConfig(
                    deliver_subject=inbox,
                    deliver_policy=api.DeliverPolicy.LAST_PER_SUBJECT,
                    ack_policy=api.AckPolicy.NONE,
                    filter_subjects=self._filters,
                    idle_heartbeat=HEARTBEAT_S,
                    inactive_threshold=_INACTIVE_S,
                    max_deliver=1,
                    mem_storage=True,
                    num_replicas=1,
                ),
            )
            delivered = info.delivered.consumer_seq if info.delivered is not None else 0
            reading.expect((info.num_pending or 0) + delivered)
            while not self._restart.is_set():
                heard_count = reading.heard_count
                try:
                    async with asyncio.timeout(SILENCE_S):
                        await self._restart.wait()
                except TimeoutError:
                    if reading.heard_count == heard_count:
                        _log.debug("watch of %s hears nothing", self._filters)
                        return
        finally:
            reading.stop()
            try:
                await subscription.unsubscribe()
            except (nats.errors.Error, OSError) as error:
                _log.debug("while leaving a watch: %r", error)


class _Pass:
    """What one consumer has delivered so far."""

    def __init__(self, known: set[str], queue: ChangeQueue, restart: asyncio.Event) -> None:
        self._known = known
        self._queue = queue
        self._restart = restart
        self._seen: set[str] = set()
        self._sequence = 0
        self._expected: int | None = None
        self._caught_up = False
        self._stopped = False
        self.heard_count = 0

    def stop(self) -> None:
        """Ignores what still comes."""
        self._stopped = True

    def expect(self, count: int) -> None:
        """Tells how many messages lie before CaughtUp."""
        self._expected = count
        if self._sequence >= count:
            self._finish()

    async def receive(self, message: Msg) -> None:
        """Takes a message of the consumer, or a heartbeat."""
        if self._stopped:
            return
        self.heard_count += 1
        headers = message.headers or {}
        if "Status" in headers:
            # An idle consumer has nothing left to deliver.
            if self._expected is not None:
                self._finish()
            return
        metadata = message.metadata
        if metadata.sequence.consumer != self._sequence + 1:
            self.stop()
            self._restart.set()
            return
        self._sequence += 1
        self._deliver(message, headers)
        if metadata.num_pending == 0 or (self._expected is not None and self._sequence >= self._expected):
            self._finish()

    def _deliver(self, message: Msg, headers: Mapping[str, str]) -> None:
        subject = message.subject
        if headers.get(DELETED_HEADER):
            self._seen.discard(subject)
            if subject in self._known:
                self._known.discard(subject)
                self._queue.put(StateChange(subject, None, own_headers(headers)))
            return
        self._seen.add(subject)
        self._known.add(subject)
        self._queue.put(StateChange(subject, message.data, own_headers(headers)))

    def _finish(self) -> None:
        """Once: what was known and was not delivered again has vanished."""
        if self._caught_up:
            return
        self._caught_up = True
        for subject in sorted(self._known - self._seen):
            self._known.discard(subject)
            self._queue.put(StateChange(subject, None))
        self._queue.put(CaughtUp())


def _disjoint(patterns: tuple[str, ...]) -> list[str]:
    """The patterns without those that another one covers; JetStream refuses filters that overlap."""
    unique = sorted(set(patterns))
    return [
        p for p in unique if not any(p != q and matches(q, p) and q.endswith(">") >= p.endswith(">") for q in unique)
    ]
