"""What the scheduler tells of nodes and of instances without a place."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from hasgpu_core.clock import ManualClock
from hasgpu_runtime import metric_catalogue as names
from hasgpu_runtime.metrics import Metrics
from hasgpu_scheduler.core import SchedulerCore
from hasgpu_scheduler.metering import watch_scheduler


@pytest.fixture
def app() -> Any:
    """What `watch_scheduler` reads of an app, around a real core."""
    clock = ManualClock()
    core = SchedulerCore(node_timeout_s=6.0, silence_s=3.0)
    return SimpleNamespace(core=core, clock=clock, leading=True, waiting_for="")


@pytest.fixture
def metrics(app: Any) -> Metrics:
    metrics = Metrics()
    watch_scheduler(metrics, app)
    return metrics


def told(metrics: Metrics) -> dict[str, dict[tuple[str, ...], float]]:
    return {spec.name: {point.labels: point.value for point in points} for spec, points in metrics.collect()}


def decide(app: Any) -> None:
    for plan in app.core.decide(app.clock.now_s(), fencing_token=1).plans:
        app.core.commit(plan)


def test_a_silent_node_shows_as_lost_and_its_instance_without_a_place(app, metrics, make) -> None:
    app.core.heard(app.clock.now_s())
    app.core.on_node(make.node("a"), app.clock.now_s())
    app.core.accept(make.wanted("f", 1, (0, make.allocation(600))), app.clock.now_s())
    decide(app)
    found = told(metrics)
    assert found[names.NODE_ALIVE.name] == {("a",): 1}
    assert found[names.PLANS_WRITTEN.name] == {("a",): 1}
    assert names.INSTANCES_UNPLACED.name not in found
    for _ in range(7):  # the bus delivers, but nothing of this node
        app.clock.advance(1.0)
        app.core.heard(app.clock.now_s())
    assert told(metrics)[names.NODE_HEARTBEAT_AGE.name] == {("a",): 7.0}
    assert told(metrics)[names.LOOP_DATA_AGE.name] == {("scheduler", "node"): 7.0}
    decide(app)
    found = told(metrics)
    assert found[names.NODE_ALIVE.name] == {("a",): 0}
    assert found[names.INSTANCES_UNPLACED.name] == {("f",): 1}
    assert names.LOOP_DATA_AGE.name not in found, "a lost node's silence is not stale data"


def test_a_node_that_left_in_order_is_not_told_of(app, metrics, make) -> None:
    app.core.on_node(make.node("a"), app.clock.now_s())
    app.core.on_node(make.node("b", draining=True), app.clock.now_s())
    app.core.on_node_gone("a")
    assert told(metrics)[names.NODE_ALIVE.name] == {("b",): 1}
    assert told(metrics)[names.NODE_DRAINING.name] == {("b",): 1}


def test_one_that_does_not_lead_tells_that_alone(app, metrics, make) -> None:
    app.core.on_node(make.node("a"), app.clock.now_s())
    app.leading, app.waiting_for = False, "another one does"
    assert told(metrics) == {
        names.LOOP_LEADING.name: {("scheduler",): 0},
        names.LOOP_WAITING.name: {("scheduler",): 0},
    }
    app.leading = True
    assert told(metrics)[names.LOOP_WAITING.name] == {("scheduler",): 1}
