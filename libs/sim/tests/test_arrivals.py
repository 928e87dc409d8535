from __future__ import annotations

from random import Random

import pytest
from hasgpu_sim.arrivals import HASGPU_RATES_RPS, Process, RateStep, arrival_times_s, hasgpu_steps
from hasgpu_sim.event_queue import EventQueue


def test_hasgpu_workload_is_the_published_one() -> None:
    assert len(HASGPU_RATES_RPS) == 50
    times = arrival_times_s(hasgpu_steps(), Process.EVEN, Random(0))
    assert len(times) == 2690
    assert times[0] == 0.0
    assert times[-1] < 250
    assert list(times) == sorted(times)


def test_poisson_is_seeded_and_has_the_rate() -> None:
    steps = (RateStep(100, 20), RateStep(10, 0), RateStep(100, 40))
    times = arrival_times_s(steps, Process.POISSON, Random(5))
    assert times == arrival_times_s(steps, Process.POISSON, Random(5))
    assert times != arrival_times_s(steps, Process.POISSON, Random(6))
    assert not [t for t in times if 100 <= t < 110]
    assert sum(t < 100 for t in times) == pytest.approx(2000, rel=0.1)
    assert len(times) == pytest.approx(6000, rel=0.05)


def test_events_run_in_order_and_time_does_not_go_back() -> None:
    queue = EventQueue()
    seen: list[str] = []
    queue.at(2.0, lambda: seen.append("c"))
    queue.at(1.0, lambda: seen.append("a"))
    queue.at(1.0, lambda: queue.after(0.5, lambda: seen.append("b")))
    queue.at(3.0, lambda: seen.append("never"))
    queue.run_until(2.0)
    assert seen == ["a", "b", "c"]
    assert queue.now_s == 2.0
    with pytest.raises(ValueError, match="has passed"):
        queue.at(1.0, lambda: None)
