"""The scheduler's metrics, read from what it holds when somebody asks."""

from __future__ import annotations

from hasgpu_runtime import metric_catalogue as names
from hasgpu_runtime.metrics import Metrics, Sink

from hasgpu_scheduler.app import SchedulerApp

LOOP = "scheduler"


def watch_scheduler(metrics: Metrics, app: SchedulerApp) -> None:
    """Has an app's state read at each collection; of nodes only where it leads, so that each is told once."""

    def collect(sink: Sink) -> None:
        sink.put(names.LOOP_LEADING, app.leading, LOOP)
        sink.put(names.LOOP_WAITING, app.leading and bool(app.waiting_for), LOOP)
        if app.leading:
            _nodes(sink, app)
            for unplaced in app.core.unplaced:
                sink.put(names.INSTANCES_UNPLACED, 1, unplaced.function)

    metrics.collect_with(collect)


def _nodes(sink: Sink, app: SchedulerApp) -> None:
    ages_s = []
    for name, record in app.core.nodes.items():
        plan = app.core.plans.get(name)
        if plan is not None:
            sink.put(names.PLANS_WRITTEN, plan.revision, name)
        if record.event is None and not record.alive and (plan is None or not plan.instances):
            continue  # it left in order and nothing is missing
        age_s = app.clock.now_s() - record.received_s
        sink.put(names.NODE_ALIVE, record.alive, name)
        sink.put(names.NODE_HEARTBEAT_AGE, age_s, name)
        sink.put(names.NODE_DRAINING, record.event is not None and record.event.draining, name)
        if record.alive:
            ages_s.append(age_s)
    if ages_s:
        sink.put(names.LOOP_DATA_AGE, max(ages_s), LOOP, "node")
