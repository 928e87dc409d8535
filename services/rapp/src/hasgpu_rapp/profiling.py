"""Profile runs: one a workload and device model, retried a bounded number of times, told in words."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Protocol

from hasgpu_core.errors import HasgpuError, IntegrityError, InvalidError, ModelError, UnavailableError, UnsupportedError
from hasgpu_core.events import FunctionEvent
from hasgpu_core.function import FunctionSpec
from hasgpu_core.ports import Clock
from hasgpu_predictor import ProfilePoint
from hasgpu_runtime.logs import about

from hasgpu_rapp.predictions import FunctionOperators
from hasgpu_rapp.world import ProfilePlace

_log = logging.getLogger(__name__)

ATTEMPTS_MAX = 6
BACKOFF_FIRST_S = 1.0
BACKOFF_MAX_S = 30.0
REST_S = 300.0
"""After the last attempt; a function that fails to load is not tried again by itself at all."""
RUNS_AT_ONCE = 4
"""Agents run one profile a device at a time and queue the others."""
FINAL_ERRORS = (ModelError, InvalidError, IntegrityError, UnsupportedError)
"""Trying the same function again would give the same."""

PROFILE_BUDGET_S = 12.0
"""For measuring in one run; loading is extra."""

Key = tuple[str, str]
"""(workload, device model)."""
Cell = tuple[int, int, int]
"""(batch, sm_pct, quota_permille)."""


class Measurer(Protocol):
    """Runs a profile on a device."""

    def measure(
        self, place: ProfilePlace, spec: FunctionSpec, cells: Sequence[Cell], *, operators: bool
    ) -> AsyncGenerator[ProfilePoint | FunctionOperators | str, None]:
        """Measures cells in order while PROFILE_BUDGET_S lasts.

        Yields points, before them the operators if they are asked for, and progress in words; raises HasgpuError.
        """
        ...


@dataclass(slots=True)
class Job:
    """One workload's profile on one device model."""

    event: FunctionEvent
    """Of a function that has the workload."""
    progress: str = "waiting"
    failed: bool = False
    """Given up; a newer revision of the function starts it again."""
    again_s: float | None = None
    """When a run that failed for want of a device or an agent is started again; None: never by itself."""
    task: asyncio.Task[None] | None = None


class Profiling:
    """Starts, watches, retries and gives up profile runs.

    Args:
        places: Live devices of a device model; asked before each attempt.
        plan: What to measure of a function on a device model, the most informative first.
        done: Takes the points of a finished run.
        wants_operators: Whether those of a function are to be asked for.
        heard: Takes them, while the run goes on.
    """

    def __init__(
        self,
        *,
        clock: Clock,
        measurer: Measurer,
        tasks: asyncio.TaskGroup,
        places: Callable[[str], list[ProfilePlace]],
        plan: Callable[[FunctionEvent, str], Awaitable[Sequence[Cell]]],
        done: Callable[[FunctionEvent, str, list[ProfilePoint]], Awaitable[None]],
        wants_operators: Callable[[FunctionEvent], bool],
        heard: Callable[[FunctionEvent, FunctionOperators], Awaitable[None]],
    ) -> None:
        self._clock = clock
        self._measurer = measurer
        self._tasks = tasks
        self._places = places
        self._plan = plan
        self._done = done
        self._wants_operators = wants_operators
        self._heard = heard
        self._slots = asyncio.Semaphore(RUNS_AT_ONCE)
        self.jobs: dict[Key, Job] = {}

    def ensure(self, key: Key, event: FunctionEvent) -> bool:
        """Starts the run unless it is under way, rests, or has failed for good on this revision of the function.

        Tells whether it did.
        """
        job = self.jobs.get(key)
        if job is not None and not job.failed:
            return False
        if job is not None and job.event == event and (job.again_s is None or self._clock.now_s() < job.again_s):
            return False
        if not self._places(key[1]):
            return False
        job = Job(event)
        self.jobs[key] = job
        job.task = self._tasks.create_task(self._run(key, job), name=f"profile {event.spec.name} on {key[1]}")
        return True

    def keep_only(self, keys: set[Key]) -> None:
        """Cancels and forgets the runs that no function needs any more."""
        for key in [key for key in self.jobs if key not in keys]:
            job = self.jobs.pop(key)
            if job.task is not None:
                job.task.cancel()

    async def _run(self, key: Key, job: Job) -> None:
        name, device_model = job.event.spec.name, key[1]
        async with self._slots:
            for attempt in range(1, ATTEMPTS_MAX + 1):
                try:
                    points = await self._attempt(device_model, job, attempt)
                    await self._done(job.event, device_model, points)
                except FINAL_ERRORS as error:
                    job.progress, job.again_s = f"failed: {error}", None
                    break
                except (HasgpuError, OSError) as error:
                    job.progress = f"attempt {attempt} of {ATTEMPTS_MAX} failed: {error}"
                    _log.warning(
                        "the profile of %s on %s: %s", name, device_model, job.progress, extra=about(function=name)
                    )
                    job.again_s = self._clock.now_s() + REST_S
                    if attempt < ATTEMPTS_MAX:
                        await self._clock.sleep(min(BACKOFF_MAX_S, BACKOFF_FIRST_S * 2 ** (attempt - 1)))
                else:
                    _log.info(
                        "%s is profiled on %s: %d points", name, device_model, len(points), extra=about(function=name)
                    )
                    self.jobs.pop(key, None)
                    return
        job.failed = True
        _log.error(
            "the profile of %s on %s is given up: %s", name, device_model, job.progress, extra=about(function=name)
        )

    async def _attempt(self, device_model: str, job: Job, attempt: int) -> list[ProfilePoint]:
        places = self._places(device_model)
        if not places:
            raise UnavailableError(f"no live node has a {device_model}")
        place = places[(attempt - 1) % len(places)]
        job.progress = f"asking {place.node} for {place.gpu}"
        _log.info(
            "the profile of %s on %s: attempt %d, %s",
            job.event.spec.name,
            device_model,
            attempt,
            job.progress,
            extra=about(function=job.event.spec.name),
        )
        points: list[ProfilePoint] = []
        cells = await self._plan(job.event, device_model)
        # A run that failed may have failed of the export.
        wanted = attempt == 1 and self._wants_operators(job.event)
        async with aclosing(self._measurer.measure(place, job.event.spec, cells, operators=wanted)) as news:
            async for item in news:
                if isinstance(item, str):
                    job.progress = item
                elif isinstance(item, FunctionOperators):
                    await self._heard(job.event, item)
                else:
                    item.validate()
                    points.append(item)
        if not points:
            raise UnavailableError(f"the run on {place.node} ended without a single point")
        return points
