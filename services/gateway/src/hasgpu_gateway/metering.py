"""The gateway's metrics: what a request adds to on its way, and what is read when somebody asks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from hasgpu_core.resources import WHOLE_PERMILLE
from hasgpu_runtime import metric_catalogue as names
from hasgpu_runtime.metrics import Metrics, Sink

if TYPE_CHECKING:
    from hasgpu_gateway.lane import Lane


class LaneMetrics:
    """The distributions of one function, bound to it once."""

    __slots__ = ("_batch_items", "_batch_s", "_latency_s", "_prediction", "_slo_ratio")

    def __init__(self, metrics: Metrics, function: str) -> None:
        self._latency_s = metrics.histogram(names.REQUEST_DURATION, function)
        self._slo_ratio = metrics.histogram(names.REQUEST_SLO_RATIO, function)
        self._batch_items = metrics.histogram(names.BATCH_ITEMS, function)
        self._batch_s = metrics.histogram(names.BATCH_DURATION, function)
        self._prediction = metrics.histogram(names.BATCH_PREDICTION, function)

    def answered(self, latency_s: float, *, slo_s: float) -> None:
        """A request was answered."""
        self._latency_s.record(latency_s)
        self._slo_ratio.record(latency_s / slo_s)

    def batch(self, items_count: int, *, took_s: float, predicted_s: float) -> None:
        """A batch was answered; `took_s` 0: the worker did not say, `predicted_s` 0: nothing was known."""
        self._batch_items.record(items_count)
        if took_s > 0:
            self._batch_s.record(took_s)
            if predicted_s > 0:
                self._prediction.record(took_s / predicted_s)


def watch_lanes(metrics: Metrics, lanes: Callable[[], Iterable[Lane]], now_s: Callable[[], float]) -> None:
    """Has all that lanes know anyway read at each collection."""

    def collect(sink: Sink) -> None:
        for lane in lanes():
            _collect(sink, lane, now_s())

    metrics.collect_with(collect)


def _collect(sink: Sink, lane: Lane, now_s: float) -> None:
    function, meter = lane.name, lane.meter
    outcomes = {
        "in_time": meter.ok_count - meter.late_count,
        "late": meter.late_count,
        "expired": meter.expired_count,
        "failed": meter.failed_count - meter.expired_count,
        "refused": meter.refused_count,
    }
    for outcome, count in outcomes.items():
        sink.put(names.REQUESTS, count, function, outcome)
    sink.put(names.REQUEST_ITEMS, meter.arrived_items_count, function)
    sink.put(names.FUNCTION_SLO, lane.event.spec.slo_s, function)
    sink.put(names.FUNCTION_SLO_TARGET, lane.event.spec.slo_permille / WHOLE_PERMILLE, function)
    sink.put(names.QUEUE_LENGTH, lane.queued_count, function)
    sink.put(names.QUEUE_ITEMS, lane.queued_items_count, function)
    sink.put(names.QUEUE_OLDEST_WAIT, lane.oldest_wait_s(now_s), function)
    sink.put(names.IN_FLIGHT, lane.in_flight_count, function)
    sink.put(names.ROUTES_OPEN, lane.open_routes_count, function)
