"""The long-lived stream to one worker."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Protocol

import grpc.aio
from hasgpu.node_agent.v1 import node_agent_pb2 as pb
from hasgpu.node_agent.v1.node_agent_pb2_grpc import WorkerServiceStub
from hasgpu_core.ports import Clock

from hasgpu_gateway.calls import Answer, BatchAnswer, Failure, FailureKind, TensorData
from hasgpu_gateway.routes import BatchOrder

log = logging.getLogger(__name__)

_KINDS = {
    pb.ERROR_KIND_UNSPECIFIED: FailureKind.MODEL,
    pb.ERROR_KIND_MODEL: FailureKind.MODEL,
    pb.ERROR_KIND_EXPIRED: FailureKind.EXPIRED,
    pb.ERROR_KIND_DRAINING: FailureKind.DRAINING,
    pb.ERROR_KIND_HUNG: FailureKind.HUNG,
    pb.ERROR_KIND_INPUT: FailureKind.INPUT,
}


@dataclass(frozen=True, slots=True)
class LinkSettings:
    """How a stream is kept."""

    connect_timeout_s: float = 5.0
    first_backoff_s: float = 0.05
    longest_backoff_s: float = 1.0


class LinkListener(Protocol):
    """Who is told what happens on the stream."""

    def link_up(self) -> None:
        """Batches may be sent."""
        ...

    def link_down(self, reason: str) -> None:
        """The stream is lost, with every batch that was not answered."""
        ...

    def answered(self, answer: BatchAnswer) -> None:
        """A batch came back."""
        ...


class WorkerLink:
    """Keeps a stream to a worker open until closed, trying again after a short back-off whenever it breaks."""

    def __init__(
        self,
        address: str,
        listener: LinkListener,
        *,
        clock: Clock,
        open_channel: Callable[[str], grpc.aio.Channel],
        settings: LinkSettings,
    ) -> None:
        self._address = address
        self._listener = listener
        self._clock = clock
        self._open_channel = open_channel
        self._settings = settings
        self._outbox: asyncio.Queue[BatchOrder | None] = asyncio.Queue()
        self._task: asyncio.Task[None] | None = None

    def start(self, group: asyncio.TaskGroup) -> None:
        """Begins connecting; `group` owns the task."""
        self._task = group.create_task(self._run(), name=f"link {self._address}")

    def send(self, order: BatchOrder) -> None:
        """Sends a batch; the sender's credits bound what waits here."""
        self._outbox.put_nowait(order)

    def close(self) -> None:
        """Ends the stream for good; the listener hears nothing more."""
        if self._task is not None:
            self._task.cancel()
            self._task = None

    async def _run(self) -> None:
        backoff_s = self._settings.first_backoff_s
        while True:
            served, reason = await self._serve()
            if served:
                backoff_s = self._settings.first_backoff_s
            log.debug("worker %s: %s; trying again in %.2f s", self._address, reason, backoff_s)
            await self._clock.sleep(backoff_s)
            backoff_s = min(2 * backoff_s, self._settings.longest_backoff_s)

    async def _serve(self) -> tuple[bool, str]:
        """Runs one stream to its end; returns whether anything was answered on it, and why it ended."""
        outbox: asyncio.Queue[BatchOrder | None] = asyncio.Queue()
        self._outbox = outbox
        up = served = False
        async with self._open_channel(self._address) as channel:
            try:
                async with asyncio.timeout(self._settings.connect_timeout_s):
                    await channel.channel_ready()
                call = WorkerServiceStub(channel).Execute(_requests(outbox))
                up = True
                self._listener.link_up()
                async for response in call:
                    served = True
                    self._listener.answered(_answer(response))
                reason = "the worker ended the stream"
            except TimeoutError:
                reason = f"not reachable within {self._settings.connect_timeout_s} s"
            except grpc.aio.AioRpcError as error:
                reason = f"{error.code().name}: {error.details()}"
            finally:
                # Or grpc.aio would read requests for a broken stream for ever.
                outbox.put_nowait(None)
            if _told_to_end():
                raise asyncio.CancelledError
            if up:
                self._listener.link_down(reason)
        return served, reason


def _told_to_end() -> bool:
    """Whether this task was cancelled and that has been lost on the way.

    grpc.aio (seen with 1.85) swallows a cancellation that meets a stream on which nothing has been answered yet; if the
    stream breaks at the same moment, its reader sees nothing but the stream's error.
    """
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


async def _requests(outbox: asyncio.Queue[BatchOrder | None]) -> AsyncIterator[pb.ExecuteRequest]:
    while (order := await outbox.get()) is not None:
        yield _request(order)


def _request(order: BatchOrder) -> pb.ExecuteRequest:
    request = pb.ExecuteRequest(
        batch=order.batch, deadline_unix_ns=order.deadline_unix_ns, traceparent=order.traceparent
    )
    for pending in order.items:
        call = pending.call
        item = request.items.add(rows=call.rows, traceparent=pending.trace.route_traceparent)
        for tensor in call.inputs:
            item.inputs.add(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape, raw=tensor.raw)
    return request


def _answer(response: pb.ExecuteResponse) -> BatchAnswer:
    items: list[Answer | Failure] = []
    for result in response.results:
        if result.HasField("error"):
            items.append(Failure(_KINDS.get(result.error.kind, FailureKind.MODEL), result.error.message))
        else:
            outputs = tuple(TensorData(t.name, t.datatype, tuple(t.shape), t.raw) for t in result.outputs)
            items.append(Answer(outputs, emulated=response.emulated))
    return BatchAnswer(
        batch=response.batch,
        items=tuple(items),
        started_unix_ns=response.started_unix_ns,
        line_ns=response.line_ns,
        gate_wait_ns=response.gate_wait_ns,
        execute_ns=response.execute_ns,
    )
