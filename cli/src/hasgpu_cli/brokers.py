"""The brokers as units of the supervisor: the servers that the packages ship, each on one port and folder for good."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from hasgpu_runtime.brokers import NatsServer, RedisServer

from hasgpu_cli.home import Home
from hasgpu_cli.stack import BROKER_RANK, HOST, Stack, log_path
from hasgpu_cli.supervisor import Unit


@dataclass(slots=True)
class BrokerUnit:
    """One broker; its `start` blocks until it listens."""

    name: str
    address: str
    log: Path
    """A link to the server's own log."""
    server: NatsServer | RedisServer
    kind: str = "broker"
    metrics: str = ""
    rank: int = BROKER_RANK

    def start(self) -> int:
        """Starts the server, waits until it is ready and returns its pid."""
        if not self.log.is_symlink():
            self.log.symlink_to(os.path.relpath(self.server.log, self.log.parent))
        self.server.start()
        return self.server.pid

    def ended(self) -> str | None:
        """Says why it does not run; None while it does."""
        return None if self.server.running else "ended"

    def stop(self) -> None:
        """Asks the server to end; it is killed when it does not."""
        self.server.stop()


def broker_units(home: Home, stack: Stack) -> list[Unit]:
    """The brokers that are not given by URL."""
    units: list[Unit] = []
    for name, url, kind in (("nats", stack.nats_url, NatsServer), ("redis", stack.redis_url, RedisServer)):
        if not url:
            server = kind(home.brokers / name, stack.ports[name])
            units.append(BrokerUnit(name, f"{HOST}:{stack.ports[name]}", log_path(home, name), server))
    return units
