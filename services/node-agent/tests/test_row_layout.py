"""Where rows lie, and that no step on the way lets two rows run on one SM at once."""

from __future__ import annotations

import itertools
import random

import hypothesis.strategies as st
import pytest
from hasgpu_node_agent.row_layout import Holder, Lease, fits, is_free, lay_out, next_leases
from hypothesis import given

UNITS = st.sampled_from((1, 6, 12, 24, 25))
WIDTHS = st.dictionaries(st.integers(0, 7), st.integers(1, 100), max_size=6)


def ranges(places: dict[int, int], widths: dict[int, int]) -> list[tuple[int, int]]:
    return sorted((first, first + widths[row]) for row, first in places.items())


@given(st.dictionaries(st.integers(0, 7), st.integers(0, 99), max_size=6), WIDTHS, UNITS)
def test_a_layout_is_disjoint_aligned_inside_the_device_and_there_whenever_rows_fit(present, widths, unit):
    places = lay_out(present, widths, unit)
    assert (places is not None) == fits(widths.values(), unit)
    if places is not None:
        assert set(places) == set(widths)
        assert all(first % unit == 0 for first in places.values())
        taken = ranges(places, widths)
        assert all(first >= 0 and end <= 100 for first, end in taken)
        assert all(a_end <= b_first for (_, a_end), (b_first, _) in itertools.pairwise(taken))


@given(WIDTHS, UNITS)
def test_a_layout_laid_out_again_stays(widths, unit):
    places = lay_out({}, widths, unit)
    if places is not None:
        assert lay_out(places, widths, unit) == places


def test_rows_stay_and_new_ones_fill_gaps():
    assert lay_out({0: 0, 1: 50}, {0: 25, 1: 25, 2: 25}, 25) == {0: 0, 1: 50, 2: 25}


def test_only_when_no_gap_is_wide_enough_all_move_together():
    assert lay_out({0: 0, 1: 50}, {0: 25, 1: 25, 2: 50}, 25) == {0: 0, 1: 25, 2: 50}


def test_on_a_device_of_odd_units_the_row_that_ends_between_two_lies_last():
    assert not fits((50, 50), 12)
    assert fits((48, 50), 12)
    assert lay_out({}, {0: 50, 1: 48}, 12) == {0: 0, 1: 60} or lay_out({}, {0: 50, 1: 48}, 12) == {1: 0, 0: 48}


class Device:
    """Workers that confirm when the test says; checks every state in between."""

    def __init__(self, rng: random.Random, unit: int, workers: dict[str, tuple[int, int]], always: bool) -> None:
        self.rng, self.unit, self.always = rng, unit, always
        self.rows = {key: row for key, (row, _) in workers.items()}
        self.widths = {key: width for key, (_, width) in workers.items()}
        self.possible: dict[str, list[Lease]] = {}
        self.firsts: dict[int, int] = {}
        self.writes = 0

    def row_widths(self) -> dict[int, int]:
        widths: dict[int, int] = {}
        for key, row in self.rows.items():
            widths[row] = max(widths.get(row, 0), self.widths[key])
        return widths

    def begin(self) -> None:
        places = lay_out({}, self.row_widths(), self.unit)
        assert places is not None
        self.firsts = places
        for key, row in self.rows.items():
            self.possible[key] = [Lease(places[row], self.widths[key], self.always)]

    def holders(self) -> list[Holder[str]]:
        return [
            Holder(key, self.rows[key], tuple(self.possible[key]), (self.firsts[self.rows[key]], self.widths[key]))
            for key in self.rows
        ]

    def check(self) -> None:
        for lease in itertools.chain.from_iterable(self.possible.values()):
            assert 0 <= lease.first_pct < lease.end_pct <= 100
        for (a, mine), (b, others) in itertools.combinations(self.possible.items(), 2):
            if self.rows[a] != self.rows[b]:
                for x, y in itertools.product(mine, others):
                    assert not x.overlaps(y) or (x.exclusive and y.exclusive), (a, x, b, y)

    def settle(self) -> None:
        """Runs to the end, with confirmations in a random order."""
        for _ in range(12 * len(self.rows) + 4):
            for key, lease in next_leases(self.holders(), always_exclusive=self.always).items():
                assert lease != self.possible[key][-1], "nothing is written for nothing"
                self.possible[key].append(lease)
                self.writes += 1
                self.check()
            late = [key for key, leases in self.possible.items() if len(leases) > 1]
            if not late:
                break
            for key in self.rng.sample(late, self.rng.randint(1, len(late))):
                self.possible[key] = self.possible[key][-1:]
                self.check()
        for holder in self.holders():
            assert holder.possible == (Lease(*holder.goal, self.always),)


@given(
    st.randoms(use_true_random=False),
    UNITS,
    st.lists(st.tuples(st.integers(0, 5), st.integers(1, 60)), min_size=1, max_size=8),
    st.lists(st.dictionaries(st.integers(0, 7), st.integers(1, 60), min_size=1, max_size=8), min_size=1, max_size=4),
    st.booleans(),
)
def test_on_the_way_rows_overlap_only_where_all_have_confirmed_that_they_are_marked(
    rng, unit, workers, changes, always
):
    device = Device(rng, unit, {f"w{i}": worker for i, worker in enumerate(workers)}, always)
    if not fits(device.row_widths().values(), unit):
        return
    device.begin()
    for change in changes:
        before = dict(device.widths)
        device.widths.update({f"w{i}": width for i, width in change.items() if f"w{i}" in device.widths})
        widths = device.row_widths()
        if not fits(widths.values(), unit):
            device.widths = before
            continue
        if rng.random() < 0.5:  # a whole new order, not only what the widths ask for
            device.firsts = {row: rng.randrange(0, 100, unit) for row in device.firsts}
        places = lay_out(device.firsts, widths, unit)
        assert places is not None
        device.firsts = places
        device.settle()


def holder(key: str, row: int, lease: Lease, goal: tuple[int, int]) -> Holder[str]:
    return Holder(key, row, (lease,), goal)


def test_growth_into_free_space_takes_one_write_and_no_mark():
    alone = [holder("a", 0, Lease(0, 25), (0, 50)), holder("b", 1, Lease(50, 50), (50, 50))]
    assert next_leases(alone) == {"a": Lease(0, 50)}


def test_who_shrinks_goes_first_and_who_grows_waits_for_it_without_marks():
    both = [holder("a", 0, Lease(0, 50), (0, 25)), holder("b", 1, Lease(50, 50), (25, 75))]
    assert next_leases(both) == {"a": Lease(0, 25)}
    on_its_way = [Holder("a", 0, (Lease(0, 50), Lease(0, 25)), (0, 25)), both[1]]
    assert next_leases(on_its_way) == {}
    assert next_leases([holder("a", 0, Lease(0, 25), (0, 25)), both[1]]) == {"b": Lease(25, 75)}


def test_rows_that_change_places_are_marked_then_moved_then_unmarked():
    a, b = (0, 50), (50, 50)
    swap = [holder("a", 0, Lease(*a), b), holder("b", 1, Lease(*b), a)]
    assert next_leases(swap) == {"a": Lease(*a, True), "b": Lease(*b, True)}
    marked = [holder("a", 0, Lease(*a, True), b), holder("b", 1, Lease(*b, True), a)]
    assert next_leases(marked) == {"a": Lease(*b, True), "b": Lease(*a, True)}
    half = [holder("a", 0, Lease(*a, True), b), Holder("b", 1, (Lease(*b), Lease(*b, True)), a)]
    assert next_leases(half) == {}, "a mark that is not confirmed does not count"
    moved = [holder("a", 0, Lease(*b, True), b), holder("b", 1, Lease(*a, True), a)]
    assert next_leases(moved) == {"a": Lease(*b), "b": Lease(*a)}


def test_time_shared_workers_stay_marked():
    whole = Lease(0, 100, True)
    assert next_leases([holder("a", 0, whole, (0, 100))], always_exclusive=True) == {}
    assert next_leases([holder("a", 0, Lease(0, 100), (0, 100))], always_exclusive=True) == {"a": whole}


@pytest.mark.parametrize(("row", "lease", "free"), [(1, Lease(0, 25), False), (0, Lease(0, 25), True)])
def test_a_range_is_free_when_only_its_own_row_is_there(row, lease, free):
    assert is_free(row, lease, [holder("a", 0, Lease(0, 50), (0, 50))]) is free
