"""The gateway on the real NATS and Redis."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys

import grpc.aio
import pytest
from hasgpu.gateway.v1 import gateway_pb2
from hasgpu.gateway.v1.gateway_pb2_grpc import FunctionServiceStub
from hasgpu.inference.v2 import inference_pb2
from hasgpu.inference.v2.inference_pb2_grpc import GRPCInferenceServiceStub
from hasgpu_core.events import function_subject
from hasgpu_core.ports import CaughtUp
from hasgpu_runtime.testing import nats_bus, nats_server, redis_server, redis_store  # noqa: F401


@pytest.fixture
def bus(nats_bus):  # noqa: F811  the fixture of that name
    return nats_bus


@pytest.fixture
def store(redis_store):  # noqa: F811  the fixture of that name
    return redis_store


async def test_deploy_serve_update_and_delete(harness) -> None:
    worker = await harness.worker()
    artifact = os.urandom(900)
    status = await harness.deploy(harness.make_spec(artifact=artifact), artifact)
    assert status.revision == 1
    await harness.announce(worker)
    assert (await harness.infer()).raw_output_contents[0] == harness.floats(1, 2)
    update = gateway_pb2.UpdateFunctionRequest(name="echo", slo_ms=500)
    assert (await harness.functions.UpdateFunction(update)).function.revision == 2
    await harness.functions.DeleteFunction(gateway_pb2.DeleteFunctionRequest(name="echo"))
    assert (await harness.deploy(harness.make_spec(artifact=artifact), artifact)).revision == 3


async def test_what_the_bus_lost_is_announced_again(harness) -> None:
    await harness.deploy(harness.make_spec())
    await harness.bus.delete(function_subject("echo"))
    await harness.until(lambda: not harness.gateway.directory.functions)
    await harness.gateway.registry.reconcile()
    async with harness.bus.watch("function.>") as changes:
        first = await anext(aiter(changes))
    assert not isinstance(first, CaughtUp)
    assert first.subject == "function.echo"


async def test_the_process_serves_and_stops_on_sigterm(nats_server, redis_server, bus, store) -> None:  # noqa: F811
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    environ = os.environ | {
        "HASGPU_NATS_URL": nats_server.url,
        "HASGPU_REDIS_URL": redis_server.url,
        "HASGPU_LISTEN": address,
    }
    process = await asyncio.create_subprocess_exec(sys.executable, "-m", "hasgpu_gateway", env=environ)
    try:
        async with grpc.aio.insecure_channel(address) as channel:
            inference = GRPCInferenceServiceStub(channel)
            live = await inference.ServerLive(inference_pb2.ServerLiveRequest(), wait_for_ready=True, timeout=30)
            assert live.live
            while not (await inference.ServerReady(inference_pb2.ServerReadyRequest(), timeout=30)).ready:  # noqa: ASYNC110  remote
                await asyncio.sleep(0.01)
            listed = await FunctionServiceStub(channel).ListFunctions(gateway_pb2.ListFunctionsRequest())
            assert not listed.functions
        process.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(process.wait(), 30) == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
