"""The stream to a worker is lost with it, even when it vanishes without a word, and found again."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc
import pytest
from hasgpu.node_agent.v1 import node_agent_pb2
from hasgpu.node_agent.v1.node_agent_pb2_grpc import (
    WorkerServiceServicer,
    WorkerServiceStub,
    add_WorkerServiceServicer_to_server,
)
from hasgpu_gateway.adapters import worker_link
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


class BreakingWorker(WorkerServiceServicer):
    """Breaks every stream off once `breaks` is set."""

    def __init__(self) -> None:
        self.streams_count = 0
        self.breaks = asyncio.Event()

    async def Execute(self, request_iterator, context):
        self.streams_count += 1
        await self.breaks.wait()
        await context.abort(grpc.StatusCode.UNAVAILABLE, "as the test wants")
        yield node_agent_pb2.ExecuteResponse()


@asynccontextmanager
async def serving(worker: WorkerServiceServicer) -> AsyncIterator[str]:
    """Serves the worker; yields its address."""
    server = rpc.create_server(address="127.0.0.1:0")
    add_WorkerServiceServicer_to_server(worker, server)
    await server.start()
    try:
        yield server.address
    finally:
        await server.stop(None)


@pytest.fixture
async def wire() -> AsyncIterator[TcpProxy]:
    async with serving(SilentWorker()) as address, TcpProxy(address) as proxy:
        yield proxy


def link_to(address: str, listener: Listener) -> WorkerLink:
    return WorkerLink(
        address,
        listener,
        clock=SystemClock(),
        open_channel=lambda where: rpc.open_channel(where, keepalive_s=1),
        settings=LinkSettings(connect_timeout_s=1),
    )


async def test_a_worker_that_vanished_is_noticed_and_found_again(wire: TcpProxy) -> None:
    listener = Listener()
    link = link_to(wire.address, listener)
    async with asyncio.timeout(60), asyncio.TaskGroup() as group:
        link.start(group)
        assert await listener.told.get() == "up"
        wire.passes.clear()
        assert (await listener.told.get()).startswith("UNAVAILABLE")
        wire.passes.set()
        assert await listener.told.get() == "up"
        link.close()


async def test_a_stream_closed_just_when_it_breaks_is_not_opened_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """There grpc.aio turns the cancellation into the stream's error; the link must end all the same, and in silence."""

    class ClosingStub(WorkerServiceStub):
        """Closes the link when the stream's status has come, before whoever reads the stream learns of it."""

        def __init__(self, channel) -> None:
            super().__init__(channel)
            execute = self.Execute

            def execute_and_close(requests):
                call = execute(requests)
                call.add_done_callback(lambda _: link.close())
                return call

            self.Execute = execute_and_close

    monkeypatch.setattr(worker_link, "WorkerServiceStub", ClosingStub)
    worker, listener = BreakingWorker(), Listener()
    async with serving(worker) as address:
        link = link_to(address, listener)
        async with asyncio.timeout(60), asyncio.TaskGroup() as group:
            link.start(group)
            assert await listener.told.get() == "up"
            worker.breaks.set()
    assert worker.streams_count == 1
    assert listener.told.empty()


async def test_a_broken_stream_leaves_no_task_behind() -> None:
    worker, listener = BreakingWorker(), Listener()
    worker.breaks.set()
    async with serving(worker) as address:
        link = link_to(address, listener)
        async with asyncio.timeout(60), asyncio.TaskGroup() as group:
            link.start(group)
            for _ in range(3):
                assert await listener.told.get() == "up"
                assert await listener.told.get() == "UNAVAILABLE: as the test wants"
            link.close()
    async with asyncio.timeout(20):
        while others := asyncio.all_tasks() - {asyncio.current_task()}:
            await asyncio.wait(others)
