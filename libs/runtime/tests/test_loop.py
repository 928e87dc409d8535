from __future__ import annotations

import asyncio
import itertools

import pytest
from hasgpu_core.clock import ManualClock
from hasgpu_core.errors import UnavailableError
from hasgpu_runtime.clock import SystemClock
from hasgpu_runtime.loop import FIRST_RETRY_S, LONGEST_RETRY_S, ReconcileLoop
from hasgpu_runtime.metric_catalogue import LOOP_DONE_AGE, LOOP_DURATION
from hasgpu_runtime.metrics import Metrics


class Enough(BaseException):
    """Ends a loop under test."""


async def run_manual(outcomes, period_s=1.0, poke_in=()):
    """Runs one pass an outcome; returns the virtual time of each pass."""
    clock = ManualClock()
    loop = ReconcileLoop(clock, period_s)
    times: list[float] = []
    left = list(outcomes)

    async def reconcile():
        times.append(clock.now_s())
        if not left:
            raise Enough
        if len(times) - 1 in poke_in:
            loop.poke()
        outcome = left.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    with pytest.raises(Enough):
        await loop.run(reconcile)
    return times


async def test_passes_come_a_period_apart_or_sooner_when_asked_for():
    assert await run_manual([None, 0.25, 5.0, None]) == [0.0, 1.0, 1.25, 2.25, 3.25]


async def test_a_poke_during_a_pass_makes_another_follow_at_once():
    assert await run_manual([None, None, None], poke_in={1}) == [0.0, 1.0, 1.0, 2.0]


async def test_failures_are_retried_with_a_bounded_back_off_and_forgotten_after_success(caplog):
    failures = [UnavailableError("away")] * 3 + [KeyError("bug")] * 7
    times = await run_manual([*failures, None, UnavailableError("away")], period_s=1.0)
    gaps = [round(b - a, 6) for a, b in itertools.pairwise(times)]
    assert gaps[:4] == [FIRST_RETRY_S, 0.2, 0.4, 0.8]
    assert gaps[4:10] == [1.6, 3.2, LONGEST_RETRY_S, LONGEST_RETRY_S, LONGEST_RETRY_S, LONGEST_RETRY_S]
    assert gaps[10:] == [1.0, FIRST_RETRY_S]
    assert sum(record.levelname == "ERROR" and record.exc_info is not None for record in caplog.records) == 7
    assert sum(record.levelname == "WARNING" for record in caplog.records) == 4


async def test_a_poke_wakes_a_waiting_loop_and_pokes_count_once():
    loop = ReconcileLoop(SystemClock(), 3_600.0)
    passes = asyncio.Queue[int]()
    running = 0

    async def reconcile():
        nonlocal running
        running += 1
        assert running == 1
        await asyncio.sleep(0)
        running -= 1
        passes.put_nowait(1)

    task = asyncio.create_task(loop.run(reconcile))
    async with asyncio.timeout(20):
        await passes.get()
        for _ in range(3):
            await asyncio.sleep(0.01)
            for _ in range(5):
                loop.poke()
            await passes.get()
    await asyncio.sleep(0.01)
    assert passes.empty()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_pause_keeps_pokes_from_spinning():
    clock = ManualClock()
    loop = ReconcileLoop(clock, 10.0, pause_s=0.5)
    times: list[float] = []

    async def reconcile():
        times.append(clock.now_s())
        if len(times) == 4:
            raise Enough
        loop.poke()

    with pytest.raises(Enough):
        await loop.run(reconcile)
    assert times == [0.0, 0.5, 1.0, 1.5]


async def test_passes_are_told_by_duration_and_outcome():
    clock, metrics = ManualClock(), Metrics()
    loop = ReconcileLoop(clock, 1.0, name="test", metrics=metrics)
    outcomes = iter((None, UnavailableError("away"), None))

    async def reconcile():
        clock.advance(0.25)
        outcome = next(outcomes, Enough())
        if isinstance(outcome, BaseException):
            raise outcome

    with pytest.raises(Enough):
        await loop.run(reconcile)
    done = metrics.histogram(LOOP_DURATION, "test", "done")
    failed = metrics.histogram(LOOP_DURATION, "test", "failed")
    assert (sum(done.counts), done.total) == (2, 0.5)
    assert (sum(failed.counts), failed.total) == (1, 0.25)
    ages = [point.value for spec, points in metrics.collect() if spec is LOOP_DONE_AGE for point in points]
    assert ages == [pytest.approx(1.25)], "the period's wait, and the pass that ended the loop"
