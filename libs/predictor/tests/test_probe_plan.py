"""The probe plan: what it measures first, what it costs, and that it beats the plain order."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from hasgpu_core.errors import InvalidError
from hasgpu_predictor import PhysicalModel, ProfilePoint, fit_physical, plan_probes, probe_candidates, static_physical
from hasgpu_predictor.probe_plan import Cell, probe_costs_s

RUNGS = (25, 50, 75, 100)
CANDIDATES = probe_candidates((1, 2, 4, 8, 16), RUNGS)


def true_latency_s(batch: int, sm: int, quota: int, exponent: float = 0.55) -> float:
    d = 0.004 + (0.003 + 0.006 * batch) * (100 / sm) ** exponent
    return max(d + 0.002, d * 1000 / quota)


def measured(cell: Cell) -> ProfilePoint:
    batch, sm, _ = cell
    d = 0.004 + (0.003 + 0.006 * batch) * (100 / sm) ** 0.55
    return ProfilePoint(*cell, true_latency_s(*cell), d)


def guess() -> PhysicalModel:
    return static_physical(artifact_bytes=40 << 20, backend="cpu", slo_s=0.2)


def test_costs_stay_inside_the_budget_and_the_expected_error_falls() -> None:
    plan = plan_probes(guess(), CANDIDATES, budget_s=8.0)
    assert 5 <= len(plan) < len(CANDIDATES)
    assert sum(probe.cost_s for probe in plan) <= 8.0
    errors = [probe.expected_error_pct for probe in plan]
    assert all(later <= earlier + 1e-9 for earlier, later in pairwise(errors))
    assert errors[-1] < 0.6 * errors[0]
    assert plan == plan_probes(guess(), CANDIDATES, budget_s=8.0)
    assert len({probe.cell for probe in plan}) == len(plan)


def test_smaller_quotas_come_after_the_whole_one() -> None:
    plan = [probe.cell for probe in plan_probes(guess(), CANDIDATES, budget_s=60.0)]
    for index, (batch, sm, quota) in enumerate(plan):
        assert quota == 1000 or (batch, sm, 1000) in plan[:index]


def test_what_is_measured_is_not_planned_again_and_costs_are_learnt() -> None:
    first = plan_probes(guess(), CANDIDATES, budget_s=4.0)
    known = [measured(probe.cell) for probe in first]
    physical = fit_physical(known)
    second = plan_probes(physical, CANDIDATES, budget_s=4.0, known=known)
    assert not {probe.cell for probe in first} & {probe.cell for probe in second}
    assert second[0].expected_error_pct < first[0].expected_error_pct
    heavy = probe_costs_s(physical, [(16, 25, 50)], budget_s=100.0)
    assert 6.25 < heavy[0] < 15, "a sixteenth of the budget, or three repetitions"
    assert probe_costs_s(physical, [(1, 100, 1000)], budget_s=100.0)[0] < 1.0


def test_a_budget_for_nothing_still_measures_one_point() -> None:
    assert len(plan_probes(guess(), CANDIDATES, budget_s=0.001)) == 1
    everything = [measured(cell) for cell in CANDIDATES]
    assert plan_probes(fit_physical(everything), CANDIDATES, budget_s=9.0, known=everything) == []


def host_metered_s(batch: int, sm: int, quota: int) -> float:
    """Nothing like the estimate's formula: batches come in steps, SM shares saturate, quotas wait for whole windows."""
    steps = 0.004 + 0.005 * math.ceil(batch / 4) * 4 / min(1.0, 0.15 + sm / 90)
    waits = 0.006 + 0.04 * math.floor(0.4 / (quota / 1000) / 1.7) / 3
    return max(steps, waits)


def test_a_planned_budget_beats_the_plain_order_and_chance() -> None:
    truth = {cell: host_metered_s(*cell) for cell in CANDIDATES}
    rng = np.random.default_rng(1)

    def error_pct(order: list[Cell], budget_s: float) -> float:
        taken: list[ProfilePoint] = []
        for cell in order:
            budget_s -= 12 * truth[cell]
            if budget_s < 0 and taken:
                break
            taken.append(ProfilePoint(*cell, truth[cell]))
        grid = np.array(CANDIDATES, float)
        return 100 * float(np.abs(fit_physical(taken).latency_s(*grid.T) / np.array(list(truth.values())) - 1).mean())

    plan = [probe.cell for probe in plan_probes(guess(), CANDIDATES, budget_s=1e3)]
    whole_first = sorted(CANDIDATES, key=lambda cell: (-cell[2], cell))
    for budget_s in (3.0, 6.0, 12.0):
        by_chance = [error_pct([CANDIDATES[i] for i in rng.permutation(len(CANDIDATES))], budget_s) for _ in range(9)]
        planned = error_pct(plan, budget_s)
        assert planned < float(np.median(by_chance))
        assert planned < error_pct(whole_first, budget_s)


@pytest.mark.parametrize(
    ("candidates", "budget_s", "text"),
    [
        ([], 1.0, "candidates: expected 1..2000"),
        ([(1, 100, 1000)], 0.0, "budget"),
        ([(1, 100, 1000)], math.nan, "budget"),
        ([(0, 100, 1000)], 1.0, r"candidate\.batch"),
        ([(1, 101, 1000)], 1.0, r"candidate\.sm_pct"),
        ([(1, 100, 0)], 1.0, r"candidate\.quota_permille"),
    ],
)
def test_it_refuses(candidates: list[Cell], budget_s: float, text: str) -> None:
    with pytest.raises(InvalidError, match=text):
        plan_probes(guess(), candidates, budget_s=budget_s)
