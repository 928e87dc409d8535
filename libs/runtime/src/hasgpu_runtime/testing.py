"""For tests: real brokers on free ports, one pair a test session, the doubles in memory, and a proxy that fails.

Import the ones needed into a `conftest.py`: `from hasgpu_runtime.testing import nats_server, nats_bus  # noqa: F401`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Iterator
from typing import Self

import nats.aio.client
import nats.js.errors
import pytest
import pytest_asyncio
import redis.asyncio
from hasgpu_core.clock import ManualClock

from hasgpu_runtime.brokers import NatsServer, RedisServer
from hasgpu_runtime.bus import nats_streams
from hasgpu_runtime.bus.memory import MemoryBus
from hasgpu_runtime.bus.nats import NatsBus
from hasgpu_runtime.clock import SystemClock
from hasgpu_runtime.store.memory import MemoryStore
from hasgpu_runtime.store.redis import RedisStore

__all__ = [
    "TcpProxy",
    "background_errors",
    "manual_clock",
    "memory_bus",
    "memory_store",
    "nats_bus",
    "nats_server",
    "redis_server",
    "redis_store",
]


@pytest.fixture(scope="session")
def nats_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NatsServer]:
    """A running nats-server with JetStream, shared by the session."""
    with NatsServer(tmp_path_factory.mktemp("nats")) as server:
        yield server


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """A running redis-server, shared by the session."""
    with RedisServer(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest_asyncio.fixture
async def nats_bus(nats_server: NatsServer) -> AsyncIterator[NatsBus]:
    """A bus on the session's server, whose streams begin empty."""
    await empty_nats(nats_server.url)
    async with NatsBus.connect(nats_server.url, name="test", clock=SystemClock()) as bus:
        yield bus


@pytest_asyncio.fixture
async def redis_store(redis_server: RedisServer) -> AsyncIterator[RedisStore]:
    """A store on the session's server, which begins empty."""
    client = redis.asyncio.Redis.from_url(redis_server.url)
    await client.flushall()
    await client.aclose()
    async with RedisStore.connect(redis_server.url) as store:
        yield store


@pytest_asyncio.fixture
async def memory_bus() -> MemoryBus:
    """The bus's double."""
    return MemoryBus()


@pytest.fixture
def manual_clock() -> ManualClock:
    """A clock at 1000 s that stands still."""
    return ManualClock(1_000.0, unix_offset_ns=1_700_000_000_000_000_000)


@pytest.fixture
def memory_store(manual_clock: ManualClock) -> MemoryStore:
    """The store's double, on the test's manual clock."""
    return MemoryStore(manual_clock)


@pytest_asyncio.fixture
async def background_errors() -> AsyncIterator[list[BaseException]]:
    """Fails the test when a task or callback of its event loop ended in an error that nobody took.

    Also counts what loops log as unforeseen (a record of level ERROR with a traceback of `hasgpu_runtime`). A test that
    expects such errors empties the list.
    """
    errors: list[BaseException] = []
    loop = asyncio.get_running_loop()
    before = loop.get_exception_handler()

    def take(_: asyncio.AbstractEventLoop, context: dict[str, object]) -> None:
        error = context.get("exception")
        errors.append(error if isinstance(error, BaseException) else RuntimeError(str(context.get("message"))))

    handler = _Collector(errors)
    logging.getLogger("hasgpu_runtime").addHandler(handler)
    loop.set_exception_handler(take)
    try:
        yield errors
    finally:
        loop.set_exception_handler(before)
        logging.getLogger("hasgpu_runtime").removeHandler(handler)
    if errors:
        raise BaseExceptionGroup("errors in the background", errors)


class _Collector(logging.Handler):
    def __init__(self, errors: list[BaseException]) -> None:
        super().__init__(logging.ERROR)
        self._errors = errors

    def emit(self, record: logging.LogRecord) -> None:
        """Keeps the error of a record."""
        if record.exc_info and record.exc_info[1] is not None:
            self._errors.append(record.exc_info[1])


async def empty_nats(url: str) -> None:
    """Deletes the streams of a server, and with them their messages and consumers."""
    client = nats.aio.client.Client()
    await client.connect(url)
    for stream in (nats_streams.STATE, nats_streams.COMMANDS, nats_streams.BUCKET_STREAM):
        try:
            await client.jetstream().delete_stream(stream)
        except nats.js.errors.NotFoundError:
            continue
    await client.close()


class TcpProxy:
    """A TCP proxy that can fall silent, as a host does that is gone, without either end being told.

    Attributes:
        passes: While it is clear, nothing passes.
        lost_answers: So many pieces that come from the target are lost, each with its connection.
        connections_count: Connections taken so far.
        address: Where it listens, once entered.
    """

    def __init__(self, target: str) -> None:
        self.target = target
        self.connections_count = 0
        self.lost_answers = 0
        self.passes = asyncio.Event()
        self.passes.set()
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.address = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections_count += 1
        host, _, port = self.target.rpartition(":")
        other_reader, other_writer = await asyncio.open_connection(host, int(port))
        for source, sink in ((reader, other_writer), (other_reader, writer)):
            self._tasks.add(asyncio.ensure_future(self._pump(source, sink, is_answer=source is other_reader)))

    async def _pump(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, *, is_answer: bool) -> None:
        try:
            while data := await source.read(65_536):
                await self.passes.wait()
                if is_answer and self.lost_answers:
                    self.lost_answers -= 1
                    return
                sink.write(data)
                await sink.drain()
        except OSError:
            pass
        finally:
            sink.close()
