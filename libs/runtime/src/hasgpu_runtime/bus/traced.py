"""The bus, with a span around each message that is sent as part of a trace."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager, contextmanager
from typing import TYPE_CHECKING

from hasgpu_core.ports import Bus, CaughtUp, Command, Message, StateChange

from hasgpu_runtime import trace_catalogue as catalogue
from hasgpu_runtime.sampling import parse_traceparent
from hasgpu_runtime.telemetry import TRACEPARENT, Telemetry

if TYPE_CHECKING:
    from collections.abc import Iterator


class TracedBus:
    """Implements `hasgpu_core.ports.Bus` on another one.

    A message whose headers hold the context of a trace that is recorded is sent in a producer span, a child of that
    context, and carries the span's own context; all others pass unchanged. Consuming spans are made by those who act on
    a message, since only they know when they are done.
    """

    def __init__(self, inner: Bus, telemetry: Telemetry) -> None:
        self._inner = inner
        self._telemetry = telemetry

    async def put(self, subject: str, payload: bytes, headers: Mapping[str, str] | None = None) -> None:
        """Sets the last value of a STATE subject."""
        with self._sending(subject, len(payload), headers) as carried:
            await self._inner.put(subject, payload, carried)

    async def delete(self, subject: str, headers: Mapping[str, str] | None = None) -> None:
        """Removes the last value of a STATE subject."""
        with self._sending(subject, 0, headers) as carried:
            await self._inner.delete(subject, carried)

    def watch(self, *patterns: str) -> AbstractAsyncContextManager[AsyncIterator[StateChange | CaughtUp]]:
        """Follows STATE subjects."""
        return self._inner.watch(*patterns)

    async def publish(self, subject: str, payload: bytes, headers: Mapping[str, str] | None = None) -> None:
        """Sends to whoever listens now."""
        with self._sending(subject, len(payload), headers) as carried:
            await self._inner.publish(subject, payload, carried)

    def subscribe(self, *patterns: str) -> AbstractAsyncContextManager[AsyncIterator[Message]]:
        """Delivers what `publish` sends."""
        return self._inner.subscribe(*patterns)

    async def send_command(
        self, subject: str, payload: bytes, *, dedup_id: str, headers: Mapping[str, str] | None = None
    ) -> None:
        """Appends to the COMMANDS work queue."""
        with self._sending(subject, len(payload), headers) as carried:
            await self._inner.send_command(subject, payload, dedup_id=dedup_id, headers=carried)

    def commands(self, pattern: str, *, consumer: str) -> AbstractAsyncContextManager[AsyncIterator[Command]]:
        """Delivers commands."""
        return self._inner.commands(pattern, consumer=consumer)

    @contextmanager
    def _sending(
        self, subject: str, size_bytes: int, headers: Mapping[str, str] | None
    ) -> Iterator[Mapping[str, str] | None]:
        parent = headers.get(TRACEPARENT, "") if headers else ""
        context = parse_traceparent(parent) if parent else None
        kind, _, rest = subject.partition(".")
        if kind == "scale":
            kind = f"scale.{rest.partition('.')[0]}"
        known = catalogue.SUBJECT_TEMPLATES.get(kind)
        if context is None or not context.sampled or known is None:
            yield headers
            return
        name, template = known
        attributes = {
            **messaging(subject, "publish", "send"),
            catalogue.MESSAGING_TEMPLATE: template,
            catalogue.MESSAGING_BODY_BYTES: size_bytes,
        }
        with self._telemetry.span(name, parent=parent, attributes=attributes) as span:
            yield {**(headers or {}), TRACEPARENT: span.traceparent}


def messaging(subject: str, operation: str, operation_type: str) -> dict[str, str | int]:
    """Returns the attributes of a span that sends or processes a message.

    https://opentelemetry.io/docs/specs/semconv/messaging/messaging-spans/
    """
    return {
        catalogue.MESSAGING_SYSTEM: "nats",
        catalogue.MESSAGING_DESTINATION: subject,
        catalogue.MESSAGING_OPERATION: operation,
        catalogue.MESSAGING_OPERATION_TYPE: operation_type,
    }
