"""Ends workers: tells others, drains, asks, and only then kills."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Protocol

from hasgpu_core.errors import HasgpuError
from hasgpu_core.ports import Clock
from hasgpu_core.resources import InstanceState

from hasgpu_node_agent.instance import Instance, Worker
from hasgpu_node_agent.ports import Sites, WorkerClient, WorkerProcess
from hasgpu_node_agent.row_guard import RowGuard

log = logging.getLogger(__name__)

DRAIN_NOTICE_S = 0.3
"""Gateways stop sending within this time after DRAINING was published."""
DRAIN_TIMEOUT_S = 10.0
TERMINATE_TIMEOUT_S = 5.0
"""Between SIGTERM and SIGKILL."""


class Publisher(Protocol):
    """Tells others of instances."""

    def mark(self, instance: str) -> None:
        """The instance changed; its subject is written soon."""
        ...

    async def flush(self, instance: str) -> None:
        """Writes the instance's subject now; returns when that is done, or after a bound when the bus is away."""
        ...

    def gone(self, function: str, instance: str) -> None:
        """The instance went for good; its subject is deleted soon."""
        ...


class Retirer:
    """Ends workers that leave; each is in its instance's `leaving` until it has gone, and its share reserved."""

    def __init__(
        self,
        *,
        guard: RowGuard,
        client: WorkerClient,
        publisher: Publisher,
        sites: Sites,
        clock: Clock,
        poke: Callable[[], None],
    ) -> None:
        self._guard = guard
        self._client = client
        self._publisher = publisher
        self._sites = sites
        self._clock = clock
        self._poke = poke

    async def retire(self, instance: Instance, worker: Worker) -> None:
        """Ends a worker in an orderly way."""
        await self.drain(instance, worker, DRAIN_TIMEOUT_S)
        await self.stop(worker)
        await self.clear_away(instance, worker)

    async def drain(self, instance: Instance, worker: Worker, timeout_s: float) -> None:
        """Tells others that a worker leaves and waits for the batches that it has; of use while it serves."""
        if worker.state is not InstanceState.READY or worker.process.exit_reason is not None:
            return
        worker.state = InstanceState.DRAINING
        await self._publisher.flush(instance.instance)
        await self._clock.sleep(DRAIN_NOTICE_S)
        try:
            lost_count = await self._client.drain(worker.address, timeout_s)
            if lost_count:
                log.warning("%s: %d batches were cut off by the drain's time-out", instance.instance, lost_count)
        except HasgpuError as error:
            log.warning("%s could not be drained: %s", instance.instance, error)

    async def stop(self, worker: Worker) -> None:
        """Ends a worker process: SIGTERM, and SIGKILL when that is not heeded in time."""
        await self.end(worker.process, worker.device.gpu)

    async def end(self, process: WorkerProcess, gpu: str) -> None:
        """Ends a process that runs on a device, as `stop` does."""
        if await self._ask(process, TERMINATE_TIMEOUT_S):
            return
        await self._sites.before_kill(gpu, process.pid)
        process.kill()
        await process.wait()

    async def ask(self, worker: Worker, timeout_s: float) -> bool:
        """Sends SIGTERM and waits; returns whether the worker has ended."""
        return await self._ask(worker.process, timeout_s)

    async def _ask(self, process: WorkerProcess, timeout_s: float) -> bool:
        ended = asyncio.ensure_future(process.wait())
        try:
            process.terminate()
            timer = asyncio.ensure_future(self._clock.sleep(timeout_s))
            await asyncio.wait({ended, timer}, return_when=asyncio.FIRST_COMPLETED)
            timer.cancel()
            return process.exit_reason is not None
        finally:
            ended.cancel()

    async def clear_away(self, instance: Instance, worker: Worker) -> None:
        """Gives back what a leaving worker had, after its end."""
        self._guard.release(worker.key)
        worker.process.remove()
        if worker.address:
            await self._client.forget(worker.address)
        instance.leaving.remove(worker)
        self._publisher.mark(instance.instance)
        self._poke()
