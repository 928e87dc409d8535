"""The back-off doubles, is bounded, and forgets after health."""

from __future__ import annotations

from hasgpu_node_agent.backoff import Backoff


def test_delays_double_to_ten_seconds() -> None:
    backoff = Backoff()
    delays = [backoff.failed(float(i)) for i in range(9)]
    assert delays == [0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 10.0, 10.0, 10.0]


def test_the_wait_runs_down() -> None:
    backoff = Backoff()
    assert backoff.wait_s(5.0) == 0.0
    backoff.failed(5.0)
    assert 0 < backoff.wait_s(5.1) <= 0.1 + 1e-9
    assert backoff.wait_s(5.3) == 0.0


def test_thirty_seconds_of_health_start_it_over_but_less_does_not() -> None:
    backoff = Backoff()
    for now_s in (0.0, 1.0, 2.0):
        backoff.failed(now_s)
    backoff.ready(3.0)
    assert backoff.failed(20.0) == 1.6
    backoff.ready(25.0)
    assert backoff.failed(55.0) == 0.2


def test_time_spent_dead_is_not_health() -> None:
    backoff = Backoff()
    backoff.ready(0.0)
    backoff.failed(1.0)
    assert backoff.failed(100.0) == 0.4
