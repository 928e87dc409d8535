"""SchedulerService over real gRPC: the cluster and what-if placement."""

from __future__ import annotations

from contextlib import asynccontextmanager

import grpc
import grpc.aio
import pytest
from hasgpu.common.v1 import common_pb2
from hasgpu.scheduler.v1 import scheduler_pb2, scheduler_pb2_grpc
from hasgpu_core.clock import ManualClock
from hasgpu_core.ports import Fence
from hasgpu_runtime import wire
from hasgpu_runtime.bus.memory import MemoryBus
from hasgpu_runtime.rpc import create_server, open_channel
from hasgpu_runtime.store.memory import MemoryStore
from hasgpu_runtime.telemetry import Telemetry
from hasgpu_scheduler.adapters.plan_store import PlanStore
from hasgpu_scheduler.app import SchedulerApp
from hasgpu_scheduler.core import SchedulerCore
from hasgpu_scheduler.server import SchedulerServicer


@asynccontextmanager
async def serving(*, leading: bool = True):
    clock = ManualClock(10.0)
    app = SchedulerApp(
        bus=MemoryBus(),
        plans=PlanStore(MemoryStore(clock)),
        clock=clock,
        core=SchedulerCore(node_timeout_s=6.0, silence_s=3.0),
        telemetry=Telemetry(),
        fence=lambda: Fence("scheduler", 1) if leading else None,
        fenced=lambda: None,
        poke=lambda: None,
    )
    app.core.heard(clock.now_s())
    server = create_server(address="127.0.0.1:0")
    scheduler_pb2_grpc.add_SchedulerServiceServicer_to_server(SchedulerServicer(app), server)
    await server.start()
    try:
        async with open_channel(server.address) as channel:
            yield app, scheduler_pb2_grpc.SchedulerServiceStub(channel)
    finally:
        await server.stop()


def decide(app: SchedulerApp) -> None:
    for plan in app.core.decide(app.clock.now_s(), fencing_token=1).plans:
        app.core.commit(plan)


async def test_the_cluster_shows_nodes_devices_rows_and_what_is_unplaced(make):
    async with serving() as (app, stub):
        app.core.on_node(make.node("a"), 9.5)
        app.core.accept(make.wanted("f", 1, (0, make.allocation(600)), (1, make.allocation(500))), 10.0)
        decide(app)
        answer = await stub.GetCluster(scheduler_pb2.GetClusterRequest())
        assert answer.leader
        (node,) = answer.nodes
        assert (node.name, node.alive, node.heartbeat_age_ms, node.draining) == ("a", True, 500, False)
        (device,) = node.devices
        assert wire.device_info_from_proto(device.device) == make.device("a")
        assert [(row.index, row.sm_pct, row.used_permille) for row in device.rows] == [(0, 100, 600)]
        assert [item.instance for item in device.instances] == ["f-0"]
        assert [(u.function, u.instance.instance) for u in answer.unplaced] == [("f", "f-1")]
        assert "400 ‰" in answer.unplaced[0].reason


async def test_what_if_says_where_or_what_is_free(make):
    async with serving() as (app, stub):
        app.core.on_node(make.node("a"), 10.0)
        app.core.accept(make.wanted("f", 1, (0, make.allocation(600))), 10.0)
        decide(app)
        fits = await stub.WhatIf(
            scheduler_pb2.WhatIfRequest(function="g", allocation=wire.allocation_to_proto(make.allocation(400)))
        )
        assert (fits.fits, fits.node, fits.gpu, fits.row) == (True, "a", "cpu0", 0)
        full = await stub.WhatIf(
            scheduler_pb2.WhatIfRequest(function="g", allocation=wire.allocation_to_proto(make.allocation(500)))
        )
        assert not full.fits
        assert "400 ‰" in full.reason


@pytest.mark.parametrize(
    "request_",
    [
        scheduler_pb2.WhatIfRequest(function="f"),
        scheduler_pb2.WhatIfRequest(
            allocation=common_pb2.Allocation(sm_pct=101, request_permille=100, limit_permille=100)
        ),
    ],
)
async def test_an_allocation_that_cannot_be_is_refused(request_):
    async with serving() as (_, stub):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.WhatIf(request_)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_who_does_not_lead_shows_what_was_announced(make):
    async with serving(leading=False) as (app, stub):
        app.core.on_node(make.node("a"), 10.0)
        app.core.on_announced("a", make.plan("a", 4, make.planned("f-0", make.allocation(600))))
        answer = await stub.GetCluster(scheduler_pb2.GetClusterRequest())
        assert not answer.leader
        assert [i.instance for d in answer.nodes[0].devices for i in d.instances] == ["f-0"]
        assert answer.nodes[0].plan_revision == 4
