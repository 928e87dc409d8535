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


def two_nodes(app: SchedulerApp, make) -> None:
    for name in ("a", "b"):
        app.core.on_node(make.node(name), 10.0)
    app.core.accept(make.wanted("f", 1, (0, make.allocation(600, 50))), 10.0)
    app.core.accept(make.wanted("g", 1, (0, make.allocation(700, 50)), (1, make.allocation(700, 50))), 10.0)
    decide(app)


async def test_what_if_many_shows_a_pass_that_is_not_made(make):
    async with serving() as (app, stub):
        two_nodes(app, make)
        before = dict(app.core.plans)
        request = scheduler_pb2.WhatIfManyRequest()
        request.add.add(function="h", allocation=wire.allocation_to_proto(make.allocation(300, 50)), count=3)
        request.add.add(function="f", allocation=wire.allocation_to_proto(make.allocation(900, 100)))
        answer = await stub.WhatIfMany(request)
        assert sorted(item.instance for item in answer.placed) == ["h-0", "h-1", "h-2"]
        assert all(getattr(item, "from") == "" and item.reason for item in answer.placed)
        assert [(u.instance.instance, "no room for SM 100 %" in u.reason) for u in answer.unplaced] == [("f-1", True)]
        assert (answer.gpus_total, answer.gpus_used_before, answer.gpus_used_after) == (2, 2, 2)
        assert answer.gpus_needed_at_least == 2
        assert dict(app.core.plans) == before
        decide(app)
        assert dict(app.core.plans) == before


@pytest.mark.parametrize("field", ["lose_nodes", "lose_gpus"])
async def test_what_the_loss_of_a_node_or_a_gpu_would_mean(make, field):
    async with serving() as (app, stub):
        two_nodes(app, make)
        where = {p.instance: node for node, plan in app.core.plans.items() for p in plan.instances}
        lost = where["f-0"]
        moving = sorted(instance for instance, node in where.items() if node == lost)
        name = lost if field == "lose_nodes" else f"{lost}/cpu0"
        answer = await stub.WhatIfMany(scheduler_pb2.WhatIfManyRequest(**{field: [name]}))
        gone = sorted([*(i.instance for i in answer.placed), *(u.instance.instance for u in answer.unplaced)])
        assert gone == moving
        assert all(getattr(item, "from") == f"{lost}/cpu0" for item in answer.placed)
        assert all("is lost" in u.reason or "is gone" in u.reason for u in answer.unplaced)
        assert list(answer.interrupted_functions) == ["f"], "g has another instance on the other node"
        assert answer.gpus_used_after == 1


async def test_a_function_that_goes_frees_its_room(make):
    async with serving() as (app, stub):
        two_nodes(app, make)
        answer = await stub.WhatIfMany(scheduler_pb2.WhatIfManyRequest(drop_functions=["f", "g"]))
        assert (answer.gpus_used_before, answer.gpus_used_after, answer.gpus_needed_at_least) == (2, 0, 0)


@pytest.mark.parametrize(
    ("request_", "code", "words"),
    [
        (scheduler_pb2.WhatIfManyRequest(), "INVALID_ARGUMENT", "got nothing"),
        (scheduler_pb2.WhatIfManyRequest(lose_nodes=["z"]), "NOT_FOUND", "there are: a, b"),
        (scheduler_pb2.WhatIfManyRequest(lose_gpus=["a"]), "INVALID_ARGUMENT", "node/gpu"),
        (scheduler_pb2.WhatIfManyRequest(lose_gpus=["a/gpu7"]), "NOT_FOUND", "there are: cpu0"),
        (scheduler_pb2.WhatIfManyRequest(drop_functions=["z"]), "NOT_FOUND", "there are: f, g"),
        (scheduler_pb2.WhatIfManyRequest(add=[{"function": "h"}]), "INVALID_ARGUMENT", "allocation"),
        (
            scheduler_pb2.WhatIfManyRequest(
                add=[{"function": "No!", "allocation": {"sm_pct": 5, "request_permille": 5, "limit_permille": 5}}]
            ),
            "INVALID_ARGUMENT",
            "a-z",
        ),
        (
            scheduler_pb2.WhatIfManyRequest(
                add=[{"function": "h", "allocation": {"sm_pct": 5, "request_permille": 0, "limit_permille": 5}}]
            ),
            "INVALID_ARGUMENT",
            "request_permille: expected 1..1000, got 0",
        ),
        (
            scheduler_pb2.WhatIfManyRequest(
                add=[
                    {
                        "function": "h",
                        "allocation": {"sm_pct": 5, "request_permille": 5, "limit_permille": 5},
                        "count": 20_001,
                    }
                ]
            ),
            "INVALID_ARGUMENT",
            "0..20000",
        ),
    ],
)
async def test_what_cannot_be_supposed_is_refused(make, request_, code, words):
    async with serving() as (app, stub):
        two_nodes(app, make)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.WhatIfMany(request_)
        assert caught.value.code() is grpc.StatusCode[code]
        assert words in (caught.value.details() or "")


async def test_without_gpus_all_waits_and_the_reason_says_so(make):
    async with serving() as (_, stub):
        request = scheduler_pb2.WhatIfManyRequest()
        request.add.add(function="h", allocation=wire.allocation_to_proto(make.allocation(300, 50)))
        answer = await stub.WhatIfMany(request)
        assert [u.reason for u in answer.unplaced] == ["no room for SM 50 %, 300 ‰ and 100 MiB: no device is known"]
        assert (answer.gpus_total, answer.gpus_needed_at_least) == (0, 0)


async def test_what_can_never_fit_in_memory_says_so(make):
    async with serving() as (app, stub):
        app.core.on_node(make.node("a"), 10.0)
        app.core.accept(make.wanted("f", 1, (0, make.allocation(100, 25, 5000))), 10.0)
        decide(app)
        answer = await stub.GetCluster(scheduler_pb2.GetClusterRequest())
        (unplaced,) = answer.unplaced
        assert "no device can ever hold 5000 MiB: the largest that gives SM 25 % has 4096 MiB in all" in unplaced.reason


async def test_scheduling_events_are_remembered_by_the_leader(make):
    async with serving() as (app, stub):
        app.core.on_node(make.node("a"), 10.0)
        app.core.accept(make.wanted("f", 1, (0, make.allocation(600)), (1, make.allocation(500))), 10.0)
        for happening in app.core.decide(10.0, fencing_token=1).happenings:
            app.core.happenings.append((5, happening))
        answer = await stub.GetSchedulingEvents(scheduler_pb2.GetSchedulingEventsRequest())
        assert [(e.kind, e.instance) for e in answer.events] == [("placed", "f-0"), ("unplaced", "f-1")]
        assert "new row 0 on a/cpu0" in answer.events[0].reason
        answer = await stub.GetSchedulingEvents(scheduler_pb2.GetSchedulingEventsRequest(limit=1))
        assert [e.kind for e in answer.events] == ["unplaced"]
