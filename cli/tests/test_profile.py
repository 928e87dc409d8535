"""`hasgpu profile` against services in this process: what it asks an agent, writes, resumes and refuses."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from hasgpu.common.v1 import common_pb2
from hasgpu.gateway.v1 import gateway_pb2, gateway_pb2_grpc
from hasgpu.node_agent.v1 import node_agent_pb2, node_agent_pb2_grpc
from hasgpu.rapp.v1 import rapp_pb2, rapp_pb2_grpc
from hasgpu.scheduler.v1 import scheduler_pb2, scheduler_pb2_grpc
from hasgpu_cli.__main__ import cli
from hasgpu_cli.profiling.axes import batch_ladder, parse_budget_s, parse_list
from hasgpu_core.errors import InvalidError, ModelError, NotFoundError, UnavailableError
from hasgpu_core.function import workload_digest
from hasgpu_core.profile import Basis, Profile
from hasgpu_runtime.rpc import create_server
from hasgpu_runtime.wire import spec_from_proto

Cell = tuple[int, int, int]


def spec(name: str, digit: str = "a") -> common_pb2.FunctionSpec:
    wire = common_pb2.FunctionSpec(name=name, entry="handler.py", slo_ms=100, max_batch=4, memory_bytes=1 << 29)
    wire.format = common_pb2.MODEL_FORMAT_PYTHON
    wire.artifact.sha256 = digit * 64
    for tensors in (wire.inputs, wire.outputs):
        tensors.add(name="x", datatype="FP32", shape=[-1, 4])
    return wire


def device(gpu: str = "gpu0", **changes: Any) -> common_pb2.Device:
    values = {"model": "Card", "backend": "cuda", "memory_bytes": 8 << 30, "sm_rungs_pct": [25, 50, 100]}
    return common_pb2.Device(node="node0", gpu=gpu, sm_granule_pct=25, **{**values, **changes})


class Services(
    gateway_pb2_grpc.FunctionServiceServicer,
    scheduler_pb2_grpc.SchedulerServiceServicer,
    rapp_pb2_grpc.RappServiceServicer,
    node_agent_pb2_grpc.NodeAgentServiceServicer,
):
    """Gateway, scheduler, rapp and an agent behind one address."""

    def __init__(self) -> None:
        self.address = ""
        self.specs = {"f": spec("f"), "g": spec("g", "b")}
        self.devices = [device(), device("gpu1")]
        self.alive = True
        self.stop_after: int | None = None
        """Points after which the budget is used up."""
        self.fail_after: int | None = None
        self.hang_after: int | None = None
        self.latency_ns = 2_000_000
        self.asked: list[node_agent_pb2.ProfileRequest] = []
        self.ingested: list[rapp_pb2.IngestRequest] = []
        self.rapp_refuses = False

    async def GetFunction(self, request: Any, context: Any) -> gateway_pb2.GetFunctionResponse:
        if request.name not in self.specs:
            raise NotFoundError("function", request.name, "there is f, g")
        return gateway_pb2.GetFunctionResponse(function=gateway_pb2.FunctionStatus(spec=self.specs[request.name]))

    async def GetCluster(self, request: Any, context: Any) -> scheduler_pb2.GetClusterResponse:
        answer = scheduler_pb2.GetClusterResponse(leader=True)
        node = answer.nodes.add(name="node0", address=self.address, alive=self.alive)
        for one in self.devices:
            node.devices.add().device.CopyFrom(one)
        return answer

    async def Profile(
        self, request: node_agent_pb2.ProfileRequest, context: Any
    ) -> AsyncIterator[node_agent_pb2.ProfileResponse]:
        self.asked.append(request)
        yield node_agent_pb2.ProfileResponse(progress="loading")
        whole_first = sorted(request.configurations, key=lambda c: -c.quota_permille)
        for index, c in enumerate(whole_first):
            yield node_agent_pb2.ProfileResponse(progress=f"batch {c.batch}, SM {c.sm_pct} %: {index + 1}")
            if index == self.stop_after:
                yield node_agent_pb2.ProfileResponse(progress="the budget of 60 s is used up")
                return
            if index == self.fail_after:
                raise ModelError("batch 2: it raised")
            if index == self.hang_after:
                await asyncio.Event().wait()
            yield node_agent_pb2.ProfileResponse(
                point=node_agent_pb2.ProfilePoint(
                    batch=c.batch,
                    sm_pct=c.sm_pct,
                    quota_permille=c.quota_permille,
                    latency_ns=self.latency_ns * 1_000 // c.quota_permille,
                    device_time_ns=self.latency_ns,
                    longest_segment_ns=self.latency_ns,
                    repetitions_count=12,
                )
            )

    async def Ingest(self, request: rapp_pb2.IngestRequest, context: Any) -> rapp_pb2.IngestResponse:
        if self.rapp_refuses:
            raise UnavailableError("rapp has a cold")
        self.ingested.append(request)
        return rapp_pb2.IngestResponse(accepted_count=len(request.points))


@pytest.fixture
def services(monkeypatch: pytest.MonkeyPatch) -> Iterator[Services]:
    """The services in a thread with a loop of its own, since a command runs one itself."""
    services, ready = Services(), Future[asyncio.AbstractEventLoop]()
    stop: list[asyncio.Event] = []

    async def serve() -> None:
        server = create_server(address="127.0.0.1:0")
        gateway_pb2_grpc.add_FunctionServiceServicer_to_server(services, server)
        scheduler_pb2_grpc.add_SchedulerServiceServicer_to_server(services, server)
        rapp_pb2_grpc.add_RappServiceServicer_to_server(services, server)
        node_agent_pb2_grpc.add_NodeAgentServiceServicer_to_server(services, server)
        await server.start()
        services.address = server.address
        stop.append(asyncio.Event())
        ready.set_result(asyncio.get_running_loop())
        await stop[0].wait()
        await server.stop(0)

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    loop = ready.result(20)
    for name in ("GATEWAY", "SCHEDULER", "RAPP"):
        monkeypatch.setenv(f"HASGPU_{name}", services.address)
    yield services
    loop.call_soon_threadsafe(stop[0].set)
    thread.join()


def call(*words: str) -> Result:
    return CliRunner().invoke(cli, ["--home", "/nonexistent/home", "profile", *words])


def cells(request: node_agent_pb2.ProfileRequest) -> set[Cell]:
    return {(c.batch, c.sm_pct, c.quota_permille) for c in request.configurations}


def read(path: Path) -> Profile:
    return Profile.parse(path.read_text())


ALL: set[Cell] = {(b, s, q) for b in (1, 2, 4) for s in (25, 50, 100) for q in (1_000, 500, 200)}


def test_the_whole_grid_is_measured_written_and_handed_to_rapp(services: Services, tmp_path: Path) -> None:
    out = tmp_path / "card.csv"
    result = call("f", "--out", str(out))
    assert result.exit_code == 0, result.output
    assert cells(services.asked[0]) == ALL
    assert services.asked[0].budget_ms == 60_000
    order = [(c.batch, c.sm_pct, c.quota_permille) for c in services.asked[0].configurations]
    assert services.asked[0].in_order
    assert order != sorted(order), "what tells most for its seconds comes first"
    assert order[0] == (1, 100, 1_000)
    assert services.asked[0].gpu == "gpu0"
    profile = read(out)
    assert {row.cell[1:] for row in profile.rows} == ALL
    row = next(row for row in profile.rows if row.cell == ("f", 2, 50, 500))
    assert (row.latency_us, row.device_time_us, row.longest_segment_us, row.repetitions) == (4_000, 2_000, 2_000, 12)
    header = profile.header
    assert header.complete
    assert (header.device_model, header.backend, header.basis) == ("Card", "cuda", Basis.MEASURED)
    assert header.sm_rungs_pct == (25, 50, 100)
    assert header.models["f"].digest == workload_digest(spec_from_proto(services.specs["f"]))
    assert header.models["f"].max_batch == 4
    assert header.versions["hasgpu"]
    assert len(services.ingested[0].points) == len(ALL)
    assert (services.ingested[0].function, services.ingested[0].device_model) == ("f", "Card")
    assert "27 of 27 configurations of f are in" in result.output
    assert "rapp took 27 points of f on Card" in result.output


def test_without_a_terminal_each_step_is_a_line(services: Services, tmp_path: Path) -> None:
    result = call("f", "--out", str(tmp_path / "p.csv"), "--batches", "1", "--sm", "100", "--quota", "1000")
    assert "f: 0/1  loading\n" in result.stderr
    assert "f: 1/1  batch 1, SM 100 %, quota 100 %: 2.00 ms, on the device 2.00 ms, 0 s left\n" in result.stderr


def test_axes_can_be_named_and_the_whole_quota_is_always_among_them(services: Services, tmp_path: Path) -> None:
    out = tmp_path / "p.csv"
    result = call("f", "--out", str(out), "--batches", "2,1", "--sm", "50", "--quota", "300", "--gpu", "gpu1", "--json")
    assert result.exit_code == 0, result.output
    assert cells(services.asked[0]) == {(b, 50, q) for b in (1, 2) for q in (300, 1_000)}
    document = json.loads(result.stdout)
    assert (document["node"], document["gpu"], document["total_count"], document["complete"]) == (
        "node0",
        "gpu1",
        4,
        True,
    )
    assert document["ingested_count"] == 4
    assert len(document["points"]) == 4


def test_a_used_up_budget_leaves_a_valid_file_and_the_next_run_measures_the_rest(
    services: Services, tmp_path: Path
) -> None:
    out = tmp_path / "p.csv"
    services.stop_after = 11
    result = call("f", "--out", str(out))
    assert result.exit_code == 0, result.output
    assert "the same command again measures the 16 that are missing" in result.output
    first = read(out)
    assert not first.header.complete
    assert "16" in first.header.models["f"].note
    services.stop_after = None
    services.latency_ns = 9_000_000
    assert call("f", "--out", str(out)).exit_code == 0
    assert cells(services.asked[1]) == ALL - {row.cell[1:] for row in first.rows}
    second = read(out)
    assert second.header.complete
    assert second.header.models["f"].note == ""
    assert set(first.rows) < set(second.rows)
    assert len(services.ingested[1].points) == len(ALL)
    result = call("f", "--out", str(out))
    assert len(services.asked) == 2
    assert "nothing was missing" in result.output


def test_no_resume_measures_all_again(services: Services, tmp_path: Path) -> None:
    out = tmp_path / "p.csv"
    call("f", "--out", str(out))
    services.latency_ns = 3_000_000
    services.stop_after = 2
    assert call("f", "--out", str(out), "--no-resume", "--no-ingest").exit_code == 0
    assert cells(services.asked[1]) == ALL
    assert {row.device_time_us for row in read(out).rows} == {3_000}
    assert len(services.ingested) == 1


def test_functions_of_one_device_share_a_file(services: Services, tmp_path: Path) -> None:
    out = tmp_path / "p.csv"
    services.stop_after = 4
    call("f", "--out", str(out))
    services.stop_after = None
    assert call("g", "--out", str(out)).exit_code == 0
    profile = read(out)
    assert set(profile.header.models) == {"f", "g"}
    assert sum(row.model == "f" for row in profile.rows) == 4
    assert sum(row.model == "g" for row in profile.rows) == len(ALL)
    assert not profile.header.complete
    assert {point.batch for point in services.ingested[1].points} == {1, 2, 4}
    call("f", "--out", str(out))
    assert read(out).header.complete


def test_what_was_measured_before_a_failure_is_kept(services: Services, tmp_path: Path) -> None:
    out = tmp_path / "p.csv"
    services.fail_after = 3
    result = call("f", "--out", str(out))
    assert (result.exit_code, result.output.splitlines()[-1]) == (1, "Error: batch 2: it raised")
    assert len(read(out).rows) == 3


def test_a_budget_without_a_single_point_is_told(services: Services, tmp_path: Path) -> None:
    services.stop_after = 0
    result = call("f", "--out", str(tmp_path / "p.csv"), "--budget", "1s")
    assert result.exit_code == 1
    assert "a budget of 1 s is too small for one point of f" in result.output
    assert not (tmp_path / "p.csv").exists()


def test_rapp_that_is_away_is_told_and_the_file_stands(services: Services, tmp_path: Path) -> None:
    services.rapp_refuses = True
    out = tmp_path / "p.csv"
    result = call("f", "--out", str(out))
    assert result.exit_code == 1
    assert "27 of 27 configurations of f are in" in result.output
    assert "rapp did not take the points: rapp has a cold" in result.output
    assert read(out).header.complete


def test_ctrl_c_leaves_a_valid_file(services: Services, tmp_path: Path) -> None:
    out = tmp_path / "p.csv"
    services.hang_after = 5
    command = [sys.executable, "-m", "hasgpu_cli", "--home", "/nonexistent/home", "profile", "f", "--out", str(out)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        while "5/27  batch" not in process.stderr.readline():
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted: 5 of 27 configurations of f are in" in told
    assert "Traceback" not in told
    assert len(read(out).rows) == 5
    assert not read(out).header.complete
    assert [path.name for path in tmp_path.iterdir()] == ["p.csv"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("nobody",), "function 'nobody' is not found; there is f, g"),
        (("f", "--node", "node9"), "node 'node9' is not found; there is node0"),
        (("f", "--gpu", "gpu9"), "device 'gpu9' is not found; there is node0/gpu0, node0/gpu1"),
        (("f", "--budget", "0.2s"), "--budget: expected 1s (a point may take that long) to 600s"),
        (("f", "--budget", "soon"), "--budget: expected a time as 60s, 2m or 1500ms, got 'soon'"),
        (("f", "--batches", "1,8"), "--batches: expected 1..4, the function's limit, got 8"),
        (("f", "--batches", "1,x"), "--batches: expected whole numbers of 1..1024, separated by commas, got 'x'"),
        (("f", "--sm", "30"), "--sm: expected shares that gpu0 can give (25, 50, 100), got 30"),
        (("f", "--sm", "120"), "--sm: expected whole numbers of 1..100, separated by commas, got '120'"),
        (("f", "--quota", "0"), "--quota: expected whole numbers of 1..1000, separated by commas, got '0'"),
        (("f", "--out", "/nowhere/p.csv"), "--out /nowhere/p.csv: expected a file that can be written"),
        (("f", "--out", "/"), "--out /: expected a profile file or none, got Is a directory"),
    ],
)
def test_mistakes_are_told(
    services: Services, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    result = call(*words)
    assert result.exit_code == 1
    assert result.output.startswith(f"Error: {says}")
    assert services.asked == []


def test_a_file_with_other_content_is_refused_and_left_alone(services: Services, tmp_path: Path) -> None:
    out = tmp_path / "p.csv"
    out.write_text("a,b\n1,2\n")
    for resume in ("--resume", "--no-resume"):
        result = call("f", "--out", str(out), resume)
        assert result.exit_code == 1
        assert "is there and is no profile that this run could add to" in result.output
        assert "line 1" in result.output
    assert out.read_text() == "a,b\n1,2\n"
    assert services.asked == []


def test_a_file_of_another_version_device_or_model_is_refused_by_name(services: Services, tmp_path: Path) -> None:
    out = tmp_path / "p.csv"
    call("f", "--out", str(out))
    services.specs["f"] = spec("f", "c")
    result = call("f", "--out", str(out))
    assert result.exit_code == 1
    assert "its f has digest" in result.output
    assert "--no-resume measures it anew" in result.output
    assert call("f", "--out", str(out), "--no-resume").exit_code == 0
    services.devices = [device(model="Other-Card")]
    result = call("f", "--out", str(out))
    assert "it is of device model 'Card', this run of 'Other-Card': name another --out" in result.output
    out.write_text(out.read_text().replace('"version": 1', '"version": 2'))
    result = call("f", "--out", str(out))
    assert "version: expected 1, got 2" in result.output


def test_lost_nodes_and_devices_are_not_measured_on(services: Services, tmp_path: Path) -> None:
    out = ("--out", str(tmp_path / "p.csv"))
    lost = {"health": common_pb2.DEVICE_HEALTH_LOST, "health_reason": "it fell off the bus"}
    services.devices = [device(**lost), device("gpu1")]
    assert call("f", *out).exit_code == 0
    assert services.asked[0].gpu == "gpu1"
    result = call("f", *out, "--gpu", "gpu0")
    assert "node0/gpu0 can't be measured on: it fell off the bus" in result.output
    services.alive = False
    assert "no node is up" in call("f", *out).output
    assert "node node0 is lost" in call("f", *out, "--node", "node0").output


def test_times_of_an_emulated_device_are_not_called_measured(services: Services, tmp_path: Path) -> None:
    services.devices = [device(backend="emulated", model="emulated-Card")]
    out = tmp_path / "p.csv"
    call("f", "--out", str(out))
    header = read(out).header
    assert header.basis is Basis.MODELLED
    assert "emulated" in header.source


def test_the_driver_is_taken_from_what_the_agent_tells(services: Services, tmp_path: Path) -> None:
    services.devices = [device(capabilities=["sm: by rungs", "driver: 580.95"])]
    out = tmp_path / "p.csv"
    call("f", "--out", str(out))
    assert read(out).header.driver == "580.95"


@pytest.mark.parametrize(("text", "seconds"), [("60s", 60), ("2m", 120), ("1500ms", 1.5), ("90", 90), ("1.5 min", 90)])
def test_budgets(text: str, seconds: float) -> None:
    assert parse_budget_s(text) == pytest.approx(seconds)


def test_lists_are_sorted_and_without_repeats() -> None:
    assert parse_list("--sm", " 50, 25,50 ", 100) == (25, 50)
    assert parse_list("--sm", "", 100) == ()
    assert batch_ladder(12) == (1, 2, 4, 8, 12)
    with pytest.raises(InvalidError, match="got ''"):
        parse_list("--sm", "25,,50", 100)


def test_a_file_whose_cells_are_no_grid_is_not_complete(services: Services, tmp_path: Path) -> None:
    out = tmp_path / "p.csv"
    call("f", "--out", str(out), "--batches", "1", "--sm", "100")
    assert read(out).header.complete
    call("f", "--out", str(out), "--batches", "4", "--sm", "25")
    profile = read(out)
    assert not profile.header.complete
    assert Profile.parse(replace(profile).format()) == profile
