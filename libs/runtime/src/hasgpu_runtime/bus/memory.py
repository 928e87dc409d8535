"""The bus and the object store in one process's memory: for tests, and the model of what the NATS one does.

Timed things (the duplicate window, retries, redelivery) run on the event loop's timer.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field

from hasgpu_core.errors import InvalidError, NotFoundError, UnavailableError
from hasgpu_core.events import COMMAND_SUBJECTS, STATE_SUBJECTS
from hasgpu_core.ports import CaughtUp, Command, Message, StateChange

from hasgpu_runtime.bus.artifacts import check_digest, verify
from hasgpu_runtime.bus.queues import ChangeQueue, DroppingQueue
from hasgpu_runtime.bus.subjects import check_covered, check_listenable, check_pattern, check_subject, matches

DEDUP_WINDOW_S = 120.0
ACK_WAIT_S = 5.0
"""A command neither acknowledged nor given back for so long is delivered again."""


class MemoryBus:
    """Implements `hasgpu_core.ports.Bus` and `ObjectStore`; must be used inside one event loop.

    `go_away()` and `come_back()` act out a broker that is lost and returns.
    """

    def __init__(self) -> None:
        self._state: dict[str, StateChange] = {}
        self._watches: list[_Watch] = []
        self._subscriptions: list[tuple[tuple[str, ...], DroppingQueue[Message]]] = []
        self._commands = _WorkQueue()
        self._artifacts: dict[str, bytes] = {}
        self._away = False

    def go_away(self) -> None:
        """From now on calls raise UnavailableError, publishing does nothing, and nothing is delivered."""
        self._away = True
        self._commands.set_paused(True)

    def come_back(self) -> None:
        """Every watch gets all last values again, deletions included, and CaughtUp."""
        self._away = False
        for watch in self._watches:
            watch.replay(self._state)
        self._commands.set_paused(False)

    async def put(self, subject: str, payload: bytes, headers: Mapping[str, str] | None = None) -> None:
        """Sets the last value of a STATE subject."""
        check_covered(subject, STATE_SUBJECTS, "STATE")
        self._check_here()
        change = StateChange(subject, payload, dict(headers or {}))
        self._state[subject] = change
        self._tell(change)

    async def delete(self, subject: str, headers: Mapping[str, str] | None = None) -> None:
        """Tells watchers that the subject is gone and forgets it."""
        check_covered(subject, STATE_SUBJECTS, "STATE")
        self._check_here()
        if self._state.pop(subject, None) is not None:
            self._tell(StateChange(subject, None, dict(headers or {})))

    @asynccontextmanager
    async def watch(self, *patterns: str) -> AsyncIterator[AsyncIterator[StateChange | CaughtUp]]:
        """Delivers the last values, then CaughtUp, then each change."""
        for pattern in patterns:
            check_listenable(pattern, STATE_SUBJECTS, "STATE")
        watch = _Watch(patterns)
        if not self._away:
            watch.replay(self._state)
        self._watches.append(watch)
        try:
            yield watch.queue
        finally:
            self._watches.remove(watch)

    async def publish(self, subject: str, payload: bytes, headers: Mapping[str, str] | None = None) -> None:
        """Sends to whoever listens now."""
        check_subject(subject)
        if self._away:
            return
        message = Message(subject, payload, dict(headers or {}))
        for patterns, queue in self._subscriptions:
            if any(matches(pattern, subject) for pattern in patterns):
                queue.put(message)

    @asynccontextmanager
    async def subscribe(self, *patterns: str) -> AsyncIterator[AsyncIterator[Message]]:
        """Delivers what `publish` sends from now on."""
        for pattern in patterns:
            check_pattern(pattern)
        entry = (patterns, DroppingQueue[Message]())
        self._subscriptions.append(entry)
        try:
            yield entry[1]
        finally:
            self._subscriptions.remove(entry)

    async def send_command(
        self, subject: str, payload: bytes, *, dedup_id: str, headers: Mapping[str, str] | None = None
    ) -> None:
        """Appends to the work queue, once for a `dedup_id`."""
        check_covered(subject, COMMAND_SUBJECTS, "COMMANDS")
        self._check_here()
        self._commands.send(subject, payload, dict(headers or {}), dedup_id)

    @asynccontextmanager
    async def commands(self, pattern: str, *, consumer: str) -> AsyncIterator[AsyncIterator[Command]]:
        """Delivers commands, each to one holder of the consumer."""
        check_listenable(pattern, COMMAND_SUBJECTS, "COMMANDS")
        with self._commands.hold(pattern, consumer) as iterator:
            yield iterator

    async def put_artifact(self, sha256: str, data: bytes) -> None:
        """Stores after checking the digest."""
        check_digest(sha256)
        verify(sha256, data)
        self._check_here()
        self._artifacts[sha256] = bytes(data)

    async def get_artifact(self, sha256: str) -> bytes:
        """Returns verified bytes."""
        check_digest(sha256)
        self._check_here()
        data = self._artifacts.get(sha256)
        if data is None:
            raise NotFoundError("artifact", sha256)
        verify(sha256, data)
        return data

    async def delete_artifact(self, sha256: str) -> None:
        """Deletes; what is not there does nothing."""
        check_digest(sha256)
        self._check_here()
        self._artifacts.pop(sha256, None)

    def _check_here(self) -> None:
        if self._away:
            raise UnavailableError("the bus is away")

    def _tell(self, change: StateChange) -> None:
        for watch in self._watches:
            watch.offer(change)


class _Watch:
    """One watch and the subjects that it has been told of."""

    def __init__(self, patterns: tuple[str, ...]) -> None:
        self._patterns = patterns
        self._known: set[str] = set()
        self.queue = ChangeQueue()

    def offer(self, change: StateChange) -> None:
        """Passes a matching change on."""
        if not any(matches(pattern, change.subject) for pattern in self._patterns):
            return
        if change.payload is None:
            self._known.discard(change.subject)
        else:
            self._known.add(change.subject)
        self.queue.put(change)

    def replay(self, state: Mapping[str, StateChange]) -> None:
        """Delivers all last values, deletions of what has vanished, and CaughtUp."""
        for subject in sorted(self._known - state.keys()):
            self.offer(StateChange(subject, None))
        for change in state.values():
            self.offer(change)
        self.queue.put(CaughtUp())


@dataclass(slots=True, eq=False)
class _Stored:
    """A command that is not settled yet."""

    subject: str
    payload: bytes
    headers: Mapping[str, str]
    delivery: int = 0
    """Grows with each delivery, so that settling an old one does nothing."""
    timer: asyncio.TimerHandle | None = field(default=None, repr=False)


class _MemoryCommand:
    """Implements `hasgpu_core.ports.Command`."""

    def __init__(self, owner: _WorkQueue, stored: _Stored) -> None:
        self._owner = owner
        self._stored = stored
        self._delivery = stored.delivery

    @property
    def subject(self) -> str:
        """What it was sent to."""
        return self._stored.subject

    @property
    def payload(self) -> bytes:
        """What was sent."""
        return self._stored.payload

    @property
    def headers(self) -> Mapping[str, str]:
        """Trace context and the like."""
        return self._stored.headers

    async def ack(self) -> None:
        """Settles the command."""
        self._owner.ack(self._stored)

    async def retry(self, delay_s: float) -> None:
        """Gives the command back."""
        if self._stored.delivery == self._delivery:
            self._owner.release(self._stored, delay_s)


class _WorkQueue:
    """Commands waiting, in order; a command handed out comes back unless it is settled."""

    def __init__(self) -> None:
        self._waiting: deque[_Stored] = deque()
        self._unsettled: set[_Stored] = set()
        self._seen: OrderedDict[str, float] = OrderedDict()
        self._changed = asyncio.Event()
        self._holders: dict[str, str] = {}
        self._paused = False

    def send(self, subject: str, payload: bytes, headers: Mapping[str, str], dedup_id: str) -> None:
        """Appends, unless the id was seen inside the window."""
        now_s = asyncio.get_running_loop().time()
        while self._seen and next(iter(self._seen.values())) < now_s - DEDUP_WINDOW_S:
            self._seen.popitem(last=False)
        if dedup_id in self._seen:
            return
        self._seen[dedup_id] = now_s
        stored = _Stored(subject, payload, headers)
        self._unsettled.add(stored)
        self._waiting.append(stored)
        self._changed.set()

    def ack(self, stored: _Stored) -> None:
        """Forgets a command."""
        if stored.timer is not None:
            stored.timer.cancel()
        self._unsettled.discard(stored)

    def release(self, stored: _Stored, delay_s: float) -> None:
        """Makes a command wait again, after the delay."""
        if stored.timer is not None:
            stored.timer.cancel()
        stored.timer = asyncio.get_running_loop().call_later(max(0.0, delay_s), self._again, stored)

    def _again(self, stored: _Stored) -> None:
        stored.timer = None
        stored.delivery += 1
        if stored in self._unsettled:
            self._waiting.append(stored)
            self._changed.set()

    def set_paused(self, paused: bool) -> None:
        """Stops handing commands out, or goes on."""
        self._paused = paused
        self._changed.set()

    @contextmanager
    def hold(self, pattern: str, consumer: str) -> Iterator[AsyncIterator[Command]]:
        """Lets a reader take commands; what it leaves unsettled comes back after ACK_WAIT_S."""
        other = self._holders.setdefault(consumer, pattern)
        if other != pattern:
            raise InvalidError(f"pattern of consumer {consumer!r}", expected=repr(other), got=repr(pattern))
        yield self._read(pattern)

    async def _read(self, pattern: str) -> AsyncIterator[Command]:
        while True:
            stored = next((item for item in self._waiting if matches(pattern, item.subject)), None)
            if stored is None or self._paused:
                self._changed.clear()
                await self._changed.wait()
                continue
            self._waiting.remove(stored)
            stored.timer = asyncio.get_running_loop().call_later(ACK_WAIT_S, self._again, stored)
            yield _MemoryCommand(self, stored)
