"""The spans of a request and of a batch; with tracing off, they are two shared objects that do nothing."""

from __future__ import annotations

from collections.abc import Sequence

from hasgpu_runtime.telemetry import Span, Telemetry

from hasgpu_gateway.calls import BatchAnswer


class RequestTrace:
    """gateway.infer, from arrival to answer, and in it gateway.queue, the wait in line. This one records nothing."""

    __slots__ = ()
    traceparent = ""
    """Of gateway.infer; empty: not traced."""

    def queued(self) -> None:
        """The request joins the line, or joins it again."""

    def dispatched(self) -> None:
        """The request leaves the line."""

    def ended(self, failure: str) -> None:
        """The request is answered; `failure` says why not, if so."""


NOT_TRACED = RequestTrace()


class _RecordedRequest(RequestTrace):
    __slots__ = ("_infer", "_queue", "_telemetry", "traceparent")

    def __init__(self, telemetry: Telemetry, function: str) -> None:
        self._telemetry = telemetry
        self._infer = telemetry.start("gateway.infer", attributes={"function": function})
        self._queue: Span | None = None
        self.traceparent = self._infer.traceparent

    def queued(self) -> None:
        self._queue = self._telemetry.start("gateway.queue", parent=self.traceparent)

    def dispatched(self) -> None:
        if self._queue is not None:
            self._queue.end()
            self._queue = None

    def ended(self, failure: str) -> None:
        self.dispatched()
        if failure:
            self._infer.fail(failure)
        self._infer.end()


def trace_request(telemetry: Telemetry, function: str) -> RequestTrace:
    """Begins a request's spans as children of the span current here: that of the RPC."""
    return _RecordedRequest(telemetry, function) if telemetry.enabled else NOT_TRACED


class BatchTrace:
    """gateway.batch, from forming a batch to its answer. This one records nothing."""

    __slots__ = ()
    traceparent = ""

    def ended(self, answer: BatchAnswer | None) -> None:
        """The batch is answered; None: it is lost."""


NO_BATCH_TRACE = BatchTrace()


class _RecordedBatch(BatchTrace):
    __slots__ = ("_span", "traceparent")

    def __init__(self, span: Span) -> None:
        self._span = span
        self.traceparent = span.traceparent

    def ended(self, answer: BatchAnswer | None) -> None:
        if answer is None:
            self._span.fail("the instance was lost")
        else:
            self._span.set("line_ns", answer.line_ns)
            self._span.set("gate_wait_ns", answer.gate_wait_ns)
            self._span.set("execute_ns", answer.execute_ns)
        self._span.end()


def trace_batch(telemetry: Telemetry, requests: Sequence[RequestTrace], *, instance: str, rows: int) -> BatchTrace:
    """Begins a batch's span: in the trace of its first traced request, linked with all of them."""
    if not telemetry.enabled:
        return NO_BATCH_TRACE
    traced = [request.traceparent for request in requests if request.traceparent]
    if not traced:
        return NO_BATCH_TRACE
    attributes: dict[str, str | int] = {"instance": instance, "rows": rows, "requests": len(requests)}
    return _RecordedBatch(telemetry.start("gateway.batch", parent=traced[0], links=traced, attributes=attributes))
