"""Parts of the hybrid policy by themselves: spacing of arrivals, plans, clear words for what cannot be."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest
from hasgpu_core.capacity import CapacityPoint, CapacityTable
from hasgpu_core.cluster import ClusterSnapshot, DemandView, FunctionView, InstanceView
from hasgpu_core.errors import InvalidError
from hasgpu_core.function import Artifact, FunctionSpec, ModelFormat, SloClass, TensorSpec, slo_class_of
from hasgpu_core.policy.hybrid import HybridPolicy, HybridSettings
from hasgpu_core.policy.hybrid.plan import poisson_tail
from hasgpu_core.policy.hybrid.spacing import Spacing
from hasgpu_core.policy.scaling import PolicyState
from hasgpu_core.resources import Allocation, DeviceInfo, DeviceState, InstanceState

ENOUGH = HybridSettings().regular_evidence


def told(times_s: list[float], end_s: float) -> list[tuple[float, bool]]:
    """(time, regular) at each look, ten a second."""
    spacing, count, out = Spacing(), 0, []
    for look in range(int(end_s * 10)):
        while count < len(times_s) and times_s[count] <= look / 10:
            count += 1
        spacing = spacing.counted(count, look / 10, ENOUGH)
        out.append((look / 10, spacing.regular))
    return out


def poisson(rate_rps: float, end_s: float, seed: int) -> list[float]:
    rng, at_s, out = Random(seed), 0.0, []
    while (at_s := at_s + rng.expovariate(rate_rps)) < end_s:
        out.append(at_s)
    return out


@pytest.mark.parametrize("rate_rps", [2.0, 5.0, 15.0, 40.0])
def test_even_arrivals_are_told_within_about_25_and_stay_so(rate_rps: float) -> None:
    times = [i / rate_rps for i in range(int(60 * rate_rps))]
    looks = told(times, 60)
    first_s = next(at_s for at_s, regular in looks if regular)
    assert first_s <= max(3.0, 25 / rate_rps)
    assert all(regular for at_s, regular in looks if at_s > first_s)


@pytest.mark.parametrize("seed", range(6))
def test_random_arrivals_are_not_taken_for_even_ones(seed: int) -> None:
    looks = told(poisson(8.0, 120, seed), 120)
    assert sum(regular for _, regular in looks) <= 0.02 * len(looks)


def test_a_step_of_an_even_rate_does_not_unsettle_it_and_random_arrivals_do() -> None:
    even = [i / 5 for i in range(100)] + [20 + i / 15 for i in range(300)]
    assert all(regular for at_s, regular in told(even, 40) if at_s > 12)
    mixed = [*(i / 10 for i in range(300)), *(30 + t for t in poisson(10.0, 30, 1))]
    assert not told(mixed, 60)[-1][1]


def test_totals_that_begin_anew_are_no_evidence() -> None:
    spacing = Spacing().counted(10, 0.0, ENOUGH).counted(20, 1.0, ENOUGH).restarted()
    assert spacing.counted(3, 2.0, ENOUGH).evidence == spacing.evidence


def test_poisson_tail() -> None:
    assert poisson_tail(0.0, 1) == 0.0
    assert poisson_tail(1.0, 1) == pytest.approx(1 - 0.36787944)
    assert poisson_tail(2.0, 3) == pytest.approx(0.32332358)


def spec_of(name: str, *, slo_ms: int, memory_bytes: int = 1 << 30) -> FunctionSpec:
    tensor = TensorSpec("x", "FP32", (-1, 1))
    return FunctionSpec(
        name, ModelFormat.PYTHON, Artifact("0" * 64, 1), "m.py", (tensor,), (tensor,), slo_ms, memory_bytes=memory_bytes
    )


def reason(spec: FunctionSpec, devices: tuple[DeviceState, ...]) -> str:
    points = tuple(CapacityPoint(1, 50, q, 20.0 / q, 10.0) for q in (500, 1000))
    table = CapacityTable(spec.name, 1, "emu", 1, 0, spec.slo_ms, points)
    view = FunctionView(spec, 1, DemandView(rate_rps=1.0, arrived_items_count=3), (), {"emu": table})
    decisions, _ = HybridPolicy(HybridSettings(lend=False)).decide(
        ClusterSnapshot((view,), devices), PolicyState(), 0.0
    )
    return decisions[0].reason


GPU = DeviceState(DeviceInfo("n", "g", "emu", "emulated", 2 << 30, (50, 100)))


def test_what_cannot_be_is_said_in_words() -> None:
    assert "no device is known" in reason(spec_of("f", slo_ms=100), ())
    impossible = reason(spec_of("f", slo_ms=10), (GPU,))
    assert "new instance f-0 (SM 50 %, quota 100 %)" in impossible
    assert "no configuration meets the SLO of 10 ms; the fastest that has room takes 20 ms" in impossible
    assert "no room: no emu has" in reason(spec_of("f", slo_ms=100, memory_bytes=4 << 30), (GPU,))
    assert "4096 MiB" in reason(spec_of("f", slo_ms=100, memory_bytes=4 << 30), (GPU,))


def test_one_that_loads_for_minutes_is_waited_for_and_one_without_a_worker_is_not() -> None:
    table = CapacityTable("f", 1, "emu", 1, 0, 100, (CapacityPoint(1, 50, 1000, 0.02, 10.0),))

    def wanted_after_90_s(state: InstanceState) -> list[str]:
        views = (InstanceView("f-0", Allocation(50, 1000, 1000, 1 << 30), state, "n", "g0", 0, "emu"),)
        policy, memory, decisions = HybridPolicy(), PolicyState(), ()
        for now_s in range(91):
            view = FunctionView(spec_of("f", slo_ms=100), 1, DemandView(0.0), views, {"emu": table}, next_ordinal=1)
            decisions, memory = policy.decide(ClusterSnapshot((view,), (GPU,)), memory, float(now_s))
        return [share.instance for share in decisions[0].desired]

    assert wanted_after_90_s(InstanceState.LOADING) == ["f-0"]
    assert "f-0" not in wanted_after_90_s(InstanceState.PENDING)


def test_a_failed_worker_is_left_to_its_agent_and_replaced_once_beside_one_that_serves() -> None:
    points = tuple(CapacityPoint(1, 50, q, 20.0 / q, 10.0) for q in (500, 1000))
    spec = spec_of("f", slo_ms=100)
    table = CapacityTable("f", 1, "emu", 1, 0, 100, points)

    def wanted(*states: InstanceState, needed_rps: float) -> list[str]:
        views = tuple(
            InstanceView(f"f-{i}", Allocation(50, 11, 1000, 1 << 30), state, "n", f"g{i}", 0, "emu", reason="it died")
            for i, state in enumerate(states)
        )
        gpus = tuple(replace(GPU, info=replace(GPU.info, gpu=f"g{i}")) for i in range(6))
        policy, state, decisions = HybridPolicy(), PolicyState(), ()
        for tick in range(80):
            demand = DemandView(rate_rps=needed_rps, arrived_items_count=int(needed_rps * tick / 10))
            view = FunctionView(spec, 1, demand, views, {"emu": table}, next_ordinal=len(views))
            decisions, state = policy.decide(ClusterSnapshot((view,), gpus), state, tick / 10)
        return [share.instance for share in decisions[0].desired]

    failed, ready = InstanceState.FAILED, InstanceState.READY
    assert wanted(failed, needed_rps=1.0) == ["f-0"]
    assert wanted(failed, failed, needed_rps=1.0) == ["f-0", "f-1"]
    assert wanted(ready, failed, needed_rps=1.0) == ["f-0"]
    two = wanted(ready, failed, needed_rps=60.0)
    assert two[:2] == ["f-0", "f-1"]
    assert len(two) >= 3
    assert len(wanted(ready, failed, failed, needed_rps=60.0)) < len(two) + 1


def test_slo_classes_by_name() -> None:
    assert [slo_class_of(text) for text in ("critical", "", "best-effort")] == [
        SloClass.CRITICAL,
        SloClass.STANDARD,
        SloClass.BEST_EFFORT,
    ]
    with pytest.raises(InvalidError, match="critical or standard or best-effort, got 'gold'"):
        slo_class_of("gold")
