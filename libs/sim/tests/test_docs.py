"""The worked example of docs/scaling.md is what the code gives."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

from hasgpu_core.policy.hybrid import HybridSettings
from hasgpu_core.policy.scaling import ScalingSettings
from hasgpu_core.resources import DeviceInfo
from hasgpu_sim import FunctionLoad, Scenario, simulate
from hasgpu_sim.arrivals import RateStep
from hasgpu_sim.synthetic import synthetic_spec, synthetic_table

PAGE = (Path(__file__).parents[3] / "docs" / "scaling.md").read_text(encoding="utf-8")


def test_the_worked_example_is_true() -> None:
    device = DeviceInfo("laptop", "cpu0", "cpu-2c", "cpu", 8 << 30, (25, 50, 75, 100))
    speed = {25: 0.5, 50: 1.0, 75: 1.4, 100: 1.7}
    table = synthetic_table("minilm", device_model="cpu-2c", slo_ms=300, fixed_s=0.005, item_s=0.005, speed=speed)
    for quota_permille in range(100, 1001, 100):
        point = table.best(25, quota_permille)
        assert point is not None
        latency_ms, capacity = point.latency_s * 1e3, point.capacity_rps
        assert f"| {quota_permille // 10} % | {point.batch} | {latency_ms:.0f} | {capacity:.1f} |" in PAGE
    steps = (RateStep(20, 10), RateStep(20, 40), RateStep(20, 80), RateStep(40, 10))
    load = FunctionLoad(synthetic_spec("minilm", slo_ms=300), (table,), steps)
    outcome = simulate(Scenario((device,), (load,), 100.0))
    assert len(outcome.decisions) >= 8
    for at_s, decision in outcome.decisions:
        assert f"{at_s:6.2f}  {decision.reason}" in PAGE
    found = outcome.functions["minilm"]
    summary = (
        f"{found.requests_count:,} requests, {found.attainment:.1%} inside the SLO, "
        f"{found.gpu_seconds:.1f} GPU-seconds of 100"
    )
    assert summary in " ".join(PAGE.split())


def test_every_constant_is_in_the_table_with_its_value() -> None:
    defaults = ScalingSettings()
    for field in fields(ScalingSettings):
        value = getattr(defaults, field.name)
        number = f"{value:,}" if isinstance(value, int) else f"{value:g}"
        assert f"| `{field.name}` | {number} |" in PAGE, field.name


def test_every_constant_of_hybrid_is_in_the_table_with_its_value() -> None:
    defaults = HybridSettings()
    for field in fields(HybridSettings):
        value = getattr(defaults, field.name)
        values = value if isinstance(value, tuple) else (value,)
        shown = ", ".join(str(one) if isinstance(one, bool) else f"{one:g}" for one in values)
        assert f"| `{field.name}` | {shown} |" in PAGE, field.name
