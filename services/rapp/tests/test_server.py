"""RappService over gRPC."""

from __future__ import annotations

from collections.abc import AsyncIterator

import grpc
import pytest
from hasgpu.node_agent.v1 import node_agent_pb2
from hasgpu.rapp.v1 import rapp_pb2, rapp_pb2_grpc
from hasgpu_core.errors import ModelError
from hasgpu_core.function import Artifact
from hasgpu_rapp.server import RappServicer
from hasgpu_runtime.rpc import create_server, open_channel

from .conftest import DEVICE_MODEL, OVERHEAD_S, RUNGS, Rig, profiled, spec, true_device_time_s


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


async def test_predictions_have_intervals_and_say_what_they_are(
    rig: Rig, stub: rapp_pb2_grpc.RappServiceAsyncStub
) -> None:
    request = rapp_pb2.PredictRequest(
        function="fn", device_model=DEVICE_MODEL, configurations=[configuration(4, 50, 500), configuration(8, 25, 100)]
    )
    answer = await stub.Predict(request, timeout=10)
    for low, latency, high in zip(answer.low_ns, answer.latencies_ns, answer.high_ns, strict=True):
        assert 0 < low <= latency <= high
    assert list(answer.extrapolated) == [False, False]
    assert (answer.correction.factor, answer.correction.batches_count, answer.correction.drift) == (1.0, 0, "")
    await rig.deploy(spec(max_batch=32), revision=2)
    await rig.table(lambda t: t.function_revision == 2)
    request.configurations.append(configuration(32, 50, 500))
    answer = await stub.Predict(request, timeout=10)
    assert list(answer.extrapolated) == [False, False, True]
    surface = await stub.PredictSurface(
        rapp_pb2.PredictSurfaceRequest(function="fn", device_model=DEVICE_MODEL), timeout=10
    )
    assert list(surface.extrapolated_batches) == [16, 32]
    assert len(surface.low_us) == len(surface.high_us) == len(surface.points)
    assert rig.tables[-1].profiled_max_batch == 8
    capacity = await stub.Capacity(
        rapp_pb2.CapacityRequest(
            function="fn",
            device_model=DEVICE_MODEL,
            configurations=[configuration(8, 50, 500), configuration(16, 50, 500)],
        ),
        timeout=10,
    )
    assert list(capacity.extrapolated) == [False, True]


async def test_a_function_without_profile_gets_a_guess_marked_so(
    rig: Rig, stub: rapp_pb2_grpc.RappServiceAsyncStub
) -> None:
    rig.agent.always = ModelError("it does not load")
    await rig.deploy(spec("other", artifact=Artifact("c" * 64, 1 << 20)))
    await rig.table(function="other")
    answer = await stub.Predict(
        rapp_pb2.PredictRequest(
            function="other", device_model=DEVICE_MODEL, configurations=[configuration(1, 50, 500)]
        ),
        timeout=10,
    )
    assert answer.basis == "static"
    assert answer.high_ns[0] > 5 * answer.low_ns[0], "a guess says how wide it is"
    assert list(answer.extrapolated) == [False]


async def test_an_instance_is_predicted_by_what_it_takes(rig: Rig, stub: rapp_pb2_grpc.RappServiceAsyncStub) -> None:
    for index in range(5):
        await rig.observe(1.4, batches_count=32 * (index + 1))
    await rig.table(lambda t: t.correction_permille > 1300)
    asked = [configuration(4, 50, 500)]

    async def latency(instance: str) -> int:
        request = rapp_pb2.PredictRequest(
            function="fn", device_model=DEVICE_MODEL, configurations=asked, instance=instance
        )
        return int((await stub.Predict(request, timeout=10)).latencies_ns[0])

    assert await latency("fn-1") == pytest.approx(await latency(""), rel=0.02)
    assert await latency("fn-99") == await latency("")
    described = await stub.Describe(rapp_pb2.DescribeRequest(), timeout=10)
    (state,) = described.functions
    assert [source.name for source in state.sources] == ["device n1/cpu0", "instance fn-1"]
    assert state.correction.factor == pytest.approx(1.4, rel=0.03)
    assert state.observed.device_mape_pct > 20 > state.observed.corrected_device_mape_pct
    assert (state.basis, state.version, state.points_count, state.profiled_max_batch) == ("profiled", 1, 48, 8)
    assert state.table_computed_unix_ns >= 10**18


async def test_capacity_counts_queueing_inside_the_objective(stub: rapp_pb2_grpc.RappServiceAsyncStub) -> None:
    async def rates(slo_ms: int) -> rapp_pb2.CapacityResponse:
        request = rapp_pb2.CapacityRequest(
            function="fn",
            device_model=DEVICE_MODEL,
            slo_ms=slo_ms,
            configurations=[configuration(1, 100, 1000), configuration(8, 100, 1000), configuration(8, 25, 100)],
        )
        return await stub.Capacity(request, timeout=10)

    loose, tight, none = await rates(1000), await rates(100), await rates(1)
    assert [p.batch for p in loose.points] == [1, 8, 8]
    bare_rps = 8 / (true_device_time_s(8, 100) + OVERHEAD_S)
    assert 0.3 * bare_rps < tight.points[1].capacity_millirps / 1e3 < loose.points[1].capacity_millirps / 1e3 < bare_rps
    assert tight.points[2].capacity_millirps == 0
    assert (loose.infeasible_reason, tight.infeasible_reason) == ("", "")
    assert "the objective is 1 ms" in none.infeasible_reason
    usual = await stub.Capacity(rapp_pb2.CapacityRequest(function="fn", device_model=DEVICE_MODEL), timeout=10)
    assert (usual.slo_ms, len(usual.points), usual.basis, usual.version) == (200, 4 * 4 * 21, "profiled", 1)
    assert usual.table_computed_unix_ns >= 10**18
    with pytest.raises(grpc.aio.AioRpcError, match="slo_ms"):
        await stub.Capacity(
            rapp_pb2.CapacityRequest(function="fn", device_model=DEVICE_MODEL, slo_ms=4_000_000), timeout=10
        )


async def test_evaluate_predicts_each_fifth_from_the_others(rig: Rig, stub: rapp_pb2_grpc.RappServiceAsyncStub) -> None:
    answer = await stub.Evaluate(rapp_pb2.EvaluateRequest(device_model=DEVICE_MODEL), timeout=60)
    (error,) = answer.functions
    assert (error.function, error.points_count, len(error.points), answer.version) == ("fn", 48, 48, 1)
    assert 0 <= error.median_ape_pct <= error.mape_pct <= 15
    assert 0 <= error.coverage_90 <= 1
    for point in error.points:
        cell = point.configuration
        d = true_device_time_s(cell.batch, cell.sm_pct)
        assert point.measured_ns / 1e9 == pytest.approx(max(d + OVERHEAD_S, d * 1000 / cell.quota_permille), rel=1e-6)
    for request, code in (
        (rapp_pb2.EvaluateRequest(), grpc.StatusCode.INVALID_ARGUMENT),
        (rapp_pb2.EvaluateRequest(device_model="abacus"), grpc.StatusCode.NOT_FOUND),
        (rapp_pb2.EvaluateRequest(device_model=DEVICE_MODEL, function="no"), grpc.StatusCode.NOT_FOUND),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Evaluate(request, timeout=60)
        assert caught.value.code() is code


async def test_probes_are_planned_and_a_new_function_is_profiled_in_that_order(
    rig: Rig, stub: rapp_pb2_grpc.RappServiceAsyncStub
) -> None:
    asked = rig.agent.requests[0]
    cells = [(c.batch, c.sm_pct, c.quota_permille) for c in asked.configurations]
    assert asked.in_order
    assert cells[0][2] == 1000
    assert all(q == 1000 or (b, s, 1000) in cells[: cells.index((b, s, q))] for b, s, q in cells)
    rig.agent.obeys = True
    await rig.deploy(spec("other", artifact=Artifact("c" * 64, 1 << 20)))
    await rig.table(profiled, function="other")
    plan = await stub.PlanProbes(
        rapp_pb2.PlanProbesRequest(function="other", device_model=DEVICE_MODEL, budget_ms=3_000), timeout=10
    )
    known = rig.app.predictions.profiles[DEVICE_MODEL]
    measured = {p.configuration for profile in known.values() if len(profile.points) != 48 for p in profile.points}
    planned = {(p.configuration.batch, p.configuration.sm_pct, p.configuration.quota_permille) for p in plan.probes}
    assert measured
    assert not measured & planned
    assert sum(probe.cost_ns for probe in plan.probes) <= 3e9
    with pytest.raises(grpc.aio.AioRpcError, match="batch"):
        await stub.PlanProbes(
            rapp_pb2.PlanProbesRequest(
                function="fn", device_model=DEVICE_MODEL, candidates=[configuration(64, 100, 1000)]
            ),
            timeout=10,
        )


def point(latency_ns: int, **changes: int) -> node_agent_pb2.ProfilePoint:
    fields = {"batch": 1, "sm_pct": 100, "quota_permille": 1000, "device_time_ns": 10**7} | changes
    return node_agent_pb2.ProfilePoint(latency_ns=latency_ns, **fields)


@pytest.mark.parametrize(
    ("points", "text"),
    [
        ([point(0)], "point.latency: expected above 0"),
        ([point(10**7), point(2 * 10**7)], "rows that agree within 20%"),
        ([point(10**7), point(10**7, device_time_ns=3 * 10**7)], "device time"),
        ([point(10**7, batch=0)], "point.batch"),
        ([point(10**7, quota_permille=1001)], "point.quota_permille"),
        ([point(2**63)], "point.latency"),
        ([], "points: expected 1.."),
    ],
)
async def test_ingest_refuses_and_the_served_model_stays(
    rig: Rig, stub: rapp_pb2_grpc.RappServiceAsyncStub, points: list[node_agent_pb2.ProfilePoint], text: str
) -> None:
    before = rig.app.predictions.served[DEVICE_MODEL]
    request = rapp_pb2.IngestRequest(function="fn", device_model=DEVICE_MODEL, points=[point(10**7, batch=2), *points])
    if not points:
        del request.points[:]
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.Ingest(request, timeout=10)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert text in (caught.value.details() or "")
    assert rig.app.predictions.served[DEVICE_MODEL] is before
    assert len(rig.app.predictions.profile(DEVICE_MODEL, next(iter(before.profiles))).points) == 48


async def test_rows_that_agree_are_averaged(rig: Rig, stub: rapp_pb2_grpc.RappServiceAsyncStub) -> None:
    request = rapp_pb2.IngestRequest(
        function="fn", device_model=DEVICE_MODEL, points=[point(100 * 10**6), point(110 * 10**6)]
    )
    assert (await stub.Ingest(request, timeout=10)).accepted_count == 2
    (profile,) = rig.app.predictions.profiles[DEVICE_MODEL].values()
    (kept,) = [p for p in profile.points if p.configuration == (1, 100, 1000)]
    assert kept.latency_s == pytest.approx(0.105)
