"""A rapp process in memory: the real app and gRPC servers, a bus double, and a node agent that measures a formula."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from hasgpu.node_agent.v1 import node_agent_pb2, node_agent_pb2_grpc
from hasgpu_core.capacity import CapacityTable
from hasgpu_core.clock import ManualClock
from hasgpu_core.errors import HasgpuError
from hasgpu_core.events import (
    BatchObservation,
    FunctionEvent,
    InstanceEvent,
    NodeEvent,
    capacity_subject,
    function_subject,
    instance_subject,
    node_subject,
)
from hasgpu_core.function import Artifact, FunctionSpec, ModelFormat, TensorSpec
from hasgpu_core.ports import CaughtUp
from hasgpu_core.resources import Allocation, DeviceInfo, InstanceState
from hasgpu_predictor import TrainingSettings
from hasgpu_rapp.adapters.agents import AgentProfiler
from hasgpu_rapp.adapters.repository import Repository
from hasgpu_rapp.app import RappApp
from hasgpu_runtime import wire
from hasgpu_runtime.bus.memory import MemoryBus
from hasgpu_runtime.rpc import create_server
from hasgpu_runtime.telemetry import Telemetry

DEVICE_MODEL = "cpu-2c"
RUNGS = (25, 50, 75, 100)
OVERHEAD_S = 0.001
TIMEOUT_S = 30


def true_device_time_s(batch: int, sm_pct: int) -> float:
    return 0.002 + (0.004 + 0.006 * batch) * 100 / sm_pct


def spec(name: str = "fn", **changes: Any) -> FunctionSpec:
    tensor = TensorSpec("x", "FP32", (-1, 3))
    base = FunctionSpec(
        name=name,
        format=ModelFormat.PYTHON,
        artifact=Artifact("a" * 64, 1 << 20),
        entry="handler.py",
        inputs=(tensor,),
        outputs=(tensor,),
        slo_ms=200,
        max_batch=8,
    )
    return replace(base, **changes)


@dataclass
class FakeAgent(node_agent_pb2_grpc.NodeAgentServiceServicer):
    """Answers Profile from the formula, on a grid of its own; raises what it is told to, as often as told."""

    errors: list[HasgpuError] = field(default_factory=list)
    always: HasgpuError | None = None
    hold: asyncio.Event | None = None
    runs_count: int = 0
    slower: float = 1.0
    """Device times are so many times the formula."""
    obeys: bool = False
    """It measures the configurations that it is asked for."""
    requests: list[node_agent_pb2.ProfileRequest] = field(default_factory=list)
    operators: dict[str, node_agent_pb2.OperatorTable] = field(default_factory=dict)
    """Of the artifacts of this digest; those of others can't be exported."""
    scale: dict[str, float] = field(default_factory=dict)
    """Device times of the artifacts of this digest are so many times the formula."""

    async def Profile(self, request: Any, context: Any) -> AsyncIterator[node_agent_pb2.ProfileResponse]:
        self.runs_count += 1
        self.requests.append(request)
        yield node_agent_pb2.ProfileResponse(progress="loading")
        digest = request.spec.artifact.sha256
        if request.operators:
            why = node_agent_pb2.OperatorTable(reason="expected one that torch.export can take, got a branch on values")
            yield node_agent_pb2.ProfileResponse(operators=self.operators.get(digest, why))
        if self.hold is not None:
            await self.hold.wait()
        if self.always is not None:
            raise self.always
        if self.errors:
            raise self.errors.pop(0)
        cells = [(batch, sm, quota) for batch in (1, 2, 4, 8) for sm in RUNGS for quota in (200, 500, 1000)]
        if self.obeys:
            cells = [(c.batch, c.sm_pct, c.quota_permille) for c in request.configurations]
        for batch, sm, quota in cells:
            d = self.slower * self.scale.get(digest, 1.0) * true_device_time_s(batch, sm)
            yield node_agent_pb2.ProfileResponse(
                point=node_agent_pb2.ProfilePoint(
                    batch=batch,
                    sm_pct=sm,
                    quota_permille=quota,
                    latency_ns=round(max(d + OVERHEAD_S, d * 1000 / quota) * 1e9),
                    device_time_ns=round(d * 1e9),
                    longest_segment_ns=5_000_000,
                    repetitions_count=5,
                )
            )


def convolutions(scale: float, count: int = 10) -> node_agent_pb2.OperatorTable:
    """A model of `count` equal convolutions; as much work as the formula takes `scale` times."""
    row = node_agent_pb2.Operator(
        op="convolution",
        flops=round(scale * 6e7),
        input_bytes=200_000,
        weight_bytes=round(scale * 40_000),
        output_bytes=200_000,
        groups=1,
        output_shape=(1, 64, 28, 28),
    )
    return node_agent_pb2.OperatorTable(rows=[row] * count)


class Rig:
    """The bus, the agent, and at most one rapp at a time, so that a test can restart it."""

    def __init__(self, folder: Path) -> None:
        self.bus = MemoryBus()
        self.clock = ManualClock(100.0, unix_offset_ns=10**18)
        self.agent = FakeAgent()
        self.agent_address = ""
        self.repository = Repository(folder / "rapp")
        self.app: RappApp = None  # type: ignore[assignment]
        self.tables: list[CapacityTable] = []

    @asynccontextmanager
    async def rapp(self) -> AsyncIterator[RappApp]:
        poked = asyncio.Event()

        async def passes(app: RappApp) -> None:
            while True:
                await poked.wait()
                poked.clear()
                await app.reconcile()

        async with asyncio.TaskGroup() as tasks:
            app = RappApp(
                bus=self.bus,
                clock=self.clock,
                repository=self.repository,
                measurer=AgentProfiler(),
                tasks=tasks,
                poke=poked.set,
                training=TrainingSettings(trees_count=30, cross_validate=False),
                telemetry=Telemetry(),
            )
            self.app = app
            self.poke = poked.set
            await app.load()
            own = [tasks.create_task(app.listen(_nothing)), tasks.create_task(passes(app))]
            try:
                yield app
            finally:
                app.profiling.keep_only(set())
                for task in own:
                    task.cancel()

    async def node(self, name: str = "n1", **changes: Any) -> None:
        device = DeviceInfo(name, "cpu0", DEVICE_MODEL, "cpu", 1 << 30, RUNGS)
        event = NodeEvent(name, self.agent_address, (device,), self.clock.unix_ns(), 0)
        await self.bus.put(node_subject(name), wire.encode(replace(event, **changes)))

    async def deploy(self, what: FunctionSpec, revision: int = 1) -> None:
        event = FunctionEvent(what, revision, self.clock.unix_ns())
        await self.bus.put(function_subject(what.name), wire.encode(event))

    async def observe(self, ratio: float, *, batches_count: int, revision: int = 1) -> None:
        observation = BatchObservation(2, 50, 500, 1, round(ratio * true_device_time_s(2, 50) * 1e9))
        await self.observe_batches((observation,) * 32, batches_count=batches_count, revision=revision)

    async def observe_batches(
        self, observations: tuple[BatchObservation, ...], *, batches_count: int, revision: int = 1
    ) -> None:
        event = InstanceEvent(
            function="fn",
            instance="fn-1",
            node="n1",
            gpu="cpu0",
            row=0,
            state=InstanceState.READY,
            reason="",
            address="",
            allocation=Allocation(50, 500, 500, 1),
            allocation_revision=1,
            function_revision=revision,
            device_model=DEVICE_MODEL,
            plan_revision=1,
            batches_count=batches_count,
            observations=observations,
        )
        await self.bus.put(instance_subject("fn", "fn-1"), wire.encode(event))

    async def table(
        self, wanted: Callable[[CapacityTable], bool] = lambda _table: True, function: str = "fn"
    ) -> CapacityTable:
        """Waits for a table in force that fits."""
        subject = capacity_subject(function, DEVICE_MODEL)
        async with asyncio.timeout(TIMEOUT_S), self.bus.watch(subject) as changes:
            async for change in changes:
                if not isinstance(change, CaughtUp) and change.payload is not None:
                    table = wire.decode_capacity(change.payload)
                    self.tables.append(table)
                    if wanted(table):
                        return table
        raise AssertionError("unreachable")

    async def gone(self, subject: str) -> None:
        """Waits until a subject has no value."""
        async with asyncio.timeout(TIMEOUT_S), self.bus.watch(subject) as changes:
            there = False
            async for change in changes:
                if isinstance(change, CaughtUp):
                    if not there:
                        return
                elif change.payload is None:
                    return
                else:
                    there = True

    async def until(self, holds: Callable[[], bool]) -> None:
        """Lets the loop run until a condition holds."""
        async with asyncio.timeout(TIMEOUT_S):
            while not holds():  # noqa: ASYNC110  no event tells of all that tests wait for
                await asyncio.sleep(0.005)


async def _nothing() -> None:
    """Nobody asks for health here."""


def profiled(table: CapacityTable) -> bool:
    return table.basis == "profiled"


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    rig = Rig(tmp_path)
    server = create_server(address="127.0.0.1:0")
    node_agent_pb2_grpc.add_NodeAgentServiceServicer_to_server(rig.agent, server)  # type: ignore[arg-type]
    await server.start()
    rig.agent_address = server.address
    try:
        yield rig
    finally:
        with suppress(asyncio.CancelledError):
            await server.stop(None)
