"""Functions without a profile: operators from the agent, what others were measured to take, and what is told of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
from hasgpu.node_agent.v1 import node_agent_pb2
from hasgpu.rapp.v1 import rapp_pb2, rapp_pb2_grpc
from hasgpu_core.capacity import CapacityTable
from hasgpu_core.errors import UnavailableError
from hasgpu_core.function import Artifact, FunctionSpec
from hasgpu_rapp.adapters.repository import Repository
from hasgpu_rapp.app import RappApp
from hasgpu_rapp.server import RappServicer
from hasgpu_runtime.rpc import create_server, open_channel

from .conftest import DEVICE_MODEL, OVERHEAD_S, Rig, convolutions, profiled, spec, true_device_time_s

SCALES = (1.0, 2.0, 4.0, 8.0)
NEW_SCALE = 3.0


def sized(name: str, number: int) -> FunctionSpec:
    """Artifacts are all of one size, so that their size tells nothing."""
    return spec(name, artifact=Artifact(f"{number:x}" * 64, 1 << 20), slo_ms=2_000)


async def profile_others(rig: Rig, scales: tuple[float, ...] = SCALES) -> None:
    await rig.node()
    for number, scale in enumerate(scales, start=1):
        what = sized(f"f{number}", number)
        rig.agent.operators[what.artifact.sha256] = convolutions(scale)
        rig.agent.scale[what.artifact.sha256] = scale
        await rig.deploy(what)
        await rig.table(profiled, function=what.name)


async def deploy_new(rig: Rig) -> None:
    """One that is not measured until it is let."""
    rig.agent.hold = asyncio.Event()
    new = sized("new", 9)
    rig.agent.operators[new.artifact.sha256] = convolutions(NEW_SCALE)
    rig.agent.scale[new.artifact.sha256] = NEW_SCALE
    await rig.deploy(new)


def error(table: CapacityTable) -> float:
    """Mean relative error of a table of the new function at the whole quota."""
    places = [(p, NEW_SCALE * true_device_time_s(p.batch, p.sm_pct) + OVERHEAD_S) for p in table.points]
    off = [abs(p.latency_s / true_s - 1) for p, true_s in places if p.quota_permille == 1_000]
    return sum(off) / len(off)


@pytest.fixture
async def stub(rig: Rig) -> AsyncIterator[rapp_pb2_grpc.RappServiceAsyncStub]:
    async with rig.rapp() as app:
        server = create_server(address="127.0.0.1:0")
        rapp_pb2_grpc.add_RappServiceServicer_to_server(RappServicer(app), server)
        await server.start()
        async with open_channel(server.address) as channel:
            yield rapp_pb2_grpc.RappServiceStub(channel)
        await server.stop(None)


def rests_on_others(app: RappApp) -> bool:
    transfer = app.predictions.transfers.get(DEVICE_MODEL)
    return transfer is not None and transfer.model is not None and len(transfer.data) == len(SCALES)


async def test_a_function_without_a_profile_is_predicted_from_its_operators(
    rig: Rig, stub: rapp_pb2_grpc.RappServiceAsyncStub
) -> None:
    await profile_others(rig)
    await rig.until(lambda: rests_on_others(rig.app))
    await deploy_new(rig)
    table = await rig.table(lambda t: error(t) < 0.3, function="new")
    assert table.basis == "static"
    described = await stub.Describe(rapp_pb2.DescribeRequest(), timeout=60)
    (state,) = [state for state in described.functions if state.function == "new"]
    assert (state.basis, state.operators_count, state.points_count) == ("static", 10, 0)
    assert state.basis_reason.startswith("from its 10 operators and 4 other functions")
    (card,) = described.transfers
    assert (card.device_model, len(card.models), card.reason) == (DEVICE_MODEL, 4, "")
    assert card.static_mape_pct > 0
    assert card.sha256
    assert "launches_log2" in card.features

    # a handful of its own points corrects it, and it is marked so
    points = [
        node_agent_pb2.ProfilePoint(
            batch=batch,
            sm_pct=sm_pct,
            quota_permille=1_000,
            latency_ns=round((2 * NEW_SCALE * true_device_time_s(batch, sm_pct) + OVERHEAD_S) * 1e9),
            device_time_ns=round(2 * NEW_SCALE * true_device_time_s(batch, sm_pct) * 1e9),
        )
        for batch, sm_pct in ((1, 100), (8, 25), (2, 50))
    ]
    await stub.Ingest(rapp_pb2.IngestRequest(function="new", device_model=DEVICE_MODEL, points=points), timeout=60)
    table = await rig.table(lambda t: t.basis == "transferred", function="new")
    assert table.latency_s(4, 50, 1_000) == pytest.approx(2 * NEW_SCALE * true_device_time_s(4, 50), rel=0.25)
    asked = rapp_pb2.PredictRequest(
        function="new",
        device_model=DEVICE_MODEL,
        configurations=[rapp_pb2.Configuration(batch=4, sm_pct=50, quota_permille=1_000)],
    )
    answer = await stub.Predict(asked, timeout=60)
    assert answer.basis == "transferred"
    assert "3 points of its own" in answer.basis_reason
    assert answer.low_ns[0] < answer.latencies_ns[0] < answer.high_ns[0]

    # and a profile takes their place
    assert rig.agent.hold is not None
    rig.agent.hold.set()
    await rig.table(profiled, function="new")
    assert not (await stub.Predict(asked, timeout=60)).basis_reason


async def test_too_few_functions_to_learn_from_are_told_and_the_size_serves(
    rig: Rig, stub: rapp_pb2_grpc.RappServiceAsyncStub
) -> None:
    await profile_others(rig, SCALES[:2])
    await deploy_new(rig)
    await rig.table(function="new")
    await rig.until(lambda: len(rig.app.predictions.operators) == 3)
    described = await stub.Describe(rapp_pb2.DescribeRequest(device_model=DEVICE_MODEL), timeout=60)
    (state,) = [state for state in described.functions if state.function == "new"]
    assert state.basis == "static"
    assert state.basis_reason == (
        "a guess from the size of its artifact: 2 of the 4 functions that are needed were profiled on cpu-2c with "
        "operators known"
    )
    (card,) = described.transfers
    assert "2 of the 4" in card.reason


async def test_a_model_that_cannot_be_exported_is_guessed_and_the_cause_told(
    rig: Rig, stub: rapp_pb2_grpc.RappServiceAsyncStub
) -> None:
    await profile_others(rig)
    await rig.until(lambda: rests_on_others(rig.app))
    rig.agent.hold = asyncio.Event()
    await rig.deploy(sized("odd", 10))
    await rig.until(lambda: len(rig.app.predictions.operators) == 5)
    answer = await stub.PredictSurface(
        rapp_pb2.PredictSurfaceRequest(function="odd", device_model=DEVICE_MODEL), timeout=60
    )
    assert answer.basis == "static"
    assert answer.basis_reason == (
        "a guess from the size of its artifact: expected one that torch.export can take, got a branch on values"
    )


async def test_operators_outlive_a_restart_and_corrupt_ones_are_told(rig: Rig) -> None:
    async with rig.rapp():
        await profile_others(rig)
    folder = rig.repository._folder / "@operators"
    (first, *_) = sorted(folder.iterdir())
    async with rig.rapp() as app:
        await rig.until(lambda: rests_on_others(app))
    first.write_text('{"format": "hasgpu-rapp-operators-1", "rows": [{"op": "relu"}], "reason": ""}')
    async with rig.rapp() as app:
        await rig.until(lambda: DEVICE_MODEL in app.predictions.transfers)
        assert any(first.name in note and "flops" in note for note in app.notes)
        assert "3 of the 4" in app.predictions.transfers[DEVICE_MODEL].reason
        assert set(app.predictions.profiles) == {DEVICE_MODEL}, "the folder of operators is no device model"


@pytest.mark.parametrize(
    ("operators", "text"),
    [
        (node_agent_pb2.OperatorTable(), "neither"),
        (node_agent_pb2.OperatorTable(rows=[node_agent_pb2.Operator(flops=1)]), "a name"),
    ],
)
async def test_operators_that_cannot_be_are_refused(
    rig: Rig, stub: rapp_pb2_grpc.RappServiceAsyncStub, operators: node_agent_pb2.OperatorTable, text: str
) -> None:
    await rig.node()
    await rig.deploy(spec())
    await rig.table(profiled)
    served = rig.app.predictions.served[DEVICE_MODEL]
    request = rapp_pb2.IngestRequest(function="fn", device_model=DEVICE_MODEL, operators=operators)
    with pytest.raises(grpc.aio.AioRpcError, match=text) as caught:
        await stub.Ingest(request, timeout=60)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert rig.app.predictions.served[DEVICE_MODEL] is served
    answer = await stub.Ingest(
        rapp_pb2.IngestRequest(function="fn", device_model=DEVICE_MODEL, operators=convolutions(1.0)), timeout=60
    )
    assert (answer.accepted_count, answer.operators_count) == (0, 10)


HEADER = "model,batch,sm_pct,quota_pct,latency_ms\n"
OPS = "model,op_index,op,flops,input_bytes,weight_bytes,output_bytes,groups,output_shape\n"


def published(folder: Path, *, models: int = 4) -> str:
    """Files in the columns of the published profiles; returns how they are named to rapp."""
    folder.mkdir()
    names = [f"m{number}" for number in range(1, models + 1)]
    rows = [
        f"{name},{b},{s},{q},{number * b * 100 / min(s, q)}\n"
        for number, name in enumerate(names, start=1)
        for b in (1, 4)
        for s in (50, 100)
        for q in (20, 60, 100)
    ]
    (folder / "latency.csv").write_text(HEADER + "".join(rows))
    ops = [f"{name},0,convolution,{number * 1000000},400,400,400,1,1x4x5x5\n" for number, name in enumerate(names, 1)]
    (folder / "model_ops.csv").write_text(OPS + "".join(ops))
    return f"{DEVICE_MODEL}={folder}"


async def test_profile_files_that_are_named_are_learnt_from(rig: Rig, tmp_path: Path) -> None:
    rig.repository = Repository(tmp_path / "state", [published(tmp_path / "v100")])
    rig.agent.always = UnavailableError("no room on the device")
    rig.agent.operators["a" * 64] = convolutions(1.0)
    async with rig.rapp() as app:
        await rig.node()
        await rig.deploy(spec())
        await rig.until(lambda: rests_on_others(app))
        event, device = app.pair("fn", DEVICE_MODEL)
        await rig.until(lambda: app.predictions.recipe(event, device).transfer is not None)
        assert "4 other functions" in app.predictions.recipe(event, device).reason
        assert (await rig.table()).basis == "static"
        assert not app.notes


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        ("nan", "column latency_ms"),
        ("unit", "latency_us, a unit that is not known here"),
        ("no operators", "neither"),
        ("nowhere", "neither"),
    ],
)
def test_profile_files_that_cannot_be_read_are_told_and_left_out(tmp_path: Path, damage: str, told: str) -> None:
    source, folder = published(tmp_path / "v100"), tmp_path / "v100"
    latency = folder / "latency.csv"
    if damage == "nan":
        latency.write_text(HEADER + "m1,1,50,20,nan\n")
    elif damage == "unit":
        latency.write_text(latency.read_text().replace("latency_ms", "latency_us"))
    elif damage == "no operators":
        (folder / "model_ops.csv").unlink()
    else:
        source = f"{DEVICE_MODEL}={tmp_path / 'nowhere'}"
    repository = Repository(tmp_path / "state", [source])
    assert repository.load_shipped() == {}
    (note,) = repository.notes
    assert note.startswith(f"the profile file {source} is left out")
    assert told in note
