"""Telemetry that records: spans of the OpenTelemetry SDK for traces that are kept, next to nothing for the others."""

from __future__ import annotations

import logging
import random
import threading
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from contextvars import Token
from types import TracebackType
from typing import TYPE_CHECKING

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.sdk.trace import SpanLimits, TracerProvider
from opentelemetry.sdk.trace.id_generator import IdGenerator
from opentelemetry.sdk.trace.sampling import ALWAYS_ON
from opentelemetry.trace import NonRecordingSpan, SpanContext, SpanKind, StatusCode, TraceFlags

from hasgpu_runtime import trace_catalogue
from hasgpu_runtime.sampling import Sampler, TraceContext, format_traceparent, parse_traceparent
from hasgpu_runtime.span_export import SpanQueue, queue_bounds
from hasgpu_runtime.telemetry import TRACEPARENT, Attribute, Span, Telemetry, current_span
from hasgpu_runtime.trace_catalogue import SPANS, SpanName

if TYPE_CHECKING:
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import SpanProcessor

_log = logging.getLogger(__name__)

LINKS_MAX = 1_024
"""Of one span: a batch has no more requests."""
_KINDS: Mapping[trace_catalogue.SpanKind, SpanKind] = {
    "internal": SpanKind.INTERNAL,
    "server": SpanKind.SERVER,
    "client": SpanKind.CLIENT,
    "producer": SpanKind.PRODUCER,
    "consumer": SpanKind.CONSUMER,
}


def exporting_queue(endpoint: str, environ: Mapping[str, str]) -> SpanQueue | None:
    """Returns a queue to the collector; None, with a warning, when its settings can't be used.

    The exporter itself reads the variables OTEL_EXPORTER_OTLP_* for headers, certificates, compression and time limit.
    """
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter

    try:
        exporter = OTLPSpanExporter(endpoint=endpoint)
    except (ValueError, OSError) as error:
        _log.warning("nothing is traced, the variables OTEL_EXPORTER_OTLP_* can't be used: %s", error)
        return None
    return SpanQueue(exporter, where=endpoint, **queue_bounds(environ))


class ExportingTelemetry(Telemetry):
    """Spans into a span processor.

    Args:
        processor: Where ended spans go.
        sampler: Which traces are kept; by default all but those of which a caller says that they are not.
        resource: What is said of the process; None: nothing.
        queue: The processor, when it is one that counts what it drops.
    """

    def __init__(
        self,
        processor: SpanProcessor,
        *,
        sampler: Sampler | None = None,
        resource: Resource | None = None,
        queue: SpanQueue | None = None,
    ) -> None:
        self._sampler = sampler or Sampler()
        self._queue = queue
        self._ids = _Ids()
        self._provider = TracerProvider(
            sampler=ALWAYS_ON,  # what comes here is kept: our own sampler has decided
            resource=resource,
            shutdown_on_exit=False,
            id_generator=self._ids,
            span_limits=SpanLimits(max_links=LINKS_MAX),
        )
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("hasgpu")

    @property
    def enabled(self) -> bool:
        """True."""
        return True

    @property
    def dropped_count(self) -> int:
        """Spans that were recorded and never reached the collector."""
        return self._queue.dropped_count if self._queue is not None else 0

    @property
    def recording(self) -> bool:
        """Whether the span current here goes anywhere."""
        span = current_span.get()
        return span is not None and span.recording

    def span(
        self,
        name: SpanName,
        *,
        parent: str | None = None,
        links: Sequence[str] = (),
        attributes: Mapping[str, Attribute] | None = None,
        start_unix_ns: int | None = None,
        kind: trace_catalogue.SpanKind | None = None,
    ) -> AbstractContextManager[Span]:
        """Opens a span around a block and makes it current there."""
        return _Current(self.start(name, parent=parent, links=links, attributes=attributes, kind=kind))

    def rpc_span(
        self,
        method: str,
        *,
        kind: trace_catalogue.SpanKind,
        parent: str | None = None,
        attributes: Mapping[str, Attribute] | None = None,
    ) -> AbstractContextManager[Span]:
        """Opens a span around one side of an RPC."""
        return _Current(self._open(method, parent, kind, False, attributes), by_status=True)

    def start(
        self,
        name: SpanName,
        *,
        parent: str | None = None,
        links: Sequence[str] = (),
        attributes: Mapping[str, Attribute] | None = None,
        start_unix_ns: int | None = None,
        kind: trace_catalogue.SpanKind | None = None,
    ) -> Span:
        """Opens a span that the caller ends."""
        info = SPANS[name]
        return self._open(name, parent, kind or info.kind, info.decision, attributes, links, start_unix_ns)

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
        span = self.start(name, parent=parent, links=links, attributes=attributes, start_unix_ns=start_unix_ns)
        if failure:
            span.fail(failure)
        span.end(end_unix_ns=end_unix_ns)
        return span.traceparent

    def traceparent(self) -> str:
        """Returns the traceparent of the current span; "" for none."""
        span = current_span.get()
        return span.traceparent if span is not None else ""

    def extract(self, headers: Mapping[str, str]) -> str:
        """Returns the traceparent that came with a message."""
        value = headers.get(TRACEPARENT, "")
        return value if value and parse_traceparent(value) is not None else ""

    def shutdown(self) -> None:
        """Sends what is left and stops."""
        self._provider.shutdown()

    def _open(
        self,
        name: str,
        parent: str | None,
        kind: trace_catalogue.SpanKind,
        decision: bool,
        attributes: Mapping[str, Attribute] | None,
        links: Sequence[str] = (),
        start_unix_ns: int | None = None,
    ) -> Span:
        sampler = self._sampler
        decision = decision and sampler.decisions
        context: TraceContext | None = None
        if parent:
            context = parse_traceparent(parent)
        else:
            current = current_span.get()
            if isinstance(current, _RecordedSpan):
                context = current.context
            elif isinstance(current, _UnkeptSpan):
                if not decision and sampler.parent_based:
                    return current
                context = parse_traceparent(current.traceparent)
        if context is None:
            trace_id = sampler.new_trace_id()
            if not decision and not sampler.keeps(trace_id):
                return _UnkeptSpan(trace_id)
            self._ids.next_trace_id = trace_id
        elif not context.sampled and sampler.parent_based:
            if not decision:
                return _UnkeptSpan(context.trace_id, parent or "")
            # Its parent will never be seen.
            context = None
            self._ids.next_trace_id = sampler.new_trace_id()
        elif not sampler.parent_based and not decision and not sampler.keeps(context.trace_id):
            return _UnkeptSpan(context.trace_id, parent or "")
        return _RecordedSpan(
            self._tracer.start_span(
                name,
                context=_otel_context(context),
                links=[trace.Link(_span_context(link)) for text in links if (link := parse_traceparent(text))],
                attributes=attributes,
                start_time=start_unix_ns,
                kind=_KINDS[kind],
            )
        )


class _Ids(IdGenerator):
    """Gives a trace the id by which it was decided to keep it."""

    def __init__(self) -> None:
        self._random = random.Random()  # noqa: S311  ids, not secrets
        self._local = threading.local()

    @property
    def next_trace_id(self) -> int:
        """Of the trace that begins next in this thread."""
        return getattr(self._local, "trace_id", 0)

    @next_trace_id.setter
    def next_trace_id(self, trace_id: int) -> None:
        self._local.trace_id = trace_id

    def generate_trace_id(self) -> int:
        return self.next_trace_id or self._random.getrandbits(128) or 1

    def generate_span_id(self) -> int:
        return self._random.getrandbits(64) or 1


class _RecordedSpan:
    """Implements `Span` on one of the SDK."""

    __slots__ = ("_span", "context")

    recording = True

    def __init__(self, span: trace.Span) -> None:
        self._span = span
        context = span.get_span_context()
        self.context = TraceContext(context.trace_id, context.span_id, int(context.trace_flags))

    @property
    def traceparent(self) -> str:
        """To be a child of this span elsewhere."""
        return format_traceparent(self.context.trace_id, self.context.span_id, self.context.flags)

    def set(self, key: str, value: Attribute) -> None:
        """Adds an attribute."""
        self._span.set_attribute(key, value)

    def link(self, traceparent: str) -> None:
        """Links it with another span."""
        context = parse_traceparent(traceparent)
        if context is not None:
            self._span.add_link(_span_context(context))

    def fail(self, message: str) -> None:
        """Marks the work as failed."""
        self._span.set_status(StatusCode.ERROR, message)

    def end(self, *, end_unix_ns: int | None = None) -> None:
        """Ends it."""
        self._span.end(end_time=end_unix_ns)


class _UnkeptSpan:
    """A span of a trace that is not kept: passes that on, so that what it causes elsewhere is not kept either."""

    __slots__ = ("_trace_id", "_traceparent")

    recording = False

    def __init__(self, trace_id: int, traceparent: str = "") -> None:
        self._trace_id = trace_id
        self._traceparent = traceparent

    @property
    def traceparent(self) -> str:
        """Its caller's, where there is one; else of a span that nobody will see."""
        if not self._traceparent:
            self._traceparent = format_traceparent(self._trace_id, self._trace_id >> 64 or 1, 0)
        return self._traceparent

    def set(self, key: str, value: Attribute) -> None:
        """Does nothing."""

    def link(self, traceparent: str) -> None:
        """Does nothing."""

    def fail(self, message: str) -> None:
        """Does nothing."""

    def end(self, *, end_unix_ns: int | None = None) -> None:
        """Does nothing."""


class _Current:
    """Makes a span current in a block and ends it there; an RPC's fails by its status, any other by an exception."""

    __slots__ = ("_by_status", "_span", "_token")

    def __init__(self, span: Span, *, by_status: bool = False) -> None:
        self._span = span
        self._by_status = by_status
        self._token: Token[Span | None] | None = None

    def __enter__(self) -> Span:
        self._token = current_span.set(self._span)
        return self._span

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._token is not None
        with suppress(ValueError):  # a generator that another task closes: there it never was current
            current_span.reset(self._token)
        if self._span.recording:
            if isinstance(error, Exception) and not self._by_status:
                self._span.fail(str(error) or type(error).__name__)
            self._span.end()


def _otel_context(context: TraceContext | None) -> Context:
    """An empty one begins a trace."""
    if context is None:
        return Context()
    return trace.set_span_in_context(NonRecordingSpan(_span_context(context)), Context())


def _span_context(context: TraceContext) -> SpanContext:
    return SpanContext(
        trace_id=context.trace_id,
        span_id=context.span_id,
        is_remote=True,
        trace_flags=TraceFlags(context.flags),
    )
