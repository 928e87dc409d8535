"""A whole node agent with real worker processes on an in-memory bus."""

from __future__ import annotations

import asyncio
import hashlib
import io
import os
import signal
import struct
import tarfile
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc.aio
import psutil
import pytest
from hasgpu.node_agent.v1 import node_agent_pb2 as pb
from hasgpu.node_agent.v1 import node_agent_pb2_grpc
from hasgpu_core.events import (
    FunctionEvent,
    InstanceEvent,
    PlanEvent,
    PlannedInstance,
    device_subject,
    function_subject,
    instance_subject,
    node_subject,
    plan_subject,
    vertical_subject,
)
from hasgpu_core.function import Artifact, FunctionSpec
from hasgpu_core.ports import CaughtUp
from hasgpu_core.resources import DeviceHealth, InstanceState
from hasgpu_device.backends.cuda import nvml
from hasgpu_node_agent import pulse
from hasgpu_node_agent.adapters.folders import NodeFolders
from hasgpu_node_agent.app import Node
from hasgpu_node_agent.devices import NodeDevice
from hasgpu_node_agent.hardware import Hardware, find_hardware
from hasgpu_node_agent.settings import AgentSettings, DeviceSetting
from hasgpu_runtime.bus.memory import MemoryBus
from hasgpu_runtime.clock import SystemClock
from hasgpu_runtime.metrics import Metrics
from hasgpu_runtime.telemetry import Telemetry
from hasgpu_runtime.wire import decode_device, decode_instance, decode_node, encode, spec_to_proto

HANDLER = """
def infer(batch):
    return {"y": batch["x"] * FACTOR}

FACTOR = 2
"""

STUCK = """
import ctypes

def infer(batch):
    if batch["x"][0, 0] == 99:
        ctypes.PyDLL(None).sleep(3600)
    return {"y": batch["x"]}
"""
"""Hangs, asked to, with Python's interpreter lock held: no thread of the worker runs any more."""

pytestmark = pytest.mark.timeout(120)


class Cluster:
    """The rest of the system, as far as a node agent sees it."""

    def __init__(self, state_dir: Path, spec: FunctionSpec) -> None:
        self.bus = MemoryBus()
        self.state_dir = state_dir
        self.spec = spec
        self.revision = 0
        self.node: Node | None = None

    async def deploy(self, handler: str = HANDLER, **changes: Any) -> None:
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as archive:
            info = tarfile.TarInfo("handler.py")
            info.size = len(handler)
            archive.addfile(info, io.BytesIO(handler.encode()))
        data = buffer.getvalue()
        self.spec = replace(self.spec, artifact=Artifact(hashlib.sha256(data).hexdigest(), len(data)), **changes)
        await self.bus.put_artifact(self.spec.artifact.sha256, data)
        self.revision += 1
        await self.bus.put(function_subject(self.spec.name), encode(FunctionEvent(self.spec, self.revision, 0)))

    async def plan(self, revision: int, *instances: PlannedInstance) -> None:
        await self.bus.put(plan_subject("n"), encode(PlanEvent("n", revision, instances, 1)))

    @asynccontextmanager
    async def agent(self, hardware: Hardware | None = None) -> AsyncIterator[Node]:
        """An agent that is cut off at the end, as if it were killed: its workers run on."""
        settings = AgentSettings(node="n", devices=(DeviceSetting("cpu", 2),), state_dir=self.state_dir)
        tasks: list[asyncio.Task[None]] = []

        def spawn(coroutine: Any) -> None:
            tasks.append(asyncio.get_running_loop().create_task(coroutine))

        folders = NodeFolders(self.state_dir / "n")
        node = Node(
            settings,
            folders=folders,
            hardware=hardware or find_hardware(settings, folders, {}, SystemClock().now_s),
            listen="127.0.0.1:0",
            advertise="",
            bus=self.bus,
            store=self.bus,
            clock=SystemClock(),
            telemetry=Telemetry(),
            metrics=Metrics(),
            spawn=spawn,
        )
        spawn(node.run())
        try:
            yield node
        finally:
            for task in tasks:
                task.cancel()
            results = await asyncio.gather(*tasks, return_exceptions=True)
            await node.close()
            assert all(r is None or isinstance(r, asyncio.CancelledError) for r in results), results

    async def until(self, instance: str, is_so: Callable[[InstanceEvent], bool]) -> InstanceEvent:
        """Waits for an event of an instance."""
        async with asyncio.timeout(60), self.bus.watch(instance_subject("*", instance)) as changes:
            async for change in changes:
                if not isinstance(change, CaughtUp) and change.payload is not None:
                    event = decode_instance(change.payload)
                    if is_so(event):
                        return event
        raise AssertionError

    async def until_gone(self, instance: str) -> None:
        async with asyncio.timeout(60), self.bus.watch(instance_subject("*", instance)) as changes:
            async for change in changes:
                if not isinstance(change, CaughtUp) and change.payload is None:
                    return

    async def ready(self, instance: str = "f-0") -> InstanceEvent:
        return await self.until(instance, lambda e: e.state is InstanceState.READY)


async def execute(address: str, *values: float) -> Any:
    item = pb.BatchItem(rows=1)
    item.inputs.add(name="x", datatype="FP32", shape=[1, len(values)], raw=struct.pack(f"<{len(values)}f", *values))

    async def requests() -> AsyncIterator[pb.ExecuteRequest]:
        yield pb.ExecuteRequest(batch=1, items=[item])

    async with grpc.aio.insecure_channel(address) as channel:
        stub = node_agent_pb2_grpc.WorkerServiceStub(channel)
        async for response in stub.Execute(requests()):
            return response


@pytest.fixture
async def cluster(tmp_path: Path, make: Any) -> AsyncIterator[Cluster]:
    cluster = Cluster(tmp_path / "state", make.function().spec)
    yield cluster
    left = [p for p in psutil.process_iter() if str(tmp_path) in " ".join(_cmdline(p))]
    for process in left:
        process.kill()


def _cmdline(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


async def test_an_instance_from_plan_to_retirement(cluster: Cluster, make: Any) -> None:
    async with cluster.agent(), cluster.bus.subscribe(device_subject("n", "*")) as devices:
        await cluster.deploy()
        await cluster.plan(1, make.planned(allocation=make.share(300, sm=50)))
        event = await cluster.ready()
        assert event.allocation == make.share(300, sm=50)
        assert event.device_model == "cpu-2c"
        answer = await execute(event.address, 1.0, 2.5)
        assert answer.results[0].outputs[0].raw == struct.pack("<2f", 2.0, 5.0)
        assert (answer.sm_pct, answer.request_permille) == (50, 300)

        change = make.vertical(allocation=make.share(600, sm=100, limit=900), revision=2)
        await cluster.bus.put(vertical_subject("n", "f-0"), encode(change))
        resized = await cluster.until("f-0", lambda e: e.allocation_revision == 2)
        assert resized.allocation == make.share(600, sm=100, limit=900)
        assert resized.pid == event.pid
        answer = await execute(event.address, 1.0, 2.5)
        assert (answer.sm_pct, answer.request_permille) == (100, 600)

        seen = await cluster.until("f-0", lambda e: any(o.request_permille == 600 for o in e.observations))
        assert (seen.device_time_ns > 0, seen.batches_count >= 2) == (True, True)
        async for message in devices:
            device = decode_device(message.payload)
            if device.allocated_gpu_ns and device.rows and device.rows[0].used_permille == 600:
                break

        retiring = asyncio.ensure_future(
            cluster.until("f-0", lambda e: e.state is InstanceState.DRAINING and e.address == event.address)
        )
        await asyncio.sleep(0)
        gone = asyncio.ensure_future(cluster.until_gone("f-0"))
        await asyncio.sleep(0)
        await cluster.plan(2)
        await retiring
        await gone
        assert not psutil.pid_exists(event.pid)
        assert not (cluster.state_dir / "n" / "instances" / "f-0").exists()


async def test_a_killed_worker_comes_back(cluster: Cluster, make: Any) -> None:
    async with cluster.agent():
        await cluster.deploy()
        await cluster.plan(1, make.planned())
        event = await cluster.ready()
        failed = asyncio.ensure_future(cluster.until("f-0", lambda e: e.state is InstanceState.FAILED))
        await asyncio.sleep(0)
        os.kill(event.pid, signal.SIGKILL)
        assert "was killed by SIGKILL" in (await failed).reason
        again = await cluster.until("f-0", lambda e: e.state is InstanceState.READY and e.pid != event.pid)
        assert again.restarts_count == 1
        answer = await execute(again.address, 3.0, 4.0)
        assert answer.results[0].outputs[0].raw == struct.pack("<2f", 6.0, 8.0)


async def test_a_worker_hung_in_native_code_is_killed_and_comes_back(
    cluster: Cluster, make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pulse, "SILENCE_S", 2.0)
    monkeypatch.setattr(pulse, "EXECUTION_MARGIN_S", 1.5)
    async with cluster.agent():
        await cluster.deploy(STUCK, execution_timeout_ms=200)
        await cluster.plan(1, make.planned())
        event = await cluster.ready()
        failed = asyncio.ensure_future(cluster.until("f-0", lambda e: e.state is InstanceState.FAILED))
        await asyncio.sleep(0)
        with pytest.raises(grpc.aio.AioRpcError):
            await execute(event.address, 99.0, 0.0)
        assert "no sign of life" in (await failed).reason
        again = await cluster.until("f-0", lambda e: e.state is InstanceState.READY and e.pid != event.pid)
        assert not psutil.pid_exists(event.pid)
        answer = await execute(again.address, 3.0, 4.0)
        assert answer.results[0].outputs[0].raw == struct.pack("<2f", 3.0, 4.0)


async def test_artifacts_go_when_nothing_needs_them(cluster: Cluster, make: Any) -> None:
    folder = cluster.state_dir / "n" / "artifacts"

    async def only(*digests: str) -> None:
        async with asyncio.timeout(30):
            while {path.name for path in folder.iterdir()} != set(digests):  # noqa: ASYNC110  done by other tasks
                await asyncio.sleep(0.02)

    async with cluster.agent():
        await cluster.deploy()
        await cluster.plan(1, make.planned())
        await cluster.ready()
        first = cluster.spec.artifact.sha256
        await only(first)
        await cluster.deploy(HANDLER.replace("FACTOR = 2", "FACTOR = 3"))
        await cluster.until("f-0", lambda e: e.function_revision == 2 and e.state is InstanceState.READY)
        await only(cluster.spec.artifact.sha256)
        await cluster.bus.delete(function_subject("f"))
        await cluster.plan(2)
        await only()


async def test_what_another_wrote_over_is_told_again(cluster: Cluster, make: Any) -> None:
    async with cluster.agent():
        await cluster.deploy()
        await cluster.plan(1, make.planned())
        event = await cluster.ready()
        await cluster.bus.delete(instance_subject("f", "f-0"))
        assert (await cluster.ready()).pid == event.pid


async def test_a_handler_that_cannot_be_loaded_is_told_in_words(cluster: Cluster, make: Any) -> None:
    async with cluster.agent():
        await cluster.deploy("import nothing_of_that_name\n")
        await cluster.plan(1, make.planned())
        failed = await cluster.until("f-0", lambda e: e.state is InstanceState.FAILED)
        assert "nothing_of_that_name" in failed.reason
        await cluster.deploy()
        await cluster.ready()


async def test_workers_outlive_their_agent_and_are_adopted(cluster: Cluster, make: Any) -> None:
    async with cluster.agent():
        await cluster.deploy()
        await cluster.plan(1, make.planned(), make.planned("f-1"))
        kept, dropped = await cluster.ready("f-0"), await cluster.ready("f-1")
        await cluster.bus.put(
            vertical_subject("n", "f-0"), encode(make.vertical(allocation=make.share(450), revision=6))
        )
        await cluster.until("f-0", lambda e: e.allocation_revision == 6)
    answer = await execute(kept.address, 1.0, 1.0)
    assert answer.results[0].outputs[0].raw == struct.pack("<2f", 2.0, 2.0)
    await cluster.bus.delete(instance_subject("f", "f-0"))
    await cluster.plan(2, make.planned())
    async with cluster.agent() as node:
        adopted = await cluster.ready("f-0")
        assert (adopted.pid, adopted.address, adopted.allocation_revision) == (kept.pid, kept.address, 6)
        assert adopted.allocation.request_permille == 450
        await cluster.until_gone("f-1")
        assert not psutil.pid_exists(dropped.pid) or psutil.Process(dropped.pid).status() == psutil.STATUS_ZOMBIE
        gone = asyncio.ensure_future(cluster.until_gone("f-0"))
        await asyncio.sleep(0)
        await node.stop()
        await gone
        assert not list((cluster.state_dir / "n" / "instances").iterdir())


async def test_another_artifact_is_rolled_out_without_a_gap(cluster: Cluster, make: Any) -> None:
    async with cluster.agent():
        await cluster.deploy()
        await cluster.plan(1, make.planned())
        old = await cluster.ready()
        states: list[InstanceState] = []

        def is_new(event: InstanceEvent) -> bool:
            states.append(event.state)
            return event.function_revision == 2 and event.state is InstanceState.READY

        await cluster.deploy(HANDLER.replace("FACTOR = 2", "FACTOR = 3"))
        new = await cluster.until("f-0", is_new)
        assert set(states) == {InstanceState.READY}
        assert new.address != old.address
        answer = await execute(new.address, 1.0, 1.0)
        assert answer.results[0].outputs[0].raw == struct.pack("<2f", 3.0, 3.0)


async def test_profile_status_and_drain_over_grpc(cluster: Cluster, make: Any) -> None:
    async with cluster.agent() as node:
        await cluster.deploy(max_batch=2)
        async with grpc.aio.insecure_channel(node.address) as channel:
            stub = node_agent_pb2_grpc.NodeAgentServiceStub(channel)
            order = pb.ProfileRequest(
                spec=spec_to_proto(cluster.spec),
                gpu="cpu0",
                budget_ms=3_000,
                sm_pcts=[50, 100],
                quotas_permille=[1_000],
                operators=True,
            )
            answers = [answer async for answer in stub.Profile(order)]
            points = [answer.point for answer in answers if answer.WhichOneof("event") == "point"]
            (table,) = [answer.operators for answer in answers if answer.WhichOneof("event") == "operators"]
            assert not table.rows
            assert "expected a handler that calls a torch.nn.Module" in table.reason
            async with asyncio.timeout(10):
                while list((cluster.state_dir / "n" / "profiles").iterdir()):  # noqa: ASYNC110  done by another task
                    await asyncio.sleep(0.01)
            assert {(p.batch, p.sm_pct) for p in points} == {(1, 50), (1, 100), (2, 50), (2, 100)}
            assert all(p.latency_ns > 0 and p.device_time_ns > 0 and p.repetitions_count > 0 for p in points)

            with pytest.raises(grpc.aio.AioRpcError) as refused:
                async for _ in stub.Profile(pb.ProfileRequest(spec=order.spec, gpu="gpu7")):
                    pass
            assert refused.value.code() is grpc.StatusCode.NOT_FOUND

            await stub.Drain(pb.DrainRequest(draining=True))
            await cluster.plan(1, make.planned())
            pending = await cluster.until("f-0", lambda e: bool(e.reason))
            assert "draining" in pending.reason
            status = await stub.GetStatus(pb.GetStatusRequest())
            assert status.node.draining
            assert [i.instance for i in status.instances] == ["f-0"]
            assert status.devices[0].device.gpu == "cpu0"
            async with cluster.bus.watch(node_subject("n")) as changes:
                async for change in changes:
                    if not isinstance(change, CaughtUp) and change.payload and decode_node(change.payload).draining:
                        break


class StillGauges:
    """NVML that always reads the same."""

    def latest(self, uuid: str) -> nvml.Telemetry:
        return nvml.Telemetry(uuid, nvml.Health.OK, "", memory_used_bytes=3 << 30, busy_pct=40, power_mw=250_000)

    async def refresh(self) -> None:
        pass


def gpu_hardware(host: Any, make: Any, mode: str = "mps+pct") -> Hardware:
    """A GPU by its daemon and its environment, whose workers compute on the CPU."""
    info = replace(make.gpu(mode), backend="cpu")
    gpu = host.gpu(info)
    return Hardware([NodeDevice(info, 2.0)], {"gpu0": gpu}, StillGauges(), gpu.environment)


async def test_an_sm_change_by_a_successor_loses_no_request(cluster: Cluster, host: Any, make: Any) -> None:
    answers: list[Any] = []
    address = ""
    enough = asyncio.Event()

    async def follow() -> None:
        """What a gateway does: sends to the instance that the newest event tells of."""
        nonlocal address
        async with cluster.bus.watch(instance_subject("*", "f-0")) as changes:
            async for change in changes:
                if not isinstance(change, CaughtUp) and change.payload is not None:
                    event = decode_instance(change.payload)
                    address = event.address if event.state is InstanceState.READY else ""

    async def send() -> None:
        while not enough.is_set():
            if address:
                answers.append(await execute(address, 1.0, 2.5))
            await asyncio.sleep(0.005)

    async with cluster.agent(gpu_hardware(host, make)), asyncio.TaskGroup() as group:
        await cluster.deploy()
        await cluster.plan(1, make.planned(allocation=make.share(300, sm=25), gpu="gpu0"))
        first = await cluster.ready()
        environ = psutil.Process(first.pid).environ()
        assert environ["CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"] == "25"
        assert "CUDA_VISIBLE_DEVICES" not in environ
        following = group.create_task(follow())
        senders = [group.create_task(send()) for _ in range(3)]
        change = make.vertical(allocation=make.share(300, sm=40), revision=2)
        await cluster.bus.put(vertical_subject("n", "f-0"), encode(change))
        second = await cluster.until("f-0", lambda e: e.allocation_revision == 2 and e.state is InstanceState.READY)
        assert (second.pid != first.pid, second.reason) == (True, "asked for 40 % of the SMs, the device gives 50 %")
        assert psutil.Process(second.pid).environ()["CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"] == "50"
        async with asyncio.timeout(60):
            while psutil.pid_exists(first.pid):  # noqa: ASYNC110  nobody tells of the end of another's child
                await asyncio.sleep(0.02)
        enough.set()
        await asyncio.gather(*senders)
        following.cancel()
    errors = [answer.results[0].error.message for answer in answers if answer is None or not answer.results[0].outputs]
    assert (len(answers) > 10, errors) == (True, [])
    assert {answer.sm_pct for answer in answers} == {25, 50}


async def test_a_daemon_that_dies_comes_back_with_its_workers_and_is_told(
    cluster: Cluster, host: Any, make: Any
) -> None:
    hardware = gpu_hardware(host, make, "mps+green")
    async with cluster.agent(hardware), cluster.bus.subscribe(device_subject("n", "gpu0")) as devices:
        await cluster.deploy()
        await cluster.plan(1, make.planned(allocation=make.share(300, sm=25), gpu="gpu0"))
        first = await cluster.ready()
        message = await anext(devices)
        event = decode_device(message.payload)
        assert (event.measured_memory_bytes, event.power_mw, event.utilisation_pct) == (3 << 30, 250_000, 40)
        assert (event.temperature_c, event.device.mode) == (None, "mps+green")
        daemon = host.daemon_pid("gpu0")
        os.kill(daemon, signal.SIGKILL)
        failed = await cluster.until("f-0", lambda e: e.state is InstanceState.FAILED)
        assert failed.reason == "the MPS daemon does not run"
        second = await cluster.until("f-0", lambda e: e.state is InstanceState.READY and e.pid != first.pid)
        assert second.restarts_count == 1
        assert host.daemon_pid("gpu0") != daemon
        async with asyncio.timeout(60):
            while event.device.health is not DeviceHealth.DEGRADED:
                event = decode_device((await anext(devices)).payload)
        assert event.device.health_reason == "the MPS daemon does not run"


async def test_the_next_agent_adopts_the_daemon_with_its_workers_and_a_graceful_end_quits_it(
    cluster: Cluster, host: Any, make: Any
) -> None:
    async with cluster.agent(gpu_hardware(host, make)):
        await cluster.deploy()
        await cluster.plan(1, make.planned(allocation=make.share(300, sm=25), gpu="gpu0"))
        first = await cluster.ready()
        daemon = host.daemon_pid("gpu0")
    async with cluster.agent(gpu_hardware(host, make)) as node:
        again = await cluster.until("f-0", lambda e: e.state is InstanceState.READY)
        await node.agent.caught_up.wait()
        assert (again.pid, host.daemon_pid("gpu0")) == (first.pid, daemon)
        assert (await execute(again.address, 1.0, 2.5)).results[0].outputs
        await node.stop()
        assert all(
            not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
            for pid in (first.pid, daemon)
        )
