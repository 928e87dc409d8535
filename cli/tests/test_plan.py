"""How the demo sizes its load and its objective."""

from __future__ import annotations

from typing import Any

import pytest
from hasgpu_cli.demo.plan import SMALLEST_SLO_MS, choose_slo_ms, plan_function
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


def test_the_peak_fills_the_chosen_share() -> None:
    plan = plan_function("f", surface(50, 100), slo_ms=300, replay_s=100)
    assert plan.factor == pytest.approx(0.9 * 30 / 15)
    assert max(plan.due_s) < 100
    assert len(plan.due_s) == pytest.approx(2690 / 250 * 100 * plan.factor, abs=1)


def test_a_machine_that_is_too_slow_is_told() -> None:
    with pytest.raises(UnavailableError, match="no share of this machine meets an objective of 300 ms"):
        plan_function("f", surface(50, 0), slo_ms=300, replay_s=100)
