"""A whole gateway on memory doubles, with workers that do as a test says."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import struct
from collections.abc import AsyncIterator, Awaitable, Callable

import grpc.aio
import pytest
from hasgpu.gateway.v1 import gateway_pb2
from hasgpu.gateway.v1.gateway_pb2_grpc import FunctionServiceStub
from hasgpu.inference.v2 import inference_pb2
from hasgpu.inference.v2.inference_pb2_grpc import GRPCInferenceServiceStub
from hasgpu.node_agent.v1 import node_agent_pb2
from hasgpu.node_agent.v1.node_agent_pb2_grpc import WorkerServiceServicer, add_WorkerServiceServicer_to_server
from hasgpu_core.capacity import CapacityPoint, CapacityTable
from hasgpu_core.events import InstanceEvent, capacity_subject, instance_subject
from hasgpu_core.function import Artifact, FunctionSpec, ModelFormat, TensorSpec
from hasgpu_core.resources import Allocation, InstanceState
from hasgpu_gateway.app import Gateway, World
from hasgpu_gateway.settings import GatewaySettings
from hasgpu_runtime import wire
from hasgpu_runtime.bus.memory import MemoryBus
from hasgpu_runtime.clock import SystemClock
from hasgpu_runtime.rpc import Server, create_server
from hasgpu_runtime.store.memory import MemoryStore
from hasgpu_runtime.telemetry import Telemetry

ARTIFACT = b"the model's files"
STOP_BOUND_S = 30.0
"""Many times what a gateway takes to start or to stop; a test that hangs must end inside pytest's own bound."""
Behaviour = Callable[["FakeWorker", node_agent_pb2.ExecuteRequest], Awaitable[node_agent_pb2.ExecuteResponse]]


def make_spec(name: str = "echo", artifact: bytes | Artifact = ARTIFACT, **changes) -> FunctionSpec:
    if isinstance(artifact, bytes):
        artifact = Artifact(hashlib.sha256(artifact).hexdigest(), len(artifact))
    spec = FunctionSpec(
        name=name,
        format=ModelFormat.PYTHON,
        artifact=artifact,
        entry="handler.py",
        inputs=(TensorSpec("x", "FP32", (-1, 2)),),
        outputs=(TensorSpec("y", "FP32", (-1, 2)),),
        slo_ms=200,
        timeout_ms=20_000,
        max_batch=4,
        min_instances=0,
    )
    return dataclasses.replace(spec, **changes)


def floats(*values: float) -> bytes:
    return struct.pack(f"<{len(values)}f", *values)


def echo(request: node_agent_pb2.ExecuteRequest) -> node_agent_pb2.ExecuteResponse:
    response = node_agent_pb2.ExecuteResponse(batch=request.batch, execute_ns=1_000_000)
    for item in request.items:
        tensor = item.inputs[0]
        response.results.add().outputs.add(name="y", datatype="FP32", shape=tensor.shape, raw=tensor.raw)
    return response


def failing(request: node_agent_pb2.ExecuteRequest, kind: int, message: str = "no") -> node_agent_pb2.ExecuteResponse:
    response = node_agent_pb2.ExecuteResponse(batch=request.batch)
    for _ in request.items:
        response.results.add().error.CopyFrom(node_agent_pb2.ItemError(kind=kind, message=message))
    return response


class FakeWorker(WorkerServiceServicer):
    """A worker process's service inside the test; `behaviour` answers its batches."""

    def __init__(self) -> None:
        self.requests: list[node_agent_pb2.ExecuteRequest] = []
        self.arrived = asyncio.Condition()
        self.gate = asyncio.Event()
        self.gate.set()
        self.behaviour: Behaviour | None = None
        self._server = grpc.aio.server()
        add_WorkerServiceServicer_to_server(self, self._server)
        self.port = self._server.add_insecure_port("127.0.0.1:0")

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    async def start(self) -> FakeWorker:
        await self._server.start()
        return self

    async def kill(self) -> None:
        await self._server.stop(None)

    async def Execute(self, request_iterator, context):
        async for request in request_iterator:
            self.requests.append(request)
            async with self.arrived:
                self.arrived.notify_all()
            await self.gate.wait()
            yield await self.behaviour(self, request) if self.behaviour else echo(request)

    async def GetWorker(self, request, context):
        return node_agent_pb2.GetWorkerResponse()

    async def DrainWorker(self, request, context):
        return node_agent_pb2.DrainWorkerResponse()

    async def Measure(self, request, context):
        return node_agent_pb2.MeasureResponse()

    async def wait_for_batches(self, count: int) -> None:
        async with asyncio.timeout(20), self.arrived:
            await self.arrived.wait_for(lambda: len(self.requests) >= count)


class Harness:
    """A running gateway and its callers' stubs."""

    make_spec = staticmethod(make_spec)
    floats = staticmethod(floats)
    echo = staticmethod(echo)
    failing = staticmethod(failing)

    def __init__(self, bus: MemoryBus, store: MemoryStore, clock: SystemClock) -> None:
        self.bus, self.store, self.clock = bus, store, clock
        self.gateway: Gateway = None  # type: ignore[assignment]
        self.workers: list[FakeWorker] = []
        self.telemetry = Telemetry()

    async def worker(self) -> FakeWorker:
        worker = await FakeWorker().start()
        self.workers.append(worker)
        return worker

    async def deploy(self, spec: FunctionSpec, artifact: bytes = ARTIFACT, *, replace: bool = False):
        def parts():
            yield gateway_pb2.DeployFunctionRequest(
                header=gateway_pb2.DeployHeader(spec=wire.spec_to_proto(spec), replace=replace)
            )
            for at in range(0, len(artifact), 7):
                yield gateway_pb2.DeployFunctionRequest(chunk=artifact[at : at + 7])

        return (await self.functions.DeployFunction(parts(), timeout=20)).function

    async def announce(self, worker: FakeWorker, **changes) -> InstanceEvent:
        event = InstanceEvent(
            function="echo",
            instance="echo-0",
            node="n1",
            gpu="cpu0",
            row=0,
            state=InstanceState.READY,
            reason="",
            address=worker.address,
            allocation=Allocation(sm_pct=100, request_permille=1000, limit_permille=1000, memory_bytes=1 << 30),
            allocation_revision=1,
            function_revision=1,
            device_model="cpu-2c",
            plan_revision=1,
        )
        event = dataclasses.replace(event, **changes)
        await self.bus.put(instance_subject(event.function, event.instance), wire.encode(event))
        return event

    async def table(self, latency_s: float, *, function: str = "echo", **changes) -> None:
        points = tuple(
            CapacityPoint(batch, 100, quota, latency_s * batch * 1000 / quota, 10.0)
            for batch in (1, 2, 4)
            for quota in (100, 1000)
        )
        table = CapacityTable(function, 1, "cpu-2c", 1, self.clock.unix_ns(), 200, points)
        table = dataclasses.replace(table, **changes)
        await self.bus.put(capacity_subject(function, "cpu-2c"), wire.encode(table))

    def request(self, *rows: tuple[float, float], name: str = "echo", **fields) -> inference_pb2.ModelInferRequest:
        request = inference_pb2.ModelInferRequest(model_name=name, **fields)
        request.inputs.add(name="x", datatype="FP32", shape=[len(rows), 2])
        request.raw_input_contents.append(floats(*(value for row in rows for value in row)))
        return request

    def infer(self, *rows: tuple[float, float], timeout: float = 25, **fields):
        return self.inference.ModelInfer(self.request(*(rows or ((1.0, 2.0),)), **fields), timeout=timeout)

    async def until(self, condition: Callable[[], bool]) -> None:
        """Waits for what events bring about; bounded, never asserted on."""
        async with asyncio.timeout(20):
            while not condition():  # noqa: ASYNC110  any state of the gateway may be waited for
                await asyncio.sleep(0.005)

    async def connected(self, *instances: str) -> None:
        """Waits until the gateway has its streams to these instances (of "echo")."""
        routes = self.lane().routes
        await self.until(lambda: all(name in routes and routes[name].up for name in instances))

    def lane(self, name: str = "echo"):
        return self.gateway.lanes.get(name)


async def run_gateway(
    harness: Harness, settings: GatewaySettings, server: Server, stop: asyncio.Event, started: asyncio.Event
) -> None:
    async with asyncio.TaskGroup() as group:
        world = World(harness.bus, harness.bus, harness.store, harness.clock, harness.telemetry)
        harness.gateway = Gateway(settings, world, server=server, group=group)
        await harness.gateway.start()
        started.set()
        await stop.wait()
        await harness.gateway.stop()


@pytest.fixture
def telemetry() -> Telemetry:
    return Telemetry()


@pytest.fixture
async def bus() -> MemoryBus:
    return MemoryBus()


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore(SystemClock())


@pytest.fixture
async def harness(bus, store, telemetry: Telemetry) -> AsyncIterator[Harness]:
    harness = Harness(bus, store, SystemClock())
    harness.telemetry = telemetry
    settings = GatewaySettings("gw1", max_artifact_bytes=1000, max_message_bytes=100_000, stop_timeout_s=5.0)
    server = create_server(
        address="127.0.0.1:0", max_message_bytes=settings.max_message_bytes, telemetry=harness.telemetry
    )
    stop, started = asyncio.Event(), asyncio.Event()
    harness.stop = stop
    main = asyncio.create_task(run_gateway(harness, settings, server, stop, started))
    harness.main = main
    starting = asyncio.create_task(started.wait())
    try:
        await asyncio.wait([main, starting], timeout=STOP_BOUND_S, return_when=asyncio.FIRST_COMPLETED)
        assert started.is_set(), main
        async with grpc.aio.insecure_channel(harness.gateway.address) as channel:
            harness.channel = channel
            harness.inference = GRPCInferenceServiceStub(channel)
            harness.functions = FunctionServiceStub(channel)
            await harness.until(lambda: harness.gateway.directory.caught_up)
            yield harness
    finally:
        starting.cancel()
        stop.set()
        await asyncio.wait([main], timeout=STOP_BOUND_S)
        stopped = main.done()
        main.cancel()
        # However the gateway ended: a server that outlives its loop would fail whatever test runs when it is collected.
        await server.stop(None)
        for worker in harness.workers:
            await worker.kill()
    assert stopped, f"the gateway does not stop: {asyncio.all_tasks()}"
    await main
