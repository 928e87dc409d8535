"""One function's way through the gateway: its queue, its routes and its dispatch.

Everything here runs on the event loop and is driven by events: a request arrives, a batch comes back, a route comes or
goes, a deadline passes. Nothing polls.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from hasgpu_core.capacity import CapacityTable
from hasgpu_core.errors import HasgpuError, InvalidError, ModelError, QueueFullError, UnavailableError
from hasgpu_core.events import DemandEvent, FunctionEvent, InstanceEvent
from hasgpu_core.policy.admission import admit
from hasgpu_core.policy.batching import EdfQueue, Waiting
from hasgpu_core.ports import Clock
from hasgpu_runtime.logs import about
from hasgpu_runtime.telemetry import Telemetry

from hasgpu_gateway.calls import Answer, BatchAnswer, Failure, FailureKind, InferCall
from hasgpu_gateway.deadlines import Deadlines
from hasgpu_gateway.demand import DemandMeter
from hasgpu_gateway.errors import InstanceLostError
from hasgpu_gateway.metering import LaneMetrics
from hasgpu_gateway.pending import Pending
from hasgpu_gateway.protocol import Signature
from hasgpu_gateway.routes import Batch, BatchOrder, Link, Route
from hasgpu_gateway.tracing import NOT_TRACED, RequestTrace, trace_batch

log = logging.getLogger(__name__)

_CODE_FIELDS = ("format", "artifact", "entry", "inputs", "outputs", "parameters")
"""What of a spec makes a worker another worker."""


EXPIRED_SLACK_S = 0.05
"""A call cancelled this shortly before its deadline ran out of time: gRPC ends it by a clock of its own."""
GONE_GRACE_S = 2.0
"""A worker drains before its instance is taken back, so little can still come from one that is no longer announced."""


@dataclass(frozen=True, slots=True)
class LaneSettings:
    """Bounds of a lane."""

    max_batches_in_flight: int = 2
    """At one instance."""
    max_batch_bytes: int = 32 * 1024 * 1024
    """Tensor contents in one batch; a request larger than that goes alone."""
    max_queue_bytes: int = 256 * 1024 * 1024
    """Tensor contents in line; a single request may be larger."""
    demand_window_s: float = 3.0
    """Over which latencies are reported."""


class Lane:
    """Queue, routes and dispatch of one function."""

    def __init__(
        self,
        event: FunctionEvent,
        *,
        clock: Clock,
        settings: LaneSettings,
        telemetry: Telemetry,
        metrics: LaneMetrics,
        open_link: Callable[[Lane, Route], Link],
        on_starved: Callable[[str], None],
    ) -> None:
        self.event = event
        self.signature = Signature.of(event)
        self.meter = DemandMeter(event.spec.name, window_s=settings.demand_window_s)
        self._clock = clock
        self._settings = settings
        self._telemetry = telemetry
        self._metrics = metrics
        self._open_link = open_link
        self._on_starved = on_starved
        self._code_revision = 0
        self._rows_revision = 0
        self._old_max_rows = event.spec.max_batch
        self._queue: EdfQueue[Pending] = EdfQueue(max_count=event.spec.max_queue)
        self._routes: dict[str, Route] = {}
        self._deadlines = Deadlines(clock, self._expire)
        self._waiting_since: dict[int, float] = {}
        self._queued_bytes = 0
        self._sequence = 0
        self._batch = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._closed: HasgpuError | None = None

    # What is known of the function

    @property
    def name(self) -> str:
        """The function's."""
        return self.event.spec.name

    @property
    def queued_count(self) -> int:
        """Requests in line."""
        return len(self._queue)

    @property
    def queued_items_count(self) -> int:
        """Their items."""
        return self._queue.rows

    def oldest_wait_s(self, now_s: float) -> float:
        """Returns for how long the oldest request in line has waited; 0: none waits."""
        return now_s - min(self._waiting_since.values(), default=now_s)

    @property
    def open_routes_count(self) -> int:
        """Instances that batches may be sent to now."""
        return len(self._open_routes())

    @property
    def in_flight_count(self) -> int:
        """Requests at workers."""
        return sum(len(batch.order.items) for route in self._routes.values() for batch in route.in_flight.values())

    @property
    def routes(self) -> dict[str, Route]:
        """By instance."""
        return self._routes

    def update(self, event: FunctionEvent) -> None:
        """Takes a new revision of the function.

        When its code or tensors changed, instances of older revisions get nothing more, and requests in line, checked
        against the old declaration, fail with UnavailableError.
        """
        old, new = self.event.spec, event.spec
        self.event = event
        self.signature = Signature.of(event)
        if new.max_queue != old.max_queue:
            waiting = self._queue.expired(float("inf"))
            self._queue = EdfQueue(max_count=new.max_queue)
            for item in waiting:
                self._queue.push(replace(item, retried=True))  # what waits keeps its place, whatever the new bound
        if any(getattr(old, field) != getattr(new, field) for field in _CODE_FIELDS):
            self._code_revision = event.revision
        if new.max_batch != old.max_batch:
            self._rows_revision = event.revision
            self._old_max_rows = min(old.max_batch, self._old_max_rows)
        if old.inputs != new.inputs or old.outputs != new.outputs:
            self._fail_queued(UnavailableError(f"function {self.name!r} was replaced while the request waited"))
        self.dispatch()

    def set_instances(self, instances: Mapping[str, InstanceEvent], tables: Mapping[str, CapacityTable]) -> None:
        """Takes the instances and predictions that exist now; opens and closes streams as needed."""
        spec = self.event.spec
        for name, event in instances.items():
            route = self._routes.get(name)
            if route is None:
                route = self._routes[name] = Route(event, max_batches=self._settings.max_batches_in_flight)
            elif route.link is not None and route.address != event.address:
                self._lose(route, "the worker moved")
                self._close_link(route)
            started_for = self._old_max_rows if event.function_revision < self._rows_revision else spec.max_batch
            route.update(event, tables.get(event.device_model), max_rows=min(started_for, spec.max_batch))
            if route.link is None and route.wants_link:
                route.link = self._open_link(self, route)
            elif route.link is not None and not route.wants_link and not route.in_flight:
                self._close_link(route)
        for name in [name for name in self._routes if name not in instances]:
            route = self._routes[name]
            if not route.gone:
                route.gone = True
                asyncio.get_running_loop().call_later(GONE_GRACE_S, self._forget, route)
            self._tidy(route)
        self._queue.reconsider()
        self.dispatch()

    # Requests

    async def submit(
        self, call: InferCall, *, timeout_s: float | None = None, trace: RequestTrace = NOT_TRACED
    ) -> Answer:
        """Runs a call, waiting for an instance if there is none; returns its outputs.

        Args:
            call: A valid call of this function.
            timeout_s: What is left of the caller's gRPC deadline; None: it has none.
            trace: The request's spans.

        Raises:
            UnavailableError: Refused (with a retry hint), out of time, or its instance was lost twice.
            DeadlineError: The caller's own gRPC deadline passed.
            QueueFullError: The queue is at its bound.
            ModelError, InvalidError: As the worker said.
            NotFoundError: The function was deleted meanwhile.
        """
        now_s = self._clock.now_s()
        spec = self.event.spec
        if self._closed is not None:
            raise self._closed
        self.meter.arrived(call.rows)
        own_s = spec.timeout_ms / 1e3 if call.timeout_s is None else min(spec.timeout_ms / 1e3, call.timeout_s)
        by_caller = timeout_s is not None and timeout_s <= own_s
        self._sequence += 1
        pending = Pending(
            call,
            asyncio.get_running_loop().create_future(),
            arrived_s=now_s,
            due_s=now_s + spec.slo_s,
            deadline_s=now_s + (timeout_s if timeout_s is not None and by_caller else own_s),
            by_caller=by_caller,
            sequence=self._sequence,
            trace=trace,
        )
        try:
            self._admit(pending, now_s)
            self._enqueue(pending)
        except UnavailableError:
            self.meter.refused_count += 1
            raise
        self._deadlines.add(pending)
        self.dispatch()
        if pending.queued and len(self._queue) == 1 and not self._open_routes():
            self._on_starved(self.name)
        try:
            answer = await pending.future
        except (asyncio.CancelledError, HasgpuError):
            self._withdraw(pending)
            self.meter.failed(expired=self._clock.now_s() >= pending.deadline_s - EXPIRED_SLACK_S)
            raise
        finally:
            self._deadlines.drop(pending)
        now_s = self._clock.now_s()
        self.meter.answered(now_s, now_s - pending.arrived_s, slo_s=spec.slo_s)
        self._metrics.answered(now_s - pending.arrived_s, slo_s=spec.slo_s)
        return answer

    def demand(self, *, gateway: str, epoch: str) -> DemandEvent:
        """Returns the report of now."""
        now_s = self._clock.now_s()
        return self.meter.event(
            gateway=gateway,
            epoch=epoch,
            now_s=now_s,
            observed_unix_ns=self._clock.unix_ns(),
            queued_count=self.queued_count,
            queued_items_count=self.queued_items_count,
            in_flight_count=self.in_flight_count,
            oldest_wait_s=self.oldest_wait_s(now_s),
        )

    # Ending

    def close(self, error: HasgpuError) -> None:
        """Takes no more requests; those in line fail with the error, those at workers finish."""
        self._closed = error
        self._fail_queued(error)

    async def finished(self) -> None:
        """Returns once nothing is at a worker any more."""
        await self._idle.wait()

    def shut(self) -> None:
        """Closes every stream; what is still at a worker fails."""
        for route in self._routes.values():
            for batch in route.take_all():
                batch.trace.ended(None)
                for pending in batch.order.items:
                    pending.settle(self._closed or UnavailableError("the gateway stops"))
            self._close_link(route)
        self._routes.clear()
        self._deadlines.close()
        self._idle.set()

    # The streams' events

    def link_up(self, route: Route) -> None:
        """A stream to the instance is open."""
        route.up = True
        self._queue.reconsider()
        self.dispatch()

    def link_down(self, route: Route, reason: str) -> None:
        """The stream is lost with all that was in flight on it: each request gets one more try."""
        self._lose(route, reason)
        self._tidy(route)
        self.dispatch()

    def answered(self, route: Route, answer: BatchAnswer) -> None:
        """A batch came back."""
        batch = route.returned(answer, self._clock.now_s())
        if batch is None:
            log.warning(
                "instance %s answered batch %d, which it was not sent",
                route.event.instance,
                answer.batch,
                extra=about(function=self.name, instance=route.event.instance),
            )
            return
        batch.trace.ended(answer)
        took_s = (answer.gate_wait_ns + answer.execute_ns) / 1e9
        self._metrics.batch(batch.rows, took_s=took_s, predicted_s=batch.predicted_s)
        items = batch.order.items
        if len(answer.items) != len(items):
            error = ModelError(
                f"instance {route.event.instance} gave {len(answer.items)} answers to {len(items)} items"
            )
            for pending in items:
                pending.settle(error)
        else:
            for pending, outcome in zip(items, answer.items, strict=True):
                if isinstance(outcome, Answer):
                    pending.settle(outcome)
                else:
                    self._failed(pending, outcome, route, shared=len(items) > 1)
        self._tidy(route)
        self.dispatch()

    # Inside

    def dispatch(self) -> None:
        """Sends batches while requests wait and an instance can take them."""
        while len(self._queue):
            now_s = self._clock.now_s()
            routes = self._open_routes()
            free = [route for route in routes if route.has_credit(self._queue.rows)]
            if not free:
                return
            # The earliest predicted finish; of equals the least busy, then the largest.
            route = min(
                free, key=lambda r: (r.after_s(now_s, 1) or 0.0, len(r.in_flight), -r.event.allocation.request_permille)
            )
            batch = self._queue.form_batch(
                now_s,
                max_rows=route.max_rows,
                latency_s=partial(route.after_s, now_s),
                soonest_s=None if len(routes) == 1 else partial(_soonest_s, routes, now_s),
            )
            if not batch:
                return
            fits = self._split([item.request for item in batch])
            self._send(route, fits, now_s)

    def _open_routes(self) -> list[Route]:
        return [route for route in self._routes.values() if not route.gone and route.is_open(self._code_revision)]

    def _admit(self, pending: Pending, now_s: float) -> None:
        """Raises UnavailableError with a retry hint when the request can't be answered in time."""
        routes = self._open_routes()
        rates = [route.trusted_rps() for route in routes]
        known = [rate for rate in rates if rate is not None]
        if len(known) != len(rates) or not known:
            return
        rows = pending.call.rows
        latencies = [latency for route in routes if (latency := route.latency_s(rows)) is not None]
        at_workers = sum(batch.rows for route in routes for batch in route.in_flight.values())
        refusal = admit(
            now_s=now_s,
            deadline_s=pending.deadline_s,
            rows=rows,
            queued_rows=self._queue.rows + at_workers,
            capacity_rps=sum(known),
            batch_latency_s=min(latencies, default=None),
        )
        if refusal is not None:
            raise UnavailableError(refusal.reason, retry_after_s=refusal.retry_after_s)

    def _enqueue(self, pending: Pending, *, returning: bool = False) -> None:
        """Puts a request in line; raises QueueFullError at a bound, except for one that comes back."""
        call = pending.call
        queued_bytes = self._queued_bytes + call.size_bytes
        if queued_bytes > self._settings.max_queue_bytes and len(self._queue) and not returning:
            raise QueueFullError(
                f"Exceeds maximum queue size: requests of {self._queued_bytes} bytes wait, of "
                f"{self._settings.max_queue_bytes} that may, and this one has {call.size_bytes}"
            )
        self._queue.push(
            Waiting(
                request=pending,
                rows=call.rows,
                signature=(call.signature, pending.sequence) if pending.alone else call.signature,
                due_s=pending.due_s,
                deadline_s=pending.deadline_s,
                sequence=pending.sequence,
                retried=returning,
            )
        )
        pending.queued = True
        self._queued_bytes = queued_bytes
        self._waiting_since[pending.sequence] = pending.arrived_s
        pending.trace.queued()

    def _dequeued(self, pending: Pending) -> None:
        pending.queued = False
        self._queued_bytes -= pending.call.size_bytes
        self._waiting_since.pop(pending.sequence, None)
        pending.trace.dispatched()

    def _split(self, items: list[Pending]) -> list[Pending]:
        """Returns the first items that fit into one message; the others go back into the line."""
        size_bytes = 0
        for count, pending in enumerate(items):
            size_bytes += pending.call.size_bytes
            if size_bytes > self._settings.max_batch_bytes and count:
                for other in items[count:]:
                    self._dequeued(other)
                    self._enqueue(other, returning=True)
                return items[:count]
        return items

    def _send(self, route: Route, items: list[Pending], now_s: float) -> None:
        for pending in items:
            self._dequeued(pending)
        rows = sum(pending.call.rows for pending in items)
        self._batch += 1
        predicted_s = route.latency_s(rows) or 0.0
        trace = trace_batch(
            self._telemetry, [p.trace for p in items], instance=route.event, rows=rows, predicted_s=predicted_s
        )
        latest_s = max(pending.deadline_s for pending in items)
        order = BatchOrder(
            batch=self._batch,
            items=tuple(items),
            deadline_unix_ns=self._clock.unix_ns() + round((latest_s - now_s) * 1e9),
            traceparent=trace.traceparent,
        )
        route.sent(Batch(order, rows, now_s, predicted_s, trace), now_s)
        self._idle.clear()
        assert route.link is not None
        route.link.send(order)

    def _failed(self, pending: Pending, failure: Failure, route: Route, *, shared: bool) -> None:
        """Deals with an item that has no outputs."""
        match failure.kind:
            case FailureKind.DRAINING:
                route.draining = True
                self._requeue(pending)
            case FailureKind.EXPIRED:
                pending.settle(pending.expired(f"before {route.event.instance!r} came to it"))
            case FailureKind.INPUT if route.max_rows < pending.call.rows <= self.event.spec.max_batch:
                # It was started before the function took batches so large, and its successor is on its way.
                name = route.event.instance
                text = f"instance {name!r} takes {route.max_rows} rows until it is replaced, got {pending.call.rows}"
                pending.settle(UnavailableError(text, retry_after_s=1.0))
            case FailureKind.INPUT:
                pending.settle(InvalidError(failure.message))
            case FailureKind.HUNG:
                limit_ms = self.event.spec.execution_timeout_ms
                pending.settle(ModelError(f"handler held the device longer than {limit_ms} ms: {failure.message}"))
            case FailureKind.MODEL:
                if shared and not pending.alone:
                    pending.alone = True
                    self._requeue(pending)
                else:
                    pending.settle(ModelError(f"function {self.name!r} failed: {failure.message}"))

    def _lose(self, route: Route, reason: str) -> None:
        """The stream is gone, and with it what was in flight."""
        route.up = False
        lost = route.take_all()
        if lost:
            log.warning(
                "instance %s: stream lost with %d batches: %s",
                route.event.instance,
                len(lost),
                reason,
                extra=about(function=self.name, instance=route.event.instance),
            )
        for batch in lost:
            batch.trace.ended(None)
            for pending in batch.order.items:
                self._retry_lost(pending, route, reason)

    def _forget(self, route: Route) -> None:
        """An instance is no longer announced: its worker has stopped, whatever its stream looks like."""
        if route.gone and self._routes.get(route.event.instance) is route:
            self._lose(route, "the instance is gone")
            self._tidy(route)
            self.dispatch()

    def _retry_lost(self, pending: Pending, route: Route, reason: str) -> None:
        if pending.retried:
            name = route.event.instance
            pending.settle(InstanceLostError(f"instance {name!r} was lost, the second for this request: {reason}"))
            return
        pending.retried = True
        self._requeue(pending)

    def _requeue(self, pending: Pending) -> None:
        """Back in line at its due time, unless nobody waits any more or its time is up."""
        if pending.future.done():
            return
        if self._closed is not None:
            pending.settle(self._closed)
        elif pending.deadline_s <= self._clock.now_s():
            pending.settle(pending.expired("before it could be tried again"))
        else:
            self._enqueue(pending, returning=True)

    def _withdraw(self, pending: Pending) -> None:
        """Takes a request whose caller is gone, or that has failed, out of the line."""
        if pending.queued:
            self._queue.discard(pending)
            self._dequeued(pending)

    def _expire(self, pending: Pending) -> None:
        """The deadline of a request has come; its batch, if it is in one, goes on for the others."""
        where = self._whereabouts() if pending.queued else "while an instance ran it"
        self._withdraw(pending)
        pending.settle(pending.expired(where))

    def _whereabouts(self) -> str:
        """What a request in line is waiting for, in words."""
        if self._open_routes():
            return "in the queue"
        states = [route.event for route in self._routes.values() if not route.gone]
        if not states:
            return f"while {self.name!r} had no instance"
        said = (
            f"{event.instance} {event.state.value}{f' ({event.reason})' if event.reason else ''}" for event in states
        )
        return f"while no instance of {self.name!r} was ready: {', '.join(said)}"

    def _fail_queued(self, error: HasgpuError) -> None:
        for item in self._queue.expired(float("inf")):
            self._dequeued(item.request)
            item.request.settle(error)

    def _tidy(self, route: Route) -> None:
        """Closes what was only kept for its last batches."""
        if not route.in_flight and (route.gone or not route.wants_link):
            self._close_link(route)
            if route.gone:
                self._routes.pop(route.event.instance, None)
        if not any(other.in_flight for other in self._routes.values()):
            self._idle.set()

    def _close_link(self, route: Route) -> None:
        if route.link is not None:
            route.link.close()
            route.link = None
        route.up = False


def _soonest_s(routes: Sequence[Route], now_s: float, rows: int) -> float | None:
    """In how long the first of the instances could have answered; None: of one of them nothing is known."""
    after_s = [route.after_s(now_s, rows) for route in routes]
    known = [seconds for seconds in after_s if seconds is not None]
    return min(known) if len(known) == len(after_s) else None
