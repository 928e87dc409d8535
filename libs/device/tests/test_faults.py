"""A device that fails under a worker: its batches, its status, its exit code."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import numpy as np
import pytest
import torch
from hasgpu.node_agent.v1 import node_agent_pb2 as pb
from hasgpu.node_agent.v1 import node_agent_pb2_grpc
from hasgpu_core.errors import UnsupportedError
from hasgpu_core.resources import InstanceState
from hasgpu_device import backends, cutting
from hasgpu_device.backends.fake import FakeBackend
from hasgpu_device.control import ControlBlock, Shares
from hasgpu_device.errors import DeviceFaultError
from hasgpu_device.gate import RowGate
from hasgpu_device.status import EXIT_DEVICE_FAULT, EXIT_HUNG, EXIT_LOAD_FAILED, WorkerStatus
from hasgpu_device.worker_config import WorkerConfig
from hasgpu_device.worker_server import WorkerServer

MakeConfig = Callable[..., WorkerConfig]
FAULT = DeviceFaultError(700, "CUDA_ERROR_ILLEGAL_ADDRESS", "an illegal memory access, while running a batch")

HANDLER = """
import time
def infer(batch):
    if batch["x"][0, 0] == 13:
        time.sleep(0.3)
    if batch["x"][0, 0] == 14:
        raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
    if batch["x"][0, 0] == 15:
        time.sleep(4)
    return {"y": batch["x"]}
"""


class Faulty(FakeBackend):
    """Fails on the batch of 13 once it is told to; the fake device's time goes on by 1 ms a segment."""

    def __init__(self) -> None:
        super().__init__()
        self.fails = False
        self.quiesced = 0
        self.refuses = ""

    def apply_sm(self, sm_pct: int, first_pct: int = 0) -> None:
        if self.refuses:
            raise UnsupportedError(self.refuses)
        super().apply_sm(sm_pct, first_pct)

    def stop_segment(self) -> int:
        self.work(1_000_000)
        used_ns = super().stop_segment()
        if self.fails:
            raise FAULT
        return used_ns

    def quiesce(self, timeout_s: float) -> bool:
        self.quiesced += 1
        return False


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> Faulty:
    faulty = Faulty()
    monkeypatch.setattr(backends, "create", lambda _: faulty)
    return faulty


class Served:
    def __init__(self, server: WorkerServer, config: WorkerConfig, control: ControlBlock) -> None:
        self.server = server
        self.config = config
        self.control = control
        self.task = asyncio.create_task(server.serve())

    async def wait_for(self, state: InstanceState) -> WorkerStatus:
        end = time.monotonic() + 60
        while (status := WorkerStatus.load(self.config.status_path)) is None or status.state is not state:
            assert time.monotonic() < end, status
            await asyncio.sleep(0.01)
        return status


@asynccontextmanager
async def served(config: WorkerConfig) -> AsyncIterator[Served]:
    control = ControlBlock.create(config.control_path, Shares(1000, 1000))
    RowGate.create(config.gate_path).close()
    worker = Served(WorkerServer(config, control, pid=os.getpid()), config, control)
    yield worker
    worker.server.stop()
    async with asyncio.timeout(60):
        await worker.task
    # A batch that hangs in its own code goes on in this process, and writes its counters at its end.
    worker.server.engine.stop()
    await asyncio.to_thread(worker.server.engine.thread.join, 60)
    control.close()


def request(number: int, value: float) -> pb.ExecuteRequest:
    x = np.full((1, 4), value, "f4")
    tensor = pb.Tensor(name="x", datatype="FP32", shape=x.shape, raw=x.tobytes())
    return pb.ExecuteRequest(batch=number, items=[pb.BatchItem(rows=1, inputs=[tensor])])


def kind(response: pb.ExecuteResponse) -> int:
    return response.results[0].error.kind


async def test_a_fault_loses_its_batch_and_sends_the_others_elsewhere(backend: Faulty, make_config: MakeConfig) -> None:
    async with served(make_config(HANDLER)) as worker:
        status = await worker.wait_for(InstanceState.READY)
        async with grpc.aio.insecure_channel(status.address) as channel:
            call = node_agent_pb2_grpc.WorkerServiceStub(channel).Execute(timeout=60)
            await call.write(request(1, 1))
            assert kind(await call.read()) == 0
            # Out of memory fails its batch, by name, and the worker goes on.
            await call.write(request(2, 14))
            failed = await call.read()
            assert kind(failed) == pb.ERROR_KIND_MODEL
            assert "CUDA out of memory" in failed.results[0].error.message
            await call.write(request(3, 13))
            await call.write(request(4, 1))
            end = time.monotonic() + 60
            while worker.server.engine.in_flight_count < 2:
                assert time.monotonic() < end
                await asyncio.sleep(0.005)
            backend.fails = True
            waiting = await call.read()
            assert (waiting.batch, kind(waiting)) == (4, pb.ERROR_KIND_DRAINING)
            with pytest.raises(grpc.aio.AioRpcError, match="CUDA_ERROR_ILLEGAL_ADDRESS") as caught:
                await call.read()
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        async with asyncio.timeout(60):
            assert await worker.task == EXIT_DEVICE_FAULT
        status = await worker.wait_for(InstanceState.FAILED)
        assert status.reason.startswith("CUDA_ERROR_ILLEGAL_ADDRESS (700): ")
        assert worker.server.engine.in_flight_count == 0


async def test_a_fault_while_loading_ends_the_worker(
    backend: Faulty, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: object) -> Any:
        raise DeviceFaultError(807, "CUDA_ERROR_MPS_SERVER_NOT_READY", "the MPS server is in FAULT")

    monkeypatch.setattr(backend, "load", load)
    async with served(make_config(HANDLER)) as worker, asyncio.timeout(60):
        assert await worker.task == EXIT_DEVICE_FAULT
        assert "SERVER_NOT_READY (807)" in (await worker.wait_for(InstanceState.FAILED)).reason


async def test_shares_that_can_not_be_given_ask_for_a_replacement(backend: Faulty, make_config: MakeConfig) -> None:
    async with served(make_config(HANDLER)) as worker:
        await worker.wait_for(InstanceState.READY)
        before = worker.control.read_counters().applied_epoch
        backend.refuses = "mode mps+pct can't change the SM share"
        worker.control.write_shares(Shares(1000, 1000, 50))
        async with asyncio.timeout(60):
            assert await worker.task == EXIT_HUNG
        assert (await worker.wait_for(InstanceState.FAILED)).reason == backend.refuses
        assert worker.control.read_counters().applied_epoch == before


async def test_a_device_that_is_not_there(make_config: MakeConfig) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    config = make_config(HANDLER, backend="cuda", mode="timeshare")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "CUBLAS_WORKSPACE_CONFIG"):
            patch.setenv(name, "")
        async with served(config) as worker, asyncio.timeout(60):
            assert await worker.task in (EXIT_LOAD_FAILED, EXIT_DEVICE_FAULT)
            assert "no CUDA device" in (await worker.wait_for(InstanceState.FAILED)).reason


async def test_a_hung_worker_tells_that_its_work_is_still_there(backend: Faulty, make_config: MakeConfig) -> None:
    async with served(make_config(HANDLER, execution_timeout_ms=200)) as worker:
        status = await worker.wait_for(InstanceState.READY)
        async with grpc.aio.insecure_channel(status.address) as channel:
            call = node_agent_pb2_grpc.WorkerServiceStub(channel).Execute(timeout=60)
            await call.write(request(1, 15))
            assert kind(await call.read()) == pb.ERROR_KIND_HUNG
        async with asyncio.timeout(60):
            assert await worker.task == EXIT_HUNG
        assert "its work is still on the device" in (await worker.wait_for(InstanceState.FAILED)).reason
        assert backend.quiesced == 1


class Doubled(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def forward(self, x: torch.Tensor, *, scale: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        self.seen.append(x.device.type)
        assert scale is None or scale.device == x.device
        return {"y": x * 2, "z": x.sum()}


@pytest.fixture
def bridged() -> Doubled:
    module = Doubled()
    cutting.bridge(module, "meta")
    return module


def test_cpu_tensors_are_taken_to_the_module(bridged: Doubled) -> None:
    # Nothing comes back from the meta device, which proves that it was asked for.
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):
        bridged(torch.ones(2))
    assert bridged.seen == ["meta"]
    answer = bridged(torch.ones(2, device="meta"), scale=torch.ones(1, device="meta"))
    assert answer["y"].device.type == "meta"
    own = Doubled()
    cutting.bridge(own, "cpu")
    assert own(torch.ones(2))["z"].item() == 2
