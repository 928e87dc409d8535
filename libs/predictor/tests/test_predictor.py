"""The physical estimate, the learnt residual, surfaces and tables, on synthetic functions."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from itertools import combinations_with_replacement
from pathlib import Path

import numpy as np
import pytest
from hasgpu_core.errors import IntegrityError, InvalidError
from hasgpu_core.function import Artifact, FunctionSpec, ModelFormat, TensorSpec
from hasgpu_predictor import (
    FEATURES,
    Axes,
    FunctionView,
    LatencyModel,
    Profile,
    ProfilePoint,
    Surface,
    TrainingSettings,
    canonical_axes,
    capacity_table,
    fit_physical,
    load_profile,
    profile_axes,
    save_profile,
    static_physical,
    static_surface,
    table_axes,
    workload_digest,
)
from hasgpu_predictor.model import measured_axes
from hasgpu_predictor.surface import monotone
from hypothesis import given, settings
from hypothesis import strategies as st

RUNGS = (25, 50, 75, 100)
FAST = TrainingSettings(trees_count=60)


def device_time_s(batch: int, sm_pct: int, *, scale: float = 1.0, exponent: float = 0.9) -> float:
    return scale * (0.002 + (0.004 + 0.008 * batch) * (100 / sm_pct) ** exponent)


def measured(
    workload: str = "a", *, scale: float = 1.0, exponent: float = 0.9, noise: float = 0.0, seed: int = 1
) -> Profile:
    """A function behind the gate of the system; the last batches at half a quota suffer 20 % more than the formula."""
    rng = np.random.default_rng(seed)
    points = []
    for batch in (1, 2, 4, 8):
        for sm in RUNGS:
            for quota in (200, 500, 1000):
                d = device_time_s(batch, sm, scale=scale, exponent=exponent)
                latency_s = max(d + 0.001, d * 1000 / quota) * (1.2 if quota == 200 and batch >= 4 else 1.0)
                factor = float(np.exp(noise * rng.standard_normal()))
                points.append(ProfilePoint(batch, sm, quota, latency_s * factor, d, 0.004, 20))
    return Profile(workload, "cpu-2c").merged(points)


def axes_of(profile: Profile) -> Axes:
    return profile_axes(profile, max_batch=8, sm_rungs_pct=RUNGS)


def assert_monotone(surface: Surface) -> None:
    assert (np.diff(surface.latency_s, axis=0) >= 0).all()
    assert (np.diff(surface.latency_s, axis=1) <= 0).all()
    assert (np.diff(surface.latency_s, axis=2) <= 0).all()


def test_physical_finds_the_formula() -> None:
    physical = fit_physical(measured().points)
    for batch, sm in ((3, 60), (6, 100), (1, 30)):
        assert float(physical.device_time_s(batch, sm)) == pytest.approx(device_time_s(batch, sm), rel=0.03)
    assert physical.overhead_s == pytest.approx(0.001, rel=0.1)
    assert float(physical.latency_s(4, 50, 100)) == pytest.approx(device_time_s(4, 50) * 10, rel=0.03)
    assert float(physical.latency_s(4, 50, 1000)) == pytest.approx(device_time_s(4, 50) + 0.001, rel=0.03)


def test_work_of_others_on_the_host_is_not_taken_for_the_functions_own() -> None:
    """Most whole-quota points of a busy host are late by far more than the function's own host work."""
    points = [
        replace(p, latency_s=p.latency_s + (0.4 if index // 3 % 3 else 0.0))
        for index, p in enumerate(measured().points)
    ]
    assert fit_physical(points).overhead_s == pytest.approx(0.001, rel=0.1)


def test_a_surface_marks_batches_beyond_those_measured() -> None:
    surface = static_surface(fit_physical(measured().points), canonical_axes(32))
    assert not surface.extrapolated(32), "nothing was measured: it is a guess as a whole, and says so"
    marked = replace(surface, measured_max_batch=8)
    assert marked.extrapolated([4, 8, 9, 64]).tolist() == [False, False, True, True]
    assert marked.scaled(2.0).extrapolated(16)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_physical_of_few_points_passes_through_them(count: int) -> None:
    points = measured().points[:count]
    physical = fit_physical(points)
    for point in points:
        assert float(physical.latency_s(*point.configuration)) == pytest.approx(point.latency_s, rel=0.06)
    assert float(physical.latency_s(8, 25, 500)) > float(physical.latency_s(1, 25, 500))


def test_physical_of_none_is_refused() -> None:
    with pytest.raises(InvalidError, match="at least one"):
        fit_physical(())


def test_points_without_device_time_take_the_host_metered_curve() -> None:
    points = [
        ProfilePoint(batch, 100, quota, max(0.01 + 0.001 * batch, 0.008 * 1000 / quota))
        for batch in (1, 2, 4, 8)
        for quota in (100, 200, 400, 700, 1000)
    ]
    physical = fit_physical(points)
    assert not physical.device_metered
    assert float(physical.latency_s(8, 100, 1000)) == pytest.approx(0.018, rel=0.05)
    # A quota bounds the latency by a time of its own, it does not multiply the device time.
    assert float(physical.latency_s(8, 100, 100)) == pytest.approx(0.08, rel=0.05)


def test_features_have_the_named_columns_and_are_finite() -> None:
    profile = measured()
    rows = FunctionView(profile.points).features(axes_of(profile).configurations())
    assert rows.shape == (axes_of(profile).configurations().shape[0], len(FEATURES))
    assert np.isfinite(rows).all()


def test_learnt_residual_beats_the_physical_estimate() -> None:
    profiles = [
        measured(w, scale=s, exponent=e, noise=0.01) for w, s, e in (("a", 1, 0.9), ("b", 3, 0.7), ("c", 0.5, 1.0))
    ]
    model = LatencyModel.train(profiles, device_model="cpu-2c", version=1, settings=TrainingSettings())
    card = model.card
    assert card.rows_count == 144
    assert card.workloads == ("a", "b", "c")
    assert card.mape_pct is not None
    assert card.physical_mape_pct is not None
    assert card.mape_pct < 3.0
    assert card.mape_pct < 0.7 * card.physical_mape_pct


def test_learnt_part_that_does_not_help_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hasgpu_predictor.model._cross_validated", lambda *_: (9.0, 5.0, None))
    told: list[str] = []
    profile = measured(noise=0.1)
    model = LatencyModel.train([profile], device_model="cpu-2c", version=1, settings=FAST, progress=told.append)
    assert model.card.sha256 == hashlib.sha256(b"").hexdigest()
    assert model.card.mape_pct == model.card.physical_mape_pct == 5.0
    assert "left out" in told[-1]
    axes = axes_of(profile)
    assert (
        model.surface(profile, axes).latency_s == LatencyModel.untrained("cpu-2c").surface(profile, axes).latency_s
    ).all()


def test_training_is_deterministic_from_the_seed() -> None:
    profiles = [measured("a", noise=0.05), measured("b", scale=2, noise=0.05)]
    surfaces = [
        LatencyModel.train(profiles, device_model="cpu-2c", version=1, settings=FAST).surface(
            profiles[0], axes_of(profiles[0])
        )
        for _ in range(2)
    ]
    assert (surfaces[0].latency_s == surfaces[1].latency_s).all()


def test_few_rows_leave_the_physical_estimate_alone() -> None:
    profile = Profile("a", "cpu-2c").merged(measured().points[:7])
    model = LatencyModel.train([profile], device_model="cpu-2c", version=1, settings=FAST)
    assert model.card.mape_pct is None
    configurations = np.array([[1.0, 100.0, 1000.0], [8.0, 25.0, 200.0]])
    view = FunctionView(profile.points)
    assert (model.latencies_s(view, configurations) == view.physical.latency_s(*configurations.T)).all()


def test_foreign_profile_is_refused() -> None:
    with pytest.raises(InvalidError, match="cpu-2c"):
        LatencyModel.train([measured()], device_model="cpu-4c", version=1, settings=FAST)


def test_measured_places_stand_where_the_learnt_part_serves() -> None:
    profiles = [measured(noise=0.0, seed=seed) for seed in range(3)]
    model = LatencyModel.train(profiles, device_model="cpu-2c", version=1, settings=replace(FAST, cross_validate=False))
    assert model.regressor is not None
    points = profiles[0].points
    surface = model.surface(profiles[0], measured_axes(points))
    batch, sm, quota = np.array([p.configuration for p in points], float).T
    assert surface.at(batch, sm, quota) == pytest.approx([p.latency_s for p in points], rel=1e-6)


def test_surface_is_monotone_whatever_the_noise() -> None:
    profiles = [measured("a", noise=0.4, seed=3), measured("b", scale=4, noise=0.4, seed=4)]
    model = LatencyModel.train(profiles, device_model="cpu-2c", version=1, settings=FAST)
    for profile in profiles:
        assert_monotone(model.surface(profile, axes_of(profile)))


@given(
    st.integers(1, 4).flatmap(
        lambda n: st.lists(
            st.lists(st.lists(st.floats(-20, 20), min_size=5, max_size=5), min_size=n, max_size=n),
            min_size=3,
            max_size=3,
        )
    )
)
@settings(max_examples=60, deadline=None)
def test_monotone_holds_on_every_axis_and_is_idempotent(values: list[list[list[float]]]) -> None:
    once = monotone(np.array(values))
    assert (np.diff(once, axis=0) >= 0).all()
    assert (np.diff(once, axis=1) <= 0).all()
    assert (np.diff(once, axis=2) <= 0).all()
    assert once.min() >= np.min(values) - 1e-9
    assert once.max() <= np.max(values) + 1e-9
    assert np.allclose(monotone(once), once, atol=1e-9)


@given(st.lists(st.integers(0, 6), min_size=1, max_size=5))
@settings(max_examples=60, deadline=None)
def test_monotone_line_errs_least_in_absolute_terms(line: list[int]) -> None:
    found = monotone(np.array(line, float).reshape(-1, 1, 1)).ravel()
    levels = sorted(set(line))
    best = min(
        sum(abs(a - b) for a, b in zip(tried, line, strict=True))
        for tried in combinations_with_replacement(levels, len(line))
    )
    assert np.abs(found - line).sum() == pytest.approx(best)


@given(
    st.tuples(st.floats(1, 12), st.floats(1, 100), st.floats(1, 1000)),
    st.tuples(st.floats(1, 2), st.floats(1, 2), st.floats(1, 2)),
)
@settings(max_examples=60, deadline=None)
def test_between_places_it_stays_monotone(
    place: tuple[float, float, float], factors: tuple[float, float, float]
) -> None:
    axes = canonical_axes(8)
    surface = static_surface(static_physical(artifact_bytes=40 << 20, backend="cpu", slo_s=1.0), axes)
    here = float(surface.at(*place))
    assert float(surface.at(place[0] * factors[0], place[1], place[2])) >= here * (1 - 1e-9)
    assert float(surface.at(place[0], min(100.0, place[1] * factors[1]), place[2])) <= here * (1 + 1e-9)
    assert float(surface.at(place[0], place[1], min(1000.0, place[2] * factors[2]))) <= here * (1 + 1e-9)


def test_save_and_load_give_equal_predictions(tmp_path: Path) -> None:
    profile = measured(noise=0.05)
    model = LatencyModel.train([profile], device_model="cpu-2c", version=7, settings=FAST)
    model = model.stamped(train_s=1.5, trained_unix_ns=12)
    model.save(tmp_path)
    again = LatencyModel.load(tmp_path)
    assert again.card == model.card
    assert again.card.version == 7
    axes = axes_of(profile)
    assert (again.surface(profile, axes).latency_s == model.surface(profile, axes).latency_s).all()


def test_saving_replaces_the_binary_before(tmp_path: Path) -> None:
    for seed in (1, 2):
        LatencyModel.train([measured(noise=0.05, seed=seed)], device_model="cpu-2c", version=seed, settings=FAST).save(
            tmp_path
        )
    assert len(list(tmp_path.glob("*.cbm"))) == 1
    assert LatencyModel.load(tmp_path).card.version == 2


def test_corrupt_and_foreign_model_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidError, match="model card"):
        LatencyModel.load(tmp_path)
    LatencyModel.train([measured()], device_model="cpu-2c", version=1, settings=FAST).save(tmp_path)
    binary = next(tmp_path.glob("*.cbm"))
    good = binary.read_bytes()
    binary.write_bytes(good[:-10])
    with pytest.raises(IntegrityError):
        LatencyModel.load(tmp_path)
    binary.unlink()
    with pytest.raises(InvalidError, match="model file"):
        LatencyModel.load(tmp_path)
    binary.write_bytes(good)
    card = json.loads((tmp_path / "card.json").read_text())
    card["card"]["features"] = ["other"]
    (tmp_path / "card.json").write_text(json.dumps(card))
    with pytest.raises(InvalidError, match="features"):
        LatencyModel.load(tmp_path)
    (tmp_path / "card.json").write_text('{"format": "x"}')
    with pytest.raises(InvalidError, match="hasgpu-latency-model-1"):
        LatencyModel.load(tmp_path)


def test_profile_file_round_trip_and_refusals(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    profile = measured()
    save_profile(path, profile)
    assert load_profile(path) == profile
    path.write_text(path.read_text()[:-30])
    with pytest.raises(InvalidError, match=r"p\.json"):
        load_profile(path)
    path.write_text('{"format": "hasgpu-profile-1", "workload": "a", "device_model": "m", "points": [{"speed": 1}]}')
    with pytest.raises(InvalidError, match="speed"):
        load_profile(path)


def test_merging_takes_the_newer_measurement_and_averages_repeats() -> None:
    profile = Profile("a", "m").merged([ProfilePoint(1, 100, 1000, 0.010, repetitions_count=10)])
    again = profile.merged(
        [
            ProfilePoint(1, 100, 1000, 0.020, repetitions_count=30),
            ProfilePoint(1, 100, 1000, 0.040, repetitions_count=10),
            ProfilePoint(2, 100, 1000, 0.030),
        ]
    )
    assert [p.configuration for p in again.points] == [(1, 100, 1000), (2, 100, 1000)]
    assert again.points[0].latency_s == pytest.approx(0.025)
    assert again.points[0].repetitions_count == 40


@pytest.mark.parametrize(
    ("field", "point"),
    [
        ("latency", ProfilePoint(1, 100, 1000, 0.0)),
        ("latency", ProfilePoint(1, 100, 1000, float("nan"))),
        ("batch", ProfilePoint(0, 100, 1000, 0.1)),
        ("sm_pct", ProfilePoint(1, 101, 1000, 0.1)),
        ("quota_permille", ProfilePoint(1, 100, 0, 0.1)),
        ("device_time", ProfilePoint(1, 100, 1000, 0.1, -1.0)),
    ],
)
def test_points_that_cannot_be_are_refused(field: str, point: ProfilePoint) -> None:
    with pytest.raises(InvalidError, match=field):
        Profile("a", "m").merged([point])


def table_of(surface: Surface, slo_ms: int):  # type: ignore[no-untyped-def]
    return capacity_table(
        surface,
        function="f",
        function_revision=3,
        device_model="cpu-2c",
        version=1,
        computed_unix_ns=5,
        slo_ms=slo_ms,
        axes=table_axes(max_batch=6, sm_rungs_pct=RUNGS),
    )


def test_table_is_a_full_grid_that_policies_can_read() -> None:
    profile = measured()
    table = table_of(LatencyModel.untrained("cpu-2c").surface(profile, axes_of(profile)), 200)
    assert table.batches == (1, 2, 4, 6)
    assert table.sm_pcts == RUNGS
    assert table.quotas_permille == (10, *range(50, 1001, 50))
    assert len(table.points) == 4 * 4 * 21
    assert table.infeasible_reason == ""
    assert table.capacity_rps(100, 1000) > table.capacity_rps(100, 500) > table.capacity_rps(25, 200) >= 0
    assert table.capacity_rps(100, 10) == 0.0


def test_impossible_objective_is_told_with_its_numbers() -> None:
    profile = measured()
    table = table_of(LatencyModel.untrained("cpu-2c").surface(profile, axes_of(profile)), 10)
    assert not list(table.feasible())
    assert table.infeasible_reason == (
        "the fastest configuration, batch 1 at 100 % SM and 100 % quota, takes 15 ms "
        "(17.3 ms with the margin for spread); the objective is 10 ms"
    )


def test_margin_for_spread_counts() -> None:
    axes = Axes((1,), (100,), (1000,))
    surface = Surface(axes, np.full((1, 1, 1), 0.095), "profiled")
    table = capacity_table(
        surface,
        function="f",
        function_revision=1,
        device_model="m",
        version=1,
        computed_unix_ns=0,
        slo_ms=100,
        axes=axes,
    )
    assert table.points[0].capacity_rps == 0.0
    assert "95 ms (109 ms" in table.infeasible_reason


@pytest.mark.parametrize("slo_ms", [1, 50, 10_000])
@pytest.mark.parametrize("backend", ["cpu", "cuda"])
def test_static_guess_never_forbids(slo_ms: int, backend: str) -> None:
    physical = static_physical(artifact_bytes=500 << 20, backend=backend, slo_s=slo_ms / 1e3)
    table = table_of(static_surface(physical, canonical_axes(6)), slo_ms)
    assert table.basis == "static"
    assert table.infeasible_reason == ""
    assert table.capacity_rps(100, 1000) > 0


def test_workload_covers_what_decides_the_device_work() -> None:
    def spec(**changes: object) -> FunctionSpec:
        tensor = TensorSpec("x", "FP32", (-1, 3))
        base: dict[str, object] = {
            "name": "f",
            "format": ModelFormat.PYTHON,
            "artifact": Artifact("0" * 64, 1),
            "entry": "handler.py",
            "inputs": (tensor,),
            "outputs": (tensor,),
            "slo_ms": 100,
        }
        return FunctionSpec(**(base | changes))  # type: ignore[arg-type]

    same = workload_digest(spec())
    assert workload_digest(spec(name="g", slo_ms=50, max_batch=2)) == same
    assert workload_digest(spec(parameters={"width": "2"})) != same
    assert workload_digest(spec(artifact=Artifact("1" * 64, 1))) != same
    assert workload_digest(spec(entry="other.py")) != same
