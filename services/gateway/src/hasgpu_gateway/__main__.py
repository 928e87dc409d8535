"""`python -m hasgpu_gateway`: runs a gateway until it is told to stop."""

from __future__ import annotations

from hasgpu_runtime.service import Service, run_service

from hasgpu_gateway.adapters.memory import keep_freed_memory
from hasgpu_gateway.app import Gateway, World
from hasgpu_gateway.settings import DEFAULT_LISTEN, GatewaySettings, load


async def run(service: Service[GatewaySettings]) -> None:
    """Serves until the process is told to stop."""
    keep_freed_memory()
    world = World(
        bus=service.bus,
        objects=service.objects,
        store=service.store,
        clock=service.clock,
        telemetry=service.telemetry,
        metrics=service.metrics,
        looks=service.stream_looks,
    )
    server = service.create_server(max_message_bytes=service.settings.max_message_bytes)
    gateway = Gateway(service.settings, world, server=server, group=service.group)
    await gateway.start()
    await service.stop.wait()
    await gateway.stop()


if __name__ == "__main__":
    run_service("gateway", load, run, listen=DEFAULT_LISTEN)
