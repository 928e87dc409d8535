"""Functions without a profile, from those that have one: device times by operators, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hasgpu_core.errors import InvalidError
from hasgpu_predictor import (
    V100,
    Axes,
    FunctionTransfer,
    Known,
    Operator,
    Profile,
    ProfilePoint,
    Workload,
    data_sheet,
    fit_transfer,
    parse_operator,
)
from hasgpu_predictor.feature_table import feature_table
from hasgpu_predictor.unprofiled import probes_among

DOCS = Path(__file__).resolve().parents[3] / "docs"
AXES = Axes((1, 2, 4, 8), (25, 50, 75, 100), (100, 200, 500, 1_000))
OVERHEAD_S = 0.0005


def operators(scale: float, count: int = 10) -> tuple[Operator, ...]:
    one = Operator("convolution", scale * 6e7, 200_000, scale * 40_000, 200_000, 1, (1, 64, 28, 28))
    return (one,) * count


def device_time_s(scale: float, batch: int, sm_pct: int) -> float:
    return 0.0005 + 0.004 * scale * batch * (100 / sm_pct) ** 0.9


def known(scale: float, **changes: Any) -> Known:
    points = [
        ProfilePoint(b, s, q, max(d + OVERHEAD_S, d * 1_000 / q), d)
        for b in AXES.batches
        for s in AXES.sm_pcts
        for q in (500, 1_000)
        for d in [device_time_s(scale, b, s)]
    ]
    one = Known(f"f{scale:g}", operators(scale), Profile(f"{scale:g}".ljust(64, "0"), "card", tuple(points)))
    return replace(one, **changes)


def fitted(scales: tuple[float, ...] = (0.5, 1.0, 2.0, 4.0, 8.0)) -> FunctionTransfer:
    return fit_transfer([known(scale) for scale in scales], device_model="card", sheet=V100)


def test_operators_tell_of_a_function_that_was_never_measured() -> None:
    transfer = fitted()
    physical, surface = transfer.surface(Workload.of(operators(3.0)), AXES)
    assert (surface.basis, physical.points_count) == ("static", 0)
    true_s = np.array([[device_time_s(3.0, b, s) + OVERHEAD_S for s in AXES.sm_pcts] for b in AXES.batches])
    assert surface.latency_s[:, :, -1] == pytest.approx(true_s, rel=0.25)
    # What a quota does to a device time is arithmetic.
    assert surface.latency_s[:, :, 0] == pytest.approx(10 * (surface.latency_s[:, :, -1] - OVERHEAD_S), rel=0.02)
    assert surface.low_s is not None
    assert surface.high_s is not None
    assert (surface.low_s < surface.latency_s).all()
    assert (surface.latency_s < surface.high_s).all()
    assert (np.diff(surface.latency_s, axis=0) >= 0).all()
    assert (np.diff(surface.latency_s, axis=1) <= 0).all()
    assert (np.diff(surface.latency_s, axis=2) <= 0).all()
    assert physical.device_time_s(4, 50) == pytest.approx(device_time_s(3.0, 4, 50), rel=0.25)
    assert 0 < transfer.card.static_mape_pct < 40
    assert transfer.card.models == ("f0.5", "f1", "f2", "f4", "f8")


def test_a_handful_of_points_of_its_own_corrects_it() -> None:
    transfer = fitted()
    # Half as slow again as its operators and the others say.
    points = [
        ProfilePoint(b, s, 1_000, 1.5 * device_time_s(3.0, b, s) + OVERHEAD_S, 1.5 * device_time_s(3.0, b, s))
        for b, s in ((1, 100), (8, 25), (4, 50))
    ]
    workload = Workload.of(operators(3.0))
    physical, surface = transfer.surface(workload, AXES, points)
    assert (surface.basis, physical.points_count) == ("transferred", 3)
    true_s = 1.5 * device_time_s(3.0, 2, 50)
    before, after = (
        float(transfer.surface(workload, AXES, told)[1].at(2, 50, 1_000)) / true_s - 1 for told in ((), points)
    )
    assert abs(after) < 0.2 < abs(before)


def test_equal_arguments_give_equal_predictions_and_digests() -> None:
    first, second = fitted(), fitted()
    assert first.card == second.card
    workload = Workload.of(operators(3.0))
    assert (first.surface(workload, AXES)[1].latency_s == second.surface(workload, AXES)[1].latency_s).all()
    assert fitted((0.5, 1.0, 2.0, 4.0, 7.0)).card.data_sha256 != first.card.data_sha256


def test_what_cannot_be_learnt_from_is_refused() -> None:
    with pytest.raises(InvalidError, match="at least 4 to learn from, got 3"):
        fitted((1.0, 2.0, 4.0))
    nothing = [known(scale, operators=()) for scale in (1.0, 2.0, 4.0, 8.0)]
    with pytest.raises(InvalidError, match="got 0"):
        fit_transfer(nothing, device_model="card", sheet=V100)
    four = [known(scale) for scale in (1.0, 2.0, 4.0, 8.0)]
    unmetered = [replace(p, device_time_s=0.0) for p in four[0].profile.points]
    four[0] = replace(four[0], profile=replace(four[0].profile, points=tuple(unmetered)))
    with pytest.raises(InvalidError, match=r"device times.*none of f1"):
        fit_transfer(four, device_model="card", sheet=V100)


def test_latencies_without_device_times_are_transferred_too() -> None:
    models = []
    for scale in (0.5, 1.0, 2.0, 4.0, 8.0):
        one = known(scale)
        points = tuple(replace(p, device_time_s=0.0) for p in one.profile.points)
        models.append(replace(one, profile=replace(one.profile, points=points)))
    transfer = fit_transfer(models, device_model="card", sheet=V100)
    points = models[2].profile.points[:4]
    physical, surface = transfer.surface(Workload.of(operators(2.0)), AXES, points)
    assert (surface.basis, physical.points_count) == ("transferred", 4)
    assert not physical.device_metered
    assert (np.diff(surface.latency_s, axis=1) <= 0).all()
    assert transfer.surface(Workload.of(operators(2.0)), AXES)[1].basis == "static"


def test_the_line_of_quotas_with_most_points_is_the_probed_curve() -> None:
    points = [ProfilePoint(4, 100, q, 1.0 / q) for q in (200, 500, 1_000)] + [ProfilePoint(1, 50, 1_000, 0.25)]
    probes = probes_among(points)
    assert (probes.batch, probes.sm_pct, probes.count) == (4, 100, 4)
    assert dict(probes.by_quota_ms) == pytest.approx({20.0: 5.0, 50.0: 2.0, 100.0: 1.0})
    assert probes.others == ((1.0, 50.0, 100.0, 250.0),)
    assert probes_among([]).count == 0


def test_sheets_are_found_by_name() -> None:
    assert data_sheet("NVIDIA H100 80GB HBM3", "cuda").sm_count == 132
    assert data_sheet("Tesla V100-SXM2-16GB", "cuda") == V100
    assert data_sheet("cpu-2c", "cpu").peak_flops < V100.peak_flops
    assert data_sheet("unheard of", "cuda") == V100


@pytest.mark.parametrize(
    "changes",
    [
        {"flops": float("nan")},
        {"flops": -1},
        {"op": ""},
        {"groups": 0},
        {"output_shape": "1x3"},
        {"input_bytes": None},
    ],
)
def test_operators_that_cannot_be_are_refused(changes: dict[str, Any]) -> None:
    fields = {
        "op": "relu", "flops": 3, "input_bytes": 12, "weight_bytes": 0, "output_bytes": 12, "groups": 1,
        "output_shape": [1, 3],
    }  # fmt: skip
    assert parse_operator(fields) == Operator("relu", 3, 12, 0, 12, 1, (1, 3))
    with pytest.raises(InvalidError, match="operator"):
        parse_operator({**fields, **changes})


def test_the_documented_features_are_those_of_the_extractors() -> None:
    assert feature_table() in (DOCS / "rapp.md").read_text(), (
        "put in what python -m hasgpu_predictor.feature_table says"
    )
