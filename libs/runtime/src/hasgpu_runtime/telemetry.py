"""Traces: OpenTelemetry over OTLP/gRPC, set by its standard environment variables, off when they name no endpoint.

A trace context crosses every border as a W3C `traceparent` string (https://www.w3.org/TR/trace-context/), "" for none;
`tracestate` is not passed on. Off, every call is a constant and no thread runs. On, whether a trace is kept is decided
first (see `sampling`): what is not kept costs an object without a content, and nothing is computed for it.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar
from typing import Protocol

from hasgpu_runtime.trace_catalogue import SpanKind, SpanName

_log = logging.getLogger(__name__)

TRACEPARENT = "traceparent"

Attribute = str | bool | int | float | Sequence[str]
"""What a span can say."""


class Span(Protocol):
    """A stretch of work under way."""

    @property
    def recording(self) -> bool:
        """Whether it goes anywhere: check it before computing what only a span needs."""
        ...

    @property
    def traceparent(self) -> str:
        """To be a child of this span elsewhere; "" when tracing is off."""
        ...

    def set(self, key: str, value: Attribute) -> None:
        """Adds an attribute."""
        ...

    def link(self, traceparent: str) -> None:
        """Links it with another span that it is not a child of."""
        ...

    def fail(self, message: str) -> None:
        """Marks the work as failed."""
        ...

    def end(self, *, end_unix_ns: int | None = None) -> None:
        """Ends it, now or at a time past. Only for spans of `Telemetry.start`."""
        ...


class Telemetry:
    """Spans of one service. This class is tracing switched off; `setup` returns it or one that exports."""

    @property
    def enabled(self) -> bool:
        """Whether any spans go anywhere."""
        return False

    @property
    def dropped_count(self) -> int:
        """Spans that were recorded and never reached the collector."""
        return 0

    def span(
        self,
        name: SpanName,
        *,
        parent: str | None = None,
        links: Sequence[str] = (),
        attributes: Mapping[str, Attribute] | None = None,
        start_unix_ns: int | None = None,
        kind: SpanKind | None = None,
    ) -> AbstractContextManager[Span]:
        """Opens a span around a block and makes it current there; an exception that leaves the block marks it failed.

        Args:
            name: From the catalogue.
            parent: A traceparent; None or "": the span current here, if any.
            links: Traceparents of spans that this one serves together.
            attributes: What to say of it.
            start_unix_ns: None: now.
            kind: None: as the catalogue says.
        """
        return _NO_SPAN_CONTEXT

    def rpc_span(
        self,
        method: str,
        *,
        kind: SpanKind,
        parent: str | None = None,
        attributes: Mapping[str, Attribute] | None = None,
    ) -> AbstractContextManager[Span]:
        """Opens a span around one side of an RPC, named after its method (`package.Service/Method`), as `span`."""
        return _NO_SPAN_CONTEXT

    def start(
        self,
        name: SpanName,
        *,
        parent: str | None = None,
        links: Sequence[str] = (),
        attributes: Mapping[str, Attribute] | None = None,
        start_unix_ns: int | None = None,
        kind: SpanKind | None = None,
    ) -> Span:
        """Opens a span that the caller ends, from any task; it never becomes current."""
        return _NO_SPAN

    def record(
        self,
        name: SpanName,
        *,
        start_unix_ns: int,
        end_unix_ns: int,
        parent: str | None = None,
        links: Sequence[str] = (),
        attributes: Mapping[str, Attribute] | None = None,
        failure: str = "",
    ) -> str:
        """Records what is already over; returns its traceparent ("" when off)."""
        return ""

    def traceparent(self) -> str:
        """Returns the traceparent of the span current here; "" for none."""
        return ""

    @property
    def recording(self) -> bool:
        """Whether the span current here goes anywhere."""
        return False

    def inject(self, headers: Mapping[str, str] | None = None) -> dict[str, str]:
        """Returns the headers, with the current trace context added when there is one."""
        result = dict(headers or {})
        context = self.traceparent()
        if context:
            result[TRACEPARENT] = context
        return result

    def extract(self, headers: Mapping[str, str]) -> str:
        """Returns the traceparent that came with a message; "" for none or one that can't be read."""
        return ""

    def shutdown(self) -> None:
        """Sends what is left, within a few seconds, and stops."""


class _NoSpan:
    """Nothing is recorded."""

    recording = False
    traceparent = ""

    def set(self, key: str, value: Attribute) -> None:
        """Does nothing."""

    def link(self, traceparent: str) -> None:
        """Does nothing."""

    def fail(self, message: str) -> None:
        """Does nothing."""

    def end(self, *, end_unix_ns: int | None = None) -> None:
        """Does nothing."""


_NO_SPAN: Span = _NoSpan()
_NO_SPAN_CONTEXT: AbstractContextManager[Span] = nullcontext(_NO_SPAN)

current_span: ContextVar[Span | None] = ContextVar("hasgpu_span", default=None)
"""The span that `Telemetry.span` made current here, one that is not kept included."""


def current_traceparent() -> str:
    """Returns the traceparent of the span current here, whichever telemetry opened it; "" for none."""
    span = current_span.get()
    return span.traceparent if span is not None else ""


def setup(
    service: str, *, environ: Mapping[str, str], instance: str = "", attributes: Mapping[str, str] | None = None
) -> Telemetry:
    """Returns the service's telemetry.

    Args:
        service: "gateway", ...; exported as `hasgpu-<service>`.
        environ: The process's environment. Tracing is off unless it sets OTEL_EXPORTER_OTLP_ENDPOINT or
            OTEL_EXPORTER_OTLP_TRACES_ENDPOINT, and when OTEL_SDK_DISABLED is "true" or OTEL_TRACES_EXPORTER is "none".
        instance: Tells replicas apart; "": a random one.
        attributes: Further ones of the process: of its device, say.
    """
    endpoint = environ.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT") or environ.get("OTEL_EXPORTER_OTLP_ENDPOINT")
    switched_off = environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true"
    if not endpoint or switched_off or environ.get("OTEL_TRACES_EXPORTER", "").strip() == "none":
        return Telemetry()
    from hasgpu_runtime.otel_resource import resource
    from hasgpu_runtime.sampling import sampler_of
    from hasgpu_runtime.tracer import ExportingTelemetry, exporting_queue

    protocol = environ.get("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL") or environ.get("OTEL_EXPORTER_OTLP_PROTOCOL") or "grpc"
    if protocol != "grpc":
        _log.warning("OTEL_EXPORTER_OTLP_PROTOCOL: expected grpc, got %r; taken as grpc", protocol)
    sampler = sampler_of(environ)
    queue = exporting_queue(endpoint, environ)
    if queue is None:
        return Telemetry()
    _log.info("traces go to %s; of those that begin here, %g %% are kept", endpoint, sampler.ratio * 100)
    return ExportingTelemetry(
        queue, sampler=sampler, resource=resource(service, instance=instance, extra=attributes), queue=queue
    )
