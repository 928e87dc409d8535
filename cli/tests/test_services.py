"""Commands against services in this process: what they send, and what they show."""

from __future__ import annotations

import asyncio
import hashlib
import json
import threading
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from hasgpu.common.v1 import common_pb2
from hasgpu.gateway.v1 import gateway_pb2, gateway_pb2_grpc
from hasgpu.inference.v2 import inference_pb2 as oip
from hasgpu.inference.v2 import inference_pb2_grpc
from hasgpu.rapp.v1 import rapp_pb2, rapp_pb2_grpc
from hasgpu.scaler.v1 import scaler_pb2, scaler_pb2_grpc
from hasgpu.scheduler.v1 import scheduler_pb2, scheduler_pb2_grpc
from hasgpu_cli.__main__ import cli
from hasgpu_cli.functions import _Failures
from hasgpu_cli.tensors import pack_bytes, unpack_bytes
from hasgpu_core.errors import AlreadyExistsError, NotFoundError
from hasgpu_runtime.rpc import create_server

YAML = """\
name: f
format: python
inputs: [{name: text, datatype: BYTES, shape: [-1]}]
outputs: [{name: loud, datatype: BYTES, shape: [-1]}]
slo_ms: 100
"""
ALLOCATION = common_pb2.Allocation(sm_pct=50, request_permille=200, limit_permille=400, memory_bytes=1 << 29)


class Services(
    gateway_pb2_grpc.FunctionServiceServicer,
    inference_pb2_grpc.GRPCInferenceServiceServicer,
    scaler_pb2_grpc.ScalerServiceServicer,
    scheduler_pb2_grpc.SchedulerServiceServicer,
    rapp_pb2_grpc.RappServiceServicer,
):
    """All services behind one address; holds one function at a time."""

    def __init__(self) -> None:
        self.function: gateway_pb2.FunctionStatus | None = None
        self.archive = b""
        self.chunks_count = 0
        self.state = common_pb2.INSTANCE_STATE_READY
        self.asked: list[Any] = []

    def status(self) -> gateway_pb2.FunctionStatus:
        if self.function is None:
            raise NotFoundError("function", "f", "there are none")
        return self.function

    async def DeployFunction(
        self, requests: AsyncIterator[gateway_pb2.DeployFunctionRequest], context: Any
    ) -> gateway_pb2.DeployFunctionResponse:
        header, data = None, b""
        async for request in requests:
            if request.HasField("header"):
                header = request.header
            else:
                data += request.chunk
                self.chunks_count += 1
        assert header is not None
        if self.function is not None and not header.replace:
            raise AlreadyExistsError("function", header.spec.name)
        self.archive = data
        failed = self.state == common_pb2.INSTANCE_STATE_FAILED
        self.function = gateway_pb2.FunctionStatus(
            spec=header.spec,
            revision=3,
            instances=[
                gateway_pb2.InstanceStatus(
                    instance="f-0",
                    node="node0",
                    gpu="cpu0",
                    state=self.state,
                    reason="ImportError: no module nothing" if failed else "",
                    allocation=ALLOCATION,
                )
            ],
            capacity=gateway_pb2.CapacityStatus(device_model="cpu-2c", basis="profiled", best_millirps=12_500),
            condition="failing: f-0: ImportError" if failed else "ready",
        )
        return gateway_pb2.DeployFunctionResponse(function=self.function)

    async def GetFunction(self, request: Any, context: Any) -> gateway_pb2.GetFunctionResponse:
        return gateway_pb2.GetFunctionResponse(function=self.status())

    async def ListFunctions(self, request: Any, context: Any) -> gateway_pb2.ListFunctionsResponse:
        return gateway_pb2.ListFunctionsResponse(functions=[self.function] if self.function else [])

    async def DeleteFunction(self, request: Any, context: Any) -> gateway_pb2.DeleteFunctionResponse:
        self.status()
        self.function = None
        return gateway_pb2.DeleteFunctionResponse()

    async def Describe(self, request: Any, context: Any) -> rapp_pb2.DescribeResponse:
        return rapp_pb2.DescribeResponse(profiling={"f": "3 of 24"})

    async def GetDesiredState(self, request: Any, context: Any) -> scaler_pb2.GetDesiredStateResponse:
        return scaler_pb2.GetDesiredStateResponse(states=[self.desired()])

    def desired(self) -> scaler_pb2.DesiredState:
        state = scaler_pb2.DesiredState(function="f", revision=7)
        state.instances.add(instance="f-0", allocation=ALLOCATION)
        return state

    async def ManualScale(self, request: Any, context: Any) -> scaler_pb2.ManualScaleResponse:
        self.asked.append(request)
        return scaler_pb2.ManualScaleResponse(state=self.desired())

    async def ExplainDecisions(self, request: Any, context: Any) -> scaler_pb2.ExplainDecisionsResponse:
        self.asked.append(request)
        action = scaler_pb2.Action(kind="vertical_up", instance="f-0", sm_pct=50, from_permille=100, to_permille=200)
        decision = scaler_pb2.Decision(
            function="f", reason="because of the queue", origin="policy", policy="hasgpu", actions=[action], slo_ms=100
        )
        return scaler_pb2.ExplainDecisionsResponse(decisions=[decision])

    async def GetCluster(self, request: Any, context: Any) -> scheduler_pb2.GetClusterResponse:
        answer = scheduler_pb2.GetClusterResponse(leader=True)
        node = answer.nodes.add(name="node0", alive=False, heartbeat_age_ms=9_000)
        device = node.devices.add()
        device.device.CopyFrom(
            common_pb2.Device(node="node0", gpu="cpu0", model="cpu-2c", backend="cpu", capabilities=["sm: by threads"])
        )
        device.rows.add(index=0, sm_pct=50, used_permille=200)
        device.instances.add(function="f", instance="f-0", gpu="cpu0", row=0, allocation=ALLOCATION)
        answer.unplaced.add(function="f", instance={"instance": "f-1"}, reason="no row has 30 % free")
        return answer

    async def ModelMetadata(self, request: oip.ModelMetadataRequest, context: Any) -> oip.ModelMetadataResponse:
        inputs = [oip.ModelMetadataResponse.TensorMetadata(name="text", datatype="BYTES", shape=[-1])]
        return oip.ModelMetadataResponse(name="f", inputs=inputs)

    async def ModelInfer(self, request: oip.ModelInferRequest, context: Any) -> oip.ModelInferResponse:
        loud = [text.upper() for text in unpack_bytes(request.raw_input_contents[0])]
        output = oip.ModelInferResponse.InferOutputTensor(name="loud", datatype="BYTES", shape=[len(loud)])
        return oip.ModelInferResponse(outputs=[output], raw_output_contents=[pack_bytes(loud)])


@pytest.fixture
def services(monkeypatch: pytest.MonkeyPatch) -> Iterator[Services]:
    """The services in a thread with a loop of its own, since a command runs one itself."""
    services, address, stop = Services(), Future[str](), Future[asyncio.Event]()

    async def serve() -> None:
        server = create_server(address="127.0.0.1:0")
        gateway_pb2_grpc.add_FunctionServiceServicer_to_server(services, server)
        inference_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(services, server)
        scaler_pb2_grpc.add_ScalerServiceServicer_to_server(services, server)
        scheduler_pb2_grpc.add_SchedulerServiceServicer_to_server(services, server)
        rapp_pb2_grpc.add_RappServiceServicer_to_server(services, server)
        await server.start()
        event, loop = asyncio.Event(), asyncio.get_running_loop()
        stop.set_result(event)
        address.set_result(server.address)
        loops.append(loop)
        await event.wait()
        await server.stop(0)

    loops: list[asyncio.AbstractEventLoop] = []
    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    for name in ("GATEWAY", "SCALER", "SCHEDULER", "RAPP"):
        monkeypatch.setenv(f"HASGPU_{name}", address.result(20))
    yield services
    loops[0].call_soon_threadsafe(stop.result().set)
    thread.join()


@pytest.fixture
def spec(tmp_path: Path) -> Path:
    (tmp_path / "handler.py").write_text("x" * 3_000_000)
    (tmp_path / "function.yaml").write_text(YAML)
    return tmp_path


def call(*words: str) -> Result:
    return CliRunner().invoke(cli, ["--home", "/nonexistent/home", *words])


def test_deploying_sends_the_whole_archive_in_pieces(services: Services, spec: Path) -> None:
    result = call("deploy", str(spec))
    assert result.exit_code == 0, result.output
    assert "f: ready, revision 3" in result.output
    assert services.chunks_count > 2
    assert hashlib.sha256(services.archive).hexdigest() == services.status().spec.artifact.sha256


def test_a_name_that_is_taken(services: Services, spec: Path) -> None:
    assert call("deploy", str(spec)).exit_code == 0
    result = call("deploy", str(spec))
    assert (result.exit_code, result.output) == (1, "Error: function 'f' already exists; --replace takes its place\n")
    assert call("deploy", str(spec), "--replace", "--json").exit_code == 0


def test_a_function_that_does_not_start_is_told_with_its_reason(
    services: Services, spec: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hasgpu_cli.functions.PATIENCE_FAILED_S", 0.0)
    services.state = common_pb2.INSTANCE_STATE_FAILED
    result = call("deploy", str(spec))
    assert result.exit_code == 1
    assert "Error: f does not start: ImportError: no module nothing" in result.output


def test_instances_that_fail_in_turn_end_the_wait() -> None:
    failures = _Failures()

    def look(*states: str) -> str:
        named = enumerate(states)
        return failures.hopeless([{"instance": f"f-{n}", "state": s, "reason": "no weights"} for n, s in named], 1.0)

    assert look("failed", "loading") == look("loading", "failed") == look("failed", "loading") == ""
    assert look("ready", "loading") == "", "one that serves makes up for those that failed"
    assert [look("failed", "loading"), look("loading", "failed"), look("failed", "loading")] == ["", "", ""]
    assert look("failed", "loading") == "", "still the same failure"
    assert look("loading", "failed") == "no weights"


def test_describe_functions_and_delete(services: Services, spec: Path) -> None:
    call("deploy", str(spec), "--no-wait")
    described = json.loads(call("describe", "f", "--json").output)
    assert described["function"]["instances"][0]["state"] == "ready"
    assert described["function"]["spec"]["slo_ms"] == 100
    assert described["desired"]["revision"] == 7
    shown = call("describe", "f").output
    assert "SM 50 % × 20 % of the time (up to 40 %)" in shown
    assert "capacity on a whole cpu-2c: 12.5 requests/s" in shown
    listed = json.loads(call("functions", "--json").output)
    assert [function["spec"]["name"] for function in listed] == ["f"]
    assert "10 %" in call("functions").output
    assert call("delete", "f").output == "f is deleted\n"
    result = call("describe", "f")
    assert (result.exit_code, result.output) == (1, "Error: function 'f' is not found; there are none\n")
    assert call("functions").output == "no functions; `hasgpu deploy FILE` deploys one\n"


def test_infer(services: Services) -> None:
    shown = call("infer", "f", "--text", "hello", "--text", "you").output
    assert "loud  BYTES [2]  'HELLO', 'YOU'" in shown
    answer = json.loads(call("infer", "f", "--input", 'text=["a"]', "--json").output)
    assert answer["outputs"] == [{"name": "loud", "datatype": "BYTES", "shape": [1], "data": ["A"]}]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--input", "x=1"), "input 'x' is not found; the function takes text"),
        (("--input", "text"), "--input: expected TENSOR=VALUE, got 'text'"),
        (("--text", "a", "--input", 'text=["b"]'), "input 'text': expected to be given once, got it twice"),
        ((), "input 'text': expected a value (--text, --input or --file), got none"),
    ],
)
def test_inputs_that_do_not_fit(services: Services, words: tuple[str, ...], says: str) -> None:
    result = call("infer", "f", *words)
    assert (result.exit_code, result.output) == (1, f"Error: {says}\n")


def test_scale_sends_what_was_given_and_nothing_else(services: Services) -> None:
    result = call("scale", "f", "--quota", "30", "--hold", "5")
    assert "f-0  SM 50 % × 20 % of the time" in result.output
    request = services.asked[0]
    assert (request.request_permille, request.hold_s) == (300, 5)
    assert not request.HasField("limit_permille")
    assert not request.HasField("instances")
    call("scale", "f", "--instances", "0", "--instance", "f-0", "--limit", "50.5")
    request = services.asked[1]
    assert request.HasField("instances")
    assert (request.instances, request.instance, request.limit_permille) == (0, "f-0", 505)


def test_explain(services: Services) -> None:
    shown = call("explain", "f", "--all", "--limit", "3").output
    assert "because of the queue" in shown
    assert "vertical up f-0: SM 50 %, 10 → 20 %" in shown
    assert services.asked[0].include_idle
    assert services.asked[0].limit == 3


def test_replay(services: Services, spec: Path) -> None:
    call("deploy", str(spec), "--no-wait")
    result = call("replay", "f", "--rates", "20 40", "--stage-seconds", "0.1", "--json")
    assert result.exit_code == 0, result.output
    summary = json.loads(result.output)
    assert (summary["requests"], summary["ok"], summary["unsent"]) == (6, 6, 0)


def test_status_shows_problems(services: Services, spec: Path) -> None:
    services.state = common_pb2.INSTANCE_STATE_FAILED
    call("deploy", str(spec), "--no-wait")
    shown = call("status", "--gateway", gateway_address(), "--scheduler", gateway_address()).output
    assert "PROBLEM NODE LOST node0" in shown
    assert "PROBLEM UNPLACED f-1: no row has 30 % free" in shown
    assert "PROBLEM FAILED" in shown
    assert "ImportError: no module nothing" in shown
    assert "can: sm: by threads" in shown
    assert "row 0: SM 50 %, 200 ‰ used, 800 ‰ free" in shown


def test_top(services: Services, spec: Path) -> None:
    call("deploy", str(spec), "--no-wait")
    rows = json.loads(call("top", "--json").output)
    assert rows[0]["decision"]["reason"] == "because of the queue"
    result = call("top", "--count", "1", "--period", "0.1")
    assert result.exit_code == 0, result.output
    assert "f-0" in result.output


def gateway_address() -> str:
    import os

    return os.environ["HASGPU_GATEWAY"]
