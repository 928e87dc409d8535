"""`python -m hasgpu_scheduler`: runs a scheduler until it is told to stop."""

from __future__ import annotations

import logging

from hasgpu.scheduler.v1 import scheduler_pb2_grpc
from hasgpu_runtime.leader import LeaderLease
from hasgpu_runtime.loop import ReconcileLoop
from hasgpu_runtime.service import Service, run_service

from hasgpu_scheduler.adapters.plan_store import PlanStore
from hasgpu_scheduler.app import SchedulerApp
from hasgpu_scheduler.core import SchedulerCore
from hasgpu_scheduler.metering import LOOP, watch_scheduler
from hasgpu_scheduler.server import SchedulerServicer
from hasgpu_scheduler.settings import SchedulerSettings, load

LEASE = "scheduler"
PAUSE_S = 0.02
"""At least this long between two passes, however often one is asked for."""

_log = logging.getLogger(__name__)


async def body(service: Service[SchedulerSettings]) -> None:
    """Plans and serves until told to stop."""
    settings = service.settings
    loop = ReconcileLoop(service.clock, settings.period_s, name=LOOP, pause_s=PAUSE_S, metrics=service.metrics)

    def leadership_changed() -> None:
        app.leadership_changed()

    async with LeaderLease.keep(
        service.store, LEASE, owner=service.instance, clock=service.clock, on_change=leadership_changed
    ) as lease:
        app = SchedulerApp(
            bus=service.bus,
            plans=PlanStore(service.store),
            clock=service.clock,
            core=SchedulerCore(
                node_timeout_s=settings.node_timeout_s, silence_s=settings.silence_s, moving=settings.moving
            ),
            telemetry=service.telemetry,
            fence=lambda: lease.fence,
            fenced=lease.lost,
            poke=loop.poke,
        )
        watch_scheduler(service.metrics, app)
        server = service.create_server()
        scheduler_pb2_grpc.add_SchedulerServiceServicer_to_server(SchedulerServicer(app), server)
        await server.start()
        _log.info("scheduler listens on %s", server.address)

        async def ready() -> None:
            await app.wait_caught_up()
            await server.set_serving(True)

        service.group.create_task(app.watch(), name="watch")
        service.group.create_task(app.take_commands(), name="commands")
        service.group.create_task(ready(), name="ready")
        service.group.create_task(loop.run(app.run_pass), name="reconcile")
        await service.stop.wait()
        await server.stop()


if __name__ == "__main__":
    run_service("scheduler", load, body)
