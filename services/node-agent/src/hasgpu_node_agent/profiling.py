"""Profiling runs: measures a function's latency over batch, SM share and quota with a worker of its own.

The worker runs beside the rows behind a gate of its own. All (batch, SM) pairs are measured at the whole quota; smaller
quotas, batch 1 first, while the budget lasts.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections import defaultdict
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from hasgpu_core.errors import HasgpuError, InvalidError, ModelError, UnavailableError
from hasgpu_core.events import FunctionEvent
from hasgpu_core.function import FunctionSpec
from hasgpu_core.ports import Clock
from hasgpu_core.resources import WHOLE_PERMILLE, Allocation, DeviceInfo, InstanceState

from hasgpu_node_agent.errors import ProfileError
from hasgpu_node_agent.ports import Artifacts, Launcher, LaunchRequest, Measurement, WorkerClient, WorkerProcess
from hasgpu_node_agent.row_guard import RowGuard, WorkerKey

log = logging.getLogger(__name__)

DEFAULT_BUDGET_S = 8.0
LONGEST_BUDGET_S = 600.0
DEFAULT_QUOTAS_PERMILLE = (1_000, 500, 200)
REPETITIONS = 12
FULL_QUOTA_SHARE = 0.7
"""Part of the budget that the whole-quota points may take together."""
LOAD_TIMEOUT_S = 300.0
STATUS_PERIOD_S = 0.05
APPLY_PERIOD_S = 0.002
APPLY_TIMEOUT_S = 2.0
MAX_POINTS = 4_096


@dataclass(frozen=True, slots=True)
class Configuration:
    """What is measured."""

    batch: int
    sm_pct: int
    quota_permille: int

    def __str__(self) -> str:
        return f"batch {self.batch}, SM {self.sm_pct} %, quota {self.quota_permille / 10:g} %"


@dataclass(frozen=True, slots=True)
class Point:
    """A configuration and what came of it."""

    configuration: Configuration
    measurement: Measurement


@dataclass(frozen=True, slots=True)
class ProfileOrder:
    """What to measure; empty sequences stand for the defaults."""

    spec: FunctionSpec
    gpu: str
    budget_s: float = DEFAULT_BUDGET_S
    batches: Sequence[int] = ()
    sm_pcts: Sequence[int] = ()
    quotas_permille: Sequence[int] = ()

    def validate(self) -> None:
        """Raises InvalidError, naming the field, the bound and what came."""
        self.spec.validate()
        if not 0 < self.budget_s <= LONGEST_BUDGET_S:
            raise InvalidError("budget_ms", expected=f"1..{LONGEST_BUDGET_S * 1e3:.0f}", got=f"{self.budget_s * 1e3}")
        for name, values, high in (
            ("batches", self.batches, self.spec.max_batch),
            ("sm_pcts", self.sm_pcts, 100),
            ("quotas_permille", self.quotas_permille, WHOLE_PERMILLE),
        ):
            for value in values:
                if not 1 <= value <= high:
                    raise InvalidError(name, expected=f"1..{high}", got=str(value))


def batch_ladder(max_batch: int) -> tuple[int, ...]:
    """Returns 1, 2, 4, ... and the limit itself."""
    ladder = [1 << power for power in range(max_batch.bit_length()) if 1 << power <= max_batch]
    return tuple(sorted({*ladder, max_batch}))


def ends_first(values: Sequence[int]) -> list[int]:
    """Returns distinct values so that each next one splits the widest gap that is left: ends, middle, quarters, ..."""
    rest = sorted(set(values))
    order = [rest.pop(0)] if rest else []
    if rest:
        order.append(rest.pop())
    while rest:
        chosen = max(rest, key=lambda v: (min(abs(v - o) for o in order), -v))
        rest.remove(chosen)
        order.append(chosen)
    return order


def configurations(order: ProfileOrder, device: DeviceInfo) -> tuple[list[Configuration], list[Configuration]]:
    """Returns what to measure at the whole quota and what at smaller ones, each the most informative first."""
    batches = ends_first(order.batches or batch_ladder(order.spec.max_batch))
    sm_pcts = ends_first([-sm for sm in (order.sm_pcts or device.sm_rungs_pct)])
    quotas = sorted(set(order.quotas_permille or DEFAULT_QUOTAS_PERMILLE), reverse=True)
    pairs = sorted(
        itertools.product(range(len(batches)), range(len(sm_pcts))), key=lambda pair: (pair[0] + pair[1], pair[1])
    )
    whole = [Configuration(batches[b], -sm_pcts[s], WHOLE_PERMILLE) for b, s in pairs]
    smaller = [
        Configuration(batch, -sm, quota)
        for batch in sorted(batches)
        for quota in quotas
        if quota < WHOLE_PERMILLE
        for sm in sm_pcts
    ]
    if len(whole) + len(smaller) > MAX_POINTS:
        raise InvalidError("points", expected=f"at most {MAX_POINTS}", got=str(len(whole) + len(smaller)))
    return whole, smaller


class Profiler:
    """Runs profiles, one at a time a device."""

    def __init__(
        self,
        *,
        guard: RowGuard,
        launcher: Launcher,
        artifacts: Artifacts,
        client: WorkerClient,
        clock: Clock,
        spawn: Callable[[Coroutine[object, object, None]], object],
    ) -> None:
        self._guard = guard
        self._launcher = launcher
        self._artifacts = artifacts
        self._client = client
        self._clock = clock
        self._spawn = spawn
        self._locks: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._runs = itertools.count(1)
        self._orders: list[ProfileOrder] = []
        self.processes: dict[WorkerKey, WorkerProcess] = {}
        """The workers of the runs under way."""

    def artifacts_in_use(self) -> frozenset[str]:
        """Returns the digests that the runs under way need."""
        return frozenset(order.spec.artifact.sha256 for order in self._orders)

    async def run(self, order: ProfileOrder) -> AsyncGenerator[Point | str, None]:
        """Yields points and, in words, how far it is; the worker is gone when it ends, in whatever way.

        Raises:
            InvalidError, NotFoundError: what was ordered can't be.
            ModelError: the function can't be loaded, or failed on random input.
            ProfileError: the worker was lost.
            HasgpuError: the artifact can't be had.
        """
        order.validate()
        device = self._guard.device(order.gpu)
        whole, smaller = configurations(order, device)
        self._orders.append(order)
        try:
            async with aclosing(self._run(order, device, whole, smaller)) as found:
                async for step in found:
                    yield step
        finally:
            self._orders.remove(order)

    async def _run(
        self, order: ProfileOrder, device: DeviceInfo, whole: Sequence[Configuration], smaller: Sequence[Configuration]
    ) -> AsyncGenerator[Point | str, None]:
        lock = self._locks[order.gpu]
        if lock.locked():
            yield f"waiting for another run on {order.gpu}"
        async with lock:
            yield "fetching the artifact"
            artifact = await self._artifacts.fetch(order.spec)
            request = LaunchRequest(
                key=WorkerKey(f"{order.spec.name}.profile", next(self._runs)),
                function=FunctionEvent(spec=order.spec, revision=0, updated_unix_ns=0),
                device=device,
                row=0,
                allocation=_allocation(order.spec, whole[0]),
                allocation_revision=0,
                artifact=artifact,
                profiling=True,
            )
            try:
                process = self._launcher.launch(request, lambda: None)
            except OSError as error:
                raise ProfileError(f"the profiling worker can't be started: {error}") from error
            self.processes[request.key] = process
            try:
                yield "loading"
                address = await self._ready(process)
                async with aclosing(self._measure_all(order, process, address, whole, smaller)) as measured:
                    async for found in measured:
                        yield found
            finally:
                # The caller may have gone: the clearing away has an owner of its own.
                self._spawn(self._dispose(request.key, process))

    async def _ready(self, process: WorkerProcess) -> str:
        until_s = self._clock.now_s() + LOAD_TIMEOUT_S
        while True:
            status = process.status()
            if status is not None and status.state is InstanceState.FAILED:
                raise ModelError(f"the profiling worker can't load the function: {status.reason}")
            if process.exit_reason is not None:
                raise ProfileError(f"the profiling worker {process.exit_reason} while it loaded")
            if status is not None and status.state is InstanceState.READY and status.address:
                return status.address
            if self._clock.now_s() >= until_s:
                raise ProfileError(f"the profiling worker was not ready after {LOAD_TIMEOUT_S:.0f} s")
            await self._clock.sleep(STATUS_PERIOD_S)

    async def _measure_all(
        self,
        order: ProfileOrder,
        process: WorkerProcess,
        address: str,
        whole: Sequence[Configuration],
        smaller: Sequence[Configuration],
    ) -> AsyncGenerator[Point | str, None]:
        begun_s = self._clock.now_s()
        total = len(whole) + len(smaller)
        each_s = order.budget_s * FULL_QUOTA_SHARE / len(whole)
        for done, configuration in enumerate((*whole, *smaller), start=1):
            left_s = begun_s + order.budget_s - self._clock.now_s()
            is_whole = configuration.quota_permille == WHOLE_PERMILLE
            # What is known at the whole quota carries all else, so it may overrun the budget once.
            if left_s <= 0 and (not is_whole or left_s <= -order.budget_s):
                yield f"the budget of {order.budget_s:g} s is used up: {done - 1} of {total} measured"
                return
            yield f"{configuration}: {done} of {total}"
            budget_s = each_s if is_whole else max(0.0, min(left_s, order.budget_s / max(1, len(smaller)) * 2))
            yield await self._measure(order, process, address, configuration, budget_s)

    async def _measure(
        self, order: ProfileOrder, process: WorkerProcess, address: str, configuration: Configuration, budget_s: float
    ) -> Point:
        epoch = process.write_share(_allocation(order.spec, configuration))
        until_s = self._clock.now_s() + APPLY_TIMEOUT_S
        while process.applied_epoch() < epoch and process.exit_reason is None and self._clock.now_s() < until_s:
            await self._clock.sleep(APPLY_PERIOD_S)
        try:
            measurement = await self._client.measure(
                address, batch=configuration.batch, repetitions_count=REPETITIONS, budget_s=budget_s
            )
        except HasgpuError as error:
            status = process.status()
            said = status.reason if status is not None and status.state is InstanceState.FAILED else ""
            text = f"{configuration}: {said or process.exit_reason or error}"
            # What the function itself got wrong stays wrong; another run may do better than a worker that was lost.
            kind = ProfileError if isinstance(error, UnavailableError) else ModelError
            raise kind(text) from error
        return Point(configuration, measurement)

    async def _dispose(self, key: WorkerKey, process: WorkerProcess) -> None:
        process.kill()
        await process.wait()
        status = process.status()
        if status is not None and status.address:
            await self._client.forget(status.address)
        process.remove()
        self._launcher.forget(key.instance, profiling=True)
        self.processes.pop(key, None)


def _allocation(spec: FunctionSpec, configuration: Configuration) -> Allocation:
    """Request and limit are the same: a measured quota borrows nothing."""
    return Allocation(
        sm_pct=configuration.sm_pct,
        request_permille=configuration.quota_permille,
        limit_permille=configuration.quota_permille,
        memory_bytes=spec.memory_bytes,
    )
