from __future__ import annotations

from dataclasses import replace
from typing import Any

from hasgpu_core.events import PlannedInstance
from hasgpu_core.function import MIB
from hasgpu_core.policy.placement import NoRoom, Placement, most_permille, occupy, place, rebind
from hasgpu_core.resources import Allocation, DeviceInfo, DeviceState, Row
from hypothesis import given
from hypothesis import strategies as st

RUNGS = (25, 50, 75, 100)


def device(gpu: str, *rows: Row, memory_mib: int = 1000, used_mib: int = 0) -> DeviceState:
    return DeviceState(DeviceInfo("n", gpu, "m", "cpu", memory_mib * MIB, RUNGS), rows, used_mib * MIB)


def allocation(sm_pct: int, permille: int, memory_mib: int = 10) -> Allocation:
    return Allocation(sm_pct, permille, 1000, memory_mib * MIB)


def where(outcome: Placement | NoRoom) -> tuple[str, int, bool]:
    assert isinstance(outcome, Placement), outcome
    return outcome.gpu, outcome.row, outcome.new_row


def test_fullest_row_of_the_same_size_comes_first() -> None:
    devices = (device("a", Row(0, 50, 200), Row(1, 50, 700)), device("b"))
    assert where(place(allocation(50, 300), devices)) == ("a", 1, False)
    assert where(place(allocation(50, 400), devices)) == ("a", 0, False)


def test_then_a_gpu_in_use_then_an_empty_one() -> None:
    devices = (device("a"), device("b", Row(0, 25, 1000)), device("c", Row(1, 50, 1000)))
    assert where(place(allocation(50, 300), devices)) == ("c", 0, True)
    assert where(place(allocation(75, 300), devices)) == ("b", 1, True)
    assert where(place(allocation(100, 300), devices)) == ("a", 0, True)


def test_memory_rungs_and_room_are_respected_and_named() -> None:
    full = device("a", Row(0, 75, 950), used_mib=995)
    outcome = place(allocation(25, 100), [full])
    assert isinstance(outcome, NoRoom)
    assert "5 MiB" in outcome.reason
    assert "row 0 (SM 75 %): 50 ‰" in outcome.reason
    outcome = place(allocation(30, 100), [full])
    assert isinstance(outcome, NoRoom)
    assert "no device gives SM 30 %" in outcome.reason
    assert isinstance(place(allocation(25, 100), []), NoRoom)


def test_an_empty_row_holds_no_sms() -> None:
    assert where(place(allocation(100, 100), [device("a", Row(3, 75, 0))])) == ("a", 0, True)


allocations = st.builds(allocation, st.sampled_from((*RUNGS, 33)), st.integers(1, 1000), st.integers(1, 600))


@given(st.lists(allocations, max_size=40), st.integers(1, 3))
def test_no_row_gpu_or_memory_is_ever_over_filled(asked: list[Allocation], count: int) -> None:
    devices = tuple(device(f"g{i}", memory_mib=2000) for i in range(count))
    for want in asked:
        outcome = place(want, devices)
        assert outcome == place(want, tuple(reversed(devices)))
        if isinstance(outcome, NoRoom):
            continue
        devices = occupy(devices, outcome, want)
        for state in devices:
            assert all(row.used_permille <= 1000 for row in state.rows)
            assert sum(row.sm_pct for row in state.rows) <= 100
            assert state.memory_used_bytes <= state.info.memory_bytes
            assert len({row.index for row in state.rows}) == len(state.rows)


@given(st.lists(st.tuples(allocations, st.booleans()), max_size=12), st.randoms(use_true_random=False))
def test_rebinding_is_deterministic_and_fits(asked: list[tuple[Allocation, bool]], rng: Any) -> None:
    lost = [PlannedInstance("f", f"f-{i}", "x", 0, want, 1, standby) for i, (want, standby) in enumerate(asked)]
    devices = (device("a", Row(0, 50, 400), used_mib=100), device("b"))
    outcomes = rebind(lost, devices)
    shuffled = list(lost)
    rng.shuffle(shuffled)
    assert outcomes == rebind(shuffled, devices)
    assert len(outcomes) == len(lost)
    room: tuple[DeviceState, ...] = devices
    for bound in outcomes:
        if isinstance(bound.outcome, Placement):
            room = occupy(room, bound.outcome, bound.planned.allocation)
    assert all(row.used_permille <= 1000 for d in room for row in d.rows)
    assert all(sum(row.sm_pct for row in d.rows) <= 100 for d in room)
    standby = [bound.planned.standby for bound in outcomes]
    assert standby == sorted(standby)


@given(st.lists(allocations, max_size=20), allocations)
def test_the_largest_request_is_what_just_finds_a_place(asked: list[Allocation], want: Allocation) -> None:
    devices: tuple[DeviceState, ...] = (device("a", memory_mib=2000), device("b", memory_mib=2000))
    for other in asked:
        outcome = place(other, devices)
        if isinstance(outcome, Placement):
            devices = occupy(devices, outcome, other)
    most = most_permille(want.sm_pct, want.memory_bytes, devices)
    if most:
        assert isinstance(place(replace(want, request_permille=most), devices), Placement)
    if most < 1000:
        assert isinstance(place(replace(want, request_permille=most + 1), devices), NoRoom)
