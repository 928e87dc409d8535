"""What the scaler tells of its loop and of functions."""

from __future__ import annotations

from hasgpu_runtime import metric_catalogue as names
from hasgpu_runtime.metrics import Metrics
from hasgpu_scaler.metering import watch_scaler


def told(metrics: Metrics) -> dict[str, dict[tuple[str, ...], float]]:
    return {spec.name: {point.labels: point.value for point in points} for spec, points in metrics.collect()}


async def test_decisions_demand_and_ages_are_told(world) -> None:
    async with world.scaler() as app:
        metrics = Metrics()
        watch_scaler(metrics, app, world.clock)
        await world.ready(app)
        await world.load(app, 20.0, 4.0)
        found = told(metrics)
        assert found[names.LOOP_LEADING.name] == {("scaler",): 1}
        assert found[names.LOOP_WAITING.name] == {("scaler",): 0}
        assert found[names.DEMAND_RATE.name]["f",] > 10
        assert found[names.CAPACITY.name]["f",] > 0
        assert found[names.INSTANCES_DESIRED.name]["f", "serving"] >= 1
        assert found[names.SCALE_ACTIONS.name]["f", "horizontal_up", "policy"] >= 1
        assert 0 <= found[names.LOOP_DATA_AGE.name]["scaler", "demand"] < 1


async def test_one_that_does_not_lead_tells_that_alone(world) -> None:
    async with world.scaler() as app:
        metrics = Metrics()
        watch_scaler(metrics, app, world.clock)
        await world.ready(app)
        app._fence = lambda: None
        await app.run_pass()
        found = told(metrics)
        assert found == {names.LOOP_LEADING.name: {("scaler",): 0}, names.LOOP_WAITING.name: {("scaler",): 0}}


async def test_a_deleted_function_is_not_told_of(world) -> None:
    async with world.scaler() as app:
        metrics = Metrics()
        watch_scaler(metrics, app, world.clock)
        await world.ready(app)
        assert ("f",) in told(metrics)[names.CAPACITY.name]
        app.core.on_function_gone("f", world.clock.now_s())
        assert names.CAPACITY.name not in told(metrics)
