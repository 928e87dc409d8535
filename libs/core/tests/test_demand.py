from __future__ import annotations

import math

import pytest
from hasgpu_core.demand import DemandTracker
from hasgpu_core.errors import InvalidError
from hasgpu_core.events import DemandEvent
from hypothesis import given
from hypothesis import strategies as st


def event(arrived: int, at_s: float, *, gateway: str = "g", epoch: str = "e", **fields: int | None) -> DemandEvent:
    values: dict[str, int | None] = {
        "ok_count": 0, "failed_count": 0, "refused_count": 0, "late_count": 0, "queued_count": 0,
        "in_flight_count": 0, "oldest_wait_ms": 0, "window_count": 0, "p50_ms": None, "p95_ms": None, "p99_ms": None,
    }  # fmt: skip
    values.update(fields)
    return DemandEvent("f", gateway, epoch, round(at_s * 1e9), arrived, **values)  # type: ignore[arg-type]


def test_no_data_is_none_and_not_zero() -> None:
    tracker = DemandTracker()
    assert tracker.view("f", 0.0).rate_rps is None
    assert tracker.view("f", 0.0).age_s == math.inf
    tracker.observe(event(100, 0.0, queued_count=1), 0.0)
    assert tracker.view("f", 0.0).rate_rps is None
    assert tracker.view("f", 0.0).queued_items_count == 1
    tracker.observe(event(100, 1.0), 1.0)
    assert tracker.view("f", 1.0).rate_rps == 0.0


def test_rates_are_of_the_window_and_summed_over_gateways() -> None:
    tracker = DemandTracker(window_s=2.0)
    for i in range(21):
        at_s = i * 0.5
        rate = 10 if at_s <= 8 else 30
        count = 10 * min(at_s, 8) + 30 * max(0.0, at_s - 8)
        tracker.observe(event(round(count), at_s), at_s)
        tracker.observe(event(round(4 * at_s), at_s, gateway="h"), at_s)
    assert rate == 30
    assert tracker.view("f", 10.0).rate_rps == pytest.approx(34.0)


def test_rates_and_queues_are_in_items() -> None:
    tracker = DemandTracker()
    tracker.observe(event(100, 0.0, arrived_items_count=400), 0.0)
    tracker.observe(event(110, 1.0, arrived_items_count=440, queued_count=3, queued_items_count=12), 1.0)
    view = tracker.view("f", 1.0)
    assert (view.rate_rps, view.queued_items_count, view.items_per_request) == (pytest.approx(40.0), 12, 4.0)
    tracker.observe(event(5, 2.0, epoch="e2", arrived_items_count=20), 2.0)
    assert tracker.view("f", 2.0).rate_rps == pytest.approx(30.0)  # (440 + 20 - 400) in 2 s: counted on


def test_a_gateway_that_does_not_count_items_has_one_a_request() -> None:
    tracker = DemandTracker()
    tracker.observe(event(0, 0.0), 0.0)
    tracker.observe(event(10, 1.0, queued_count=2), 1.0)
    view = tracker.view("f", 1.0)
    assert (view.rate_rps, view.queued_items_count, view.items_per_request) == (pytest.approx(10.0), 2, 1.0)


def test_lost_doubled_and_late_messages_do_no_harm() -> None:
    tracker = DemandTracker()
    for at_s in (0.0, 0.5, 2.0, 2.0, 1.5, 2.5):
        tracker.observe(event(round(10 * at_s), at_s), 3.0)
    assert tracker.view("f", 3.0).rate_rps == pytest.approx(10.0)


def test_a_restarted_gateway_counts_on() -> None:
    tracker = DemandTracker()
    tracker.observe(event(1000, 0.0), 0.0)
    tracker.observe(event(1010, 1.0), 1.0)
    tracker.observe(event(8, 2.0, epoch="e2"), 2.0)
    assert tracker.view("f", 2.0).rate_rps == pytest.approx(9.0)


def test_a_silent_gateway_leaves_the_sum_and_all_silent_is_no_data() -> None:
    tracker = DemandTracker()
    for at_s in (0.0, 1.0):
        tracker.observe(event(round(10 * at_s), at_s, in_flight_count=3), at_s)
        tracker.observe(event(round(2 * at_s), at_s, gateway="h"), at_s)
    for at_s in (2.0, 4.0, 6.5):
        tracker.observe(event(round(2 * at_s), at_s, gateway="h"), at_s)
    view = tracker.view("f", 6.5)
    assert view.rate_rps == pytest.approx(2.0)
    assert view.in_flight_count == 0
    assert tracker.view("f", 20.0).rate_rps is None
    assert tracker.view("f", 20.0).age_s == pytest.approx(13.5)
    # What it counted while it was silent came at an unknown time: no spike when it is back.
    tracker.observe(event(100_000, 21.0), 21.0)
    assert tracker.view("f", 21.0).rate_rps is None


def test_the_worst_percentile_and_wait_count() -> None:
    tracker = DemandTracker()
    tracker.observe(event(1, 0.0, window_count=5, p95_ms=100, oldest_wait_ms=7), 0.0)
    tracker.observe(event(1, 0.0, gateway="h", window_count=5, p95_ms=300, oldest_wait_ms=5), 0.0)
    tracker.observe(event(1, 0.0, gateway="i", window_count=0, p95_ms=900), 0.0)
    view = tracker.view("f", 0.0)
    assert (view.p95_s, view.oldest_wait_s) == (0.3, 0.007)
    tracker.forget("f")
    assert tracker.view("f", 0.0).p95_s is None


def test_a_window_longer_than_the_silence_is_refused() -> None:
    with pytest.raises(InvalidError, match="window_s"):
        DemandTracker(window_s=6.0, silent_after_s=5.0)


@given(st.lists(st.tuples(st.integers(0, 50), st.booleans(), st.floats(0.01, 2.0)), min_size=2, max_size=60))
def test_rates_are_never_negative_whatever_restarts(steps: list[tuple[int, bool, float]]) -> None:
    tracker = DemandTracker()
    now_s, count, epoch, total = 0.0, 0, 0, []
    for arrivals, restart, gap_s in steps:
        now_s += gap_s
        if restart:
            epoch, count = epoch + 1, 0
        count += arrivals
        total.append((now_s, arrivals))
        tracker.observe(event(count, now_s, epoch=str(epoch)), now_s)
        rate = tracker.view("f", now_s).rate_rps
        assert rate is None or 0 <= rate <= max(a for _, a in total) * len(total) / 0.01


def test_late_answers_are_summed_over_gateways_and_epochs() -> None:
    tracker = DemandTracker()
    assert tracker.view("f", 0.0).late_count is None
    tracker.observe(event(10, 0.0, late_count=3), 0.0)
    tracker.observe(event(12, 1.0, late_count=4), 1.0)
    tracker.observe(event(5, 1.0, gateway="h", late_count=1), 1.0)
    assert tracker.view("f", 1.0).late_count == 5
    tracker.observe(event(2, 2.0, epoch="e2", late_count=2), 2.0)
    assert tracker.view("f", 2.0).late_count == 7
