"""SM shares: rounded up and told; moved so that no SM is used twice; changed by a successor where need be."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hasgpu_core.errors import CapacityError
from hasgpu_core.resources import InstanceState
from hasgpu_node_agent.places import adopt_lease
from hasgpu_node_agent.ports import Hindrance
from hasgpu_node_agent.row_guard import RowGuard, WorkerKey
from hasgpu_node_agent.row_layout import Lease


async def running(world: Any, make: Any, *planned: Any) -> None:
    world.reconciler.set_function(make.function())
    world.plan(1, *planned)
    await world.step(3)
    for process in world.launcher.live:
        process.ready()
    await world.step()


def on_gpu(make: Any, instance: str = "f-0", request: int = 300, *, sm: int, row: int = 0) -> Any:
    return make.planned(instance, make.share(request, sm=sm), gpu="gpu0", row=row)


# Rounded up, and told


async def test_a_share_below_the_granule_is_rounded_up_and_told(make: Any) -> None:
    world = make.world([make.gpu()])
    await running(world, make, on_gpu(make, sm=7))
    event = world.event("f-0")
    assert (event.state, event.reason) == (InstanceState.READY, "asked for 7 % of the SMs, the device gives 25 %")
    assert event.allocation.sm_pct == 7, "what was decided stays what it was"
    assert world.process("f-0").request.lease == Lease(0, 25)
    assert world.guard.rows("gpu0")[0].sm_pct == 25
    assert world.guard.gpu_share("gpu0") == pytest.approx(0.25 * 0.3), "it costs what it takes"


async def test_a_share_that_is_a_rung_is_not_remarked_on(make: Any) -> None:
    world = make.world([make.gpu()])
    await running(world, make, on_gpu(make, sm=50))
    assert world.event("f-0").reason == ""


def test_the_guard_counts_what_is_given(make: Any) -> None:
    guard = RowGuard([make.gpu()])
    for row in range(3):
        guard.reserve(WorkerKey("f", row), "gpu0", row, make.share(sm=26 if row == 0 else 1))
    with pytest.raises(
        CapacityError, match="gpu0 has 0 % of its SMs free for row 3, 7 % were asked for, which takes 25 %"
    ):
        guard.reserve(WorkerKey("f", 3), "gpu0", 3, make.share(sm=7))


def test_rows_that_find_no_aligned_place_are_refused_in_words(make: Any) -> None:
    guard = RowGuard([make.gpu(rungs=(12, 50, 100))])
    guard.reserve(WorkerKey("f", 0), "gpu0", 0, make.share(sm=50))
    with pytest.raises(CapacityError, match="row 1 finds no place on gpu0, where rows begin at multiples of 12 %"):
        guard.reserve(WorkerKey("f", 1), "gpu0", 1, make.share(sm=50))


# Places


async def test_rows_lie_side_by_side(make: Any) -> None:
    world = make.world([make.gpu()])
    rows = [on_gpu(make, f"f-{n}", sm=sm, row=n) for n, sm in enumerate((25, 50, 25))]
    await running(world, make, *rows, make.planned("f-3", make.share(300, sm=25), gpu="gpu0", row=1))
    leases = {p.request.key.instance: p.lease for p in world.launcher.live}
    taken = sorted(leases[f"f-{n}"].range_pct for n in range(3))
    assert [first for first, _ in taken] == [0, *(first + width for first, width in taken[:-1])]
    assert leases["f-3"].first_pct == leases["f-1"].first_pct, "the instances of a row begin at the same place"


async def test_a_row_grows_into_free_space_in_one_write(make: Any) -> None:
    world = make.world([make.gpu()])
    await running(world, make, on_gpu(make, sm=25))
    epoch = world.process("f-0").epoch
    world.reconciler.set_vertical(make.vertical(allocation=make.share(300, sm=75)), {})
    await world.step()
    assert world.process("f-0").lease == Lease(0, 75)
    assert world.process("f-0").epoch == epoch + 1


async def test_a_quota_change_takes_one_write_and_moves_nothing(make: Any) -> None:
    world = make.world([make.gpu()])
    await running(world, make, on_gpu(make, sm=25), on_gpu(make, "f-1", sm=50, row=1))
    process = world.process("f-1")
    epoch, lease = process.epoch, process.lease
    process.instantly = False
    world.reconciler.set_vertical(make.vertical("f-1", make.share(900, sm=50)), {})
    world.reconciler.reconcile()
    assert (process.epoch, process.lease, process.written.request_permille) == (epoch + 1, lease, 900)


async def test_a_row_grows_when_its_neighbour_has_confirmed_that_it_gave_way(make: Any) -> None:
    world = make.world([make.gpu()])
    await running(world, make, on_gpu(make, sm=25), on_gpu(make, "f-1", sm=50, row=1))
    a, b = world.process("f-0"), world.process("f-1")
    assert (a.lease, b.lease) == (Lease(0, 25), Lease(25, 50))
    history: list[tuple[str, Lease]] = []
    for name, process in (("a", a), ("b", b)):
        process.instantly = False
        write = process.write_share
        process.write_share = lambda allocation, lease, name=name, write=write: (
            history.append((name, lease)),
            write(allocation, lease),
        )[1]
    world.reconciler.set_vertical(make.vertical(allocation=make.share(300, sm=50)), {})
    for number in range(12):
        world.reconciler.reconcile()
        for x in a.possible:
            for y in b.possible:
                assert not x.overlaps(y) or (x.exclusive and y.exclusive)
        (b if number % 3 == 2 else a).confirm()
    assert (a.lease, b.lease) == (Lease(0, 50), Lease(50, 50))
    assert history == [("b", Lease(50, 50)), ("a", Lease(0, 50))]
    assert world.event("f-0").allocation.sm_pct == 50


async def test_a_new_row_waits_until_the_others_have_moved_together(make: Any) -> None:
    world = make.world([make.gpu()])
    await running(world, make, *(on_gpu(make, f"f-{n}", sm=25, row=n) for n in range(3)))
    two = world.process("f-2")
    world.plan(2, on_gpu(make, sm=25), on_gpu(make, "f-2", sm=25, row=2), on_gpu(make, "f-3", sm=50, row=3))
    two.instantly = False
    await world.step(4)
    assert "f-3" not in {p.request.key.instance for p in world.launcher.live}
    assert world.event("f-3").reason == "the rows of gpu0 are moved together to make room"
    for _ in range(6):
        two.confirm()
        await world.step()
    assert (two.lease, world.process("f-3").lease) == (Lease(25, 25), Lease(50, 50))


async def test_a_time_shared_device_gives_the_whole_and_marks_it_always(make: Any) -> None:
    world = make.world([make.gpu("timeshare", rungs=(100,))])
    await running(world, make, on_gpu(make, sm=25), on_gpu(make, "f-1", sm=50))
    assert {p.lease for p in world.launcher.live} == {Lease(0, 100, exclusive=True)}
    assert world.event("f-0").reason == "asked for 25 % of the SMs, the device gives 100 %"


async def test_an_adopted_worker_that_has_not_confirmed_may_be_anywhere(make: Any) -> None:
    world = make.world([make.gpu()])
    await running(world, make, on_gpu(make, sm=25))
    process = world.process("f-0")
    process.confirmed_epoch = 0
    worker = world.reconciler.instances["f-0"].current
    process.epoch = 2
    process.confirmed_epoch = 1
    adopt_lease(worker)
    assert worker.possible_leases() == (Lease(0, 100), Lease(0, 25))
    process.confirm()
    worker.settle_lease()
    assert worker.possible_leases() == (Lease(0, 25),)


# By a successor


@pytest.mark.parametrize("mode", ["mps+pct", "mps+static"])
async def test_where_sms_cannot_change_live_a_successor_takes_over(make: Any, mode: str) -> None:
    world = make.world([make.gpu(mode)])
    await running(world, make, on_gpu(make, sm=25))
    old = world.process("f-0")
    address = world.event("f-0").address
    world.reconciler.set_vertical(make.vertical(allocation=make.share(300, sm=50)), {})
    await world.step(2)
    new = world.process("f-0")
    assert (new is not old, new.request.allocation.sm_pct, new.lease.width_pct) == (True, 50, 50)
    assert (world.event("f-0").address, world.event("f-0").state) == (address, InstanceState.READY), (
        "the old one serves on"
    )
    assert old.signals == []
    drained = asyncio.Event()

    async def drain(where: str, timeout_s: float) -> int:
        assert where == address
        await drained.wait()
        return 0

    world.client.drain = drain
    new.ready()
    await world.step(3)
    event = world.event("f-0")
    assert (event.address, event.allocation.sm_pct, event.allocation_revision) == (f"worker:{new.pid}", 50, 2)
    assert world.publisher.told[-1] == ("f-0", InstanceState.READY), (
        "gateways know the new one before the old one drains"
    )
    assert old.ended is None, "requests in flight finish on the old one"
    drained.set()
    await world.step(2)
    assert (old.ended, old.removed) == ("ended with exit code 0", True)
    assert world.guard.rows("gpu0")[0].used_permille == 300


async def test_quota_changes_need_no_successor_there(make: Any) -> None:
    world = make.world([make.gpu("mps+pct")])
    await running(world, make, on_gpu(make, sm=25))
    world.reconciler.set_vertical(make.vertical(allocation=make.share(700, sm=25)), {})
    await world.step(2)
    assert world.process("f-0").written.request_permille == 700
    assert len(world.launcher.started) == 1


async def test_shares_that_round_to_the_same_rung_need_no_successor(make: Any) -> None:
    world = make.world([make.gpu("mps+pct")])
    await running(world, make, on_gpu(make, sm=30))
    world.reconciler.set_vertical(make.vertical(allocation=make.share(300, sm=45)), {})
    await world.step(2)
    assert len(world.launcher.started) == 1
    assert world.event("f-0").allocation.sm_pct == 45


async def test_without_room_for_both_the_old_one_is_drained_first(make: Any) -> None:
    world = make.world([make.gpu("mps+pct")])
    await running(world, make, on_gpu(make, request=700, sm=25))
    old = world.process("f-0")
    world.reconciler.set_vertical(make.vertical(allocation=make.share(700, sm=50)), {})
    await world.step(4)
    assert world.client.drained == [f"worker:{old.pid}"]
    assert old.removed
    new = world.process("f-0")
    assert (new is not old, new.request.allocation) == (True, make.share(700, sm=50))


async def test_a_successor_under_way_finishes_before_the_next_change(make: Any) -> None:
    world = make.world([make.gpu("mps+pct")])
    await running(world, make, on_gpu(make, request=200, sm=25))
    for revision, sm in ((2, 50), (3, 75), (4, 100)):
        world.reconciler.set_vertical(make.vertical(allocation=make.share(200, sm=sm), revision=revision), {})
        await world.step(2)
    assert len(world.launcher.started) == 2, "shares may change faster than workers load"
    world.process("f-0").ready()
    await world.step(3)
    assert world.process("f-0").request.allocation.sm_pct == 100
    world.process("f-0").ready()
    await world.step(3)
    assert world.event("f-0").allocation.sm_pct == 100
    assert len(world.launcher.live) == 1


async def test_a_successor_that_fails_leaves_the_old_one_serving(make: Any) -> None:
    world = make.world([make.gpu("mps+pct")])
    await running(world, make, on_gpu(make, sm=25))
    old = world.process("f-0")
    world.reconciler.set_vertical(make.vertical(allocation=make.share(300, sm=50)), {})
    await world.step(2)
    world.process("f-0").fail("no such handler")
    await world.step(2)
    event = world.event("f-0")
    assert (event.state, event.allocation.sm_pct, old.ended) == (InstanceState.READY, 25, None)
    assert "its successor failed: no such handler" in event.reason


async def test_a_device_that_takes_no_worker_now_does_not_cost_the_one_that_serves(make: Any) -> None:
    world = make.world([make.gpu("mps+pct")])
    await running(world, make, on_gpu(make, sm=25))
    world.sites.in_the_way = Hindrance("an SM partition of 50 % is being made on gpu0")
    world.reconciler.set_vertical(make.vertical(allocation=make.share(300, sm=50)), {})
    await world.step(3)
    assert len(world.launcher.live) == 1
    assert world.event("f-0").state is InstanceState.READY
    world.sites.in_the_way = None
    await world.step(2)
    assert len(world.launcher.live) == 2
