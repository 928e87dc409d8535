"""Vertical changes: the newest wins, shrinks go first, no row is over-filled."""

from __future__ import annotations

from typing import Any

import pytest
from hasgpu_core.resources import Allocation, InstanceState


async def running(world: Any, make: Any, *planned: Any) -> None:
    world.reconciler.set_function(make.function())
    world.plan(1, *planned)
    await world.step(2)
    for process in world.launcher.live:
        process.ready()
    await world.step()


async def test_a_vertical_change_takes_effect_in_one_pass_without_a_restart(world: Any, make: Any) -> None:
    await running(world, make, make.planned())
    world.reconciler.set_vertical(make.vertical(allocation=make.share(600, limit=900)), {})
    await world.step(2)
    assert world.process("f-0").written == make.share(600, limit=900)
    event = world.event("f-0")
    assert (event.allocation, event.allocation_revision) == (make.share(600, limit=900), 2)
    assert world.process("f-0").noted == (make.share(600, limit=900), 2)
    assert len(world.launcher.started) == 1


async def test_the_event_shows_the_share_in_force_not_the_one_asked_for(world: Any, make: Any) -> None:
    await running(world, make, make.planned())
    process = world.process("f-0")
    process.instantly = False
    world.reconciler.set_vertical(make.vertical(allocation=make.share(600)), {})
    await world.step(2)
    assert process.written == make.share(600)
    assert world.event("f-0").allocation == make.share(300)
    process.confirm()
    await world.step()
    assert world.event("f-0").allocation == make.share(600)
    assert world.shares_applied[-1] == ("f-0", 2, True)


@pytest.mark.parametrize(("plan_revision", "vertical_revision", "wanted"), [(3, 2, 500), (2, 3, 700), (3, 3, 700)])
async def test_the_newest_of_plan_and_vertical_change_wins_in_either_order(
    world: Any, make: Any, plan_revision: int, vertical_revision: int, wanted: int
) -> None:
    await running(world, make, make.planned())
    for first in ("plan", "vertical"):
        for which in (first, "vertical" if first == "plan" else "plan"):
            if which == "plan":
                world.plan(2, make.planned(allocation=make.share(500), revision=plan_revision))
            else:
                world.reconciler.set_vertical(make.vertical(allocation=make.share(700), revision=vertical_revision), {})
        await world.step(3)
        assert world.event("f-0").allocation.request_permille == wanted


async def test_an_older_vertical_change_than_the_last_is_ignored(world: Any, make: Any) -> None:
    await running(world, make, make.planned())
    world.reconciler.set_vertical(make.vertical(allocation=make.share(700), revision=5), {})
    world.reconciler.set_vertical(make.vertical(allocation=make.share(100), revision=4), {})
    await world.step(2)
    assert world.event("f-0").allocation.request_permille == 700


async def test_a_worker_starts_with_the_newest_share(world: Any, make: Any) -> None:
    world.reconciler.set_vertical(make.vertical(allocation=make.share(700), revision=5), {})
    await running(world, make, make.planned())
    assert world.process("f-0").request.allocation == make.share(700)


async def test_shrinks_go_first_and_growth_awaits_their_confirmation(world: Any, make: Any) -> None:
    await running(world, make, make.planned("f-0", make.share(700)), make.planned("f-1", make.share(300)))
    shrinking, growing = world.process("f-0"), world.process("f-1")
    shrinking.instantly = False
    world.reconciler.set_vertical(make.vertical("f-1", make.share(600)), {})
    world.reconciler.set_vertical(make.vertical("f-0", make.share(400)), {})
    await world.step(2)
    assert shrinking.written == make.share(400)
    assert growing.written == make.share(300)
    assert world.event("f-1").reason == "", "waiting for a shrink is no refusal"
    shrinking.confirm()
    await world.step(2)
    assert growing.written == make.share(600)


async def test_an_unconfirmed_shrink_counts_after_its_time_out(world: Any, make: Any) -> None:
    await running(world, make, make.planned())
    world.process("f-0").instantly = False
    world.reconciler.set_vertical(make.vertical(allocation=make.share(100)), {})
    await world.step()
    world.clock.advance(2.1)
    await world.step()
    assert world.shares_applied[-1] == ("f-0", 2, False)
    assert world.guard.rows("cpu0")[0].used_permille == 100


async def test_growth_that_does_not_fit_is_refused_in_words_and_made_when_there_is_room(world: Any, make: Any) -> None:
    await running(world, make, make.planned("f-0", make.share(700)), make.planned("f-1", make.share(300)))
    world.reconciler.set_vertical(make.vertical("f-1", make.share(600)), {})
    await world.step(2)
    event = world.event("f-1")
    assert event.reason == "row 0 of cpu0 has 300 ‰ free, 600 ‰ were asked for"
    assert (event.state, event.allocation) == (InstanceState.READY, make.share(300))
    assert world.refusals == [("f-1", event.reason)]
    world.reconciler.set_vertical(make.vertical("f-0", make.share(200)), {})
    await world.step(3)
    assert world.event("f-1").allocation == make.share(600)
    assert world.event("f-1").reason == ""


async def test_an_sm_change_is_live_on_the_cpu_and_a_mixed_change_lowers_before_it_raises(
    world: Any, make: Any
) -> None:
    await running(world, make, make.planned(allocation=make.share(800, sm=50)))
    process = world.process("f-0")
    seen: list[Allocation] = []
    write = process.write_share
    process.write_share = lambda allocation, lease: (seen.append(allocation), write(allocation, lease))[1]
    world.reconciler.set_vertical(make.vertical(allocation=make.share(200, sm=100)), {})
    await world.step(4)
    assert [(a.sm_pct, a.request_permille) for a in seen] == [(50, 200), (100, 200)]
    assert world.event("f-0").allocation == make.share(200, sm=100)
    assert world.event("f-0").allocation_revision == 2
    assert len(world.launcher.started) == 1


async def test_an_impossible_share_is_ignored(world: Any, make: Any) -> None:
    await running(world, make, make.planned())
    world.reconciler.set_vertical(make.vertical(allocation=Allocation(100, 500, 400, 0), revision=9), {})
    await world.step()
    assert world.event("f-0").allocation == make.share(300)


async def test_an_equal_share_of_a_newer_revision_only_moves_the_revision(world: Any, make: Any) -> None:
    await running(world, make, make.planned())
    epoch = world.process("f-0").epoch
    world.reconciler.set_vertical(make.vertical(allocation=make.share(300), revision=8), {})
    await world.step()
    assert world.event("f-0").allocation_revision == 8
    assert world.process("f-0").epoch == epoch
