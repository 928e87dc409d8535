"""Many placements: the same answers as one at a time, spread and warm; and how few GPUs could do."""

from __future__ import annotations

from itertools import combinations

import pytest
from hasgpu_core.function import MIB
from hasgpu_core.policy.placement import NO_TIES, NoRoom, Placement, Room, Ties, occupy, place
from hasgpu_core.policy.placement.bounds import fewest_bins, fewest_gpus
from hasgpu_core.resources import Allocation, DeviceHealth, DeviceInfo, DeviceState, Row
from hypothesis import given
from hypothesis import strategies as st

RUNGS = (10, 25, 50, 75, 100)


def device(
    node: str, gpu: str = "g0", *rows: Row, memory_mib: int = 1000, granule: int = 1, lost: bool = False
) -> DeviceState:
    health = DeviceHealth.LOST if lost else DeviceHealth.OK
    info = DeviceInfo(node, gpu, "m", "cuda", memory_mib * MIB, RUNGS, sm_granule_pct=granule, health=health)
    return DeviceState(info, rows)


def allocation(sm_pct: int, permille: int, memory_mib: int = 10) -> Allocation:
    return Allocation(sm_pct, permille, 1000, memory_mib * MIB)


allocations = st.builds(allocation, st.sampled_from((*RUNGS, 33)), st.integers(1, 1000), st.integers(1, 400))
ties = st.builds(
    Ties,
    st.dictionaries(st.sampled_from("abc"), st.integers(1, 3), max_size=3),
    st.frozensets(st.sampled_from("abc"), max_size=2),
)
clusters = st.lists(
    st.builds(device, st.sampled_from("abc"), st.sampled_from(("g0", "g1")), granule=st.sampled_from((1, 10)),
              lost=st.booleans()),
    max_size=6,
    unique_by=lambda d: (d.info.node, d.info.gpu),
)  # fmt: skip


@given(clusters, st.lists(st.tuples(allocations, ties, st.booleans()), max_size=40))
def test_a_room_answers_as_a_look_at_every_device(
    devices: list[DeviceState], asked: list[tuple[Allocation, Ties, bool]]
) -> None:
    room, states = Room(devices), tuple(devices)
    placed: list[tuple[Placement, Allocation]] = []
    for want, tied, leaves in asked:
        outcome = room.place(want, tied)
        expected = place(want, states, tied)
        assert isinstance(outcome, NoRoom) == isinstance(expected, NoRoom)
        if isinstance(outcome, Placement):
            assert outcome == expected
            states = occupy(states, outcome, want)
            room.occupy(outcome.node, outcome.gpu, outcome.row, want)
            placed.append((outcome, want))
        assert room.states() == list(states)
        if leaves and placed:
            where, share = placed.pop()
            room.release(where.node, where.gpu, where.row, share)
            states = tuple(room.states())
    for where, share in placed:
        room.release(where.node, where.gpu, where.row, share)
    assert room.states() == devices
    assert room.gpus_used == 0


def test_the_second_instance_goes_to_another_node_where_that_costs_nothing() -> None:
    devices = (device("a", "g0", Row(0, 50, 600)), device("b", "g0", Row(0, 25, 400)))
    alone = Ties({"a": 1})
    # Both nodes would open a new row on a GPU in use; a is the tighter, b is the other node.
    assert where(place(allocation(50, 500), devices)) == ("a", 1)
    assert where(place(allocation(50, 500), devices, alone)) == ("b", 1)
    # Sharing the row on a opens no row at all: the other node would cost half the SMs of its GPU.
    assert where(place(allocation(50, 400), devices, alone)) == ("a", 0)
    # An empty GPU is not opened for it either.
    assert where(place(allocation(50, 500), (devices[0], device("b")), alone)) == ("a", 1)


def test_weights_come_after_surviving_a_node_and_before_an_even_spread() -> None:
    devices = tuple(device(name, "g0", Row(0, 50, 600)) for name in "abc")
    want = allocation(50, 500)
    assert where(place(want, devices, Ties(warm=frozenset("c")))) == ("c", 1)
    assert where(place(want, devices, Ties({"a": 1}, frozenset("ac")))) == ("c", 1)
    assert where(place(want, devices, Ties({"a": 1}, frozenset("a")))) == ("b", 1)
    assert where(place(want, devices, Ties({"a": 2, "b": 1}, frozenset("ab")))) == ("b", 1)
    assert where(place(want, devices, Ties({"a": 1, "b": 1}))) == ("c", 1)
    words = place(want, devices, Ties({"a": 1}, frozenset("ac"))).reason
    assert words.endswith("none of the function's others is on this node, the node has its weights")


def where(outcome: Placement | NoRoom) -> tuple[str, int]:
    assert isinstance(outcome, Placement), outcome
    return outcome.node, outcome.row


@pytest.mark.parametrize(
    ("devices", "want", "words"),
    [
        ((), allocation(25, 100), "no device is known"),
        ((device("a", lost=True),), allocation(25, 100), "no device is healthy"),
        ((device("a"), device("b")), allocation(25, 100, 2000), "no device can ever hold 2000 MiB"),
        ((device("a"),), allocation(33, 100), "no device gives SM 33 %: they offer 10, 25, 50, 75, 100 %"),
        (tuple(device(f"n{i}", "g0", Row(0, 100, 950)) for i in range(9)), allocation(25, 100), "5 more have no more"),
    ],
)
def test_what_fits_nowhere_is_told_why(devices: tuple[DeviceState, ...], want: Allocation, words: str) -> None:
    for outcome in (place(want, devices), Room(devices).place(want), Room(devices).place(want, NO_TIES)):
        assert isinstance(outcome, NoRoom)
        assert words in outcome.reason


def test_room_given_back_is_found_by_what_found_none() -> None:
    room = Room([device("a")])
    room.occupy("a", "g0", 0, allocation(100, 1000))
    assert isinstance(room.place(allocation(50, 500)), NoRoom)
    room.release("a", "g0", 0, allocation(100, 1000))
    assert where(room.place(allocation(50, 500))) == ("a", 0)


@given(st.lists(st.integers(1, 20), max_size=7))
def test_the_bound_on_bins_is_never_above_the_optimum_nor_below_the_sum(sizes: list[int]) -> None:
    assert -(-sum(sizes) // 20) <= fewest_bins(sizes, 20) <= optimum(tuple(sizes), 20)


def optimum(sizes: tuple[int, ...], capacity: int) -> int:
    """By trying: the first item with every set of others that fits beside it."""
    if not sizes:
        return 0
    first, rest = sizes[0], sizes[1:]
    best = len(sizes)
    for count in range(len(rest) + 1):
        for chosen in combinations(range(len(rest)), count):
            if first + sum(rest[i] for i in chosen) <= capacity:
                left = tuple(size for i, size in enumerate(rest) if i not in chosen)
                best = min(best, 1 + optimum(left, capacity))
    return best


def test_the_bound_sees_widths_that_the_volume_does_not() -> None:
    bound = fewest_gpus([allocation(60, 100) for _ in range(21)], 1000 * MIB)
    # 21 x 60 % x 10 % of the time is 1.26 GPUs; they need three rows of 60 %, no two of which share a GPU.
    assert (bound.volume, bound.widths, bound.gpus) == (2, 3, 3)
    assert fewest_gpus([allocation(10, 10, 600) for _ in range(5)], 1000 * MIB).gpus == 5
    assert fewest_gpus([], 1000 * MIB).gpus == 0


@given(st.lists(st.builds(allocation, st.sampled_from(RUNGS), st.integers(1, 1000), st.integers(1, 900)), max_size=30))
def test_no_placement_does_with_fewer_gpus_than_the_bound(asked: list[Allocation]) -> None:
    room = Room([device(f"n{i:02}") for i in range(40)])
    for want in asked:
        found = room.place(want)
        assert isinstance(found, Placement)
        room.occupy(found.node, found.gpu, found.row, want)
    assert fewest_gpus(asked, 1000 * MIB).gpus <= room.gpus_used
