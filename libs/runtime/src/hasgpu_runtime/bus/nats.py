"""The bus and the object store on NATS JetStream (server 2.11 or later, for messages with a time to live)."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any, Self
from urllib.parse import unquote, urlsplit

import nats.aio.client
import nats.errors
import nats.js
import nats.js.api
import nats.js.errors
from hasgpu_core.errors import InvalidError, UnavailableError
from hasgpu_core.events import COMMAND_SUBJECTS, STATE_SUBJECTS
from hasgpu_core.ports import CaughtUp, Clock, Command, Message, StateChange
from nats.aio.msg import Msg

from hasgpu_runtime.bus import nats_checks, nats_streams
from hasgpu_runtime.bus.nats_artifacts import ArtifactBucket
from hasgpu_runtime.bus.nats_commands import CommandReader
from hasgpu_runtime.bus.nats_watch import DELETED_HEADER, Watch, own_headers
from hasgpu_runtime.bus.queues import DroppingQueue
from hasgpu_runtime.bus.subjects import check_covered, check_listenable, check_pattern, check_subject, matches
from hasgpu_runtime.diagnosis import Look
from hasgpu_runtime.urls import without_secret

_log = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 30.0
"""How long a service that starts waits for the broker."""
WAIT_S = 3.0
"""How long a call waits for the broker to return, and then for its answer."""
_REFUSED = "authorization"
"""In what the client raises when the server does not take the user or the password."""
TOMBSTONE_TTL_S = 60
"""How long a deletion stays in the stream; who was away for longer misses the subject among the last values."""


class NatsBus:
    """Implements `hasgpu_core.ports.Bus` and `ObjectStore`."""

    def __init__(self, url: str, *, name: str, clock: Clock) -> None:
        """Use `connect`."""
        self._url = url
        self._where = without_secret(url)
        self._name = name
        self._clock = clock
        self._client = nats.aio.client.Client()
        self._js: Any = self._client.jetstream(timeout=WAIT_S)
        self._connected = asyncio.Event()
        self._opened = False
        self._told_refused = False
        self._watches: set[Watch] = set()
        self._artifacts = ArtifactBucket(self._js)

    @classmethod
    @asynccontextmanager
    async def connect(
        cls, url: str, *, name: str, clock: Clock, timeout_s: float = CONNECT_TIMEOUT_S
    ) -> AsyncIterator[Self]:
        """Connects, makes sure that the streams exist, and closes the connection at the end.

        Raises UnavailableError, naming the URL, when the broker can't be used within `timeout_s`.
        """
        bus = cls(url, name=name, clock=clock)
        try:
            await bus._open(timeout_s)
            yield bus
        finally:
            await bus._close()

    @property
    def connected(self) -> bool:
        """Whether the broker is there now."""
        return self._connected.is_set() and bool(self._client.is_connected)

    @property
    def looks(self) -> tuple[Look, ...]:
        """What every service looks at when it is asked how it is."""
        return (Look("NATS", lambda: nats_checks.check_server(self._client, self._where)),)

    @property
    def stream_looks(self) -> tuple[Look, ...]:
        """What one service looks at for all."""
        return (Look("streams", lambda: nats_checks.check_streams(self._js)),)

    async def put(self, subject: str, payload: bytes, headers: Mapping[str, str] | None = None) -> None:
        """Sets the last value of a STATE subject."""
        check_covered(subject, STATE_SUBJECTS, "STATE")
        await self._store(subject, payload, dict(headers or {}), nats_streams.STATE)

    async def delete(self, subject: str, headers: Mapping[str, str] | None = None) -> None:
        """Replaces the last value by a tombstone, which the server drops after TOMBSTONE_TTL_S."""
        check_covered(subject, STATE_SUBJECTS, "STATE")
        marked = {**(headers or {}), DELETED_HEADER: "1"}
        await self._store(subject, b"", marked, nats_streams.STATE, ttl_s=TOMBSTONE_TTL_S)

    @asynccontextmanager
    async def watch(self, *patterns: str) -> AsyncIterator[AsyncIterator[StateChange | CaughtUp]]:
        """Delivers the last values, then CaughtUp, then each change; starts again when the broker returns."""
        for pattern in patterns:
            check_listenable(pattern, STATE_SUBJECTS, "STATE")
        watch = Watch(self._client, self._js, self._clock, patterns, self.wait_connected)
        self._watches.add(watch)
        try:
            async with watch.running():
                yield watch.queue
        finally:
            self._watches.discard(watch)

    async def publish(self, subject: str, payload: bytes, headers: Mapping[str, str] | None = None) -> None:
        """Sends to whoever listens now; while the broker is away the message is dropped."""
        check_subject(subject)
        if not self.connected:
            return
        try:
            await self._client.publish(subject, payload, headers=dict(headers) if headers else None)
        except nats.errors.MaxPayloadError as error:
            raise InvalidError("payload", expected="what the broker takes", got=f"{len(payload)} bytes") from error
        except (nats.errors.Error, OSError) as error:
            _log.debug("message to %s was dropped: %r", subject, error)

    @asynccontextmanager
    async def subscribe(self, *patterns: str) -> AsyncIterator[AsyncIterator[Message]]:
        """Delivers what `publish` sends from now on."""
        for pattern in patterns:
            check_pattern(pattern)
        queue = DroppingQueue[Message]()
        subscriptions = []
        try:
            for at, pattern in enumerate(patterns):
                receive = _receiver(queue, patterns[:at])
                subscriptions.append(await self._client.subscribe(pattern, cb=receive))
            if self.connected:
                await self._round_trip()
            yield queue
        finally:
            for subscription in subscriptions:
                await _quietly(subscription.unsubscribe())

    async def send_command(
        self, subject: str, payload: bytes, *, dedup_id: str, headers: Mapping[str, str] | None = None
    ) -> None:
        """Appends to the COMMANDS work queue, once for a `dedup_id` within its duplicate window."""
        check_covered(subject, COMMAND_SUBJECTS, "COMMANDS")
        marked = {**(headers or {}), str(nats.js.api.Header.MSG_ID.value): dedup_id}
        await self._store(subject, payload, marked, nats_streams.COMMANDS)

    @asynccontextmanager
    async def commands(self, pattern: str, *, consumer: str) -> AsyncIterator[AsyncIterator[Command]]:
        """Delivers commands, each to one holder of the durable consumer."""
        check_listenable(pattern, COMMAND_SUBJECTS, "COMMANDS")
        reader = CommandReader(self._js, self._clock, pattern, consumer, self.wait_connected)
        try:
            yield reader
        finally:
            await _quietly(reader.close())

    async def put_artifact(self, sha256: str, data: bytes) -> None:
        """Stores after checking the digest; storing twice does nothing."""
        await self._require()
        await self._artifacts.put(sha256, data)

    async def get_artifact(self, sha256: str) -> bytes:
        """Returns verified bytes."""
        await self._require()
        return await self._artifacts.get(sha256)

    async def delete_artifact(self, sha256: str) -> None:
        """Deletes; what is not there does nothing."""
        await self._require()
        await self._artifacts.delete(sha256)

    async def wait_connected(self) -> None:
        """Waits, for as long as it takes, until the broker is there."""
        await self._connected.wait()

    async def _store(
        self, subject: str, payload: bytes, headers: dict[str, str], stream: str, ttl_s: int | None = None
    ) -> None:
        await self._require()
        try:
            try:
                await self._js.publish(subject, payload, headers=dict(headers), stream=stream, msg_ttl=ttl_s)
            except nats.js.errors.NoStreamResponseError:
                await nats_streams.ensure(self._js)
                await self._js.publish(subject, payload, headers=dict(headers), stream=stream, msg_ttl=ttl_s)
        except nats.errors.MaxPayloadError as error:
            raise InvalidError("payload", expected="what the broker takes", got=f"{len(payload)} bytes") from error
        except (nats.errors.Error, TimeoutError, OSError) as error:
            raise UnavailableError(f"the broker at {self._where} did not take {subject}: {_text(error)}") from error

    async def _require(self) -> None:
        """Waits WAIT_S for the broker; raises UnavailableError when it stays away."""
        if self.connected:
            return
        try:
            async with asyncio.timeout(WAIT_S):
                await self._connected.wait()
        except TimeoutError as error:
            raise UnavailableError(f"the broker at {self._where} is away") from error

    async def _round_trip(self) -> None:
        """Makes sure that the server knows the subscriptions sent so far."""
        try:
            await self._client.flush(timeout=WAIT_S)
        except (nats.errors.Error, TimeoutError, OSError) as error:
            _log.debug("no answer to a ping: %r", error)

    async def _open(self, timeout_s: float) -> None:
        try:
            async with asyncio.timeout(timeout_s):
                await self._client.connect(
                    self._where,
                    **_credentials(self._url),
                    name=self._name,
                    error_cb=self._on_error,
                    disconnected_cb=self._on_disconnected,
                    reconnected_cb=self._on_reconnected,
                    connect_timeout=2,
                    reconnect_time_wait=0.25,
                    max_reconnect_attempts=-1,
                    ping_interval=5,
                    max_outstanding_pings=2,
                )
                self._connected.set()
                while not await self._try_ensure():
                    await self._clock.sleep(0.25)
                self._opened = True
        except TimeoutError as error:
            last = f": {_text(self._client.last_error)}" if self._client.last_error is not None else ""
            raise UnavailableError(f"no NATS with JetStream at {self._where} within {timeout_s:.0f} s{last}") from error
        except (nats.errors.Error, OSError, ValueError) as error:
            raise UnavailableError(f"can't use NATS at {self._where}: {_text(error)}") from error

    async def _try_ensure(self) -> bool:
        """JetStream of a server that has just started may not answer yet."""
        try:
            await nats_streams.ensure(self._js)
        except (nats.errors.TimeoutError, nats.errors.NoRespondersError, nats.js.errors.ServiceUnavailableError):
            return False
        return True

    async def _close(self) -> None:
        await _quietly(self._client.close())

    async def _on_error(self, error: Exception) -> None:
        if _REFUSED in str(error).lower():
            self._on_refused()
            return
        _log.debug("NATS at %s: %r", self._where, error)

    def _on_refused(self) -> None:
        if not self._opened:
            # Leaves the client's endless attempts to connect: no waiting makes a wrong password right.
            raise UnavailableError(
                f"NATS at {self._where} refuses the user or the password: HASGPU_NATS_URL and "
                "HASGPU_NATS_PASSWORD_FILE must name what the server was given"
            )
        # What served goes on serving, and the client trying: the server may get its old password back.
        if not self._told_refused:
            self._told_refused = True
            _log.warning(
                "NATS at %s refuses the user or the password that it took before; if they were changed, "
                "start this service again",
                self._where,
            )

    async def _on_disconnected(self) -> None:
        if self._connected.is_set():
            self._connected.clear()
            if not self._client.is_closed:
                _log.warning("the broker at %s is away", self._where)

    async def _on_reconnected(self) -> None:
        _log.info("the broker at %s is back", self._where)
        self._told_refused = False
        self._connected.set()
        for watch in self._watches:
            watch.restart()


def _receiver(queue: DroppingQueue[Message], earlier: tuple[str, ...]) -> Any:
    """A message that an earlier pattern covers too comes through that one."""

    async def receive(message: Msg) -> None:
        if not any(matches(pattern, message.subject) for pattern in earlier):
            queue.put(Message(message.subject, message.data, own_headers(message.headers)))

    return receive


def _credentials(url: str) -> dict[str, str]:
    """User and password as the client's options: left in the URL, it would send them percent-encoded."""
    parts = urlsplit(url)
    given = {"user": parts.username, "password": parts.password}
    return {name: unquote(value) for name, value in given.items() if value is not None}


async def _quietly(closing: Any) -> None:
    """Awaits a clean-up that may find the connection gone."""
    try:
        async with asyncio.timeout(WAIT_S):
            await closing
    except (nats.errors.Error, TimeoutError, OSError) as error:
        _log.debug("while closing: %r", error)


def _text(error: Exception) -> str:
    return str(error) or type(error).__name__
