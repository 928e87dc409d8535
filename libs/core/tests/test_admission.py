from __future__ import annotations

from hasgpu_core.policy.admission import LONGEST_RETRY_S, SHORTEST_RETRY_S, admit
from hypothesis import given
from hypothesis import strategies as st


def test_unknown_or_no_capacity_waits() -> None:
    for capacity in (None, 0.0):
        assert (
            admit(now_s=0, deadline_s=1, rows=1, queued_rows=1000, capacity_rps=capacity, batch_latency_s=None) is None
        )


def test_a_passed_deadline_is_refused_even_without_capacity() -> None:
    assert admit(now_s=2, deadline_s=1, rows=1, queued_rows=0, capacity_rps=None, batch_latency_s=None) is not None


def test_queue_that_is_too_long_is_refused_with_the_excess_as_hint() -> None:
    refusal = admit(now_s=0, deadline_s=1, rows=1, queued_rows=30, capacity_rps=10, batch_latency_s=0.5)
    assert refusal is not None
    assert abs(refusal.retry_after_s - 2.5) < 1e-9
    assert "30 rows" in refusal.reason
    assert admit(now_s=0, deadline_s=4, rows=1, queued_rows=30, capacity_rps=10, batch_latency_s=0.5) is None


@given(st.integers(0, 10_000), st.floats(0.1, 1e4), st.floats(0, 10), st.floats(0.01, 100))
def test_admission_is_monotone_in_the_queue(queued: int, capacity: float, latency: float, left: float) -> None:
    def ask(rows: int) -> bool:
        refusal = admit(
            now_s=0, deadline_s=left, rows=1, queued_rows=rows, capacity_rps=capacity, batch_latency_s=latency
        )
        if refusal is not None:
            assert SHORTEST_RETRY_S <= refusal.retry_after_s <= LONGEST_RETRY_S
        return refusal is None

    assert ask(queued) or not ask(queued + 1)
