"""Scaler and scheduler as processes on real brokers: from a function to a plan, through kills and restarts."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from hasgpu.scaler.v1 import scaler_pb2, scaler_pb2_grpc
from hasgpu.scheduler.v1 import scheduler_pb2, scheduler_pb2_grpc
from hasgpu_core.events import (
    FunctionEvent,
    InstanceEvent,
    NodeEvent,
    PlanEvent,
    VerticalScaleEvent,
    function_subject,
    instance_subject,
    node_subject,
)
from hasgpu_core.function import MIB, Artifact, FunctionSpec, ModelFormat, TensorSpec
from hasgpu_core.ports import CaughtUp
from hasgpu_core.resources import DeviceInfo, InstanceState
from hasgpu_runtime import wire
from hasgpu_runtime.bus.nats import NatsBus
from hasgpu_runtime.rpc import open_channel
from hasgpu_runtime.testing import nats_bus, nats_server, redis_server, redis_store  # noqa: F401  fixtures

PATIENCE_S = 30.0
DEVICE = DeviceInfo("a", "cpu0", "cpu-2c", "cpu", 4_096 * MIB, (25, 50, 75, 100))
TENSORS = (TensorSpec("x", "FP32", (-1, 4)),)
SPEC = FunctionSpec(
    name="f",
    format=ModelFormat.PYTHON,
    artifact=Artifact("0" * 64, 1),
    entry="handler.py",
    inputs=TENSORS,
    outputs=TENSORS,
    slo_ms=200,
    memory_bytes=64 * MIB,
)


class Process:
    """One service."""

    def __init__(self, module: str, environ: dict[str, str], log: Path) -> None:
        self._command = [sys.executable, "-m", module]
        self._environ = environ
        self._log = log
        self.start()

    def start(self) -> None:
        self._from = self._log.stat().st_size if self._log.exists() else 0
        with self._log.open("ab") as out:
            self._process = subprocess.Popen(self._command, env=self._environ, stdout=out, stderr=out)

    def kill(self) -> None:
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()

    def stop(self) -> int:
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
        return self._process.wait(timeout=PATIENCE_S)

    async def address(self) -> str:
        """Where it listens, once it is ready for work."""

        def listening() -> str | None:
            assert self._process.poll() is None, self.text()
            found = re.search(r"listens on (\S+:\d+)", self.text())
            return found[1] if found else None

        where = await until(listening)
        async with open_channel(where) as channel:
            stub = health_pb2_grpc.HealthStub(channel)

            async def serving() -> bool:
                answer = await stub.Check(health_pb2.HealthCheckRequest(), timeout=5)
                return answer.status == health_pb2.HealthCheckResponse.SERVING

            await until_true(serving)
        return where

    def text(self) -> str:
        return self._log.read_bytes()[self._from :].decode()


async def until(look: Callable[[], str | None]) -> str:
    async with asyncio.timeout(PATIENCE_S):
        while True:
            found = look()
            if found is not None:
                return found
            await asyncio.sleep(0.05)


async def until_true(ask) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not await ask():  # noqa: ASYNC110  what is asked about lies in other processes
            await asyncio.sleep(0.05)


class Agent:
    """Acts the node agent of node a: beats, and reports what the plan names as running."""

    def __init__(self, bus: NatsBus) -> None:
        self._bus = bus
        self.plan = PlanEvent("a", 0)
        self.verticals: dict[str, VerticalScaleEvent] = {}
        self.beats = True

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(self._beat())
            group.create_task(self._obey())

    async def _beat(self) -> None:
        count = 0
        while True:
            count += 1
            if self.beats:
                event = NodeEvent("a", "127.0.0.1:1", (DEVICE,), count, self.plan.revision)
                await self._bus.put(node_subject("a"), wire.encode(event))
            await asyncio.sleep(0.5)

    async def _obey(self) -> None:
        async with self._bus.watch("plan.a", "scale.vertical.a.>") as changes:
            async for change in changes:
                if isinstance(change, CaughtUp):
                    continue
                if change.subject == "plan.a" and change.payload is not None:
                    plan = wire.decode_plan(change.payload)
                    gone = {p.instance for p in self.plan.instances} - {p.instance for p in plan.instances}
                    self.plan = plan
                    for instance in gone:
                        await self._bus.delete(instance_subject("f", instance))
                elif change.payload is not None:
                    event = wire.decode_vertical(change.payload)
                    self.verticals[event.instance] = event
                for entry in self.plan.instances:
                    await self._report(entry)

    async def _report(self, entry) -> None:
        share, revision = entry.allocation, entry.allocation_revision
        vertical = self.verticals.get(entry.instance)
        if vertical is not None and vertical.revision > revision:
            share, revision = vertical.allocation, vertical.revision
        event = InstanceEvent(
            function=entry.function,
            instance=entry.instance,
            node="a",
            gpu=entry.gpu,
            row=entry.row,
            state=InstanceState.READY,
            reason="",
            address="127.0.0.1:1",
            allocation=share,
            allocation_revision=revision,
            function_revision=1,
            device_model=DEVICE.model,
            plan_revision=self.plan.revision,
        )
        await self._bus.put(instance_subject(entry.function, entry.instance), wire.encode(event))


@pytest.fixture
async def agent(nats_bus, redis_store) -> AsyncIterator[Agent]:  # noqa: F811  the imported fixtures
    acting = Agent(nats_bus)
    task = asyncio.create_task(acting.run())
    yield acting
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


@pytest.fixture
def services(tmp_path, nats_server, redis_server):  # noqa: F811  the imported fixtures
    environ = {
        **os.environ,
        "HASGPU_NATS_URL": nats_server.url,
        "HASGPU_REDIS_URL": redis_server.url,
        "HASGPU_LISTEN": "127.0.0.1:0",
        "HASGPU_NODE_TIMEOUT_S": "3",
    }
    running = {name: Process(f"hasgpu_{name}", environ, tmp_path / f"{name}.log") for name in ("scaler", "scheduler")}
    yield running
    codes = {name: process.stop() for name, process in running.items()}
    assert codes == {"scaler": 0, "scheduler": 0}


async def planned(agent: Agent, *instances: str) -> None:
    async def there() -> bool:
        return [p.instance for p in agent.plan.instances] == list(instances)

    await until_true(there)


async def by_hand(address: str, **fields) -> scaler_pb2.DesiredState:
    """Scales; while nobody leads (right after a start) it is asked again."""
    async with open_channel(address) as channel, asyncio.timeout(PATIENCE_S):
        stub = scaler_pb2_grpc.ScalerServiceStub(channel)
        while True:
            try:
                answer = await stub.ManualScale(scaler_pb2.ManualScaleRequest(function="f", **fields), timeout=10)
            except grpc.aio.AioRpcError as error:
                if error.code() is not grpc.StatusCode.UNAVAILABLE:
                    raise
                await asyncio.sleep(0.2)
            else:
                return answer.state


@pytest.mark.timeout(180)
async def test_a_function_becomes_a_plan_and_both_services_survive_being_killed(services, agent, nats_bus):  # noqa: F811
    scaler, scheduler = services["scaler"], services["scheduler"]
    await nats_bus.put(function_subject("f"), wire.encode(FunctionEvent(SPEC, 1, 0)))
    await planned(agent, "f-0")
    first = agent.plan

    state = await by_hand(await scaler.address(), request_permille=700)
    assert state.instances[0].allocation.request_permille == 700

    async def resized() -> bool:
        vertical = agent.verticals.get("f-0")
        return vertical is not None and vertical.allocation.request_permille == 700

    await until_true(resized)

    scheduler.kill()
    scheduler.start()
    scaler.kill()
    scaler.start()
    await by_hand(await scaler.address(), request_permille=300, instances=2)
    await planned(agent, "f-0", "f-1")
    assert agent.plan.revision > first.revision
    assert [p.allocation.request_permille for p in agent.plan.instances] == [300, 300]

    async with open_channel(await scheduler.address()) as channel:
        stub = scheduler_pb2_grpc.SchedulerServiceStub(channel)
        cluster = await stub.GetCluster(scheduler_pb2.GetClusterRequest(), timeout=10)
        assert cluster.leader
        assert [row.used_permille for row in cluster.nodes[0].devices[0].rows] == [600]
        agent.beats = False

        async def lost() -> bool:
            seen = await stub.GetCluster(scheduler_pb2.GetClusterRequest(), timeout=10)
            return not seen.nodes[0].alive and len(seen.unplaced) == 2

        await until_true(lost)
        agent.beats = True

        async def back() -> bool:
            seen = await stub.GetCluster(scheduler_pb2.GetClusterRequest(), timeout=10)
            return seen.nodes[0].alive and not seen.unplaced

        await until_true(back)
    await planned(agent, "f-0", "f-1")

    await nats_bus.delete(function_subject("f"))
    await planned(agent)
