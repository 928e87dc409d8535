from __future__ import annotations

import random

import pytest
from hasgpu_device.engine import summary
from hasgpu_device.segments import Run


def run(execute_ns: int, device_ns: int = 1, *, wait_ns: int = 0, longest_ns: int = 1) -> Run:
    return Run(0, gate_wait_ns=wait_ns, execute_ns=execute_ns, device_ns=device_ns, longest_segment_ns=longest_ns)


def test_one_slow_repetition_changes_nothing():
    usual = [run(100 + n, 50 + n, wait_ns=10) for n in (0, 1, 2, 3, 4)]
    before = summary(usual)
    assert (before.latency_ns, before.device_time_ns) == (112, 52)
    after = summary([*usual[:4], run(90_000, 60_000, wait_ns=10)])
    assert (after.latency_ns, after.device_time_ns) == (before.latency_ns, before.device_time_ns)


def test_the_first_of_three_or_more_does_not_count():
    cold = run(900, 800, longest_ns=700)
    warm = [run(100, 50, longest_ns=30), run(102, 52, longest_ns=40)]
    found = summary([cold, *warm])
    assert (found.latency_ns, found.device_time_ns, found.longest_segment_ns) == (101, 51, 40)
    assert found.repetitions_count == 3


@pytest.mark.parametrize("count", [1, 2])
def test_of_fewer_all_count(count: int):
    found = summary([run(900, 800, longest_ns=700), run(100, 50, longest_ns=30)][:count])
    assert found.latency_ns == {1: 900, 2: 500}[count]
    assert found.longest_segment_ns == 700


def test_the_order_after_the_first_does_not_matter():
    runs = [run(n * 7 % 31, n) for n in range(12)]
    shuffled = runs[1:]
    random.Random(3).shuffle(shuffled)
    assert summary([runs[0], *shuffled]) == summary(runs)
