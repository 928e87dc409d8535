"""The shipped profile: what it says, that the tool computes it, and that the gate makes the latencies it tells."""

from __future__ import annotations

import importlib.util
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from hasgpu_core.errors import NotFoundError
from hasgpu_core.profile import Basis, Profile
from hasgpu_device import profiles
from hasgpu_device.quota import Account, RowClock, advance, charge, choose, join, wake_up

ROOT = Path(__file__).resolve().parents[3]
TOOL = ROOT / "tools" / "modelled_profile.py"


@pytest.fixture(scope="module")
def profile() -> Profile:
    return profiles.shipped()


@pytest.fixture(scope="module")
def tool() -> Any:
    """The tool as a module; the package is tested without it where it is not there."""
    if not TOOL.exists():
        pytest.skip(f"{TOOL} is not here")
    spec = importlib.util.spec_from_file_location("modelled_profile", TOOL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_it_says_that_it_is_modelled_and_from_what(profile: Profile) -> None:
    header = profile.header
    assert profiles.names() == ("modelled-h100",)
    assert header.basis is Basis.MODELLED
    assert "modelled" in header.device_model
    assert "not measured" in header.source
    assert "Datasheet" in header.source
    assert header.complete
    assert {"echo", "minilm", "resnet18"} <= set(header.models)
    assert len(header.models) >= 10
    assert all(model.memory_bytes > 0 for model in header.models.values())


def test_an_unknown_name_is_refused_with_those_there_are() -> None:
    with pytest.raises(NotFoundError, match="shipped profile 'h900' is not found; there is modelled-h100"):
        profiles.shipped("h900")


def test_more_sms_never_slow_a_batch_down_and_a_larger_batch_is_never_faster(profile: Profile) -> None:
    times: dict[str, dict[tuple[int, int], float]] = defaultdict(dict)
    for row in profile.rows:
        times[row.model][row.batch, row.sm_pct] = row.device_time_us
    for model, cells in times.items():
        for (batch, sm_pct), time_us in cells.items():
            assert time_us >= max(v for (b, s), v in cells.items() if b <= batch and s >= sm_pct), (
                model,
                batch,
                sm_pct,
            )


def test_small_batches_gain_little_from_more_sms_and_large_ones_much(profile: Profile) -> None:
    resnet = profile.device_times("resnet50")
    assert resnet.device_time_us(1, 50) / resnet.device_time_us(1, 100) < 1.1
    assert 2 < resnet.device_time_us(32, 12) / resnet.device_time_us(32, 50) < 50 / 12


@pytest.mark.timeout(300)
def test_the_tool_computes_what_is_shipped(tool: Any, profile: Profile) -> None:
    """Drift: the tool, its constants or torch's operations have changed; run tools/modelled_profile.py again."""
    names, batches = ["echo", "minilm", "mobilenet-v2", "gpt2"], (1, 8)
    fresh = tool.compute(names, batches)
    shipped = {row.cell: row for row in profile.rows if row.model in names and row.batch in batches}
    assert len(fresh.rows) == len(names) * len(batches) * 8 * 4
    assert {row.cell for row in fresh.rows} == set(shipped)
    for row in fresh.rows:
        assert row == shipped[row.cell]
    assert set(tool.entries()) == set(profile.header.models)
    assert fresh.header.source == profile.header.source


def test_unknown_models_are_refused_by_the_tool(tool: Any) -> None:
    with pytest.raises(SystemExit, match=r"expected some of echo, .*got resnet9000"):
        tool.compute(["resnet9000"])


def test_an_operation_is_bound_by_arithmetic_or_by_memory(tool: Any) -> None:
    gpu = tool.H100
    product = tool.Operation(1e12, 1.0, True, 2, 1, 132_000)
    assert product.time_us(gpu, 132) == pytest.approx(tool.KERNEL_US + 1e12 / gpu.tensor_flops[2] * 1e6)
    assert product.time_us(gpu, 66) - tool.KERNEL_US == pytest.approx(2 * (product.time_us(gpu, 132) - tool.KERNEL_US))
    copy = tool.Operation(0.0, 1.0, False, 4, 10**9, 1)
    whole_us = copy.time_us(gpu, 132)
    assert whole_us == pytest.approx(tool.KERNEL_US + 1e15 / gpu.bytes_per_s / tool.MEMORY_EFFICIENCY)
    assert copy.time_us(gpu, tool.SATURATING_SMS) == pytest.approx(whole_us)
    assert copy.time_us(gpu, 16) > 2 * whole_us
    small = tool.Operation(1e6, 1.0, True, 2, 1, 8)
    assert small.time_us(gpu, 132) == small.time_us(gpu, 16)


@pytest.mark.parametrize("quota", [100, 200, 500, 1_000])
@pytest.mark.parametrize("segments_us", [(500,), (3_000,), (5_000, 5_000, 2_000)])
def test_the_latency_at_a_quota_is_what_the_gate_makes_of_it(
    tool: Any, quota: int, segments_us: tuple[int, ...]
) -> None:
    """Batches back to back through the gate's own arithmetic: their mean is the tool's formula."""
    clock, account, now_ns = RowClock(), Account(quota, quota, 40_000_000), 0
    join(account, clock, now_ns)
    batches_count, settled_ns = 400, 0
    for index in range(batches_count):
        if index == batches_count // 4:
            settled_ns = now_ns
        for segment_us in segments_us:
            advance(clock, {0: account}, now_ns)
            wake_up(account, clock, now_ns)
            while choose(clock, {0: account}, now_ns) is None:
                now_ns += max(1, account.ready_in_ns(clock, now_ns))
                advance(clock, {0: account}, now_ns)
            account.waiting, account.holding = False, True
            now_ns += segment_us * 1_000
            advance(clock, {0: account}, now_ns)
            charge(account, clock, now_ns, device_ns=segment_us * 1_000, borrowed=False)
            account.holding = False
    counted = batches_count - batches_count // 4
    mean_us = (now_ns - settled_ns) / 1e3 / counted
    assert mean_us == pytest.approx(tool.latency_us(sum(segments_us), 0.0, quota), rel=0.01)
