"""What rapp tells of its predictions."""

from __future__ import annotations

from hasgpu_rapp.metering import watch_rapp
from hasgpu_runtime import metric_catalogue as names
from hasgpu_runtime.metrics import Metrics

from .conftest import DEVICE_MODEL, Rig, profiled, spec
from .test_corrections import compared, observe

PAIR = ("fn", DEVICE_MODEL)


def told(metrics: Metrics) -> dict[str, dict[tuple[str, ...], float]]:
    return {spec.name: {point.labels: point.value for point in points} for spec, points in metrics.collect()}


async def test_tables_and_corrections_are_told_and_go_with_their_function(rig: Rig) -> None:
    async with rig.rapp() as app:
        metrics = Metrics()
        watch_rapp(metrics, app, rig.clock)
        assert set(told(metrics)) == {names.PROFILES_RUNNING.name}
        await rig.node()
        await rig.deploy(spec())
        await rig.table(profiled)
        await observe(rig, 80, slower=1.0)
        await compared(rig, 6.0)
        found = told(metrics)
        assert found[names.TABLE_AGE.name][(*PAIR, "profiled")] >= 0
        assert found[names.PREDICTION_OBSERVED.name] == {PAIR: 80}
        assert found[names.PREDICTION_DRIFT.name] == {PAIR: 0}
        assert set(found[names.PREDICTION_CORRECTION.name]) == {(*PAIR, "device"), (*PAIR, "run")}
        app._function_gone("fn")
        assert set(told(metrics)) == {names.PROFILES_RUNNING.name}
