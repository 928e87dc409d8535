"""What every service's process does around its own work: configuration, logging, brokers, signals, an orderly end."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Generator, Mapping
from contextlib import asynccontextmanager
from contextvars import Context
from dataclasses import dataclass
from typing import Any, Generic, NoReturn, TypeVar

from hasgpu_core.errors import HasgpuError, InvalidError
from hasgpu_core.ports import Bus, Clock, ObjectStore, Store

from hasgpu_runtime import logs, telemetry
from hasgpu_runtime.bus.nats import NatsBus
from hasgpu_runtime.bus.traced import TracedBus
from hasgpu_runtime.clock import SystemClock
from hasgpu_runtime.diagnosis import Look, Reporter
from hasgpu_runtime.metric_catalogue import SPANS_DROPPED
from hasgpu_runtime.metrics import Metrics
from hasgpu_runtime.metrics_export import Exporters
from hasgpu_runtime.rpc import MAX_MESSAGE_BYTES, Server, create_server
from hasgpu_runtime.settings import DEFAULT_LISTEN, CommonSettings, environment, load_common
from hasgpu_runtime.store.redis import RedisStore
from hasgpu_runtime.telemetry import Telemetry

_log = logging.getLogger(__name__)

_S = TypeVar("_S")
_R = TypeVar("_R")

STOP_TIMEOUT_S = 20.0
"""How long a service that was told to stop may take."""
CANCEL_AGAIN_S = 2.0
EXIT_FAILED = 1
EXIT_CONFIGURATION = 2


@dataclass(frozen=True, slots=True)
class Service(Generic[_S]):
    """What the body of a service is given."""

    name: str
    instance: str
    """host-pid; unique to the process."""
    settings: _S
    common: CommonSettings
    clock: Clock
    telemetry: Telemetry
    metrics: Metrics
    bus: Bus
    objects: ObjectStore
    stop: asyncio.Event
    """Set when the process was told to end; the body then winds up and returns."""
    stream_looks: tuple[Look, ...]
    """How the streams are; for the service that tells of the whole system."""
    group: asyncio.TaskGroup
    """For the service's tasks; those still running when the body returns are cancelled, and one that fails ends it."""
    _store: Store | None

    @property
    def store(self) -> Store:
        """The store; must not be asked for by a service that was started with `needs_store=False`."""
        if self._store is None:
            raise RuntimeError(f"{self.name} was started without a store")
        return self._store

    def create_server(self, *, max_message_bytes: int = MAX_MESSAGE_BYTES) -> Server:
        """Returns a gRPC server bound to HASGPU_LISTEN; raises UnavailableError when the port is taken."""
        return create_server(address=self.common.listen, max_message_bytes=max_message_bytes, telemetry=self.telemetry)

    def advertised(self, server: Server) -> str:
        """Returns the host:port that others dial."""
        host, _, port = (self.common.advertise or server.address).rpartition(":")
        return f"{host}:{port if port != '0' else server.address.rpartition(':')[2]}"


def run_service(
    name: str,
    load: Callable[[Mapping[str, str]], _S],
    body: Callable[[Service[_S]], Awaitable[None]],
    *,
    listen: str = DEFAULT_LISTEN,
    needs_store: bool = True,
    describe: Callable[[_S], Mapping[str, str]] | None = None,
) -> NoReturn:
    """Runs a service until it is told to stop, and ends the process.

    The exit status is 0 after SIGTERM or SIGINT, 2 with one line on stderr for configuration that can't be, 1 with one
    line when the brokers or the port can't be had, and 1 with a traceback in the log for anything unforeseen.

    Args:
        name: "gateway", "scaler", ...
        load: Reads the service's own settings from the environment; raises InvalidError.
        body: The service; it returns after `Service.stop` is set, or fails.
        listen: Its default address.
        needs_store: False for a service that keeps nothing in Redis, and need not wait for it.
        describe: Returns what its settings say of the process, as attributes of the traces' resource; None: nothing.
    """
    try:
        environ = environment()
        common = load_common(environ, listen=listen)
        settings = load(environ)
    except InvalidError as error:
        sys.stderr.write(f"hasgpu-{name}: configuration: {error}\n")
        sys.exit(EXIT_CONFIGURATION)
    instance = f"{socket.gethostname()}-{os.getpid()}"
    metrics = Metrics()
    logs.set_up(
        name,
        level=common.log_level,
        style=common.log_format,
        traceparent=telemetry.current_traceparent,
        instance=instance,
        metrics=metrics,
    )
    attributes = describe(settings) if describe is not None else None
    traces = telemetry.setup(name, environ=environ, instance=instance, attributes=attributes)
    if traces.enabled:
        metrics.collect_with(lambda sink: sink.put(SPANS_DROPPED, traces.dropped_count))
    exporters = Exporters(
        metrics, service=name, instance=instance, environ=environ, listen=common.listen, port=common.metrics_port
    )
    try:
        status = _outcome(name, _run(name, instance, common, settings, traces, exporters, body, needs_store))
    finally:
        traces.shutdown()
    sys.exit(status)


def _outcome(name: str, running: Coroutine[None, None, None]) -> int:
    """Runs it and returns the exit status."""
    try:
        asyncio.run(running)
    except Exception as error:  # noqa: BLE001  the process's border: every error is logged and becomes its exit status
        leaves = _leaves(error)
        if not all(isinstance(leaf, HasgpuError) for leaf in leaves):
            _log.critical("%s ends because of an unforeseen error", name, exc_info=error)
            return EXIT_FAILED
        for leaf in leaves:
            _log.critical("%s", leaf)
        return EXIT_FAILED
    return 0


async def _run(
    name: str,
    instance: str,
    common: CommonSettings,
    settings: _S,
    traces: Telemetry,
    exporters: Exporters,
    body: Callable[[Service[_S]], Awaitable[None]],
    needs_store: bool,
) -> None:
    clock = SystemClock()
    started_unix_ns = clock.unix_ns()
    stop = _stop_on_signals()
    async with exporters.running(clock.unix_ns), _brokers(name, common, clock, stop, needs_store) as brokers:
        if brokers is None:
            return
        bus, store = brokers
        async with _Group() as group:
            service = Service(
                name=name,
                instance=instance,
                settings=settings,
                common=common,
                clock=clock,
                telemetry=traces,
                metrics=exporters.metrics,
                bus=TracedBus(bus, traces) if traces.enabled else bus,
                objects=bus,
                stop=stop,
                stream_looks=bus.stream_looks,
                group=group,
                _store=store,
            )
            reporter = Reporter(name, instance, clock, started_unix_ns, bus.looks + (store.looks if store else ()))
            group.create_task(reporter.answer(bus), name="reports")
            running = group.create_task(_await(body(service)), name=name)
            watching = group.create_task(_bound_stop(clock, stop, running), name="stop")
            await asyncio.wait((running,))
            watching.cancel()
            await group.end()
    _log.info("%s has stopped", name)


class _Group(asyncio.TaskGroup):
    """A task group that can be told to end what still runs."""

    def __init__(self) -> None:
        super().__init__()
        self._running: set[asyncio.Task[Any]] = set()
        self._ending: asyncio.Future[None] | None = None

    def create_task(
        self,
        coro: Generator[Any, None, _R] | Coroutine[Any, Any, _R],
        *,
        name: str | None = None,
        context: Context | None = None,
    ) -> asyncio.Task[_R]:
        """Starts a task."""
        task = super().create_task(coro, name=name, context=context)
        self._running.add(task)
        task.add_done_callback(self._has_ended)
        return task

    def _has_ended(self, task: asyncio.Task[Any]) -> None:
        """A failure makes the group cancel its other tasks, once; who swallows that would keep the process for ever."""
        self._running.discard(task)
        if not task.cancelled() and task.exception() is not None and self._ending is None:
            self._ending = asyncio.ensure_future(self.end())

    async def end(self) -> None:
        """Cancels all tasks until they have ended; now and then a call of gRPC or NATS swallows a cancellation."""
        while self._running:
            for task in self._running:
                task.cancel()
            await asyncio.wait(tuple(self._running), timeout=CANCEL_AGAIN_S)


@asynccontextmanager
async def _brokers(
    name: str, common: CommonSettings, clock: Clock, stop: asyncio.Event, needs_store: bool
) -> AsyncIterator[tuple[NatsBus, RedisStore | None] | None]:
    """Connects; None when the process was told to stop before that had worked."""
    connecting = NatsBus.connect(common.nats_url, name=name, clock=clock)
    bus = await _unless_stopped(stop, connecting.__aenter__())
    if bus is None:
        yield None
        return
    try:
        if not needs_store:
            yield bus, None
            return
        opening = RedisStore.connect(common.redis_url, clock=clock)
        store = await _unless_stopped(stop, opening.__aenter__())
        if store is None:
            yield None
            return
        try:
            yield bus, store
        finally:
            await opening.__aexit__(None, None, None)
    finally:
        await connecting.__aexit__(None, None, None)


async def _unless_stopped(stop: asyncio.Event, work: Awaitable[_R]) -> _R | None:
    working = asyncio.ensure_future(work)
    stopping = asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait((working, stopping), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        working.cancel()
        await asyncio.wait((working,))
        return None
    finally:
        stopping.cancel()


def _stop_on_signals() -> asyncio.Event:
    """SIGTERM and SIGINT set the event; a second one ends the process at once."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()

    def on_signal(number: int) -> None:
        if stop.is_set():
            os._exit(128 + number)
        _log.info("told to stop by %s", signal.Signals(number).name)
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal, number)
    return stop


async def _bound_stop(clock: Clock, stop: asyncio.Event, running: asyncio.Task[None]) -> None:
    """Ends a body that takes too long to wind up."""
    await stop.wait()
    await clock.sleep(STOP_TIMEOUT_S)
    _log.error("%s did not stop within %.0f s and is cut off", running.get_name(), STOP_TIMEOUT_S)
    running.cancel()


async def _await(work: Awaitable[None]) -> None:
    await work


def _leaves(error: BaseException) -> list[BaseException]:
    if not isinstance(error, BaseExceptionGroup):
        return [error]
    return [leaf for inner in error.exceptions for leaf in _leaves(inner)]
