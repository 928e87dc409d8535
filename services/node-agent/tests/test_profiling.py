"""Profiling runs: what is measured, in which order, and that nothing is left."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import Any

import pytest
from hasgpu_core.errors import InvalidError, ModelError, NotFoundError, UnavailableError
from hasgpu_node_agent.errors import ProfileError
from hasgpu_node_agent.ports import Measurement, OperatorTable
from hasgpu_node_agent.profiling import (
    Configuration,
    Point,
    ProfileOrder,
    Profiler,
    batch_ladder,
    configurations,
    ends_first,
    repetitions,
)
from hasgpu_node_agent.retirer import TERMINATE_TIMEOUT_S


@pytest.fixture
def profiler(world: Any) -> Profiler:
    """One whose workers are ready at once."""
    launch = world.launcher.launch

    def launch_ready(*args: Any) -> Any:
        process = launch(*args)
        process.ready()
        return process

    world.launcher.launch = launch_ready
    return Profiler(
        guard=world.guard,
        launcher=world.launcher,
        artifacts=world.artifacts,
        client=world.client,
        clock=world.clock,
        spawn=world.spawn,
        end=world.reconciler.retirer.end,
    )


async def collect(world: Any, profiler: Profiler, order: ProfileOrder) -> tuple[list[Point], list[str]]:
    async with aclosing(profiler.run(order)) as items:
        found = [item async for item in items]
    await world.step()
    return [i for i in found if isinstance(i, Point)], [i for i in found if isinstance(i, str)]


def order(make: Any, **changes: Any) -> ProfileOrder:
    return ProfileOrder(**{"spec": make.function().spec, "gpu": "cpu0", **changes})


@pytest.mark.parametrize(("limit", "ladder"), [(1, (1,)), (8, (1, 2, 4, 8)), (12, (1, 2, 4, 8, 12))])
def test_the_ladder_of_batches_ends_at_the_limit(limit: int, ladder: tuple[int, ...]) -> None:
    assert batch_ladder(limit) == ladder


def test_ends_come_first() -> None:
    assert ends_first([1, 2, 4, 8]) == [1, 8, 4, 2]
    assert ends_first([5]) == [5]
    assert ends_first([]) == []


def test_all_pairs_are_measured_at_the_whole_quota_the_corners_first(make: Any) -> None:
    whole, smaller = configurations(order(make), make.device())
    assert len(whole) == 4 * 4
    assert len(set(whole)) == 16
    corners = {(c.batch, c.sm_pct) for c in whole[:4]}
    assert (whole[0].batch, whole[0].sm_pct) == (1, 100)
    assert {(1, 100), (1, 25), (8, 100)} <= corners
    assert len(smaller) == 16 * 2
    assert {c.batch for c in smaller[:8]} == {1}
    assert all(c.quota_permille < 1_000 for c in smaller)


async def test_a_run_measures_under_the_share_of_each_point(world: Any, make: Any, profiler: Profiler) -> None:
    shares: list[tuple[int, int, int]] = []
    world.client.on_measure = lambda batch: shares.append(
        (batch, world.launcher.started[0].applied.sm_pct, world.launcher.started[0].applied.request_permille)
    )
    points, words = await collect(world, profiler, order(make, batches=(1, 4), sm_pcts=(50,)))
    assert shares == [(p.configuration.batch, p.configuration.sm_pct, p.configuration.quota_permille) for p in points]
    assert len(points) == 2 * 1 * 3
    assert points[0].measurement.latency_ns == 1_000
    assert words[-1] == "batch 4, SM 50 %, quota 20 %: 6 of 6"
    process = world.launcher.started[0]
    assert process.request.profiling
    assert process.removed
    assert profiler.processes == {}


async def test_operators_are_told_once_before_the_points_if_they_are_wanted(
    world: Any, make: Any, profiler: Profiler
) -> None:
    async with aclosing(profiler.run(order(make, batches=(1,), quotas_permille=(1_000,), operators=True))) as items:
        found = [item async for item in items if not isinstance(item, str)]
    assert [row.op for row in found[0].rows] == ["relu"]
    assert [isinstance(item, Point) for item in found[1:]] == [True] * 4
    async with aclosing(profiler.run(order(make, batches=(1,), quotas_permille=(1_000,)))) as items:
        assert not [item async for item in items if isinstance(item, OperatorTable)]


async def test_a_model_that_cannot_be_exported_is_measured_all_the_same(
    world: Any, make: Any, profiler: Profiler
) -> None:
    world.client.operators = UnavailableError("it took too long")
    async with aclosing(profiler.run(order(make, batches=(1,), quotas_permille=(1_000,), operators=True))) as items:
        found = [item async for item in items if not isinstance(item, str)]
    assert (found[0].rows, found[0].reason) == ((), "exporting the model failed: it took too long")
    assert len(found) == 5


async def test_the_budget_leaves_small_quotas_out_but_no_pair(world: Any, make: Any, profiler: Profiler) -> None:
    world.client.on_measure = lambda batch: world.clock.advance(0.8)
    points, words = await collect(world, profiler, order(make, budget_s=12.0))
    whole = [p for p in points if p.configuration.quota_permille == 1_000]
    assert len(whole) == 16
    assert len(points) == 16
    assert words[-1] == "the budget of 12 s is used up: 16 of 48 measured"


async def test_even_whole_quota_points_end_at_twice_the_budget(world: Any, make: Any, profiler: Profiler) -> None:
    world.client.on_measure = lambda batch: world.clock.advance(10.0)
    points, _ = await collect(world, profiler, order(make, budget_s=12.0))
    assert len(points) == 3


def test_named_configurations_are_measured_in_the_same_order_and_no_others(make: Any) -> None:
    whole, smaller = configurations(order(make), make.device())
    everything = order(make, configurations=tuple(reversed([*whole, *smaller])))
    assert configurations(everything, make.device()) == (whole, smaller)
    some = order(make, configurations=tuple(whole[5:9] + smaller[3:7]))
    found_whole, found_smaller = configurations(some, make.device())
    assert set(found_whole) == set(whole[5:9])
    assert set(found_smaller) == set(smaller[3:7])


async def test_named_configurations_at_small_quotas_alone_are_measured(
    world: Any, make: Any, profiler: Profiler
) -> None:
    named = (Configuration(2, 50, 200), Configuration(1, 25, 200))
    points, words = await collect(world, profiler, order(make, configurations=named))
    assert [p.configuration for p in points] == list(reversed(named))
    assert words[-1] == "batch 2, SM 50 %, quota 20 %: 2 of 2"


async def test_an_order_that_says_so_is_measured_in_its_order(world: Any, make: Any, profiler: Profiler) -> None:
    cells = ((1, 100, 1_000), (8, 100, 1_000), (1, 25, 1_000), (1, 100, 200), (2, 50, 1_000), (1, 100, 1_000))
    named = tuple(Configuration(*cell) for cell in cells)
    points, words = await collect(world, profiler, order(make, configurations=named, in_order=True))
    assert [p.configuration for p in points] == list(named[:5])
    assert words[-1] == "batch 2, SM 50 %, quota 100 %: 5 of 5"
    with pytest.raises(InvalidError, match="in_order: expected configurations beside"):
        order(make, in_order=True).validate()


async def test_the_budget_of_named_configurations_is_not_overrun(world: Any, make: Any, profiler: Profiler) -> None:
    world.client.on_measure = lambda batch: world.clock.advance(5.0)
    named = tuple(Configuration(batch, 100, 1_000) for batch in (1, 2, 4, 8))
    points, words = await collect(world, profiler, order(make, budget_s=12.0, configurations=named))
    assert len(points) == 3
    assert words[-1] == "the budget of 12 s is used up: 3 of 4 measured"


def test_a_point_at_a_quota_is_repeated_until_its_bucket_is_long_empty() -> None:
    """12 batches of 0.3 ms would all fit into the 8 ms that 20 % of a window of 40 ms are."""
    short = Measurement(latency_ns=300_000, device_time_ns=300_000, longest_segment_ns=1, repetitions_count=12)
    assert repetitions(1_000, short) == 12
    count = repetitions(200, short)
    assert count * 0.3 * (1 - 0.2) > 3 * 40 * 0.2
    long = Measurement(latency_ns=10**8, device_time_ns=10**8, longest_segment_ns=1, repetitions_count=12)
    assert repetitions(200, long) == 13
    mostly_host = Measurement(latency_ns=1_000_000, device_time_ns=100_000, longest_segment_ns=1, repetitions_count=12)
    assert repetitions(500, mostly_host) == 12
    assert repetitions(500, None) == 1_000


async def test_what_the_whole_quota_took_decides_how_often_smaller_ones_run(
    world: Any, make: Any, profiler: Profiler
) -> None:
    asked: list[int] = []
    measure = world.client.measure

    async def remember(address: str, **options: Any) -> Any:
        asked.append(options["repetitions_count"])
        return await measure(address, **options)

    world.client.measure = remember
    await collect(world, profiler, order(make, batches=(1,), sm_pcts=(100,), quotas_permille=(1_000, 900, 100)))
    found = await measure("x", batch=1, repetitions_count=1, budget_s=1.0)
    assert asked == [12, repetitions(900, found), repetitions(100, found)]


async def test_a_worker_that_cannot_load_ends_the_run_with_its_reason(
    world: Any, make: Any, profiler: Profiler
) -> None:
    launch = world.launcher.launch

    def launch_failing(*args: Any) -> Any:
        process = launch(*args)
        process.fail("no module named 'x'")
        return process

    world.launcher.launch = launch_failing
    with pytest.raises(ModelError, match="can't load the function: no module named 'x'"):
        await collect(world, profiler, order(make))
    await world.step()
    assert world.launcher.started[0].removed
    assert world.launcher.forgotten == ["f.profile"]


async def test_a_worker_that_dies_while_it_measures_ends_the_run(world: Any, make: Any, profiler: Profiler) -> None:
    def die(batch: int) -> None:
        world.launcher.started[0].end("was killed by SIGKILL")
        raise UnavailableError("connection lost")

    world.client.on_measure = die
    with pytest.raises(ProfileError, match="batch 1, SM 100 %, quota 100 %: was killed by SIGKILL"):
        await collect(world, profiler, order(make))
    await world.step()
    assert world.launcher.started[0].removed


async def test_a_caller_that_goes_leaves_nothing_behind(world: Any, make: Any, profiler: Profiler) -> None:
    async with aclosing(profiler.run(order(make))) as items:
        async for item in items:
            if isinstance(item, Point):
                break
    await world.step()
    assert world.launcher.started[0].signals == ["TERM"]
    assert world.launcher.started[0].removed
    assert profiler.processes == {}


async def test_a_worker_that_does_not_end_is_no_client_of_its_gpu_any_more_when_it_is_killed(
    world: Any, make: Any, profiler: Profiler
) -> None:
    order_of_end: list[str] = []

    async def before_kill(gpu: str, pid: int) -> None:
        process = world.launcher.started[0]
        order_of_end.extend([*process.signals, f"client {pid - process.pid} of {gpu}"])

    world.sites.before_kill = before_kill
    async with aclosing(profiler.run(order(make))) as items:
        async for item in items:
            if isinstance(item, Point):
                world.launcher.started[0].heeds_terminate = False
                break
    began_s = world.clock.now_s()
    await world.step()
    assert world.clock.now_s() - began_s == TERMINATE_TIMEOUT_S, "it is given time"
    assert order_of_end == ["TERM", "client 0 of cpu0"]
    assert world.launcher.started[0].signals == ["TERM", "KILL"]
    assert world.launcher.started[0].removed
    assert profiler.processes == {}


async def test_the_end_of_one_run_leaves_the_folder_of_the_next_alone(
    world: Any, make: Any, profiler: Profiler
) -> None:
    may_end = asyncio.Event()
    end = world.reconciler.retirer.end

    async def end_late(process: Any, gpu: str) -> None:
        if process is world.launcher.started[0]:
            await may_end.wait()
        await end(process, gpu)

    profiler = Profiler(
        guard=world.guard,
        launcher=world.launcher,
        artifacts=world.artifacts,
        client=world.client,
        clock=world.clock,
        spawn=world.spawn,
        end=end_late,
    )
    for run in range(2):
        async with aclosing(profiler.run(order(make))) as items:
            async for item in items:
                if isinstance(item, Point):
                    break
            if run:
                may_end.set()
            await world.step()
            assert world.launcher.started[0].removed == bool(run)
            assert world.launcher.forgotten == []
    await world.step()
    assert world.launcher.forgotten == ["f.profile"]


async def test_runs_on_one_device_wait_for_each_other(world: Any, make: Any, profiler: Profiler) -> None:
    first = profiler.run(order(make))
    async for item in first:
        if isinstance(item, Point):
            break
    second = profiler.run(order(make))
    assert await anext(second) == "waiting for another run on cpu0"
    waiting = asyncio.ensure_future(anext(second))
    await world.step()
    assert not waiting.done()
    await first.aclose()
    assert await waiting == "fetching the artifact"
    await second.aclose()


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"gpu": "gpu9"}, NotFoundError),
        ({"batches": (9,)}, InvalidError),
        ({"sm_pcts": (0,)}, InvalidError),
        ({"quotas_permille": (1_001,)}, InvalidError),
        ({"budget_s": 1e9}, InvalidError),
        ({"configurations": (Configuration(9, 100, 1_000),)}, InvalidError),
        ({"configurations": (Configuration(1, 101, 1_000),)}, InvalidError),
        ({"configurations": (Configuration(1, 100, 0),)}, InvalidError),
        ({"configurations": (Configuration(1, 100, 1_000),), "batches": (1,)}, InvalidError),
    ],
)
async def test_orders_that_cannot_be_are_refused(
    world: Any, make: Any, profiler: Profiler, changes: dict[str, Any], error: type[Exception]
) -> None:
    with pytest.raises(error):
        await collect(world, profiler, order(make, **changes))
    assert world.launcher.started == []


async def test_where_sms_are_fixed_each_share_has_a_worker_of_its_own(make: Any) -> None:
    world = make.world([make.gpu("mps+pct")])
    profiler = Profiler(
        guard=world.guard,
        launcher=world.launcher,
        artifacts=world.artifacts,
        client=world.client,
        clock=world.clock,
        spawn=world.spawn,
        end=world.reconciler.retirer.end,
    )
    wanted = ProfileOrder(make.function().spec, "gpu0", batches=(1,), sm_pcts=(50, 100), quotas_permille=(1_000, 500))
    points = []
    async for step in profiler.run(wanted):
        for process in world.launcher.live:
            process.ready()
        if isinstance(step, Point):
            points.append((step.configuration.sm_pct, world.launcher.live[-1].request.lease.width_pct))
    assert sorted(points) == [(50, 50), (50, 50), (100, 100), (100, 100)]
    assert len(world.launcher.started) == 2
