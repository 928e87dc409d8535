"""rapp's metrics, read from what it holds when somebody asks."""

from __future__ import annotations

from hasgpu_core.ports import Clock
from hasgpu_runtime import metric_catalogue as names
from hasgpu_runtime.metrics import Metrics, Sink

from hasgpu_rapp.app import RappApp


def watch_rapp(metrics: Metrics, app: RappApp, clock: Clock) -> None:
    """Has an app's state read at each collection."""

    def collect(sink: Sink) -> None:
        sink.put(names.PROFILES_RUNNING, sum(not job.failed for job in app.profiling.jobs.values()))
        for (function, device_model), correction in app.predictions.corrections.items():
            pair = function, device_model
            sink.put(names.PREDICTION_CORRECTION, correction.factors.device, *pair, "device")
            sink.put(names.PREDICTION_CORRECTION, correction.factors.run, *pair, "run")
            sink.put(names.PREDICTION_DRIFT, bool(correction.drift), *pair)
            sink.put(names.PREDICTION_OBSERVED, correction.observed_count, *pair)
        devices = app.world.device_models()
        now_unix_ns = clock.unix_ns()
        for (function, device_model), computed_unix_ns in app.table_computed_unix_ns.items():
            event, device = app.world.functions.get(function), devices.get(device_model)
            if event is not None and device is not None:
                basis = app.predictions.recipe(event, device).basis
                sink.put(names.TABLE_AGE, (now_unix_ns - computed_unix_ns) / 1e9, function, device_model, basis)

    metrics.collect_with(collect)
