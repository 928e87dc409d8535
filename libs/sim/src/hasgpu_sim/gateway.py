"""The simulated front door: one gateway's queues, batches and counters."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from hasgpu_core.capacity import CapacityTable
from hasgpu_core.errors import QueueFullError
from hasgpu_core.events import DemandEvent
from hasgpu_core.policy.admission import admit
from hasgpu_core.policy.batching import EdfQueue, Waiting

from hasgpu_sim.event_queue import EventQueue
from hasgpu_sim.scenario import FunctionLoad

BATCH_CREDITS = 2
"""Batches that an instance may hold: one runs while the next lies ready."""


@dataclass(slots=True, eq=False)
class Request:
    """One request."""

    arrived_s: float
    rows: int
    started_s: float = 0.0


@dataclass(slots=True, eq=False)
class Route:
    """One ready instance as the gateway sees it."""

    instance: str
    table: CapacityTable
    sm_pct: int
    quota_permille: int
    batches: deque[list[Request]] = field(default_factory=deque)
    """Handed over and not answered, the running one first."""
    busy_until_s: float = 0.0
    draining: bool = False
    on_empty: Callable[[], None] | None = None
    """Called when a draining instance has answered its last batch."""

    def latency_s(self, batch: int) -> float:
        """Predicted latency of a batch at the quota in force."""
        return self.table.latency_s(batch, self.sm_pct, self.quota_permille) or math.inf

    def after_s(self, now_s: float, rows: int) -> float:
        """In how long a batch handed over now would be done."""
        return max(0.0, self.busy_until_s - now_s) + self.latency_s(rows)


def _soonest_s(routes: Sequence[Route], now_s: float, rows: int) -> float:
    return min(route.after_s(now_s, rows) for route in routes)


class FunctionGateway:
    """The queue of one function, its routes and its counters."""

    def __init__(self, load: FunctionLoad, events: EventQueue, *, window_s: float) -> None:
        spec = load.spec
        self._spec = spec
        self._rows = load.rows
        self._events = events
        self._window_s = window_s
        self._queue: EdfQueue[Request] = EdfQueue(max_count=spec.max_queue)
        self._routes: dict[str, Route] = {}
        self._recent: deque[tuple[float, float]] = deque()
        self._sequence = 0
        self.arrived_count = 0
        self.refused_count = 0
        self.expired_count = 0
        self.late_count = 0
        self.latencies_s: list[float] = []
        self.waits_s: list[float] = []

    @property
    def in_flight_count(self) -> int:
        """Requests handed to instances and not answered."""
        return sum(len(batch) for route in self._routes.values() for batch in route.batches)

    @property
    def queued_count(self) -> int:
        """Requests waiting here."""
        return len(self._queue)

    def arrive(self) -> None:
        """Takes or refuses a request."""
        now_s, spec = self._events.now_s, self._spec
        self.arrived_count += 1
        self._sequence += 1
        deadline_s = now_s + spec.timeout_ms / 1e3
        open_routes = self._open_routes()
        refusal = admit(
            now_s=now_s,
            deadline_s=deadline_s,
            rows=self._rows,
            queued_rows=self._queue.rows,
            capacity_rps=sum(spec.max_batch / route.latency_s(spec.max_batch) for route in open_routes) or None,
            batch_latency_s=min((route.latency_s(self._rows) for route in open_routes), default=None),
        )
        try:
            if refusal is not None:
                self.refused_count += 1
                return
            request = Request(now_s, self._rows)
            self._queue.push(Waiting(request, self._rows, None, now_s + spec.slo_s, deadline_s, self._sequence))
        except QueueFullError:
            self.refused_count += 1
            return
        self.dispatch()

    def set_route(self, route: Route) -> None:
        """An instance became ready."""
        self._routes[route.instance] = route
        self._queue.reconsider()
        self.dispatch()

    def route(self, instance: str) -> Route | None:
        """Returns a route by its instance."""
        return self._routes.get(instance)

    def drain(self, instance: str, on_empty: Callable[[], None]) -> None:
        """Sends nothing more to an instance and calls back when it has answered what it has."""
        route = self._routes.get(instance)
        if route is None or not route.batches:
            self._routes.pop(instance, None)
            on_empty()
            return
        route.draining = True
        route.on_empty = on_empty

    def dispatch(self) -> None:
        """Hands batches to instances with a free credit, the least busy first."""
        self.expired_count += len(self._queue.expired(self._events.now_s))
        while len(self._queue):
            routes, now_s = self._open_routes(), self._events.now_s
            free = [route for route in routes if len(route.batches) < BATCH_CREDITS]
            if not free:
                return
            route = min(free, key=lambda r: (r.after_s(now_s, 1), len(r.batches), r.instance))
            batch = self._queue.form_batch(
                now_s,
                max_rows=self._spec.max_batch,
                latency_s=partial(route.after_s, now_s),
                soonest_s=partial(_soonest_s, routes, now_s),
            )
            if not batch:
                return
            route.batches.append([waiting.request for waiting in batch])
            if len(route.batches) == 1:
                self._start(route)

    def report(self, gateway: str, epoch: str, unix_ns: int) -> DemandEvent:
        """Returns the counters as a gateway publishes them."""
        now_s = self._events.now_s
        while self._recent and self._recent[0][0] < now_s - self._window_s:
            self._recent.popleft()
        window = sorted(latency for _, latency in self._recent)
        oldest_due_s = self._queue.oldest_due_s()
        waited_s = 0.0 if oldest_due_s is None else now_s - (oldest_due_s - self._spec.slo_s)
        return DemandEvent(
            function=self._spec.name,
            gateway=gateway,
            epoch=epoch,
            observed_unix_ns=unix_ns,
            arrived_count=self.arrived_count,
            ok_count=len(self.latencies_s),
            failed_count=self.expired_count,
            refused_count=self.refused_count,
            late_count=self.late_count,
            queued_count=self.queued_count,
            in_flight_count=self.in_flight_count,
            oldest_wait_ms=round(waited_s * 1e3),
            window_count=len(window),
            p50_ms=_percentile_ms(window, 0.50),
            p95_ms=_percentile_ms(window, 0.95),
            p99_ms=_percentile_ms(window, 0.99),
            arrived_items_count=self.arrived_count * self._rows,
            queued_items_count=self._queue.rows,
        )

    def _open_routes(self) -> list[Route]:
        return [route for route in self._routes.values() if not route.draining]

    def _start(self, route: Route) -> None:
        """Runs an instance's next batch; a quota changed meanwhile counts from the next batch on."""
        batch = route.batches[0]
        now_s = self._events.now_s
        for request in batch:
            request.started_s = now_s
        route.busy_until_s = now_s + route.latency_s(sum(request.rows for request in batch))
        self._events.at(route.busy_until_s, lambda: self._finish(route))

    def _finish(self, route: Route) -> None:
        now_s = self._events.now_s
        for request in route.batches.popleft():
            latency_s = now_s - request.arrived_s
            self.latencies_s.append(latency_s)
            self.waits_s.append(request.started_s - request.arrived_s)
            self.late_count += latency_s > self._spec.slo_s
            self._recent.append((now_s, latency_s))
        if route.batches:
            self._start(route)
        elif route.draining and route.on_empty is not None:
            self._routes.pop(route.instance, None)
            route.on_empty()
            return
        self.dispatch()


def _percentile_ms(ascending: Sequence[float], part: float) -> int | None:
    if not ascending:
        return None
    return round(ascending[max(1, math.ceil(part * len(ascending))) - 1] * 1e3)
