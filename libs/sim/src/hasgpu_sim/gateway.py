"""The simulated front door: one gateway's queues, batches and counters."""

from __future__ import annotations

import math
from array import array
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from hasgpu_core.capacity import CapacityTable
from hasgpu_core.errors import QueueFullError
from hasgpu_core.events import DemandEvent
from hasgpu_core.policy.admission import admit
from hasgpu_core.policy.batching import EdfQueue, Waiting
from hasgpu_core.resources import WHOLE_PERMILLE

from hasgpu_sim.event_queue import EventQueue
from hasgpu_sim.lending import Lender, Run
from hasgpu_sim.physics import Bucket, Gate, Physics
from hasgpu_sim.scenario import FunctionLoad, Timing
from hasgpu_sim.surface import Surface

BATCH_CREDITS = 2
"""Batches that an instance may hold, as the live gateway's LaneSettings."""
SHORT_BATCH_S = 0.005
"""As the live gateway: below it a busy instance takes a further batch into its line though that is not full."""
_KEPT_RECENT = 4_096


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
    row: tuple[str, str, int]
    """(node, gpu, row)"""
    table: CapacityTable
    surface: Surface | None
    """What the device really takes; None: what the table says."""
    sm_pct: int
    quota_permille: int
    limit_permille: int
    latencies_s: Mapping[int, float] = field(default_factory=dict)
    """Predicted, by rows, at the quota in force."""
    batches: deque[list[Request]] = field(default_factory=deque)
    """Handed over and not answered, the running one first."""
    gate: Gate = field(default_factory=lambda: Gate(Bucket(), Bucket()))
    run: Run | None = None
    """The batch that runs, where idle time is lent."""
    busy_until_s: float = 0.0
    draining: bool = False
    gone: bool = False
    """Lost with its node: what it held is lost, too."""
    on_empty: Callable[[], None] | None = None
    """Called when a draining instance has answered its last batch."""

    def after_s(self, now_s: float, rows: int) -> float:
        """In how long a batch handed over now would be done."""
        if self.run is not None:
            return max(0.0, self.run.ends_s - now_s) + self.latencies_s[rows] * len(self.batches)
        busy_s = self.busy_until_s - now_s if self.batches else 0.0
        return self.latencies_s[rows] + (busy_s if busy_s > 0 else 0.0)


class _Latencies(dict[int, float]):
    """Latencies by rows, worked out when first asked for."""

    def __init__(self, latency_s: Callable[[int], float | None]) -> None:
        super().__init__()
        self._latency_s = latency_s

    def __missing__(self, rows: int) -> float:
        value = self._latency_s(rows) or math.inf
        self[rows] = value
        return value


class LatencyCache:
    """The latencies of all shares used, predicted and real; routes of equal shares use the same."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, int, int], _Latencies] = {}

    def of(self, source: CapacityTable | Surface, sm_pct: int, quota_permille: int) -> Mapping[int, float]:
        """Returns seconds by rows."""
        key = (id(source), sm_pct, quota_permille)
        found = self._known.get(key)
        if found is None:
            found = self._known[key] = _Latencies(lambda rows: source.latency_s(rows, sm_pct, quota_permille))
        return found


def _soonest_s(routes: Sequence[Route], now_s: float, rows: int) -> float:
    return min(route.after_s(now_s, rows) for route in routes)


@dataclass(frozen=True, slots=True)
class GatewayHooks:
    """What a gateway tells the world around it."""

    borrowed: Callable[[str, float], None]
    """A batch of a function used GPU-seconds beyond its requests."""
    pressed: Callable[[str], None]
    """Requests of a function wait, or it was asleep when one came."""


class FunctionGateway:
    """The queue of one function, its routes and its counters."""

    def __init__(
        self,
        load: FunctionLoad,
        events: EventQueue,
        *,
        timing: Timing,
        physics: Physics,
        cache: LatencyCache,
        hooks: GatewayHooks,
        rows_busy: dict[tuple[str, str, int], int],
        lender: Lender | None = None,
    ) -> None:
        spec = load.spec
        self._spec = spec
        self._slo_s = spec.slo_s
        self._timeout_s = spec.timeout_ms / 1e3
        self._rows = load.rows
        self._events = events
        self._window_s = timing.window_s
        self._transport_s = timing.transport_s
        self._physics = physics
        self._cache = cache
        self._hooks = hooks
        self._rows_busy = rows_busy
        self._lender = lender
        self._queue: EdfQueue[Request] = EdfQueue(max_count=spec.max_queue)
        self._routes: dict[str, Route] = {}
        self._open: list[Route] = []
        self._capacity_rps: float | None = None
        self._own_s: float | None = None
        self._quick_s = math.inf
        self._recent: deque[tuple[float, float]] = deque()
        self._sequence = 0
        self._at_workers = 0
        self.arrived_count = 0
        self.refused_count = 0
        self.expired_count = 0
        self.late_count = 0
        self.latencies_s = array("d")
        self.waits_s = array("d")
        self.violated_s = array("d")
        """Arrival times of requests answered late, refused or lost, as that became known."""

    @property
    def in_flight_count(self) -> int:
        """Requests handed to instances and not answered."""
        return sum(len(batch) for route in self._routes.values() for batch in route.batches)

    @property
    def queued_count(self) -> int:
        """Requests waiting here."""
        return len(self._queue)

    @property
    def ready(self) -> bool:
        """Whether an instance takes requests."""
        return bool(self._open)

    def arrive(self) -> None:
        """Takes or refuses a request."""
        now_s = self._events.now_s
        self.arrived_count += 1
        self._sequence += 1
        if not len(self._queue) and (route := self._idle_route(now_s)) is not None:
            # A lone request before an idle instance that answers in time: the queue would give just this batch.
            self._hand_over(route, [Request(now_s, self._rows)])
            return
        deadline_s = now_s + self._timeout_s
        refusal = admit(
            now_s=now_s,
            deadline_s=deadline_s,
            rows=self._rows,
            queued_rows=self._queue.rows + self._at_workers,
            capacity_rps=self._capacity_rps,
            batch_latency_s=self._own_s,
        )
        if refusal is not None:
            self.refused_count += 1
            self.violated_s.append(now_s)
            return
        item = Waiting(Request(now_s, self._rows), self._rows, None, now_s + self._slo_s, deadline_s, self._sequence)
        try:
            self._queue.push(item)
        except QueueFullError:
            self.refused_count += 1
            self.violated_s.append(now_s)
            return
        self.dispatch()
        if len(self._queue):
            self._hooks.pressed(self._spec.name)

    def set_route(self, route: Route) -> None:
        """An instance became ready."""
        self._routes[route.instance] = route
        self.reshare(route)
        self._queue.reconsider()
        self.dispatch()

    def reshare(self, route: Route) -> None:
        """A route's share is new."""
        # Where idle time is lent, a batch is expected to get it: the live gateway learns the same from its answers.
        lent = self._lender is not None or (self._physics is Physics.DEVICE_TIME and route.surface is not None)
        quota_permille = route.limit_permille if lent else route.quota_permille
        route.latencies_s = self._cache.of(route.table, route.sm_pct, quota_permille)
        if self._lender is not None and route.run is not None:
            self._lender.reshare(route.row, route.run, route.quota_permille, route.limit_permille)
        self._reopen()

    def route(self, instance: str) -> Route | None:
        """Returns a route by its instance."""
        return self._routes.get(instance)

    def drain(self, instance: str, on_empty: Callable[[], None]) -> None:
        """Sends nothing more to an instance and calls back when it has answered what it has."""
        route = self._routes.get(instance)
        if route is None or not route.batches:
            self._routes.pop(instance, None)
            self._reopen()
            on_empty()
            return
        route.draining = True
        route.on_empty = on_empty
        self._reopen()

    def move(self, instance: str, on_empty: Callable[[], None]) -> str:
        """Lets an instance's old place answer what it has under a name of its own, and calls back then.

        The caller sets a route to the new place first thing after this. Returns that name.
        """
        old = f"{instance}~"
        route = self._routes.pop(instance, None)
        if route is not None:
            route.instance = old
            self._routes[old] = route
        self.drain(old, on_empty)
        return old

    def undrain(self, route: Route) -> None:
        """An instance that was being parked becomes active again."""
        route.draining = False
        route.on_empty = None
        self._reopen()
        self.dispatch()

    def lose(self, instance: str) -> None:
        """An instance is gone with its node: what it had is tried once more elsewhere, within its deadline."""
        route = self._routes.pop(instance, None)
        if route is None:
            return
        route.gone = True
        if self._lender is not None and route.run is not None:
            self._lender.drop(route.row, route.run)
        if route.batches:
            self._rows_busy[route.row] -= 1
        self._reopen()
        for request in [request for batch in route.batches for request in batch]:
            self._at_workers -= request.rows
            self._sequence += 1
            due_s = request.arrived_s + self._slo_s
            deadline_s = request.arrived_s + self._timeout_s
            self._queue.push(Waiting(request, request.rows, None, due_s, deadline_s, self._sequence, retried=True))
        self.dispatch()

    def dispatch(self) -> None:
        """Hands batches to instances with a free credit, the one that ends first first; as the live gateway does."""
        if not len(self._queue):
            return
        now_s, max_rows = self._events.now_s, self._spec.max_batch
        for waiting in self._queue.expired(now_s):
            self.expired_count += 1
            self.violated_s.append(waiting.request.arrived_s)
        while len(self._queue):
            routes, queued_rows = self._open, self._queue.rows
            free = [route for route in routes if self._has_credit(route, queued_rows)]
            if not free:
                return
            route = min(free, key=lambda r: (r.after_s(now_s, 1), len(r.batches), -r.quota_permille, r.instance))
            batch = self._queue.form_batch(
                now_s,
                max_rows=max_rows,
                latency_s=partial(route.after_s, now_s),
                soonest_s=None if len(routes) == 1 else partial(_soonest_s, routes, now_s),
            )
            if not batch:
                return
            self._hand_over(route, [waiting.request for waiting in batch])

    def report(self, gateway: str, epoch: str, unix_ns: int) -> DemandEvent:
        """Returns the counters as a gateway publishes them."""
        now_s = self._events.now_s
        while self._recent and self._recent[0][0] < now_s - self._window_s:
            self._recent.popleft()
        window = sorted(latency for _, latency in self._recent)
        oldest_due_s = self._queue.oldest_due_s()
        waited_s = 0.0 if oldest_due_s is None else now_s - (oldest_due_s - self._slo_s)
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

    def _idle_route(self, now_s: float) -> Route | None:
        """The idle instance that a lone request goes to, where it will be in time and is sure to be admitted."""
        if self._quick_s > self._timeout_s:
            return None
        best: Route | None = None
        best_s = self._slo_s
        for route in self._open:
            if route.batches:
                continue
            took_s = route.latencies_s[self._rows]
            if took_s < best_s or (took_s == best_s and best is None):
                best, best_s = route, took_s
        return best

    def _has_credit(self, route: Route, queued_rows: int) -> bool:
        """As the live gateway's routes: a busy instance takes more only where no larger batch is missed by it."""
        count = len(route.batches)
        if count == 0:
            return True
        if count >= BATCH_CREDITS:
            return False
        return queued_rows >= self._spec.max_batch or route.latencies_s[1] < SHORT_BATCH_S

    def _reopen(self) -> None:
        """Works out what depends on the set of open routes."""
        max_batch = self._spec.max_batch
        self._open = routes = [route for route in self._routes.values() if not route.draining]
        self._capacity_rps = sum(max_batch / route.latencies_s[max_batch] for route in routes) or None
        self._own_s = min((route.latencies_s[self._rows] for route in routes), default=None)
        self._quick_s = math.inf
        if self._capacity_rps and self._own_s is not None:
            # With at most so much at the instances a request is admitted for certain.
            most_rows = BATCH_CREDITS * max_batch * len(routes)
            self._quick_s = most_rows / self._capacity_rps + max(self._own_s, self._rows / self._capacity_rps)

    def _hand_over(self, route: Route, batch: list[Request]) -> None:
        self._at_workers += len(batch) * self._rows
        route.batches.append(batch)
        if len(route.batches) == 1:
            self._rows_busy[route.row] = self._rows_busy.get(route.row, 0) + 1
            self._start(route)
        else:
            route.busy_until_s += route.latencies_s[len(batch) * self._rows]

    def _start(self, route: Route) -> None:
        """Runs an instance's next batch; a quota changed meanwhile counts from the next batch on."""
        batch = route.batches[0]
        now_s = self._events.now_s
        for request in batch:
            request.started_s = now_s
        rows = len(batch) * self._rows
        if self._lender is not None:
            source, sm_pct = route.surface or route.table, route.sm_pct
            route.run = Run(
                self._spec.name,
                sm_pct,
                route.quota_permille,
                route.limit_permille,
                lambda quota_permille: self._cache.of(source, sm_pct, quota_permille)[rows],
                partial(self._done, route),
            )
            self._lender.start(route.row, route.run)
            return
        took_s = self._took_s(route, now_s, rows)
        route.busy_until_s = now_s + took_s
        if len(route.batches) > 1:
            route.busy_until_s += sum(route.latencies_s[len(later) * self._rows] for later in list(route.batches)[1:])
        self._events.at(now_s + took_s, partial(self._done, route))

    def _took_s(self, route: Route, now_s: float, rows: int) -> float:
        """What the device takes."""
        if self._physics is Physics.TABLE or route.surface is None:
            source = route.surface or route.table
            return self._cache.of(source, route.sm_pct, route.quota_permille)[rows]
        # The gate lends what is idle to all who want it, in turn: of a row with n busy instances each gets about 1 / n.
        busy_count = max(1, self._rows_busy[route.row])
        device_s = route.surface.device_s(rows, route.sm_pct)
        host_s = max(0.0, self._cache.of(route.surface, route.sm_pct, WHOLE_PERMILLE)[rows] - device_s)
        part_permille = WHOLE_PERMILLE // busy_count
        took_s, borrowed_s = route.gate.run(
            now_s,
            device_s,
            request_permille=route.quota_permille,
            limit_permille=max(route.quota_permille, min(route.limit_permille, part_permille)),
            alone=busy_count == 1,
        )
        if borrowed_s > 0:
            self._hooks.borrowed(self._spec.name, borrowed_s * route.sm_pct / 100)
        return took_s + host_s

    def _done(self, route: Route) -> None:
        """The device has run a batch; its answer is on the way."""
        if self._transport_s > 0:
            self._events.after(self._transport_s, partial(self._finish, route))
        else:
            self._finish(route)

    def _finish(self, route: Route) -> None:
        if route.gone:
            return
        route.run = None
        now_s, slo_s = self._events.now_s, self._slo_s
        batch = route.batches.popleft()
        self._at_workers -= len(batch) * self._rows
        for request in batch:
            latency_s = now_s - request.arrived_s
            self.latencies_s.append(latency_s)
            self.waits_s.append(request.started_s - request.arrived_s)
            if latency_s > slo_s:
                self.late_count += 1
                self.violated_s.append(request.arrived_s)
            self._recent.append((now_s, latency_s))
        if len(self._recent) > _KEPT_RECENT:
            while self._recent[0][0] < now_s - self._window_s:
                self._recent.popleft()
        if route.batches:
            self._start(route)
        else:
            self._rows_busy[route.row] -= 1
            if route.draining and route.on_empty is not None:
                self._routes.pop(route.instance, None)
                route.on_empty()
                return
        self.dispatch()


def _percentile_ms(ascending: Sequence[float], part: float) -> int | None:
    if not ascending:
        return None
    return round(ascending[max(1, math.ceil(part * len(ascending))) - 1] * 1e3)
