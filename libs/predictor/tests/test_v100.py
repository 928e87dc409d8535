"""The predictor on a sample of the published V100 profiles (skipped where the data is not at hand)."""

from __future__ import annotations

import csv
import gzip
from pathlib import Path

import numpy as np
import pytest
from hasgpu_predictor import LatencyModel, Profile, ProfilePoint, TrainingSettings
from hasgpu_predictor.model import held_out_errors, profile_axes

DATA = Path(__file__).resolve().parents[4] / "shared/data/profiles/v100/latency.csv.gz"
SAMPLE = ("resnet50", "mobilenet_v3_large", "vit_b_16", "convnext_tiny")


@pytest.fixture(scope="module")
def points() -> dict[str, list[ProfilePoint]]:
    if not DATA.exists():
        pytest.skip(f"the V100 profiles are not at {DATA}")
    found: dict[str, list[ProfilePoint]] = {}
    with gzip.open(DATA, "rt", newline="") as file:
        for row in csv.DictReader(file):
            found.setdefault(row["model"], []).append(
                ProfilePoint(
                    int(row["batch"]), int(row["sm_pct"]), 10 * int(row["quota_pct"]), float(row["latency_ms"]) / 1e3
                )
            )
    chosen = [name for name in SAMPLE if name in found] or sorted(found)[:4]
    return {name: found[name] for name in chosen}


def test_unseen_configurations(points: dict[str, list[ProfilePoint]]) -> None:
    rng = np.random.default_rng(0)
    held = {name: rng.random(len(rows)) < 0.1 for name, rows in points.items()}
    known = {n: [p for p, out in zip(rows, held[n], strict=True) if not out] for n, rows in points.items()}
    model = LatencyModel.train(
        [Profile(name, "v100", tuple(rows)) for name, rows in known.items()],
        device_model="v100",
        version=1,
        settings=TrainingSettings(cross_validate=False),
    )
    errors, physical = zip(
        *(
            held_out_errors(model, known[n], [p for p, out in zip(rows, held[n], strict=True) if out])
            for n, rows in points.items()
        ),
        strict=True,
    )
    assert np.concatenate(errors).mean() < 0.06
    assert np.concatenate(errors).mean() < 0.8 * np.concatenate(physical).mean()
    for name, rows in known.items():
        profile = Profile(name, "v100", tuple(rows))
        surface = model.surface(profile, profile_axes(profile, max_batch=8, sm_rungs_pct=())).latency_s
        assert (np.diff(surface, axis=0) >= 0).all()
        assert (np.diff(surface, axis=1) <= 0).all()
        assert (np.diff(surface, axis=2) <= 0).all()
