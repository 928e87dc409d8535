"""How the demo sizes its load and its objective."""

from __future__ import annotations

from typing import Any

import pytest
from hasgpu_cli.demo.plan import (
    FULL_ROW,
    FULL_ROW_ALONE,
    MOST_PEAK_RPS,
    MOST_SHARE,
    SMALLEST_SLO_MS,
    FirstInstance,
    FunctionPlan,
    choose_slo_ms,
    plan_functions,
)
from hasgpu_core.errors import UnavailableError


def surface(latency_ms: float, rps_per_device: float) -> dict[str, Any]:
    """Capacity in proportion to the share, so that the right factor is known."""
    points = [
        {
            "batch": batch,
            "sm_pct": sm_pct,
            "quota_permille": quota,
            "latency_us": round(latency_ms * 1e3 * batch / (sm_pct / 50 * quota / 500)),
            "capacity_millirps": round(rps_per_device * 1e3 * sm_pct / 100 * quota / 1_000),
        }
        for batch in (1, 2)
        for sm_pct in (25, 50, 100)
        for quota in range(100, 1_001, 100)
    ]
    return {"points": points, "slo_ms": 100}


def test_the_objective_is_a_multiple_of_the_latency_and_has_a_floor() -> None:
    assert choose_slo_ms(surface(101, 10)) == 650
    assert choose_slo_ms(surface(5, 10)) == SMALLEST_SLO_MS


def planned(first: dict[str, FirstInstance] | None = None, **surfaces: dict[str, Any]) -> dict[str, FunctionPlan]:
    slos_ms = dict.fromkeys(surfaces, 300)
    return {plan.name: plan for plan in plan_functions(surfaces, slos_ms=slos_ms, replay_s=100, first=first or {})}


def at(row: int, sm_pct: int) -> FirstInstance:
    return FirstInstance(("node0", "cpu0", row), sm_pct)


def test_the_peaks_fill_their_shares() -> None:
    plan = planned(a=surface(50, 50), b=surface(50, 100))["a"]
    # on this grid b gets 20 of its 24 %, and a 25 of the 28 % that are left
    assert plan.factor == pytest.approx(0.9 * 25 / 100 * 50 / 15)
    assert max(plan.due_s) < 100
    assert len(plan.due_s) == pytest.approx(2690 / 250 * 100 * plan.factor, abs=1)


def test_what_a_fast_function_leaves_goes_to_the_slow_one() -> None:
    plans = planned(slow=surface(50, 50), fast=surface(5, 1_000))
    assert plans["fast"].factor == pytest.approx(MOST_PEAK_RPS / 15)
    largest_on_grid = 0.3
    assert largest_on_grid <= MOST_SHARE
    assert plans["slow"].factor == pytest.approx(0.9 * largest_on_grid * 50 / 15)


def test_the_row_for_which_least_is_missing_is_filled() -> None:
    """Alone in a quarter of the SMs `a` needs less more than `b` alone in a half."""
    before = planned(a=surface(50, 60), b=surface(50, 60))
    plans = planned({"a": at(0, 25), "b": at(1, 50)}, a=surface(50, 60), b=surface(50, 60))
    assert plans["a"].factor * 15 / 0.9 == pytest.approx(FULL_ROW_ALONE * 60 * 0.25)
    assert plans["b"].factor == before["b"].factor


def test_functions_that_share_a_row_fill_it_together() -> None:
    plans = planned({"a": at(0, 50), "b": at(0, 50)}, a=surface(50, 300), b=surface(50, 300))
    needed = sum(plan.factor * 15 / 0.9 for plan in plans.values()) / (300 * 0.5)
    assert all(plan.factor * 15 > MOST_PEAK_RPS for plan in plans.values())
    assert needed == pytest.approx(FULL_ROW)


def test_a_row_that_is_full_already_or_too_fast_to_fill_changes_nothing() -> None:
    full = planned({"a": at(0, 25), "b": at(0, 25)}, a=surface(50, 60), b=surface(50, 60))
    fast = planned({"a": at(0, 50), "b": at(1, 50)}, a=surface(5, 1_000), b=surface(5, 1_000))
    assert full["a"].factor == planned(a=surface(50, 60), b=surface(50, 60))["a"].factor
    assert fast["a"].factor == planned(a=surface(5, 1_000), b=surface(5, 1_000))["a"].factor


def test_a_machine_that_is_too_slow_is_told() -> None:
    with pytest.raises(UnavailableError, match="a: 24 % of this device meets an objective of 300 ms at no rate"):
        planned(a=surface(50, 0), b=surface(50, 0))
