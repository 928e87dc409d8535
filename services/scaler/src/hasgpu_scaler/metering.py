"""The scaler's metrics, read from what it holds when somebody asks."""

from __future__ import annotations

import math

from hasgpu_core.ports import Clock
from hasgpu_runtime import metric_catalogue as names
from hasgpu_runtime.metrics import Metrics, Sink

from hasgpu_scaler.app import ScalerApp

LOOP = "scaler"


def watch_scaler(metrics: Metrics, app: ScalerApp, clock: Clock) -> None:
    """Has an app's state read at each collection; of functions only where it leads, so that each is told once."""

    def collect(sink: Sink) -> None:
        sink.put(names.LOOP_LEADING, app.leading, LOOP)
        sink.put(names.LOOP_WAITING, app.leading and bool(app.waiting_for), LOOP)
        if app.leading:
            sink.put(names.SCALING_PAUSED, app.core.paused)
            _ages(sink, app, clock)
            for function in app.core.functions:
                _function(sink, app, function)

    metrics.collect_with(collect)


def _function(sink: Sink, app: ScalerApp, function: str) -> None:
    for (kind, origin), count in app.log.actions_count(function).items():
        sink.put(names.SCALE_ACTIONS, count, function, kind.value, origin)
    record = app.core.records.get(function)
    if record is not None:
        standby_count = sum(instance.standby for instance in record.instances)
        sink.put(names.INSTANCES_DESIRED, len(record.instances) - standby_count, function, "serving")
        sink.put(names.INSTANCES_DESIRED, standby_count, function, "standby")
    last = app.log.last(function)
    if last is None:
        return
    decision = last.decision
    sink.put(names.CAPACITY, decision.capacity_rps, function)
    for spec, rate in (
        (names.DEMAND_RATE, decision.observed_rps),
        (names.DEMAND_PREDICTED, decision.predicted_rps),
        (names.DEMAND_NEEDED, decision.needed_rps),
    ):
        if rate is not None:
            sink.put(spec, rate, function)


def _ages(sink: Sink, app: ScalerApp, clock: Clock) -> None:
    """Of the oldest input that the last pass had; no data at all is not an age."""
    views = [view for function in app.core.functions if (view := app.core.view(function)) is not None]
    demand_s = [view.demand.age_s for view in views if math.isfinite(view.demand.age_s)]
    if demand_s:
        sink.put(names.LOOP_DATA_AGE, max(demand_s), LOOP, "demand")
    computed_unix_ns = [table.computed_unix_ns for view in views for table in view.tables.values()]
    if computed_unix_ns:
        sink.put(names.LOOP_DATA_AGE, (clock.unix_ns() - min(computed_unix_ns)) / 1e9, LOOP, "table")
