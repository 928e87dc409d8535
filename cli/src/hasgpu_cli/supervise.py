"""The supervisor process: `python -m hasgpu_cli.supervise --home DIR`, started by `hasgpu up`."""

from __future__ import annotations

import argparse
import asyncio
import fcntl
import logging
import os
import signal
import sys
from pathlib import Path

from hasgpu_core.errors import HasgpuError

from hasgpu_cli.brokers import broker_units
from hasgpu_cli.home import Home
from hasgpu_cli.stack import HOST, Stack, read_stack, service_units
from hasgpu_cli.supervisor import Supervisor

logger = logging.getLogger(__name__)


def main() -> int:
    """Runs the stack of a home until SIGTERM or SIGINT; returns 3 when another supervisor has the home."""
    parser = argparse.ArgumentParser(prog="hasgpu-supervise")
    parser.add_argument("--home", required=True, type=Path)
    home = Home(parser.parse_args().home.resolve())
    logging.basicConfig(
        level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s supervisor: %(message)s"
    )
    lock = os.open(home.path / "supervisor.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        logger.error("another supervisor runs in %s", home.path)
        return 3
    os.environ["HASGPU_HOME"] = str(home.path)  # for the brokers, which inherit it and are found by it
    try:
        asyncio.run(_run(home, read_stack(home)))
    except (HasgpuError, OSError) as error:
        logger.error("%s", error)
        return 1
    return 0


async def _run(home: Home, stack: Stack) -> None:
    nats_url = stack.nats_url or f"nats://{HOST}:{stack.ports['nats']}"
    redis_url = stack.redis_url or f"redis://{HOST}:{stack.ports['redis']}/0"
    units = [*broker_units(home, stack), *service_units(home, stack, nats_url=nats_url, redis_url=redis_url)]
    supervisor = Supervisor(home, units, nats_url=nats_url, redis_url=redis_url)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, supervisor.stop)
    await supervisor.run()
    logger.info("all stopped")


if __name__ == "__main__":
    sys.exit(main())
