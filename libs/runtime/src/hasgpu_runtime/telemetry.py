"""Traces: OpenTelemetry over OTLP/gRPC, set by its standard environment variables, off when they name no endpoint.

A trace context crosses every border as a W3C `traceparent` string (https://www.w3.org/TR/trace-context/), "" for none;
`tracestate` is not passed on. Off, every call is a constant and no thread runs.
"""

from __future__ import annotations

import logging
import re
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Protocol

from hasgpu_runtime.names import SpanName

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span as OtelSpan
    from opentelemetry.trace import SpanContext

_log = logging.getLogger(__name__)

TRACEPARENT = "traceparent"
EXPORT_DELAY_MS = 500
"""Ended spans leave in batches at least this often."""
_TRACEPARENT_PATTERN = re.compile(r"[0-9a-f]{2}-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")

Attribute = str | bool | int | float | Sequence[str]
"""What a span can say."""


class Span(Protocol):
    """A stretch of work under way."""

    @property
    def traceparent(self) -> str:
        """To be a child of this span elsewhere; "" when tracing is off."""
        ...

    def set(self, key: str, value: Attribute) -> None:
        """Adds an attribute."""
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
        """Whether spans go anywhere: check it before computing what only a span needs."""
        return False

    def span(
        self,
        name: SpanName,
        *,
        parent: str | None = None,
        links: Sequence[str] = (),
        attributes: Mapping[str, Attribute] | None = None,
        start_unix_ns: int | None = None,
    ) -> AbstractContextManager[Span]:
        """Opens a span around a block and makes it current there; an exception that leaves the block marks it failed.

        Args:
            name: From the catalogue.
            parent: A traceparent; None or "": the span current here, if any.
            links: Traceparents of spans that this one serves together.
            attributes: What to say of it.
            start_unix_ns: None: now.
        """
        return _NO_SPAN_CONTEXT

    def start(
        self,
        name: SpanName,
        *,
        parent: str | None = None,
        links: Sequence[str] = (),
        attributes: Mapping[str, Attribute] | None = None,
        start_unix_ns: int | None = None,
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

    traceparent = ""

    def set(self, key: str, value: Attribute) -> None:
        """Does nothing."""

    def fail(self, message: str) -> None:
        """Does nothing."""

    def end(self, *, end_unix_ns: int | None = None) -> None:
        """Does nothing."""


_NO_SPAN: Span = _NoSpan()
_NO_SPAN_CONTEXT: AbstractContextManager[Span] = nullcontext(_NO_SPAN)


def setup(service: str, *, environ: Mapping[str, str], instance: str = "") -> Telemetry:
    """Returns the service's telemetry.

    Args:
        service: "gateway", ...; exported as `hasgpu-<service>`.
        environ: The process's environment. Tracing is off unless it sets OTEL_EXPORTER_OTLP_ENDPOINT or
            OTEL_EXPORTER_OTLP_TRACES_ENDPOINT, and when OTEL_SDK_DISABLED is "true" or OTEL_TRACES_EXPORTER is "none".
        instance: Tells replicas apart; "": a random one.
    """
    endpoint = environ.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT") or environ.get("OTEL_EXPORTER_OTLP_ENDPOINT")
    switched_off = environ.get("OTEL_SDK_DISABLED", "").lower() == "true"
    if not endpoint or switched_off or environ.get("OTEL_TRACES_EXPORTER", "") == "none":
        return Telemetry()
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    resource = Resource.create(
        {
            "service.name": f"hasgpu-{service}",
            "service.namespace": "hasgpu",
            "service.instance.id": instance or uuid.uuid4().hex,
        }
    )
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(), schedule_delay_millis=EXPORT_DELAY_MS))
    _log.info("traces go to %s", endpoint)
    return ExportingTelemetry(provider)


class ExportingTelemetry(Telemetry):
    """Spans through an OpenTelemetry provider."""

    def __init__(self, provider: TracerProvider) -> None:
        from opentelemetry import trace

        self._trace = trace
        self._provider = provider
        self._tracer = provider.get_tracer("hasgpu")

    @property
    def enabled(self) -> bool:
        """True."""
        return True

    @contextmanager
    def _current(self, span: OtelSpan) -> Iterator[Span]:
        with self._trace.use_span(span, end_on_exit=True, record_exception=False, set_status_on_exception=False):
            wrapped = _RecordedSpan(span)
            try:
                yield wrapped
            except Exception as error:
                wrapped.fail(str(error) or type(error).__name__)
                raise

    def span(
        self,
        name: SpanName,
        *,
        parent: str | None = None,
        links: Sequence[str] = (),
        attributes: Mapping[str, Attribute] | None = None,
        start_unix_ns: int | None = None,
    ) -> AbstractContextManager[Span]:
        """Opens a span around a block and makes it current there."""
        return self._current(self._open(name, parent, links, attributes, start_unix_ns))

    def start(
        self,
        name: SpanName,
        *,
        parent: str | None = None,
        links: Sequence[str] = (),
        attributes: Mapping[str, Attribute] | None = None,
        start_unix_ns: int | None = None,
    ) -> Span:
        """Opens a span that the caller ends."""
        return _RecordedSpan(self._open(name, parent, links, attributes, start_unix_ns))

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
        """Records what is already over; returns its traceparent."""
        span = _RecordedSpan(self._open(name, parent, links, attributes, start_unix_ns))
        if failure:
            span.fail(failure)
        span.end(end_unix_ns=end_unix_ns)
        return span.traceparent

    def traceparent(self) -> str:
        """Returns the traceparent of the current span; "" for none."""
        context = self._trace.get_current_span().get_span_context()
        if not context.is_valid:
            return ""
        return f"00-{context.trace_id:032x}-{context.span_id:016x}-{int(context.trace_flags):02x}"

    def extract(self, headers: Mapping[str, str]) -> str:
        """Returns the traceparent that came with a message."""
        value = headers.get(TRACEPARENT, "")
        return value if _TRACEPARENT_PATTERN.fullmatch(value) else ""

    def shutdown(self) -> None:
        """Sends what is left and stops."""
        self._provider.shutdown()

    def _open(
        self,
        name: SpanName,
        parent: str | None,
        links: Sequence[str],
        attributes: Mapping[str, Attribute] | None,
        start_unix_ns: int | None,
    ) -> OtelSpan:
        contexts = (_span_context(link) for link in links)
        return self._tracer.start_span(
            name,
            context=self._context(parent),
            links=[self._trace.Link(context) for context in contexts if context is not None],
            attributes=attributes,
            start_time=start_unix_ns,
            kind=self._trace.SpanKind.SERVER if name == "rpc.server" else self._trace.SpanKind.INTERNAL,
        )

    def _context(self, parent: str | None) -> Context | None:
        """None stands for the current context."""
        context = _span_context(parent) if parent else None
        return self._trace.set_span_in_context(self._trace.NonRecordingSpan(context)) if context is not None else None


class _RecordedSpan:
    """Implements `Span` on an OpenTelemetry one."""

    def __init__(self, span: OtelSpan) -> None:
        self._span = span

    @property
    def traceparent(self) -> str:
        """To be a child of this span elsewhere."""
        context = self._span.get_span_context()
        return f"00-{context.trace_id:032x}-{context.span_id:016x}-{int(context.trace_flags):02x}"

    def set(self, key: str, value: Attribute) -> None:
        """Adds an attribute."""
        self._span.set_attribute(key, value)

    def fail(self, message: str) -> None:
        """Marks the work as failed."""
        from opentelemetry.trace import StatusCode

        self._span.set_status(StatusCode.ERROR, message)

    def end(self, *, end_unix_ns: int | None = None) -> None:
        """Ends it."""
        self._span.end(end_time=end_unix_ns)


def _span_context(traceparent: str) -> SpanContext | None:
    found = _TRACEPARENT_PATTERN.fullmatch(traceparent)
    if found is None:
        return None
    from opentelemetry import trace

    context = trace.SpanContext(
        trace_id=int(found[1], 16),
        span_id=int(found[2], 16),
        is_remote=True,
        trace_flags=trace.TraceFlags(int(found[3], 16)),
    )
    return context if context.is_valid else None
