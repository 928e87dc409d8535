"""Profiling runs: measures a function's latency over batch, SM share and quota with a worker of its own.

The worker runs beside the rows behind a gate of its own. All (batch, SM) pairs are measured at the whole quota; smaller
quotas, batch 1 first, while the budget lasts. An order may instead name its configurations (those that an earlier run
left out): they are measured in the same order, and the budget is then never overrun by more than one measurement.

At a smaller quota an instance that was idle has up to a window's worth of device time in its bucket, so short batches
run undisturbed at first. Such a point is repeated until its bucket has long been empty.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
from collections import defaultdict
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from pathlib import Path

from hasgpu_core.errors import HasgpuError, InvalidError, ModelError, UnavailableError
from hasgpu_core.events import FunctionEvent
from hasgpu_core.function import FunctionSpec
from hasgpu_core.ports import Clock
from hasgpu_core.resources import WHOLE_PERMILLE, Allocation, DeviceInfo, InstanceState
from hasgpu_device.control import DEFAULT_WINDOW_NS

from hasgpu_node_agent.errors import ProfileError
from hasgpu_node_agent.places import alone
from hasgpu_node_agent.ports import (
    Artifacts,
    Launcher,
    LaunchRequest,
    Measurement,
    OperatorTable,
    WorkerClient,
    WorkerProcess,
)
from hasgpu_node_agent.row_guard import RowGuard, WorkerKey
from hasgpu_node_agent.shares import changes_sms_live

log = logging.getLogger(__name__)

DEFAULT_BUDGET_S = 8.0
LONGEST_BUDGET_S = 600.0
DEFAULT_QUOTAS_PERMILLE = (1_000, 500, 200)
REPETITIONS = 12
MOST_REPETITIONS = 1_000
DRAINED_FACTOR = 4
"""So many times the repetitions that empty the bucket are made, so that the median is one of those after it."""
FULL_QUOTA_SHARE = 0.7
"""Part of the budget that the whole-quota points may take together."""
IN_ORDER_SHARE = 1 / 16
"""Part of the budget that one point may take when the order names what comes first."""
LOAD_TIMEOUT_S = 300.0
OPERATORS_TIMEOUT_S = 120.0
"""For exporting the model's graph; what is measured does not depend on it."""
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


Item = Point | OperatorTable | str


@dataclass(frozen=True, slots=True)
class ProfileOrder:
    """What to measure; empty sequences stand for the defaults."""

    spec: FunctionSpec
    gpu: str
    budget_s: float = DEFAULT_BUDGET_S
    batches: Sequence[int] = ()
    sm_pcts: Sequence[int] = ()
    quotas_permille: Sequence[int] = ()
    configurations: Sequence[Configuration] = ()
    """If any, exactly these; the three above are empty then."""
    in_order: bool = False
    """They are measured in the order given."""
    operators: bool = False
    """The model's operators are wanted too."""

    def validate(self) -> None:
        """Raises InvalidError, naming the field, the bound and what came."""
        self.spec.validate()
        if self.configurations and (self.batches or self.sm_pcts or self.quotas_permille):
            raise InvalidError("configurations", expected="no batches, sm_pcts or quotas_permille beside", got="both")
        if self.in_order and not self.configurations:
            raise InvalidError("in_order", expected="configurations beside", got="none")
        if not 0 < self.budget_s <= LONGEST_BUDGET_S:
            raise InvalidError("budget_ms", expected=f"1..{LONGEST_BUDGET_S * 1e3:.0f}", got=f"{self.budget_s * 1e3}")
        named = self.configurations
        for name, values, high in (
            ("batches", self.batches, self.spec.max_batch),
            ("sm_pcts", self.sm_pcts, 100),
            ("quotas_permille", self.quotas_permille, WHOLE_PERMILLE),
            ("configurations.batch", [c.batch for c in named], self.spec.max_batch),
            ("configurations.sm_pct", [c.sm_pct for c in named], 100),
            ("configurations.quota_permille", [c.quota_permille for c in named], WHOLE_PERMILLE),
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
    """Returns what to measure at the whole quota and what at smaller ones, each the most informative first.

    What is to be measured in the order given is all in the second.
    """
    named = set(order.configurations)
    if len(named) > MAX_POINTS:
        raise InvalidError("points", expected=f"at most {MAX_POINTS}", got=str(len(named)))
    if order.in_order:
        return [], list(dict.fromkeys(order.configurations))
    batches = ends_first([c.batch for c in named] or order.batches or batch_ladder(order.spec.max_batch))
    sm_pcts = ends_first([-sm for sm in ([c.sm_pct for c in named] or order.sm_pcts or device.sm_rungs_pct)])
    quotas = sorted(
        {c.quota_permille for c in named} or set(order.quotas_permille or DEFAULT_QUOTAS_PERMILLE), reverse=True
    )
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
    if named:
        return [c for c in whole if c in named], [c for c in smaller if c in named]
    if len(whole) + len(smaller) > MAX_POINTS:
        raise InvalidError("points", expected=f"at most {MAX_POINTS}", got=str(len(whole) + len(smaller)))
    return whole, smaller


def repetitions(quota_permille: int, whole: Measurement | None) -> int:
    """Returns how often a batch is run for a point.

    Args:
        quota_permille: Of the point.
        whole: The same batch on the same SMs at the whole quota; None: not known, then it runs as often as the point's
            budget allows.
    """
    if quota_permille >= WHOLE_PERMILLE:
        return REPETITIONS
    if whole is None:
        return MOST_REPETITIONS
    quota = quota_permille / WHOLE_PERMILLE
    # The bucket holds quota * window. While batches run undisturbed it is filled too, at the quota.
    spent_ns = whole.device_time_ns - quota * max(whole.latency_ns, whole.device_time_ns)
    if spent_ns <= 0:
        # The host between the batches leaves the device idle for so long that the quota does not bind.
        return REPETITIONS
    return min(MOST_REPETITIONS, REPETITIONS + math.ceil(DRAINED_FACTOR * quota * DEFAULT_WINDOW_NS / spent_ns))


class Profiler:
    """Runs profiles, one at a time a device.

    Args:
        guard: Of the node.
        launcher: Starts the workers.
        artifacts: Has the functions' files.
        client: Calls the workers.
        clock: Time.
        spawn: Starts work in the background.
        end: Ends a worker process on a device in an orderly way: one that is killed with work on a GPU may take that
            GPU's other workers with it.
    """

    def __init__(
        self,
        *,
        guard: RowGuard,
        launcher: Launcher,
        artifacts: Artifacts,
        client: WorkerClient,
        clock: Clock,
        spawn: Callable[[Coroutine[object, object, None]], object],
        end: Callable[[WorkerProcess, str], Awaitable[None]],
    ) -> None:
        self._guard = guard
        self._launcher = launcher
        self._artifacts = artifacts
        self._client = client
        self._clock = clock
        self._spawn = spawn
        self._end = end
        self._locks: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._runs = itertools.count(1)
        self._orders: list[ProfileOrder] = []
        self.processes: dict[WorkerKey, WorkerProcess] = {}
        """The workers of the runs under way."""

    def artifacts_in_use(self) -> frozenset[str]:
        """Returns the digests that the runs under way need."""
        return frozenset(order.spec.artifact.sha256 for order in self._orders)

    async def run(self, order: ProfileOrder) -> AsyncGenerator[Item, None]:
        """Yields points, operators before them if they are wanted and, in words, how far it is.

        The worker is gone when it ends, in whatever way.

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
    ) -> AsyncGenerator[Item, None]:
        lock = self._locks[order.gpu]
        if lock.locked():
            yield f"waiting for another run on {order.gpu}"
        async with lock:
            yield "fetching the artifact"
            artifact = await self._artifacts.fetch(order.spec)
            total = len(whole) + len(smaller)
            for number, part in enumerate(_parts(device, whole, smaller)):
                share = replace(
                    order,
                    budget_s=order.budget_s * (len(part[0]) + len(part[1])) / total,
                    operators=order.operators and number == 0,
                )
                async with aclosing(self._run_part(share, device, artifact, *part)) as found:
                    async for step in found:
                        yield step

    async def _run_part(
        self,
        order: ProfileOrder,
        device: DeviceInfo,
        artifact: Path,
        whole: Sequence[Configuration],
        smaller: Sequence[Configuration],
    ) -> AsyncGenerator[Item, None]:
        """Measures with one worker."""
        first = _allocation(order.spec, [*whole, *smaller][0])
        request = LaunchRequest(
            key=WorkerKey(f"{order.spec.name}.profile", next(self._runs)),
            function=FunctionEvent(spec=order.spec, revision=0, updated_unix_ns=0),
            device=device,
            row=0,
            allocation=first,
            lease=alone(device, first),
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
            if order.operators:
                yield "exporting the model's graph"
                yield await self._operators(address)
            async with aclosing(self._measure_all(order, process, address, whole, smaller)) as measured:
                async for found in measured:
                    yield found
        finally:
            # The caller may have gone: the clearing away has an owner of its own.
            self._spawn(self._dispose(request.key, process, device.gpu))

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

    async def _operators(self, address: str) -> OperatorTable:
        """Asks the worker for the operators; a model that can't be exported is measured all the same."""
        try:
            return await self._client.list_operators(address, OPERATORS_TIMEOUT_S)
        except HasgpuError as error:
            log.warning("the operators are left out: %s", error)
            return OperatorTable(reason=f"exporting the model failed: {error}")

    async def _measure_all(
        self,
        order: ProfileOrder,
        process: WorkerProcess,
        address: str,
        whole: Sequence[Configuration],
        smaller: Sequence[Configuration],
    ) -> AsyncGenerator[Item, None]:
        begun_s = self._clock.now_s()
        total = len(whole) + len(smaller)
        known: dict[tuple[int, int], Measurement] = {}
        each_s = order.budget_s * FULL_QUOTA_SHARE / max(1, len(whole))
        overrun_s = 0.0 if order.configurations else order.budget_s
        for done, configuration in enumerate((*whole, *smaller), start=1):
            left_s = begun_s + order.budget_s - self._clock.now_s()
            is_whole = configuration.quota_permille == WHOLE_PERMILLE
            # What is known at the whole quota carries all else, so it may overrun the budget once.
            if left_s <= 0 and (not is_whole or left_s <= -overrun_s):
                yield f"the budget of {order.budget_s:g} s is used up: {done - 1} of {total} measured"
                return
            yield f"{configuration}: {done} of {total}"
            if order.in_order:
                budget_s = max(0.0, min(left_s, order.budget_s * IN_ORDER_SHARE))
            else:
                budget_s = each_s if is_whole else max(0.0, min(left_s, order.budget_s / max(1, len(smaller)) * 2))
            place = configuration.batch, configuration.sm_pct
            count = repetitions(configuration.quota_permille, known.get(place))
            point = await self._measure(order, process, address, configuration, count, budget_s)
            if is_whole:
                known[place] = point.measurement
            yield point

    async def _measure(
        self,
        order: ProfileOrder,
        process: WorkerProcess,
        address: str,
        configuration: Configuration,
        repetitions_count: int,
        budget_s: float,
    ) -> Point:
        allocation = _allocation(order.spec, configuration)
        epoch = process.write_share(allocation, alone(self._guard.device(order.gpu), allocation))
        until_s = self._clock.now_s() + APPLY_TIMEOUT_S
        while process.applied_epoch() < epoch and process.exit_reason is None and self._clock.now_s() < until_s:
            await self._clock.sleep(APPLY_PERIOD_S)
        try:
            measurement = await self._client.measure(
                address, batch=configuration.batch, repetitions_count=repetitions_count, budget_s=budget_s
            )
        except HasgpuError as error:
            status = process.status()
            said = status.reason if status is not None and status.state is InstanceState.FAILED else ""
            text = f"{configuration}: {said or process.exit_reason or error}"
            # What the function itself got wrong stays wrong; another run may do better than a worker that was lost.
            kind = ProfileError if isinstance(error, UnavailableError) else ModelError
            raise kind(text) from error
        return Point(configuration, measurement)

    async def _dispose(self, key: WorkerKey, process: WorkerProcess, gpu: str) -> None:
        await self._end(process, gpu)
        status = process.status()
        if status is not None and status.address:
            await self._client.forget(status.address)
        process.remove()
        self.processes.pop(key, None)
        if not any(other.instance == key.instance for other in self.processes):
            # The next run of the function has its folder there too, and may have begun.
            self._launcher.forget(key.instance, profiling=True)


def _parts(
    device: DeviceInfo, whole: Sequence[Configuration], smaller: Sequence[Configuration]
) -> list[tuple[list[Configuration], list[Configuration]]]:
    """Splits what is to be measured by worker: where SMs are fixed at a worker's start, one an SM share."""
    if changes_sms_live(device):
        return [(list(whole), list(smaller))]
    sm_pcts = dict.fromkeys(c.sm_pct for c in (*whole, *smaller))
    return [([c for c in whole if c.sm_pct == sm], [c for c in smaller if c.sm_pct == sm]) for sm in sm_pcts]


def _allocation(spec: FunctionSpec, configuration: Configuration) -> Allocation:
    """Request and limit are the same: a measured quota borrows nothing."""
    return Allocation(
        sm_pct=configuration.sm_pct,
        request_permille=configuration.quota_permille,
        limit_permille=configuration.quota_permille,
        memory_bytes=spec.memory_bytes,
    )
