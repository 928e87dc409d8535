"""Clumps of requests: the account of late ones, the plans made for them, and bursts told from chance."""

from __future__ import annotations

from random import Random

import pytest
from hasgpu_core.cluster import DemandView
from hasgpu_core.policy.hybrid import HybridSettings
from hasgpu_core.policy.hybrid.clumps import Clumps, observe
from hasgpu_core.policy.hybrid.forecast import History
from hasgpu_core.policy.hybrid.forecast import observe as observe_arrivals
from hasgpu_core.policy.hybrid.plan import clump_tail, poisson_rps, poisson_tail

SETTINGS = HybridSettings(lend=False, clump_late=2.0, clump_most=6, late_share=0.0025)


def told(looks: list[tuple[int, int, bool]], clumps: Clumps | None = None) -> Clumps:
    """After looks of (arrived, late, counts), ten a second."""
    clumps = clumps or Clumps()
    for at, (arrived, late, counts) in enumerate(looks):
        demand = DemandView(rate_rps=1.0, arrived_items_count=arrived, late_count=late)
        clumps = observe(clumps, demand, at / 10, counts=counts, settings=SETTINGS)
    return clumps


def test_without_clumps_the_tail_is_that_of_poisson_arrivals() -> None:
    assert clump_tail(2.0, 3, 0.0) == pytest.approx(poisson_tail(2.0, 3))
    assert clump_tail(0.0, 3, 0.5) == pytest.approx(0.125)
    sampled = Random(1)
    draws = 20_000
    hits = 0
    for _ in range(draws):
        arrived, at = 0, sampled.expovariate(1.0)
        while at < 1.5:
            arrived, at = arrived + 1, at + sampled.expovariate(1.0)
        while sampled.random() < 0.4:
            arrived += 1
        hits += arrived >= 4
    assert clump_tail(1.5, 4, 0.4) == pytest.approx(hits / draws, abs=0.01)


def test_larger_clumps_are_sustained_at_lower_rates_or_by_more_instances() -> None:
    latencies = (0.03, 0.05, 0.07, 0.09)
    rates = [poisson_rps(latencies, 0.05, 5, SETTINGS, clump=clump) for clump in range(7)]
    assert rates == sorted(rates, reverse=True)
    assert rates[0] > rates[3]
    assert rates[6] == 0.0
    assert poisson_rps(latencies, 0.05, 12, SETTINGS, clump=6) > 0.0


def test_late_requests_raise_the_level_and_requests_in_time_lower_it() -> None:
    assert told([(0, 0, True), (10, 2, True)]).level == 0  # a little of it is paid for by the ten
    owing = told([(0, 0, True), (10, 2, True), (20, 4, True), (30, 5, True)])
    assert (owing.level, owing.owed) == (2, pytest.approx(5 - 0.075, abs=1e-3))
    assert told([(0, 0, True), (0, 2, True), (0, 4, True), (600, 4, True)]).level == 1  # 4 - 1.5
    assert told([(0, 0, True), (0, 2, True), (5000, 2, True)]).level == 0


def test_what_was_late_for_other_reasons_or_all_at_once_counts_little_or_not() -> None:
    assert told([(0, 0, True), (10, 50, False)]).owed == 0.0
    assert told([(0, 0, True), (10, 50, True)]).owed == pytest.approx(2.0, abs=0.05)


def test_a_total_that_falls_is_no_data_and_none_changes_nothing() -> None:
    before = told([(0, 0, True), (10, 2, True), (20, 4, True)])
    demand = DemandView(rate_rps=1.0, arrived_items_count=5, late_count=0)
    fallen = observe(before, demand, 1.0, counts=True, settings=SETTINGS)
    assert (fallen.owed, fallen.level, fallen.late_count) == (before.owed, before.level, 0)
    assert observe(before, DemandView(rate_rps=None), 1.0, counts=True, settings=SETTINGS) == before


def test_it_never_owes_more_than_the_largest_clumps_reckoned_with() -> None:
    looks = [(10 * at, 2 * at, True) for at in range(200)]
    most = told(looks)
    assert most.level == SETTINGS.clump_most
    assert most.owed <= SETTINGS.clump_late * SETTINGS.clump_most


def part_bursty(times_s: list[float], end_s: int) -> float:
    history, count, bursty = History(), 0, 0
    for look in range(10 * end_s):
        while count < len(times_s) and times_s[count] <= look / 10:
            count += 1
        history = observe_arrivals(history, count, look / 10, SETTINGS)
        bursty += history.bursty
    return bursty / (10 * end_s)


@pytest.mark.parametrize("seed", range(3))
def test_bursts_are_told_from_random_arrivals(seed: int) -> None:
    rng = Random(seed)
    times, at_s = [], 0.0
    while (at_s := at_s + rng.expovariate(10.0)) < 900:
        times.append(at_s)
    assert part_bursty(times, 900) < 0.02
    bursts, at_s = [], 0.0
    while (at_s := at_s + rng.expovariate(1.0)) < 900:
        bursts += [at_s + rng.random() * 0.3 for _ in range(8)]
    assert part_bursty(sorted(bursts), 900) > 0.8
