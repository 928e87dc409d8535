"""What the domain needs of the world, as protocols. `hasgpu_runtime` implements each on NATS or Redis and in memory."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Protocol


class Clock(Protocol):
    """The only source of time."""

    def now_s(self) -> float:
        """Returns monotonic seconds; only differences mean anything."""
        ...

    def unix_ns(self) -> int:
        """Returns nanoseconds since 1970, for stamps that other processes read."""
        ...

    async def sleep(self, delay_s: float) -> None:
        """Waits; a delay of zero or less yields once."""
        ...


@dataclass(frozen=True, slots=True)
class Message:
    """One message of core NATS."""

    subject: str
    payload: bytes
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class StateChange:
    """A subject of the STATE stream has a new last value, or none any more."""

    subject: str
    payload: bytes | None
    """None: the owner deleted it."""
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class CaughtUp:
    """All last values that existed when the watch began have been delivered."""


class Command(Protocol):
    """One message of the COMMANDS stream; unacknowledged commands are delivered again."""

    @property
    def subject(self) -> str:
        """What it was sent to."""
        ...

    @property
    def payload(self) -> bytes:
        """What was sent."""
        ...

    @property
    def headers(self) -> Mapping[str, str]:
        """Trace context and the like."""
        ...

    async def ack(self) -> None:
        """Settles the command; it is not delivered again."""
        ...

    async def retry(self, delay_s: float) -> None:
        """Gives the command back; it is delivered again after the delay."""
        ...


class Bus(Protocol):
    """Events between services.

    Subjects are dot-separated; patterns use `*` for one token and a final `>` for one or more. Delivery is at least
    once. While the broker is away, `put`, `delete` and `send_command` raise UnavailableError within a few seconds;
    watches and subscriptions survive and, on return, a watch delivers all last values again (deletions included)
    followed by another CaughtUp.
    """

    async def put(self, subject: str, payload: bytes, headers: Mapping[str, str] | None = None) -> None:
        """Sets the last value of a STATE subject."""
        ...

    async def delete(self, subject: str, headers: Mapping[str, str] | None = None) -> None:
        """Tells watchers that the subject is gone and purges it. Deleting what is not there does nothing."""
        ...

    def watch(self, *patterns: str) -> AbstractAsyncContextManager[AsyncIterator[StateChange | CaughtUp]]:
        """Delivers the last values of the matching STATE subjects, then CaughtUp, then each change.

        Iteration never ends by itself; leaving the context stops it.
        """
        ...

    async def publish(self, subject: str, payload: bytes, headers: Mapping[str, str] | None = None) -> None:
        """Sends on core NATS: whoever listens now gets it; never raises because the broker is away."""
        ...

    def subscribe(self, *patterns: str) -> AbstractAsyncContextManager[AsyncIterator[Message]]:
        """Delivers what `publish` sends from now on. A slow consumer loses the oldest messages."""
        ...

    async def send_command(
        self, subject: str, payload: bytes, *, dedup_id: str, headers: Mapping[str, str] | None = None
    ) -> None:
        """Appends to the COMMANDS work queue; the same `dedup_id` within two minutes is stored once."""
        ...

    def commands(self, pattern: str, *, consumer: str) -> AbstractAsyncContextManager[AsyncIterator[Command]]:
        """Delivers commands, each to one holder of the durable `consumer`, in order; each must be settled."""
        ...


class ObjectStore(Protocol):
    """Model artifacts, by their sha256."""

    async def put_artifact(self, sha256: str, data: bytes) -> None:
        """Stores; raises IntegrityError when `data` has another digest. Storing twice does nothing."""
        ...

    async def get_artifact(self, sha256: str) -> bytes:
        """Returns verified bytes; raises NotFoundError, IntegrityError, UnavailableError."""
        ...

    async def delete_artifact(self, sha256: str) -> None:
        """Deletes; what is not there does nothing."""
        ...


@dataclass(frozen=True, slots=True)
class Versioned:
    """A stored value and the revision to pass to compare_and_set."""

    value: bytes
    revision: int


@dataclass(frozen=True, slots=True)
class Fence:
    """Proof of leadership, checked by the store in the same step as the write."""

    lease: str
    token: int


class Store(Protocol):
    """Small durable values with revisions; each key has one writing service. Raises UnavailableError when away."""

    async def get(self, key: str) -> Versioned | None:
        """Returns the value, or None when the key is absent."""
        ...

    async def list(self, prefix: str) -> dict[str, Versioned]:
        """Returns every key that begins with `prefix`."""
        ...

    async def compare_and_set(
        self, key: str, value: bytes, *, expected_revision: int, fence: Fence | None = None
    ) -> int:
        """Writes when the key is at `expected_revision` (0: absent); returns the new revision.

        Raises ConflictError, and FencedError when the lease has a newer token. Revisions of a key never repeat, not
        even after a delete.
        """
        ...

    async def delete(self, key: str, *, expected_revision: int | None = None, fence: Fence | None = None) -> None:
        """Deletes; what is not there does nothing. Raises ConflictError, FencedError."""
        ...

    async def acquire_lease(self, lease: str, owner: str, *, ttl_s: float) -> Fence | None:
        """Takes or renews the lease; None while another owner holds it. A new owner gets a larger token."""
        ...

    async def release_lease(self, lease: str, owner: str) -> None:
        """Gives the lease up, when `owner` holds it."""
        ...
