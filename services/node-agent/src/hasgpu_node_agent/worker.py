"""The worker process: the device layer's worker, with traces. `python -m hasgpu_node_agent.worker --config FILE`."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence

from hasgpu_device.engine import Observer
from hasgpu_device.errors import ConfigError
from hasgpu_device.worker import run_worker
from hasgpu_device.worker_config import WorkerConfig
from hasgpu_runtime.settings import environment


def main(arguments: Sequence[str] | None = None) -> int:
    """Reads the configuration and runs the worker; returns the exit code."""
    parser = argparse.ArgumentParser(prog="hasgpu_node_agent.worker", description="Serve one instance of a function.")
    parser.add_argument("--config", required=True, help="JSON file of a WorkerConfig")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        config = WorkerConfig.load(options.config)
    except ConfigError as error:
        parser.error(str(error))
    return run_worker(config, _observer(config))


def _observer(config: WorkerConfig) -> Observer | None:
    """Returns None unless traces go anywhere; a worker that is not traced does not load what traces need."""
    environ = environment()
    if not any(name.startswith("OTEL_EXPORTER_OTLP_") for name in environ):
        return None
    from hasgpu_runtime.telemetry import setup

    from hasgpu_node_agent.worker_spans import SpanObserver

    device = {
        "hasgpu.function": config.function,
        "hasgpu.gpu": config.gpu,
        "hasgpu.gpu_uuid": config.gpu_uuid,
        "hasgpu.device_model": config.device_model,
        "hasgpu.device_backend": config.backend,
    }
    attributes = {name: value for name, value in device.items() if value}
    telemetry = setup("worker", environ=environ, instance=config.instance, attributes=attributes)
    return SpanObserver(telemetry) if telemetry.enabled else None


if __name__ == "__main__":
    sys.exit(main())
