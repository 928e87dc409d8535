"""Moves: they fit beside all that is bound, free what they promise, and undo nothing."""

from __future__ import annotations

from collections.abc import Sequence

from hasgpu_core.events import PlannedInstance
from hasgpu_core.function import MIB
from hasgpu_core.policy.placement import NO_TIES, NoRoom, Placement, Room, place
from hasgpu_core.policy.placement.migration import Bound, MigrationPlan, evacuate, free_gpu, make_room
from hasgpu_core.resources import Allocation, DeviceInfo, DeviceState
from hypothesis import given
from hypothesis import strategies as st

RUNGS = (25, 50, 75, 100)
EMPTY = tuple(DeviceState(DeviceInfo("n", f"g{i}", "m", "cuda", 1000 * MIB, RUNGS)) for i in range(5))
allocations = st.builds(
    lambda sm_pct, permille, memory_mib: Allocation(sm_pct, permille, 1000, memory_mib * MIB),
    st.sampled_from(RUNGS),
    st.integers(1, 10).map(lambda tenths: tenths * 100),
    st.integers(1, 300),
)


def filled(asked: Sequence[Allocation], keep: Sequence[bool]) -> tuple[list[DeviceState], list[Bound]]:
    """Places all, and takes away some: the holes that a live cluster has."""
    room, bound = Room(EMPTY), []
    for number, want in enumerate(asked):
        found = room.place(want)
        if isinstance(found, Placement):
            room.occupy(found.node, found.gpu, found.row, want)
            entry = PlannedInstance("f", f"f-{number}", found.gpu, found.row, want, 1)
            bound.append(Bound("n", entry, "m"))
    gone = [item for item, stays in zip(bound, keep, strict=False) if not stays]
    for item in gone:
        room.release("n", item.planned.gpu, item.planned.row, item.planned.allocation)
    return room.states(), [item for item in bound if item not in gone]


def carry_out(devices: Sequence[DeviceState], plan: MigrationPlan) -> list[DeviceState]:
    """Makes every move beside all the rest, then takes the old places away; checks that all fits all the time."""
    room = Room(devices)
    for move in plan.moves:
        room.occupy(move.to.node, move.to.gpu, move.to.row, move.bound.planned.allocation)
        for state in room.states():
            assert all(row.used_permille <= 1000 for row in state.rows)
            assert state.free_sm_pct >= 0
            assert state.free_memory_bytes >= 0
    for move in plan.moves:
        room.release(move.bound.node, move.bound.planned.gpu, move.bound.planned.row, move.bound.planned.allocation)
    return room.states()


def used(devices: Sequence[DeviceState]) -> int:
    return sum(1 for device in devices if device.rows)


holes = st.lists(st.booleans(), min_size=20, max_size=20)


@given(st.lists(allocations, max_size=20), holes, st.integers(0, 3))
def test_a_plan_frees_one_gpu_and_opens_none(asked: list[Allocation], keep: list[bool], pinned_count: int) -> None:
    devices, bound = filled(asked, keep)
    pinned = {item.planned.instance for item in bound[:pinned_count]}
    plan = free_gpu(devices, bound, pinned=pinned, headroom_permille=100, most_moves=8, ties_of=lambda _: NO_TIES)
    if plan is None:
        return
    after = carry_out(devices, plan)
    assert used(after) == used(devices) - 1
    assert len({move.bound.planned.gpu for move in plan.moves}) == 1
    assert not pinned & {move.bound.planned.instance for move in plan.moves}
    assert len(plan.moves) <= 8
    for move in plan.moves:
        if not move.to.new_row:
            (row,) = [r for d in after for r in d.rows if (d.info.gpu, r.index) == (move.to.gpu, move.to.row)]
            assert row.free_permille >= 100


@given(st.lists(allocations, max_size=20), holes, allocations)
def test_moves_make_room_for_what_waits(asked: list[Allocation], keep: list[bool], waiting: Allocation) -> None:
    devices, bound = filled(asked, keep)
    if not isinstance(place(waiting, devices), NoRoom):
        return
    plan = make_room(waiting, devices, bound, pinned=(), most_moves=8, ties_of=lambda _: NO_TIES)
    if plan is not None:
        assert 0 < len(plan.moves) <= 8
        assert isinstance(place(waiting, carry_out(devices, plan)), Placement)


def test_one_move_is_found_where_one_is_enough() -> None:
    def share(sm_pct: int, permille: int) -> Allocation:
        return Allocation(sm_pct, permille, 1000, MIB)

    devices, bound = filled([share(75, 900), share(75, 800), share(25, 300)], [True] * 3)
    assert [(b.planned.instance, b.planned.gpu) for b in bound] == [("f-0", "g0"), ("f-1", "g1"), ("f-2", "g0")]
    waiting = share(100, 500)
    two = [device for device in devices if device.info.gpu in ("g0", "g1")]
    assert make_room(waiting, two, bound, pinned=(), most_moves=8, ties_of=lambda _: NO_TIES) is None
    three = [device for device in devices if device.info.gpu in ("g0", "g1", "g2")]
    assert isinstance(place(waiting, three), Placement)
    waiting = share(25, 900)
    room = Room(two)
    room.occupy("n", "g1", 1, share(25, 400))
    bound.append(Bound("n", PlannedInstance("g", "g-0", "g1", 1, share(25, 400), 1), "m"))
    plan = make_room(waiting, room.states(), bound, pinned=(), most_moves=8, ties_of=lambda _: NO_TIES)
    assert plan is not None
    assert [(m.bound.planned.instance, m.to.gpu, m.to.row) for m in plan.moves] in (
        [("g-0", "g0", 1)],
        [("f-2", "g1", 1)],
    )


def test_a_move_stays_on_its_device_model_unless_it_must_leave() -> None:
    other = DeviceState(DeviceInfo("n", "x0", "other", "cuda", 1000 * MIB, RUNGS))
    room = Room([EMPTY[0], other])
    share = Allocation(50, 300, 1000, MIB)
    room.occupy("n", "g0", 0, share)
    room.occupy("n", "x0", 0, Allocation(50, 600, 1000, MIB))
    bound = [
        Bound("n", PlannedInstance("f", "f-0", "g0", 0, share, 1), "m"),
        Bound("n", PlannedInstance("h", "h-0", "x0", 0, Allocation(50, 600, 1000, MIB), 1), "other"),
    ]
    none = free_gpu(room.states(), bound, pinned=(), headroom_permille=0, most_moves=8, ties_of=lambda _: NO_TIES)
    assert none is None
    plan, stuck = evacuate(bound[:1], room.states()[1:], why="ill", ties_of=lambda _: NO_TIES)
    assert [(m.to.gpu, m.to.row) for m in plan.moves] == [("x0", 0)]
    assert not stuck
    plan, stuck = evacuate(bound[:1], [], why="ill", ties_of=lambda _: NO_TIES)
    assert not plan.moves
    assert "no other device" in stuck[0][1].reason
