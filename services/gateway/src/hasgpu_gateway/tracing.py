"""The spans of a request and of a batch; of those that are not traced they are two shared objects that do nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from hasgpu_runtime import trace_catalogue as names
from hasgpu_runtime.telemetry import Attribute, Span, Telemetry

from hasgpu_gateway.calls import BatchAnswer

if TYPE_CHECKING:
    from hasgpu_core.events import InstanceEvent


class RequestTrace:
    """gateway.infer, from arrival to answer, and in it gateway.queue and gateway.route. This one records nothing."""

    __slots__ = ()
    traceparent = ""
    """Of gateway.infer; empty: not traced."""

    def queued(self) -> None:
        """The request joins the line, or joins it again."""

    def dispatched(self) -> None:
        """The request leaves the line."""

    def ended(self, failure: str) -> None:
        """The request is answered; `failure` says why not, if so."""

    def routed(self, attributes: dict[str, Attribute]) -> Span | None:
        """The request goes to an instance in a batch; returns its gateway.route, None when it is not traced."""
        return None

    @property
    def route_traceparent(self) -> str:
        """Of its gateway.route; empty: not traced, or at no instance."""
        return ""


NOT_TRACED = RequestTrace()


class _RecordedRequest(RequestTrace):
    __slots__ = ("_function", "_infer", "_queue", "_route", "_telemetry", "traceparent")

    def __init__(self, telemetry: Telemetry, function: str, infer: Span) -> None:
        self._telemetry = telemetry
        self._function = function
        self._infer = infer
        self._queue: Span | None = None
        self._route: Span | None = None
        self.traceparent = infer.traceparent

    def queued(self) -> None:
        self._queue = self._telemetry.start(
            "gateway.queue", parent=self.traceparent, attributes={names.FUNCTION: self._function}
        )

    def dispatched(self) -> None:
        if self._queue is not None:
            self._queue.end()
            self._queue = None

    def routed(self, attributes: dict[str, Attribute]) -> Span | None:
        self._route = self._telemetry.start("gateway.route", parent=self.traceparent, attributes=attributes)
        return self._route

    @property
    def route_traceparent(self) -> str:
        return self._route.traceparent if self._route is not None else ""

    def ended(self, failure: str) -> None:
        self.dispatched()
        if failure:
            self._infer.fail(failure)
        self._infer.end()


def trace_request(telemetry: Telemetry, function: str) -> RequestTrace:
    """Begins a request's spans as children of the span current here: that of the RPC."""
    if not telemetry.enabled:
        return NOT_TRACED
    infer = telemetry.start("gateway.infer")
    if not infer.recording:
        return NOT_TRACED
    infer.set(names.FUNCTION, function)
    return _RecordedRequest(telemetry, function, infer)


class BatchTrace:
    """gateway.batch, from forming a batch to its answer. This one records nothing."""

    __slots__ = ()
    traceparent = ""

    def ended(self, answer: BatchAnswer | None) -> None:
        """The batch is answered; None: it is lost."""


NO_BATCH_TRACE = BatchTrace()


class _RecordedBatch(BatchTrace):
    __slots__ = ("_batch", "_routes", "traceparent")

    def __init__(self, batch: Span, routes: Sequence[Span]) -> None:
        self._batch = batch
        self._routes = routes
        self.traceparent = batch.traceparent

    def ended(self, answer: BatchAnswer | None) -> None:
        for span in (self._batch, *self._routes):
            if answer is None:
                span.fail("the instance was lost")
            else:
                span.set(names.ACTUAL_LATENCY_MS, _ms(answer.gate_wait_ns + answer.execute_ns))
                span.set(names.LINE_MS, _ms(answer.line_ns))
                span.set(names.GATE_WAIT_MS, _ms(answer.gate_wait_ns))
                span.set(names.EXECUTE_MS, _ms(answer.execute_ns))
            span.end()


def trace_batch(
    telemetry: Telemetry, requests: Sequence[RequestTrace], *, instance: InstanceEvent, rows: int, predicted_s: float
) -> BatchTrace:
    """Begins a batch's span, linked with all of its traced requests, and the gateway.route of each of these.

    Args:
        telemetry: Where spans go.
        requests: The batch's, in its order.
        instance: Where the batch goes.
        rows: In the batch.
        predicted_s: Gate wait and execution, as predicted; 0.0: unknown.
    """
    traced = [request for request in requests if request.traceparent]
    if not traced:
        return NO_BATCH_TRACE
    attributes: dict[str, Attribute] = {
        names.FUNCTION: instance.function,
        names.INSTANCE: instance.instance,
        names.NODE: instance.node,
        names.GPU: instance.gpu,
        names.DEVICE_MODEL: instance.device_model,
        names.ROW: instance.row,
        names.SM_PCT: instance.allocation.sm_pct,
        names.REQUEST_PERMILLE: instance.allocation.request_permille,
        names.LIMIT_PERMILLE: instance.allocation.limit_permille,
        names.BATCH_ROWS: rows,
        names.BATCH_REQUESTS_COUNT: len(requests),
    }
    if predicted_s:
        attributes[names.PREDICTED_LATENCY_MS] = round(predicted_s * 1e3, 3)
    routes = [span for request in traced if (span := request.routed(attributes)) is not None]
    batch = telemetry.start(
        "gateway.batch",
        parent=traced[0].traceparent,
        links=[span.traceparent for span in routes],
        attributes=attributes,
    )
    for span in routes:
        span.link(batch.traceparent)
    return _RecordedBatch(batch, routes)


def _ms(duration_ns: int) -> float:
    return round(duration_ns / 1e6, 3)
