"""Demand of every function over all gateways, from their cumulative counters."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from hasgpu_core.cluster import DemandView
from hasgpu_core.errors import InvalidError
from hasgpu_core.events import DemandEvent

RATE_WINDOW_S = 2.0
"""The arrival rate is taken over this long: short enough to see a step, long enough to count a few requests."""
SILENT_AFTER_S = 5.0
"""A gateway that has not reported for this long leaves the sum."""


class _Sample(NamedTuple):
    """What had arrived by a time."""

    observed_s: float
    items_count: int
    requests_count: int


@dataclass(slots=True)
class _Source:
    """One gateway's reports on one function."""

    epoch: str
    newest: DemandEvent
    received_s: float
    items_base_count: int = 0
    requests_base_count: int = 0
    late_base_count: int = 0
    """Arrivals, and late answers, of earlier epochs, so that the totals only grow."""
    samples: deque[_Sample] = field(default_factory=deque)
    """Oldest first: those of the window and the last one before it."""


class DemandTracker:
    """Takes demand events with the time they came in, gives a DemandView a function.

    Rates and queues are in items (rows), as capacity is: a request of four rows is four times the work of one.
    Rates are differences of cumulative counters, so a lost or doubled message does no harm. Refused requests are
    arrivals: they are demand that was not served. A gateway that restarted counts on from where its old epoch ended.
    """

    def __init__(self, *, window_s: float = RATE_WINDOW_S, silent_after_s: float = SILENT_AFTER_S) -> None:
        if not 0 < window_s < silent_after_s:
            raise InvalidError(
                "window_s", expected=f"more than 0 and less than silent_after_s ({silent_after_s})", got=str(window_s)
            )
        self._window_s = window_s
        self._silent_after_s = silent_after_s
        self._sources: dict[str, dict[str, _Source]] = {}

    def observe(self, event: DemandEvent, now_s: float) -> None:
        """Takes one report, received at `now_s`; an older one than the last of the same epoch is left out."""
        sources = self._sources.setdefault(event.function, {})
        source = sources.get(event.gateway)
        if source is not None and now_s - source.received_s > self._silent_after_s:
            source = None  # what it counted while it was silent came at an unknown time
        if source is None:
            source = sources[event.gateway] = _Source(event.epoch, event, now_s)
        elif event.epoch != source.epoch:
            source.items_base_count += _arrived_items_count(source.newest)
            source.requests_base_count += source.newest.arrived_count
            source.late_base_count += source.newest.late_count
            source.epoch = event.epoch
        elif event.observed_unix_ns <= source.newest.observed_unix_ns:
            return
        source.newest = event
        source.received_s = now_s
        observed_s = event.observed_unix_ns / 1e9
        samples = source.samples
        if samples and observed_s <= samples[-1].observed_s:
            samples.clear()  # the gateway's clock was set back
        items_count = source.items_base_count + _arrived_items_count(event)
        samples.append(_Sample(observed_s, items_count, source.requests_base_count + event.arrived_count))
        while len(samples) > 2 and samples[1].observed_s <= observed_s - self._window_s:
            samples.popleft()

    def forget(self, function: str) -> None:
        """Drops a function that went."""
        self._sources.pop(function, None)

    def view(self, function: str, now_s: float) -> DemandView:
        """Returns what the gateways that are not silent see together.

        The rate is None when there is no data: no gateway has reported twice within the time after which it counts as
        silent. The age is infinite when none ever reported.
        """
        sources = self._sources.get(function, {})
        age_s = min((now_s - source.received_s for source in sources.values()), default=math.inf)
        live = [source for source in sources.values() if now_s - source.received_s <= self._silent_after_s]
        rates = [rate for source in live if (rate := _rate_rps(source)) is not None]
        p95s_ms = [
            source.newest.p95_ms for source in live if source.newest.window_count and source.newest.p95_ms is not None
        ]
        return DemandView(
            rate_rps=sum(rates) if rates else None,
            queued_items_count=sum(_queued_items_count(source.newest) for source in live),
            in_flight_count=sum(source.newest.in_flight_count for source in live),
            oldest_wait_s=max((source.newest.oldest_wait_ms for source in live), default=0) / 1e3,
            p95_s=max(p95s_ms) / 1e3 if p95s_ms else None,
            age_s=age_s,
            items_per_request=_items_per_request(live),
            arrived_items_count=sum(source.samples[-1].items_count for source in live) if rates else None,
            late_count=sum(source.late_base_count + source.newest.late_count for source in live) if rates else None,
        )


def _rate_rps(source: _Source) -> float | None:
    """Items a second over the window; None with a single report."""
    if len(source.samples) < 2:
        return None
    start, end = source.samples[0], source.samples[-1]
    return max(0, end.items_count - start.items_count) / (end.observed_s - start.observed_s)


def _items_per_request(sources: Sequence[_Source]) -> float:
    """The mean over the windows; 1 when nothing arrived."""
    spans = [(source.samples[0], source.samples[-1]) for source in sources]
    items_count = sum(end.items_count - start.items_count for start, end in spans)
    requests_count = sum(end.requests_count - start.requests_count for start, end in spans)
    return max(1.0, items_count / requests_count) if requests_count > 0 else 1.0


def _arrived_items_count(event: DemandEvent) -> int:
    """A request has at least one item; a gateway that does not count them tells 0."""
    return max(event.arrived_items_count, event.arrived_count)


def _queued_items_count(event: DemandEvent) -> int:
    return max(event.queued_items_count, event.queued_count)
