"""A worker's gRPC service, and what watches over the worker while it serves."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from typing import Any, TypeVar

import grpc
from hasgpu.common.v1 import common_pb2
from hasgpu.node_agent.v1 import node_agent_pb2 as pb
from hasgpu.node_agent.v1 import node_agent_pb2_grpc
from hasgpu_core.errors import HasgpuError, ModelError
from hasgpu_core.resources import InstanceState

from hasgpu_device.control import ControlBlock
from hasgpu_device.engine import BatchJob, Engine, MeasureJob, Observer, OperatorsJob
from hasgpu_device.status import EXIT_DEVICE_FAULT, EXIT_HUNG, EXIT_LOAD_FAILED, WorkerStatus
from hasgpu_device.worker_config import WorkerConfig

MAX_WAITING_BATCHES = 64
"""Batches taken from all streams and not answered; beyond it no stream is read."""
TICK_S = 0.05
HEARTBEAT_S = 0.25
DRAIN_S = 10.0
"""How long a worker that was told to stop finishes what it has."""
WARM_UP_TIMEOUT_MS = 60_000
QUIESCE_S = 2.0
"""How long the device may take to be done with its work before the process is ended all the same."""
_FLUSH_S = 0.3
_OPTIONS = (
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.so_reuseport", 0),
    ("grpc.keepalive_permit_without_calls", 1),
    # Below the period of the callers' pings, or the connection would be broken off as abused.
    ("grpc.http2.min_ping_interval_without_data_ms", 500),
)

T = TypeVar("T")

logger = logging.getLogger(__name__)


class WorkerServer(node_agent_pb2_grpc.WorkerServiceServicer):
    """Serves one instance until it is told to stop, is orphaned, hangs or can't load its model.

    Args:
        config: The worker's configuration.
        control: Its control block.
        pid: Of this process, for the status.
        observer: Told of every batch that is traced, if given.
    """

    def __init__(
        self, config: WorkerConfig, control: ControlBlock, *, pid: int, observer: Observer | None = None
    ) -> None:
        self._config = config
        self._control = control
        self._pid = pid
        self._loop = asyncio.get_running_loop()
        self._changed = asyncio.Event()
        self._job_done = asyncio.Event()
        self._slots = asyncio.Semaphore(MAX_WAITING_BATCHES)
        self._address = ""
        self._started_unix_ns = time.time_ns()
        self._started_ns = time.monotonic_ns()
        self._is_stopping = False
        self._drain_asked = False
        self._written: tuple[InstanceState, str, str] | None = None
        self.engine = Engine(config, control, on_change=self._wake, observer=observer)

    def _wake(self) -> None:
        self._soon(self._changed.set)
        self._soon(self._job_done.set)

    def _soon(self, function: Any, *args: Any) -> None:
        """Calls a function in the event loop; nothing happens when the loop has ended."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(function, *args)

    async def serve(self) -> int:
        """Runs the worker; returns the exit code of its process."""
        self._write_status()
        self.engine.start()
        server = grpc.aio.server(options=_OPTIONS)
        node_agent_pb2_grpc.add_WorkerServiceServicer_to_server(self, server)
        port = server.add_insecure_port(f"{self._config.listen_host}:0")
        await server.start()
        self._address = f"{self._config.advertise_host or self._config.listen_host}:{port}"
        code = await self._watch()
        await server.stop(_FLUSH_S)
        self._write_status()
        return code

    def stop(self) -> None:
        """Lets the worker finish what it has and end; for signal handlers."""
        self._is_stopping = True
        self._changed.set()

    async def _watch(self) -> int:
        """Looks after the worker until it has to end; returns the exit code."""
        beat_at_ns = stop_at_ns = 0
        while True:
            self._changed.clear()
            now_ns = time.monotonic_ns()
            self.engine.is_draining = self._is_stopping or self._drain_asked or self._control.read_shares().draining
            self._write_status()
            if now_ns >= beat_at_ns:
                beat_at_ns = now_ns + round(HEARTBEAT_S * 1e9)
                self._control.beat_worker()
                if self._is_orphan(now_ns):
                    logger.warning("no sign of the node agent for %g s: ending", self._config.orphan_timeout_s)
                    self._is_stopping = True
            if self.engine.state is InstanceState.FAILED:
                if self.engine.fault is not None:
                    return EXIT_DEVICE_FAULT
                return EXIT_HUNG if self.engine.is_broken else EXIT_LOAD_FAILED
            if self.engine.held_ns() > self._execution_timeout_ns():
                return await self._hang()
            if self._is_stopping:
                stop_at_ns = stop_at_ns or now_ns + round(DRAIN_S * 1e9)
                if not self.engine.in_flight_count or now_ns >= stop_at_ns:
                    self.engine.stop()
                    if self.engine.in_flight_count:
                        await self._quiesce()
                    return 0
            await self._tick()

    def _execution_timeout_ns(self) -> int:
        timeout_ms = self._config.execution_timeout_ms
        if self.engine.state is InstanceState.LOADING:
            # The first batches of the warm-up also set libraries up.
            timeout_ms = max(timeout_ms, WARM_UP_TIMEOUT_MS)
        return timeout_ms * 1_000_000

    async def _tick(self) -> None:
        # A worker that is ready wakes this itself when something changes.
        quiet = self.engine.state is InstanceState.READY and not self._is_stopping
        try:
            async with asyncio.timeout(HEARTBEAT_S if quiet else TICK_S):
                await self._changed.wait()
        except TimeoutError:
            return

    async def _hang(self) -> int:
        reason = f"a batch held the device for longer than {self._config.execution_timeout_ms} ms"
        logger.error("%s: ending", reason)
        if not await self._quiesce():
            reason += "; its work is still on the device"
        self.engine.abandon(reason)
        self._write_status()
        await asyncio.sleep(_FLUSH_S)
        return EXIT_HUNG

    async def _quiesce(self) -> bool:
        """Waits until the device has no more work, so that the process may be ended."""
        is_idle = await asyncio.to_thread(self.engine.quiesce, QUIESCE_S)
        if not is_idle:
            logger.warning("the device still has work after %g s", QUIESCE_S)
        return is_idle

    def _is_orphan(self, now_ns: int) -> bool:
        if not self._config.orphan_timeout_s:
            return False
        heartbeat = self._control.read_agent_heartbeat()
        # A heartbeat from before this boot lies in the future: as good as none.
        seen_ns = heartbeat.monotonic_ns if heartbeat is not None and heartbeat.monotonic_ns <= now_ns else 0
        return now_ns - max(seen_ns, self._started_ns) > self._config.orphan_timeout_s * 1e9

    def _state(self) -> InstanceState:
        if self.engine.state is InstanceState.READY and self.engine.is_draining:
            return InstanceState.DRAINING
        return self.engine.state

    def _write_status(self) -> None:
        state, reason = self._state(), self.engine.reason
        if (state, reason, self._address) == self._written:
            return
        self._written = (state, reason, self._address)
        self._control.write_state(state, self._pid)
        WorkerStatus(self._pid, self._address, state, reason, self._started_unix_ns).save(self._config.status_path)

    async def Execute(
        self, request_iterator: AsyncIterator[pb.ExecuteRequest], context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[pb.ExecuteResponse]:
        """Runs a stream's batches; answers each when it is done."""
        answers: asyncio.Queue[pb.ExecuteResponse | str | None] = asyncio.Queue()
        jobs: dict[int, BatchJob] = {}

        def deliver(key: int, response: pb.ExecuteResponse) -> None:
            del jobs[key]
            self._slots.release()
            answers.put_nowait(response)

        def lose(key: int, reason: str) -> None:
            del jobs[key]
            self._slots.release()
            answers.put_nowait(reason)

        async def read() -> None:
            try:
                async for request in request_iterator:
                    await self._slots.acquire()
                    job = BatchJob(request=request)
                    key = id(job)
                    jobs[key] = job
                    job.answer = lambda response, key=key: self._soon(deliver, key, response)  # type: ignore[misc]
                    job.lose = lambda reason, key=key: self._soon(lose, key, reason)  # type: ignore[misc]
                    self.engine.submit(job)
            finally:
                answers.put_nowait(None)

        reader = asyncio.create_task(read())
        try:
            while not (reader.done() and not jobs and answers.empty()):
                response = await answers.get()
                if isinstance(response, str):
                    # Who reads this stream tries what was lost with it once more, elsewhere.
                    await context.abort(grpc.StatusCode.UNAVAILABLE, response)
                elif response is not None:
                    yield response
        finally:
            for job in jobs.values():
                job.cancelled = True
            reader.cancel()
            # Whatever ended the reading: this stream is over, and its caller knows better why.
            await asyncio.wait([reader])
            if not reader.cancelled() and (error := reader.exception()) is not None:
                logger.info("a stream of batches broke off: %s", error)

    async def GetWorker(
        self, request: pb.GetWorkerRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.GetWorkerResponse:
        """Describes the worker and hands over its newest observations, which it forgets."""
        return pb.GetWorkerResponse(
            instance=self._config.instance,
            function=self._config.function,
            function_revision=self._config.function_revision,
            state=common_pb2.InstanceState.Value(f"INSTANCE_STATE_{self._state().name}"),
            reason=self.engine.reason,
            batches_count=self.engine.batches_count,
            pid=self._pid,
            device_model=self._config.device_model,
            observations=self.engine.take_observations(),
            in_flight_count=self.engine.in_flight_count,
        )

    async def DrainWorker(
        self, request: pb.DrainWorkerRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.DrainWorkerResponse:
        """Takes no new batch, and answers when the last one is done or the time is over."""
        self._drain_asked = self.engine.is_draining = True
        self._write_status()
        try:
            async with asyncio.timeout((request.timeout_ms or 10_000) / 1e3):
                while self.engine.in_flight_count:
                    self._job_done.clear()
                    await self._job_done.wait()
        except TimeoutError:
            pass
        return pb.DrainWorkerResponse(abandoned_count=self.engine.in_flight_count)

    async def Measure(
        self, request: pb.MeasureRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.MeasureResponse:
        """Runs random inputs back to back."""
        if not 1 <= request.batch <= self._config.max_batch:
            await context.abort(
                grpc.StatusCode.INVALID_ARGUMENT,
                f"batch: expected 1..{self._config.max_batch}, got {request.batch}",
            )
        answer: asyncio.Future[pb.MeasureResponse | HasgpuError] = self._loop.create_future()
        job = MeasureJob(request=request, answer=lambda result: self._soon(_settle, answer, result))
        return await self._answer_of(job, answer, context)

    async def ListOperators(
        self, request: pb.ListOperatorsRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.ListOperatorsResponse:
        """Exports the model's graph, between batches; a model that can't be exported is answered with the reason."""
        answer: asyncio.Future[pb.OperatorTable | HasgpuError] = self._loop.create_future()
        job = OperatorsJob(answer=lambda result: self._soon(_settle, answer, result))
        table: pb.OperatorTable = await self._answer_of(job, answer, context)
        return pb.ListOperatorsResponse(table=table)

    async def _answer_of(
        self,
        job: MeasureJob | OperatorsJob,
        answer: asyncio.Future[T | HasgpuError],
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> T:
        """Has a job done and returns its answer; ends the call with the status of its error."""
        self.engine.submit(job)
        try:
            result = await answer
        finally:
            job.cancelled = True
        if isinstance(result, HasgpuError):
            is_model = isinstance(result, ModelError)
            await context.abort(grpc.StatusCode.INTERNAL if is_model else grpc.StatusCode.UNAVAILABLE, str(result))
            raise AssertionError("abort raises")
        return result


def _settle(answer: asyncio.Future[T], result: T) -> None:
    """Gives an answer to whoever awaits it, if anybody still does."""
    if not answer.done():
        answer.set_result(result)
