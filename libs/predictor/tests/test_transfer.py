"""Latency of models that were not trained on: operators, device times, curves and the whole, on made-up models."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hasgpu_core.errors import IntegrityError, InvalidError
from hasgpu_predictor import Axes, Operator, Probes, Sample, TransferSettings, Workload, train_transfer
from hasgpu_predictor.curves import BatchSteps, groups_per_launch
from hasgpu_predictor.intervals import Intervals
from hasgpu_predictor.likeness import folds_of_like
from hasgpu_predictor.operators import V100, kernel_of, roofline_columns
from hasgpu_predictor.surface import Surface
from hasgpu_predictor.transfer import probes_of
from hasgpu_predictor.transfer_files import load_transfer, save_transfer

BATCHES, SMS, QUOTAS = (1, 2, 4, 8), (5, 20, 50, 70, 85, 100), (20, 40, 60, 80, 100)
FAST = TransferSettings(trees_count=30, depth=4, folds_count=3)
AXES = Axes(BATCHES, SMS, tuple(10 * q for q in QUOTAS))


def convolution(channels: int, pixels: int, groups: int = 1, taps: int = 9) -> Operator:
    flops = 2.0 * channels * pixels * pixels * channels // groups * taps
    size = 4.0 * channels * pixels * pixels
    weights = 4.0 * channels * channels // groups * taps
    return Operator("convolution", flops, size, weights, size, groups, (1, channels, pixels, pixels))


def sample(depth: int, channels: int, *, seed: int = 0) -> Sample:
    """Host-bound below, device-bound above: the device works at half of its peak."""
    rng = np.random.default_rng(seed)
    operators = [convolution(channels, 28) for _ in range(depth)]
    operators += [Operator("relu", 1e5, 4e5, 0, 4e5, 1, (1, 1, 1, 1))] * depth
    flops = sum(o.flops for o in operators)
    host_ms = 0.1 * 2 * depth
    places = np.array([(b, s, q) for b in BATCHES for s in SMS for q in QUOTAS], float)
    batch, sm, quota = places.T
    device_ms = 1e3 * flops * batch / (0.5 * V100.peak_flops * sm / 100)
    latency_ms = np.maximum(device_ms, host_ms * np.maximum(1.0, 80 / quota))
    graph_ms = {
        float(s): float(max(1e3 * flops / (0.5 * V100.peak_flops * s / 100), host_ms)) for s in (5, 10, 30, 60, 80, 100)
    }
    return Sample(Workload.of(operators), places, latency_ms * np.exp(0.01 * rng.standard_normal(len(batch))), graph_ms)


def samples(count: int = 10) -> list[Sample]:
    return [sample(10 + 3 * k, 64 + 32 * (k % 4), seed=k) for k in range(count)]


def errors(model: object, held: Sample, probes: Probes) -> tuple[np.ndarray, Surface]:
    surface = model.surface(model.view(held.workload, probes), AXES)  # type: ignore[attr-defined]
    batch, sm, quota = held.configurations.T
    return np.abs(surface.at(batch, sm, 10 * quota) * 1e3 / held.latency_ms - 1), surface


def test_kernels_are_told_apart() -> None:
    def kind(operator: Operator) -> str | None:
        kernel = kernel_of(operator)
        return None if kernel is None else kernel.kind

    assert kind(convolution(64, 28)) == "spatial"
    assert kind(convolution(64, 28, taps=1)) == "pointwise"
    assert kind(convolution(64, 28, groups=64)) == "depthwise"
    assert kind(convolution(64, 28, groups=8)) == "grouped"
    assert kind(Operator("addmm", 2e6, 4e3, 4e6, 4e3, 1, (1, 1000))) == "linear"
    assert kind(Operator("view", 10, 40, 0, 40, 1, (10,))) is None


def test_roofline_falls_with_sms_and_grows_with_the_batch() -> None:
    columns = roofline_columns(
        sample(20, 128).workload, V100, np.array([1.0, 1.0, 8.0]), np.array([100.0, 10.0, 100.0])
    )
    whole, tenth, eight = columns["spatial_flops"]
    flops = sum(k.flops for k in sample(20, 128).workload.kernels if k.kind == "spatial")
    assert whole >= 1e3 * flops / V100.peak_flops * 0.999
    assert tenth == pytest.approx(10 * whole, rel=0.3)
    assert eight > 4 * whole


def test_unseen_model_is_predicted_from_probes_better_than_without() -> None:
    every = samples()
    held, model = every[4], train_transfer(every[:4] + every[5:], FAST)
    probed, surface = errors(model, held, probes_of(held, 4, 100))
    static, guess = errors(model, held, Probes())
    assert probed.mean() < 0.12
    assert probed.mean() < static.mean()
    assert surface.basis == "transferred"
    assert guess.basis == "static"
    assert (np.diff(surface.latency_s, axis=1) <= 0).all()
    assert (np.diff(surface.latency_s, axis=2) <= 0).all()
    assert surface.low_s is not None
    assert surface.high_s is not None
    assert (surface.low_s <= surface.latency_s).all()
    assert (surface.latency_s <= surface.high_s).all()
    extra = tuple(
        (*map(float, c), float(ms)) for c, ms in zip(held.configurations[:9], held.latency_ms[:9], strict=True)
    )
    probes = probes_of(held, 4, 100)
    more, _ = errors(model, held, Probes(4, 100, probes.by_quota_ms, probes.graph_ms, extra))
    assert more[:9].mean() < probed[:9].mean() + 0.01


def test_training_is_deterministic_and_digested() -> None:
    every = samples(6)
    first, second = train_transfer(every, FAST), train_transfer(every, FAST)
    assert first.digest() == second.digest()
    held = sample(25, 96, seed=9)
    assert (errors(first, held, probes_of(held, 4, 100))[0] == errors(second, held, probes_of(held, 4, 100))[0]).all()
    assert train_transfer(every[:5], FAST).digest() != first.digest()


def test_too_few_models_are_refused() -> None:
    with pytest.raises(InvalidError, match="at least 4"):
        train_transfer(samples(3), FAST)


def test_partial_probes_are_taken() -> None:
    model = train_transfer(samples(6), FAST)
    held = sample(25, 96, seed=9)
    for probes in (
        Probes(4, 100, {100.0: 4.0}),
        Probes(graph_ms={5.0: 80.0}),
        Probes(4, 100, {20.0: 20.0, 100.0: 5.0}, {100.0: 5.0}),
    ):
        _, surface = errors(model, held, probes)
        assert np.isfinite(surface.latency_s).all()


def test_curves_of_grouped_convolutions_step_with_the_batch() -> None:
    grouped = Workload.of([convolution(128, 28, groups=16), convolution(128, 28), convolution(4096, 7, groups=32)])
    plain = Workload.of([convolution(128, 28)])
    assert groups_per_launch(grouped).tolist() == [16 / 3, 48 / 3]
    groups = np.array([[0.5 * k, 0.5 * k + (k % 3)] for k in range(12)])
    steps = np.stack([-0.08 * groups[:, 1], -0.05 * groups[:, 0]], axis=1)
    steps[4] = np.nan
    fitted = BatchSteps.fit(groups, steps)
    at = fitted.at(np.array([2.0, 3.0]), np.array([1.0, 2.0, 3.0, 4.0, 8.0]))
    assert at == pytest.approx([-0.24, -0.1, -0.1, 0.0, 0.0], abs=0.01)
    assert not fitted.at(groups_per_launch(plain), np.array([1.0, 2.0])).any()
    assert not BatchSteps.fit(np.zeros((3, 2)), np.zeros((3, 2))).weights.any()


def test_intervals_hold_their_share_by_regime() -> None:
    rng = np.random.default_rng(0)
    keys = rng.uniform(0, 1, 6_000)
    wrong = rng.standard_normal(6_000) * np.where(keys < 0.5, 0.01, 0.2)
    intervals = Intervals.fit(keys[:3_000], wrong[:3_000])
    assert intervals is not None
    low, high = intervals.at(keys[3_000:])
    inside = (np.log(low) <= wrong[3_000:]) & (wrong[3_000:] <= np.log(high))
    for part in (keys[3_000:] < 0.5, keys[3_000:] > 0.5):
        assert 0.86 < inside[part].mean() < 0.94
    assert Intervals.fit(keys[:5], wrong[:5]) is None


def test_kept_model_predicts_the_same_and_a_corrupt_one_is_refused(tmp_path: Path) -> None:
    model, held = train_transfer(samples(6), FAST), sample(25, 96, seed=9)
    save_transfer(tmp_path, model)
    again = load_transfer(tmp_path)
    assert again.digest() == model.digest()
    probes = probes_of(held, 4, 100)
    assert (errors(again, held, probes)[1].latency_s == errors(model, held, probes)[1].latency_s).all()
    card = json.loads((tmp_path / "transfer.json").read_text())
    binary = tmp_path / f"{card['digests']['probed']}.bin"
    binary.write_bytes(binary.read_bytes()[:-5])
    with pytest.raises(IntegrityError):
        load_transfer(tmp_path)
    binary.unlink()
    with pytest.raises(InvalidError, match="transfer model"):
        load_transfer(tmp_path)
    (tmp_path / "transfer.json").write_text(json.dumps(card | {"format": "other"}))
    with pytest.raises(InvalidError, match="hasgpu-transfer-model-2"):
        load_transfer(tmp_path)


def test_a_further_probe_that_the_device_decided_moves_the_device_time() -> None:
    every = samples()
    model = train_transfer(every[1:], FAST)
    held = every[0]
    probes = probes_of(held, 4, 100)
    view = model.view(held.workload, probes)
    place = np.array([8.0]), np.array([5.0])
    guess_ms = float(np.exp(view.device_log_ms(*place)[0][0]))

    def told(latency_ms: float, quota_pct: float) -> float:
        others = ((8.0, 5.0, quota_pct, latency_ms),)
        more = Probes(probes.batch, probes.sm_pct, probes.by_quota_ms, probes.graph_ms, others)
        return float(np.exp(model.view(held.workload, more).device_log_ms(*place)[0][0]))

    assert told(1.3 * guess_ms, 100.0) > 1.15 * guess_ms
    # at a small quota the gate may have decided it, and so it may below the fastest probe
    assert told(1.3 * guess_ms, 20.0) == pytest.approx(guess_ms)
    assert told(0.5 * min(probes.by_quota_ms.values()), 100.0) == pytest.approx(guess_ms)


def test_models_alike_are_held_out_together() -> None:
    narrow = [Workload.of([convolution(32, 28)] * (10 + k)) for k in range(3)]
    depthwise = [Workload.of([convolution(256, 28, groups=256)] * (40 + k)) for k in range(3)]
    folds = folds_of_like([*narrow, *depthwise], 1)
    assert folds.tolist() == [0] * 6
    folds = folds_of_like([narrow[0], depthwise[0], narrow[0], depthwise[0]], 2)
    assert folds[0] == folds[2] != folds[1] == folds[3]
    assert folds_of_like(narrow[:1], 5).tolist() == [0]
