"""`python -m hasgpu_rapp`: runs rapp until it is told to stop."""

from __future__ import annotations

import logging

from hasgpu.rapp.v1 import rapp_pb2_grpc
from hasgpu_runtime.layout import claim_folder
from hasgpu_runtime.loop import ReconcileLoop
from hasgpu_runtime.service import Service, run_service

from hasgpu_rapp.adapters.agents import AgentProfiler
from hasgpu_rapp.adapters.repository import Repository
from hasgpu_rapp.app import RappApp
from hasgpu_rapp.corrections import CORRECTION_PERIOD_S
from hasgpu_rapp.metering import watch_rapp
from hasgpu_rapp.server import RappServicer
from hasgpu_rapp.settings import RappSettings, load

_log = logging.getLogger(__name__)

STOP_GRACE_S = 1.0


async def body(service: Service[RappSettings]) -> None:
    """Serves and publishes until told to stop."""
    claim_folder(service.settings.state_dir)
    loop = ReconcileLoop(service.clock, CORRECTION_PERIOD_S, name="rapp", pause_s=0.02, metrics=service.metrics)
    app = RappApp(
        bus=service.bus,
        clock=service.clock,
        repository=Repository(service.settings.state_dir / "rapp", service.settings.profile_files),
        measurer=AgentProfiler(service.telemetry),
        tasks=service.group,
        poke=loop.poke,
        training=service.settings.training,
        telemetry=service.telemetry,
    )
    watch_rapp(service.metrics, app, service.clock)
    server = service.create_server()
    rapp_pb2_grpc.add_RappServiceServicer_to_server(RappServicer(app), server)
    await app.load()
    await server.start()
    _log.info("rapp listens on %s and keeps its files in %s", server.address, service.settings.state_dir / "rapp")

    async def follow() -> None:
        await app.listen(caught_up=lambda: server.set_serving(True))

    service.group.create_task(follow(), name="listen")
    service.group.create_task(loop.run(app.reconcile), name="reconcile")
    await service.stop.wait()
    app.profiling.keep_only(set())
    await server.stop(STOP_GRACE_S)
    await app.close()


if __name__ == "__main__":
    run_service("rapp", load, body, needs_store=False)
