"""Requests that come several at once: the policy learns it from those that are late, and keeps to the objective."""

from __future__ import annotations

from random import Random

import pytest
from hasgpu_core.policy.hybrid import HybridPolicy, HybridSettings
from hasgpu_core.policy.rivals.clairvoyant import borrowed_bound, held_bound
from hasgpu_sim.evaluate import Settings, function_load, scenario_of
from hasgpu_sim.scenario import FunctionResult
from hasgpu_sim.simulate import simulate
from hasgpu_sim.surface import filled_surface

SURFACE = filled_surface(
    "made-up",
    "emu",
    {
        (batch, sm_pct, quota): (0.004 + 0.016 * (0.6 + 0.4 * batch) * 30 / (30 + sm_pct)) * 1000 / quota
        for batch in (1, 2, 4, 8)
        for sm_pct in (10, 30, 50, 100)
        for quota in range(200, 1001, 200)
    },
)


def clumped(rate_rps: float, more: float, end_s: float, seed: int) -> list[float]:
    """Arrivals of which a part brings another one with it within milliseconds."""
    rng, at_s, out = Random(seed), 0.0, []
    while (at_s := at_s + rng.expovariate(rate_rps * (1 - more))) < end_s:
        out.append(at_s)
        while rng.random() < more:
            out.append(out[-1] + 1e-3 * rng.random())
    return sorted(out)


def test_clumps_are_learnt_from_late_requests_which_is_cheaper_than_growing_without_knowing_why() -> None:
    times = clumped(8.0, 0.4, 400.0, seed=2)
    settings = Settings(gpus=2)

    def found(most: int) -> FunctionResult:
        load = function_load("f", SURFACE, 2.0, times, settings)
        policy = HybridPolicy(HybridSettings(clump_most=most))
        return simulate(scenario_of([load], SURFACE, 400.0, settings), policy).functions["f"]

    without, learnt = found(0), found(6)
    assert without.violations_count > 0.01 * len(times)
    assert learnt.violations_count < without.violations_count / 2
    assert sum(at_s > 200 for at_s in learnt.violated_s) <= 0.005 * sum(at_s > 200 for at_s in times)
    assert learnt.gpu_seconds < without.gpu_seconds


def test_the_bound_of_who_holds_a_set_lies_between_that_of_who_knows_all_and_what_is_reached() -> None:
    times = clumped(8.0, 0.0, 120.0, 3)
    settings = Settings(gpus=2)
    load = function_load("f", SURFACE, 3.0, times, settings)
    table = load.tables[0]
    held = held_bound(times, table, duration_s=120.0, max_batch=8)
    least = borrowed_bound(times, table, max_batch=8)
    found = simulate(scenario_of([load], SURFACE, 120.0, settings), HybridPolicy()).functions["f"]
    assert found.violations_count / found.requests_count <= 0.005
    assert least.gpu_seconds < held.gpu_seconds <= found.gpu_seconds


def test_the_bound_of_one_request_in_two_epochs_is_that_request_and_an_idle_instance() -> None:
    table = function_load("f", SURFACE, 3.0, [1.0], Settings(gpus=2)).tables[0]
    bound = held_bound([1.0], table, duration_s=10.0, max_batch=1)
    slo_s = table.slo_ms / 1e3
    ways = [
        0.1 * 0.010 * 5 + sm / 100 * (0.010 * 5 + (q - 10) / 1000 * took_s)
        for sm in table.sm_pcts
        for q in table.quotas_permille
        if (took_s := table.latency_s(1, sm, q)) is not None and took_s <= slo_s
    ]
    assert bound.gpu_seconds == pytest.approx(min(ways))
    assert bound.requests_count == 1
