"""The worker process: `run_worker(config)` is its whole life.

`python -m hasgpu_device.worker --config FILE` runs one without a node agent's telemetry.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import signal
import sys
import time
from collections.abc import Sequence

from hasgpu_core.resources import InstanceState

from hasgpu_device.control import ControlBlock
from hasgpu_device.engine import BatchRecord, Observer
from hasgpu_device.errors import ConfigError, ControlBlockError, GateError
from hasgpu_device.gate import RowGate
from hasgpu_device.status import EXIT_DEVICE_FAULT, EXIT_LOAD_FAILED, WorkerStatus
from hasgpu_device.worker_config import WorkerConfig
from hasgpu_device.worker_server import WorkerServer

__all__ = ["BatchRecord", "Observer", "main", "run_worker"]

_EXECUTOR_END_S = 1.0


def run_worker(config: WorkerConfig, observer: Observer | None = None) -> int:
    """Runs a worker until it ends; to be called in the main thread of a process of its own.

    Args:
        config: What to serve, and where.
        observer: Told of every batch that is traced; closed before this returns.

    Returns:
        The exit code: 0 after SIGTERM, SIGINT or when orphaned, 65 when the model could not be loaded, 70 when a batch
        hung, 71 when the device failed. When the executor thread can't be ended (it hangs in the model), or the
        device failed (what clears up its libraries may hang then), the process exits here and now.
    """
    try:
        control = ControlBlock.open(config.control_path)
        RowGate.open(config.gate_path).close()
    except (ControlBlockError, GateError) as error:
        WorkerStatus(os.getpid(), "", InstanceState.FAILED, str(error), time.time_ns()).save(config.status_path)
        return EXIT_LOAD_FAILED

    async def body() -> tuple[int, bool]:
        server = WorkerServer(config, control, pid=os.getpid(), observer=observer)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, server.stop)
        code = await server.serve()
        thread = server.engine.thread
        if code == 0:
            await asyncio.to_thread(thread.join, _EXECUTOR_END_S)
        return code, thread.is_alive()

    code, executor_lives = asyncio.run(body())
    if observer is not None:
        observer.close()
    if executor_lives or code == EXIT_DEVICE_FAULT:
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def main(arguments: Sequence[str] | None = None) -> int:
    """Reads the configuration and runs the worker."""
    parser = argparse.ArgumentParser(prog="hasgpu_device.worker", description="Serve one instance of a function.")
    parser.add_argument("--config", required=True, help="JSON file of a WorkerConfig")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        config = WorkerConfig.load(options.config)
    except ConfigError as error:
        parser.error(str(error))
    return run_worker(config)


if __name__ == "__main__":
    sys.exit(main())
