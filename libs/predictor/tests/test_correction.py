"""The online correction: how fast it is right, what it ignores, when it calls for a new profile."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hasgpu_core.errors import InvalidError
from hasgpu_predictor import (
    Axes,
    Correction,
    Factors,
    LatencyModel,
    ObservedBatch,
    Profile,
    ProfilePoint,
    Surface,
    corrected,
    fit_physical,
    profile_axes,
)
from hasgpu_predictor.correction import DRIFT_LASTING_S, SOURCES_MAX, level_of
from hasgpu_predictor.physical import PhysicalModel
from hypothesis import given, settings
from hypothesis import strategies as st

RUNGS = (25, 50, 75, 100)
OVERHEAD_S = 0.004


def device_s(batch: int, sm_pct: int) -> float:
    return 0.002 + (0.004 + 0.008 * batch) * (100 / sm_pct) ** 0.9


def prediction(off: float = 1.0) -> tuple[PhysicalModel, Surface]:
    """What is predicted of a function whose true latencies are `off` times that."""
    points = []
    for batch in (1, 2, 4, 8):
        for sm in RUNGS:
            for quota in (200, 500, 1000):
                d = device_s(batch, sm) / off
                points.append(ProfilePoint(batch, sm, quota, max(d + OVERHEAD_S / off, d * 1000 / quota), d, 0.004, 9))
    profile = Profile("w", "gpu").merged(points)
    axes = profile_axes(profile, max_batch=8, sm_rungs_pct=RUNGS)
    return fit_physical(profile.points), LatencyModel.untrained("gpu").surface(profile, axes)


def observed(count: int, seed: int, *, slower: float = 1.0, outliers_share: float = 0.05) -> list[ObservedBatch]:
    """Batches of many sizes at partial quotas: 8 % noise, outliers of 2 to 20 times, any wait at the gate."""
    rng = np.random.default_rng(seed)
    batches = []
    for _ in range(count):
        batch, sm = int(rng.choice((1, 2, 4, 8))), int(rng.choice(RUNGS))
        quota = int(rng.choice((100, 200, 500)))
        stretch = slower * math.exp(0.08 * rng.standard_normal())
        if rng.random() < outliers_share:
            stretch *= rng.uniform(2, 20)
        d = device_s(batch, sm) * stretch
        run_s = d + OVERHEAD_S * stretch
        wait_s = rng.exponential(d * 1000 / quota)
        batches.append(ObservedBatch(batch, sm, d, run_s, quota, wait_s + run_s))
    return batches


@pytest.mark.parametrize("off", [1.5, 1 / 1.5])
@pytest.mark.parametrize("seed", range(5))
def test_a_wrong_start_is_right_after_200_batches(off: float, seed: int) -> None:
    physical, surface = prediction(off)
    _, truth = prediction()
    correction = Correction()
    correction.observe(observed(200, seed))
    assert correction.update(physical, surface)
    after = corrected(surface, correction.factors)
    before_pct = 100 * np.abs(surface.latency_s / truth.latency_s - 1)
    after_pct = 100 * np.abs(after.latency_s / truth.latency_s - 1)
    assert before_pct.min() > 30
    assert after_pct.max() < 5, "every configuration, not the mean only"
    error = correction.error(physical, surface)
    assert error is not None
    assert error.corrected_median_run_error_pct < 10 < error.median_run_error_pct


def test_waits_at_the_gate_correct_nothing() -> None:
    physical, surface = prediction()
    correction = Correction()
    waits = [ObservedBatch(2, 50, device_s(2, 50), device_s(2, 50) + OVERHEAD_S, 100, 5.0) for _ in range(200)]
    correction.observe(waits)
    assert not correction.update(physical, surface)
    assert correction.factors == Factors()


def test_overhead_corrects_only_where_the_quota_does_not_decide() -> None:
    physical, surface = prediction()
    correction = Correction()
    correction.observe([ObservedBatch(1, 100, device_s(1, 100), 1.5 * (device_s(1, 100) + OVERHEAD_S))] * 100)
    assert correction.update(physical, surface)
    after = corrected(surface, correction.factors)
    assert float(after.at(1, 100, 1000)) == pytest.approx(1.5 * float(surface.at(1, 100, 1000)), rel=0.03)
    assert float(after.at(1, 100, 200)) == pytest.approx(float(surface.at(1, 100, 200)), rel=0.03)


def test_bounds_dead_band_and_the_least_number() -> None:
    physical, surface = prediction()

    def batches(count: int, ratio: float) -> list[ObservedBatch]:
        return [ObservedBatch(2, 50, ratio * float(physical.device_time_s(2, 50)))] * count

    correction = Correction()
    correction.observe(batches(19, 1.5))
    assert not correction.update(physical, surface)
    correction.observe(batches(1, 1.5))
    assert correction.update(physical, surface)
    assert correction.factor == pytest.approx(1.5)
    correction.observe(batches(200, 1.53))
    assert not correction.update(physical, surface), "within the dead band"
    correction.observe(batches(200, 9.0))
    assert correction.update(physical, surface)
    assert correction.factors == Factors(2.0, 2.0)
    correction.observe(batches(200, 0.01))
    assert correction.update(physical, surface)
    assert correction.factors == Factors(0.5, 0.5)


def test_what_was_is_forgotten() -> None:
    physical, surface = prediction()
    correction = Correction()
    correction.observe(observed(200, 1, slower=1.8))
    correction.update(physical, surface)
    correction.observe(observed(100, 2))
    assert correction.update(physical, surface)
    assert correction.factor == pytest.approx(1.0, abs=0.06)


def test_outliers_of_any_size_move_the_level_little() -> None:
    rng = np.random.default_rng(3)
    values = 0.05 * rng.standard_normal(200)
    clean = level_of(values)
    values[::20] = 50.0
    dirty = level_of(values)
    assert clean is not None
    assert dirty is not None
    assert abs(dirty - clean) < 0.02


def test_nonsense_is_left_out() -> None:
    correction = Correction()
    correction.observe(
        [
            ObservedBatch(0, 50, 1.0),
            ObservedBatch(1, 0, 1.0),
            ObservedBatch(1, 50, math.nan),
            ObservedBatch(1, 50, -1.0),
            ObservedBatch(1, 50, 0.0),
            ObservedBatch(1, 50, 1.0, math.inf),
        ]
    )
    assert correction.observed_count == 0


def test_instances_and_devices_have_levels_of_their_own() -> None:
    physical, surface = prediction()
    correction = Correction()
    for turn in range(20):
        correction.observe(observed(10, turn), sources=("instance f-0", "device n/gpu0"))
        correction.observe(observed(10, 100 + turn, slower=1.4), sources=("instance f-1", "device n/gpu1"))
    correction.observe(observed(2, 7, slower=1.9, outliers_share=0), sources=("instance f-2", "device n/gpu1"))
    correction.update(physical, surface)
    assert correction.factors_of("instance f-0").device == pytest.approx(1.0, abs=0.06)
    assert correction.factors_of("instance f-1").device == pytest.approx(1.4, rel=0.06)
    assert correction.factors_of("device n/gpu1").device == pytest.approx(1.4, rel=0.06)
    assert correction.factors_of("instance f-2") == correction.factors, "two batches say too little"
    assert correction.factors_of("instance f-9") == correction.factors
    assert {level.name for level in correction.sources()} >= {"instance f-0", "device n/gpu1"}
    correction.forget_source("instance f-1")
    assert "instance f-1" not in {level.name for level in correction.sources()}
    for index in range(2 * SOURCES_MAX):
        correction.observe(observed(1, index, outliers_share=0), sources=(f"instance g-{index}",))
    assert len(correction.sources()) == SOURCES_MAX


def test_drift_is_told_once_and_ends_with_a_new_profile() -> None:
    physical, surface = prediction()
    correction = Correction()

    def step(slower: float, now_s: float) -> str:
        correction.observe(observed(100, round(now_s), slower=slower))
        correction.update(physical, surface)
        return correction.detect(physical, surface, now_s=now_s)

    assert step(1.0, 0.0) == ""
    assert step(1.6, 10.0) == "", "it has to last"
    told = step(1.6, 10.0 + DRIFT_LASTING_S)
    assert "device times are 1.6" in told
    assert correction.drift == told
    assert step(1.6, 50.0) == "", "told once"
    slow, slow_surface = prediction(1 / 1.6)
    correction.rebase()
    assert correction.drift == ""
    correction.observe(observed(100, 60, slower=1.6))
    correction.update(slow, slow_surface)
    assert correction.detect(slow, slow_surface, now_s=100.0) == ""
    assert correction.factor == pytest.approx(1.0, abs=0.05)
    assert correction.accepted == pytest.approx(0.0, abs=0.05)


def test_drift_that_a_new_profile_does_not_see_is_accepted() -> None:
    physical, surface = prediction()
    correction = Correction()
    correction.observe(observed(200, 1, slower=1.6))
    correction.update(physical, surface)
    correction.detect(physical, surface, now_s=0.0)
    assert correction.detect(physical, surface, now_s=100.0)
    correction.rebase()  # the new profile says what the one before said
    for now_s in (200.0, 300.0, 400.0):
        correction.observe(observed(100, round(now_s), slower=1.6))
        correction.update(physical, surface)
        assert correction.detect(physical, surface, now_s=now_s) == ""
    assert correction.factor == pytest.approx(1.6, rel=0.05), "the correction carries it"


def test_a_changed_shape_is_drift_although_the_level_is_not() -> None:
    physical, surface = prediction()
    correction = Correction()
    small = [ObservedBatch(1, 50, device_s(1, 50), device_s(1, 50) + OVERHEAD_S)] * 120
    large = [ObservedBatch(8, 50, 1.7 * device_s(8, 50), 1.7 * device_s(8, 50) + OVERHEAD_S)] * 60
    correction.observe(batch for pair in zip(small[:60], large, strict=True) for batch in (*pair, pair[0]))
    correction.update(physical, surface)
    correction.detect(physical, surface, now_s=0.0)
    assert "batches of 8 at 50 % SM take 1.70 times" in correction.detect(physical, surface, now_s=DRIFT_LASTING_S)


def test_it_survives_a_restart_and_refuses_what_it_did_not_write() -> None:
    physical, surface = prediction()
    correction = Correction()
    correction.observe(observed(250, 1, slower=1.5), sources=("instance f-0",))
    correction.update(physical, surface)
    assert correction.unsaved
    text = json.dumps(correction.to_json())
    assert not correction.unsaved
    again = Correction.from_json(json.loads(text))
    assert again.factors == correction.factors
    assert again.sources() == correction.sources()
    assert again.to_json() == correction.to_json()
    assert not again.update(physical, surface)
    good = json.loads(text)
    for broken in (
        {},
        {**good, "format": "other"},
        {**good, "factors": [9.0, 1.0]},
        {**good, "level": math.nan},
        {**good, "batches": [[1, 50, -1.0, 0, 0, 0]]},
        {**good, "batches": [[1, 50]]},
        {**good, "sources": []},
    ):
        with pytest.raises(InvalidError, match="correction"):
            Correction.from_json(broken)


@settings(max_examples=25, deadline=None)
@given(st.floats(0.5, 2.0), st.floats(0.5, 2.0), st.floats(0.5, 2.0))
def test_a_corrected_surface_stays_monotone_and_bounded(device: float, run: float, off: float) -> None:
    _, surface = prediction(off)
    small = Surface(Axes((1, 8), (25, 100), (50, 500, 1000)), surface.at(*_grid()), "profiled")
    after = corrected(small, Factors(device, run)).latency_s
    assert (np.diff(after, axis=0) >= 0).all()
    assert (np.diff(after, axis=1) <= 0).all()
    assert (np.diff(after, axis=2) <= 0).all()
    ratio = after / small.latency_s
    assert ratio.min() >= min(device, run) - 1e-9
    assert ratio.max() <= max(device, run) + 1e-9


def _grid() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    batch, sm, quota = np.meshgrid([1, 8], [25, 100], [50, 500, 1000], indexing="ij")
    return batch, sm, quota
