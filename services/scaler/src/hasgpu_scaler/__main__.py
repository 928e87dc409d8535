"""`python -m hasgpu_scaler`: runs a scaler until it is told to stop."""

from __future__ import annotations

import logging

from hasgpu.scaler.v1 import scaler_pb2_grpc
from hasgpu_core.observe import ClusterObserver
from hasgpu_core.policy.choice import make_live_policy
from hasgpu_core.policy.scaling import ScalingPolicy
from hasgpu_runtime.leader import LeaderLease
from hasgpu_runtime.loop import ReconcileLoop
from hasgpu_runtime.service import Service, run_service

from hasgpu_scaler.adapters.desired_store import DesiredStore
from hasgpu_scaler.adapters.recording_files import RecordingFiles
from hasgpu_scaler.app import ScalerApp
from hasgpu_scaler.core import ScalerCore
from hasgpu_scaler.metering import LOOP, watch_scaler
from hasgpu_scaler.recorder import Recorder, RecordingObserver
from hasgpu_scaler.server import ScalerServicer
from hasgpu_scaler.settings import ScalerSettings, load

LEASE = "scaler"
PAUSE_S = 0.02
"""At least this long between two passes, however often one is asked for."""

_log = logging.getLogger(__name__)


async def body(service: Service[ScalerSettings]) -> None:
    """Decides and serves until told to stop."""
    loop = ReconcileLoop(service.clock, service.settings.period_s, name=LOOP, pause_s=PAUSE_S, metrics=service.metrics)
    async with LeaderLease.keep(
        service.store, LEASE, owner=service.instance, clock=service.clock, on_change=loop.poke
    ) as lease:
        settings = service.settings

        def make_policy(name: str) -> ScalingPolicy:
            return make_live_policy(
                name or settings.policy, idle_to_zero_s=settings.idle_to_zero_s, retire_s=settings.retire_s
            )

        files = None
        if settings.recording_dir is not None:
            files = RecordingFiles(settings.recording_dir, settings.recording_bytes)
        recorder = Recorder(files, service.clock) if files is not None else None
        observer = RecordingObserver(recorder) if recorder is not None else ClusterObserver()
        app = ScalerApp(
            bus=service.bus,
            desired=DesiredStore(service.store),
            clock=service.clock,
            core=ScalerCore(policy=make_policy(""), observer=observer, clock=service.clock, recorder=recorder),
            make_policy=make_policy,
            recordings=files,
            telemetry=service.telemetry,
            fence=lambda: lease.fence,
            fenced=lease.lost,
            poke=loop.poke,
        )
        watch_scaler(service.metrics, app, service.clock)
        server = service.create_server()
        scaler_pb2_grpc.add_ScalerServiceServicer_to_server(ScalerServicer(app), server)
        await server.start()
        _log.info("scaler listens on %s", server.address)

        async def ready() -> None:
            await app.wait_caught_up()
            await server.set_serving(True)

        service.group.create_task(app.watch(), name="watch")
        service.group.create_task(app.listen(), name="listen")
        service.group.create_task(ready(), name="ready")
        service.group.create_task(loop.run(app.run_pass), name="reconcile")
        await service.stop.wait()
        await server.stop()


if __name__ == "__main__":
    run_service("scaler", load, body)
