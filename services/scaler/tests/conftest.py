"""A world for the scaler: memory bus and store, a clock moved by hand, a node agent and a gateway acted by the test."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest
from hasgpu_core.capacity import CapacityPoint, CapacityTable, capacity_rps
from hasgpu_core.clock import ManualClock
from hasgpu_core.events import (
    DemandEvent,
    FunctionEvent,
    HorizontalScaleEvent,
    InstanceEvent,
    NodeEvent,
    VerticalScaleEvent,
    capacity_subject,
    demand_subject,
    function_subject,
    instance_subject,
    node_subject,
)
from hasgpu_core.function import MIB, Artifact, FunctionSpec, ModelFormat, TensorSpec
from hasgpu_core.observe import ClusterObserver
from hasgpu_core.policy.hasgpu import HasGpuPolicy
from hasgpu_core.policy.scaling import ScalingSettings
from hasgpu_core.ports import Fence
from hasgpu_core.resources import Allocation, DeviceInfo, InstanceState
from hasgpu_runtime import wire
from hasgpu_runtime.bus.memory import MemoryBus
from hasgpu_runtime.store.memory import MemoryStore
from hasgpu_runtime.telemetry import Telemetry
from hasgpu_scaler.adapters.desired_store import PREFIX, DesiredStore
from hasgpu_scaler.adapters.recording_files import RecordingFiles
from hasgpu_scaler.app import ScalerApp
from hasgpu_scaler.core import ScalerCore
from hasgpu_scaler.recorder import Recorder, RecordingObserver
from hasgpu_scaler.records import DesiredRecord, decode

MODEL = "cpu-2c"
UNIX_OFFSET_NS = 1_700_000_000_000_000_000


def spec(name: str = "f", **fields) -> FunctionSpec:
    tensors = (TensorSpec("x", "FP32", (-1, 4)),)
    made = FunctionSpec(
        name=name,
        format=ModelFormat.PYTHON,
        artifact=Artifact("0" * 64, 1),
        entry="handler.py",
        inputs=tensors,
        outputs=tensors,
        slo_ms=200,
        memory_bytes=100 * MIB,
    )
    return replace(made, **fields)


def table(function: str = "f", *, latency_s: float = 0.01, slo_s: float = 0.2) -> CapacityTable:
    """A model whose batches take `latency_s` on the whole device and in proportion more with less of it."""
    points = []
    for batch in (1, 2, 4, 8):
        for sm_pct in (25, 50, 75, 100):
            for quota in range(100, 1_001, 100):
                whole_s = latency_s * (0.5 + 0.5 * batch)
                taken_s = whole_s / (sm_pct / 100) / (quota / 1_000)
                rate = capacity_rps(batch=batch, latency_s=taken_s, slo_s=slo_s)
                points.append(CapacityPoint(batch, sm_pct, quota, taken_s, rate))
    return CapacityTable(function, 1, MODEL, 1, 0, round(slo_s * 1e3), tuple(points))


class World:
    """What is around a scaler."""

    def __init__(self) -> None:
        self.clock = ManualClock(1_000.0, unix_offset_ns=UNIX_OFFSET_NS)
        self.bus = MemoryBus()
        self.store = MemoryStore(self.clock)
        self.arrived_count = 0
        self.poked_count = 0
        self.beat_count = 0

    def build(self, fence, policy=None, telemetry=None, files: RecordingFiles | None = None) -> ScalerApp:
        recorder = Recorder(files, self.clock) if files is not None else None
        core = ScalerCore(
            policy=policy or HasGpuPolicy(ScalingSettings()),
            observer=RecordingObserver(recorder) if recorder is not None else ClusterObserver(),
            clock=self.clock,
            recorder=recorder,
        )
        return ScalerApp(
            bus=self.bus,
            desired=DesiredStore(self.store),
            clock=self.clock,
            core=core,
            telemetry=telemetry or Telemetry(),
            fence=fence,
            fenced=lambda: None,
            poke=self._poke,
            recordings=files,
        )

    def _poke(self) -> None:
        self.poked_count += 1

    @asynccontextmanager
    async def scaler(
        self, owner: str = "one", *, lead: bool = True, policy=None, telemetry=None, files=None
    ) -> AsyncIterator[ScalerApp]:
        """A scaler whose listening tasks run; it holds the lease when it can get it. Passes are run by the test."""
        held: list[Fence | None] = [None]
        if lead:
            held[0] = await self.store.acquire_lease("scaler", owner, ttl_s=3.0)
        app = self.build(lambda: held[0], policy, telemetry, files)
        app.held = held  # type: ignore[attr-defined]
        tasks = [asyncio.ensure_future(app.watch()), asyncio.ensure_future(app.listen())]
        await app.wait_caught_up()
        await self.settle()
        try:
            yield app
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def settle(self) -> None:
        for _ in range(50):
            await asyncio.sleep(0)

    # What others say.

    async def deploy(self, declared: FunctionSpec, revision: int = 1) -> None:
        event = FunctionEvent(declared, revision, 0)
        await self.bus.put(function_subject(declared.name), wire.encode(event))
        await self.settle()

    async def undeploy(self, name: str) -> None:
        await self.bus.delete(function_subject(name))
        await self.settle()

    async def predict(self, known: CapacityTable) -> None:
        await self.bus.put(capacity_subject(known.function, known.device_model), wire.encode(known))
        await self.settle()

    async def beat(self, node: str = "a", memory_mib: int = 4096) -> None:
        self.beat_count += 1
        device = DeviceInfo(node, "cpu0", MODEL, "cpu", memory_mib * MIB, (25, 50, 75, 100))
        event = NodeEvent(node, f"{node}:1", (device,), self.beat_count, 0)
        await self.bus.put(node_subject(node), wire.encode(event))
        await self.settle()

    async def demand(self, arrived: int, *, queued: int = 0, function: str = "f", gateway: str = "gw") -> None:
        self.arrived_count += arrived
        event = DemandEvent(
            function=function,
            gateway=gateway,
            epoch="1",
            observed_unix_ns=self.clock.unix_ns(),
            arrived_count=self.arrived_count,
            ok_count=self.arrived_count,
            failed_count=0,
            refused_count=0,
            late_count=0,
            queued_count=queued,
            in_flight_count=0,
            oldest_wait_ms=0,
            window_count=0,
            p50_ms=None,
            p95_ms=None,
            p99_ms=None,
        )
        await self.bus.publish(demand_subject(function, gateway), wire.encode(event))
        await self.settle()

    async def report(
        self,
        instance: str,
        share: Allocation,
        revision: int,
        *,
        node: str = "a",
        row: int = 0,
        state: InstanceState = InstanceState.READY,
    ) -> None:
        function = instance.rpartition("-")[0]
        event = InstanceEvent(
            function=function,
            instance=instance,
            node=node,
            gpu="cpu0",
            row=row,
            state=state,
            reason="",
            address="127.0.0.1:1",
            allocation=share,
            allocation_revision=revision,
            function_revision=1,
            device_model=MODEL,
            plan_revision=1,
        )
        await self.bus.put(instance_subject(function, instance), wire.encode(event))
        await self.settle()

    async def withdraw(self, instance: str) -> None:
        await self.bus.delete(instance_subject(instance.rpartition("-")[0], instance))
        await self.settle()

    # What the scaler has said.

    def commands(self) -> list[HorizontalScaleEvent]:
        """All commands sent, oldest first."""
        return [wire.decode_horizontal(stored.payload) for stored in self.bus._commands._waiting]

    def verticals(self) -> dict[str, VerticalScaleEvent]:
        """The vertical values that the bus holds, by subject."""
        return {
            subject: wire.decode_vertical(change.payload)
            for subject, change in self.bus._state.items()
            if subject.startswith("scale.vertical.") and change.payload is not None
        }

    async def record(self, function: str = "f") -> DesiredRecord | None:
        """What the store holds."""
        stored = await self.store.get(PREFIX + function)
        return decode(stored.value) if stored is not None else None

    # A whole small cluster.

    async def obey(self, node: str = "a") -> None:
        """Acts scheduler and agent: what is desired runs, with the newest share, in the row of its SM share."""
        for record in [decode(v.value) for v in (await self.store.list(PREFIX)).values()]:
            for item in record.instances:
                share, revision = item.allocation, record.revision
                row = (25, 50, 75, 100).index(share.sm_pct)
                await self.report(item.instance, share, revision, node=node, row=row)
            wanted = {item.instance for item in record.instances}
            prefix = f"instance.{record.function}."
            for subject in [s for s in self.bus._state if s.startswith(prefix)]:
                if subject.removeprefix(prefix) not in wanted:
                    await self.withdraw(subject.removeprefix(prefix))

    async def ready(self, app: ScalerApp, declared: FunctionSpec | None = None) -> None:
        """A function with its first instances ready."""
        declared = declared or spec()
        await self.beat()
        await self.deploy(declared)
        await self.predict(table(declared.name))
        await app.run_pass()
        await self.obey()

    async def load(self, app: ScalerApp, rate_rps: float, seconds: float, *, obey: bool = True) -> None:
        """Steady demand, a pass every half second."""
        for step in range(round(seconds * 2)):
            self.clock.advance(0.5)
            if step % 2:
                await self.beat()
            await self.demand(round(rate_rps / 2))
            await app.run_pass()
            if obey:
                await self.obey()


@pytest.fixture
def world() -> World:
    return World()


@pytest.fixture
def make_spec():
    return spec


@pytest.fixture
def make_table():
    return table
