"""The stream to a worker is lost with it, even when it vanishes without a word, and found again."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from hasgpu.node_agent.v1 import node_agent_pb2
from hasgpu.node_agent.v1.node_agent_pb2_grpc import WorkerServiceServicer, add_WorkerServiceServicer_to_server
from hasgpu_gateway.adapters.worker_link import LinkSettings, WorkerLink
from hasgpu_runtime import rpc
from hasgpu_runtime.clock import SystemClock
from hasgpu_runtime.testing import TcpProxy


class SilentWorker(WorkerServiceServicer):
    """Takes a stream and never answers."""

    async def Execute(self, request_iterator, context):
        async for _ in request_iterator:
            pass
        yield node_agent_pb2.ExecuteResponse()


class Listener:
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.told: asyncio.Queue[str] = asyncio.Queue()

    def link_up(self) -> None:
        self.told.put_nowait("up")

    def link_down(self, reason: str) -> None:
        self.told.put_nowait(reason)

    def answered(self, answer) -> None:
        self.told.put_nowait("answer")


@pytest.fixture
async def wire() -> AsyncIterator[TcpProxy]:
    server = rpc.create_server(address="127.0.0.1:0")
    add_WorkerServiceServicer_to_server(SilentWorker(), server)
    await server.start()
    async with TcpProxy(server.address) as proxy:
        yield proxy
    await server.stop(None)


async def test_a_worker_that_vanished_is_noticed_and_found_again(wire: TcpProxy) -> None:
    listener = Listener()
    link = WorkerLink(
        wire.address,
        listener,
        clock=SystemClock(),
        open_channel=lambda where: rpc.open_channel(where, keepalive_s=1),
        settings=LinkSettings(connect_timeout_s=1),
    )
    async with asyncio.timeout(60), asyncio.TaskGroup() as group:
        link.start(group)
        assert await listener.told.get() == "up"
        wire.passes.clear()
        assert (await listener.told.get()).startswith("UNAVAILABLE")
        wire.passes.set()
        assert await listener.told.get() == "up"
        link.close()
