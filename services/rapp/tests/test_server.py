"""RappService over gRPC."""

from __future__ import annotations

from collections.abc import AsyncIterator

import grpc
import pytest
from hasgpu.node_agent.v1 import node_agent_pb2
from hasgpu.rapp.v1 import rapp_pb2, rapp_pb2_grpc
from hasgpu_rapp.server import RappServicer
from hasgpu_runtime.rpc import create_server, open_channel

from .conftest import DEVICE_MODEL, RUNGS, Rig, profiled, spec


@pytest.fixture
async def stub(rig: Rig) -> AsyncIterator[rapp_pb2_grpc.RappServiceAsyncStub]:
    async with rig.rapp() as app:
        server = create_server(address="127.0.0.1:0")
        rapp_pb2_grpc.add_RappServiceServicer_to_server(RappServicer(app), server)
        await server.start()
        async with open_channel(server.address) as channel:
            await rig.node()
            await rig.deploy(spec())
            await rig.table(profiled)
            yield rapp_pb2_grpc.RappServiceStub(channel)
        await server.stop(None)


def configuration(batch: int, sm_pct: int, quota_permille: int) -> rapp_pb2.Configuration:
    return rapp_pb2.Configuration(batch=batch, sm_pct=sm_pct, quota_permille=quota_permille)


async def test_predict_agrees_with_the_surface(stub: rapp_pb2_grpc.RappServiceAsyncStub) -> None:
    asked = [configuration(8, 25, 100), configuration(1, 100, 1000)]
    answer = await stub.Predict(
        rapp_pb2.PredictRequest(function="fn", device_model=DEVICE_MODEL, configurations=asked), timeout=10
    )
    assert (answer.basis, answer.version) == ("profiled", 1)
    surface = await stub.PredictSurface(
        rapp_pb2.PredictSurfaceRequest(
            function="fn", device_model=DEVICE_MODEL, batches=[1, 8], sm_pcts=[25, 100], quotas_permille=[100, 1000]
        ),
        timeout=10,
    )
    assert len(surface.points) == 8
    assert surface.slo_ms == 200
    by_place = {(p.batch, p.sm_pct, p.quota_permille): p.latency_us for p in surface.points}
    assert [round(ns / 1e3) for ns in answer.latencies_ns] == [by_place[8, 25, 100], by_place[1, 100, 1000]]
    usual = await stub.PredictSurface(
        rapp_pb2.PredictSurfaceRequest(function="fn", device_model=DEVICE_MODEL), timeout=10
    )
    assert len(usual.points) == 4 * 4 * 21


@pytest.mark.parametrize(
    ("function", "device_model", "asked", "code", "text"),
    [
        ("none", DEVICE_MODEL, configuration(1, 1, 1), grpc.StatusCode.NOT_FOUND, "none"),
        ("fn", "abacus", configuration(1, 1, 1), grpc.StatusCode.NOT_FOUND, "abacus"),
        ("fn", DEVICE_MODEL, configuration(9, 50, 500), grpc.StatusCode.INVALID_ARGUMENT, "batch: expected 1..8"),
        ("fn", DEVICE_MODEL, configuration(1, 0, 500), grpc.StatusCode.INVALID_ARGUMENT, "sm_pct"),
        ("fn", DEVICE_MODEL, configuration(1, 50, 1001), grpc.StatusCode.INVALID_ARGUMENT, "quota_permille"),
    ],
)
async def test_predict_refuses(
    stub: rapp_pb2_grpc.RappServiceAsyncStub,
    function: str,
    device_model: str,
    asked: rapp_pb2.Configuration,
    code: grpc.StatusCode,
    text: str,
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.Predict(
            rapp_pb2.PredictRequest(function=function, device_model=device_model, configurations=[asked]), timeout=10
        )
    assert caught.value.code() is code
    assert text in (caught.value.details() or "")


async def test_surface_refuses_axes_that_cannot_be(stub: rapp_pb2_grpc.RappServiceAsyncStub) -> None:
    for axes in ({"batches": [2, 1]}, {"sm_pcts": [0]}, {"quotas_permille": [2000]}, {"batches": [64]}):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.PredictSurface(
                rapp_pb2.PredictSurfaceRequest(function="fn", device_model=DEVICE_MODEL, **axes), timeout=10
            )
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_ingested_points_are_learnt_and_published(rig: Rig, stub: rapp_pb2_grpc.RappServiceAsyncStub) -> None:
    slow = [
        node_agent_pb2.ProfilePoint(
            batch=b, sm_pct=sm, quota_permille=q, latency_ns=10**11 * b // q, device_time_ns=10**8 * b
        )
        for b in (1, 2, 4, 8)
        for sm in RUNGS
        for q in (200, 500, 1000)
    ]
    answer = await stub.Ingest(
        rapp_pb2.IngestRequest(function="fn", device_model=DEVICE_MODEL, points=slow), timeout=10
    )
    assert answer.accepted_count == 48
    table = await rig.table(lambda t: t.version == 2)
    assert table.latency_s(8, 100, 1000) == pytest.approx(0.8, rel=0.05)
    bad = [node_agent_pb2.ProfilePoint(batch=1, sm_pct=100, quota_permille=1000)]
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.Ingest(rapp_pb2.IngestRequest(function="fn", device_model=DEVICE_MODEL, points=bad), timeout=10)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_train_tells_progress_and_ends_with_the_card(stub: rapp_pb2_grpc.RappServiceAsyncStub) -> None:
    events = [e async for e in stub.Train(rapp_pb2.TrainRequest(device_model=DEVICE_MODEL), timeout=30)]
    assert [e.WhichOneof("event") for e in events[:-1]] == ["progress"] * (len(events) - 1)
    card = events[-1].card
    assert len(events) >= 2
    assert (card.version, card.rows_count, list(card.functions)) == (2, 48, ["fn"])
    described = await stub.Describe(rapp_pb2.DescribeRequest(), timeout=10)
    assert [c.version for c in described.cards] == [2]
    assert dict(described.profiling) == {}
    for wrong, code in (("", grpc.StatusCode.INVALID_ARGUMENT), ("abacus", grpc.StatusCode.NOT_FOUND)):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in stub.Train(rapp_pb2.TrainRequest(device_model=wrong), timeout=10):
                pass
        assert caught.value.code() is code
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.Describe(rapp_pb2.DescribeRequest(device_model="abacus"), timeout=10)
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
