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


class Wire:
    """A TCP proxy that can be cut without either end being told."""

    def __init__(self, target: str) -> None:
        self.host, _, self.port = target.rpartition(":")
        self.passes = asyncio.Event()
        self.passes.set()
        self.tasks: set[asyncio.Task[None]] = set()

    async def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        other_reader, other_writer = await asyncio.open_connection(self.host, int(self.port))
        for source, sink in ((reader, other_writer), (other_reader, writer)):
            self.tasks.add(asyncio.ensure_future(self.pump(source, sink)))

    async def pump(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        try:
            while data := await source.read(65_536):
                await self.passes.wait()
                sink.write(data)
                await sink.drain()
        except OSError:
            pass
        finally:
            sink.close()


@pytest.fixture
async def wire() -> AsyncIterator[tuple[Wire, str]]:
    server = rpc.create_server(address="127.0.0.1:0")
    add_WorkerServiceServicer_to_server(SilentWorker(), server)
    await server.start()
    made = Wire(server.address)
    proxy = await asyncio.start_server(made.accept, "127.0.0.1", 0)
    yield made, f"127.0.0.1:{proxy.sockets[0].getsockname()[1]}"
    proxy.close()
    for task in made.tasks:
        task.cancel()
    await asyncio.gather(*made.tasks, return_exceptions=True)
    await server.stop(None)


async def test_a_worker_that_vanished_is_noticed_and_found_again(wire: tuple[Wire, str]) -> None:
    line, address = wire
    listener = Listener()
    link = WorkerLink(
        address,
        listener,
        clock=SystemClock(),
        open_channel=lambda where: rpc.open_channel(where, keepalive_s=1),
        settings=LinkSettings(connect_timeout_s=1),
    )
    async with asyncio.timeout(60), asyncio.TaskGroup() as group:
        link.start(group)
        assert await listener.told.get() == "up"
        line.passes.clear()
        assert (await listener.told.get()).startswith("UNAVAILABLE")
        line.passes.set()
        assert await listener.told.get() == "up"
        link.close()
