"""How right the predictor is on what it has not seen: the measure of `hasgpu rapp evaluate` and `bench/rapp.py`.

Test models that the training files lack are unseen models: they are predicted from their operators and probes. Of
other test models the training rows are known, and unseen configurations are predicted.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from hasgpu_core.errors import InvalidError
from numpy.typing import NDArray

from hasgpu_predictor.dataset import Measured, read_graph_probes, read_latencies, read_operators
from hasgpu_predictor.features import FEATURES, FunctionView
from hasgpu_predictor.model import LatencyModel, TrainingSettings, measured_axes
from hasgpu_predictor.operators import Array, Operator, Workload
from hasgpu_predictor.profile import Profile, ProfilePoint
from hasgpu_predictor.surface import Axes, Surface
from hasgpu_predictor.transfer import (
    TRANSFER_FEATURES,
    Probes,
    Sample,
    TransferModel,
    TransferSettings,
    train_transfer,
)

LEVEL_PCT = 90


@dataclass(frozen=True, slots=True)
class Data:
    """One set of files."""

    latencies: Mapping[str, Measured]
    operators: Mapping[str, list[Operator]]
    graph_probes: Mapping[str, Mapping[float, float]]

    @classmethod
    def read(cls, latency: Path, ops: Path, probes: Path) -> Data:
        """Reads the files; raises InvalidError naming file, line and column."""
        return cls(read_latencies(latency), read_operators(ops), read_graph_probes(probes))

    def only(self, models: set[str]) -> Data:
        """Returns the latencies of some models; operators and probes stay."""
        return Data({m: t for m, t in self.latencies.items() if m in models}, self.operators, self.graph_probes)


@dataclass(frozen=True, slots=True)
class ProbeRows:
    """Which rows of an unseen model may be looked at."""

    batch: int = 4
    sm_pct: float = 100.0
    quotas_pct: tuple[float, ...] = (20.0, 40.0, 60.0, 80.0, 100.0)

    @classmethod
    def parse(cls, text: str) -> ProbeRows:
        """Reads `batch=4,sm_pct=100,quota_pct=20/40/60/80/100`; raises InvalidError for anything else."""
        expected = "as batch=4,sm_pct=100,quota_pct=20/40/60/80/100"
        found: dict[str, str] = {}
        for part in text.split(","):
            match = re.fullmatch(r"\s*(batch|sm_pct|quota_pct)\s*=\s*([0-9./]+)\s*", part)
            if match is None or match[1] in found:
                raise InvalidError("--probe-rows", expected=expected, got=repr(text))
            found[match[1]] = match[2]
        try:
            batch, sm_pct = int(found["batch"]), float(found["sm_pct"])
            quotas = tuple(sorted({float(quota) for quota in found["quota_pct"].split("/")}))
        except (KeyError, ValueError) as error:
            raise InvalidError("--probe-rows", expected=expected, got=repr(text)) from error
        if batch < 1 or not 0 < sm_pct <= 100 or not all(0 < quota <= 100 for quota in quotas):
            raise InvalidError(
                "--probe-rows", expected="batch from 1, shares and quotas above 0 to 100", got=repr(text)
            )
        return cls(batch, sm_pct, quotas)

    def mask(self, configurations: Array) -> NDArray[np.bool_]:
        """Marks the rows, shape (n,) for (n, 3)."""
        batch, sm, quota = configurations.T
        return np.asarray((batch == self.batch) & (sm == self.sm_pct) & np.isin(quota, self.quotas_pct))


@dataclass(frozen=True, slots=True)
class Scored:
    """Predictions of one test model, in ms; arrays of equal length, probes left out."""

    unseen_model: bool
    configurations: Array
    measured_ms: Array
    predicted_ms: Array
    low_ms: Array
    high_ms: Array
    unconstrained_ms: Array
    """Before the surface is made monotone."""
    monotone: bool
    """Whether the whole surface is."""

    @property
    def ape_pct(self) -> Array:
        """Absolute errors in per cent of what was measured."""
        return np.asarray(100 * np.abs(self.predicted_ms / self.measured_ms - 1))

    @property
    def covered(self) -> NDArray[np.bool_]:
        """Whether a row lies in its interval."""
        return np.asarray((self.low_ms <= self.measured_ms) & (self.measured_ms <= self.high_ms))


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What came of it."""

    scored: Mapping[str, Scored]
    train_s: float
    predict_s: float
    already_trained_count: int
    """Test rows that the training files hold too; not scored."""
    importance_pct: Mapping[str, float]
    """Of the features, per cent."""

    def summary(self) -> dict[str, object]:
        """Returns the judged figures; errors and coverage in per cent."""
        parts = list(self.scored.values())
        ape = np.concatenate([part.ape_pct for part in parts])
        covered = np.concatenate([part.covered for part in parts])
        return {
            "mape": float(ape.mean()),
            "median_ape": float(np.median(ape)),
            "p95_ape": float(np.quantile(ape, 0.95)),
            "mape_by_model": {model: float(part.ape_pct.mean()) for model, part in self.scored.items()},
            "coverage_90": 100 * float(covered.mean()),
            "n": len(ape),
            "train_s": self.train_s,
            "predict_us_per_config": 1e6 * self.predict_s / len(ape),
            "mape_unconstrained": float(
                np.mean(np.concatenate([100 * np.abs(p.unconstrained_ms / p.measured_ms - 1) for p in parts]))
            ),
            "units": "errors and coverage in per cent of the measured latency and of the rows",
            "unseen_models": sorted(model for model, part in self.scored.items() if part.unseen_model),
            "already_trained_rows": self.already_trained_count,
            "monotone_violations": sum(not part.monotone for part in parts),
        }


def evaluate(
    train: Data,
    test: Data,
    probe_rows: ProbeRows,
    *,
    now_s: Callable[[], float],
    transfer: TransferSettings | None = None,
    training: TrainingSettings | None = None,
    progress: Callable[[str], None] = lambda _text: None,
) -> Evaluation:
    """Trains on `train` and predicts `test`.

    Args:
        now_s: A clock, to tell how long training and predicting take.

    Raises InvalidError when an unseen model has no operators, or nothing is left to score.
    """
    unseen = [model for model in test.latencies if model not in train.latencies]
    seen = [model for model in test.latencies if model in train.latencies]
    for model in unseen:
        if model not in test.operators:
            raise InvalidError(f"operators of {model}", expected="rows in the ops file of the test", got="none")
    scored: dict[str, Scored] = {}
    importance: dict[str, float] = {}
    train_s = predict_s = 0.0
    already_count = 0
    if unseen:
        began_s = now_s()
        settings = transfer or TransferSettings()
        model_ = train_transfer(samples_of(train), settings, progress)
        train_s += now_s() - began_s
        importance |= importances(model_.probed)
        for name in unseen:
            began_s = now_s()
            scored[name] = _score_unseen(model_, test, name, probe_rows)
            predict_s += now_s() - began_s
    if seen:
        began_s = now_s()
        settings_ = training or training_settings()
        profiles = {name: profile_of(name, table) for name, table in train.latencies.items()}
        latency = LatencyModel.train(
            list(profiles.values()), device_model="", version=1, settings=settings_, progress=progress
        )
        train_s += now_s() - began_s
        importance |= importances(latency.regressor)
        for name in seen:
            began_s = now_s()
            part, already = _score_seen(latency, profiles[name], train.latencies[name], test.latencies[name])
            predict_s += now_s() - began_s
            already_count += already
            if len(part.measured_ms):
                scored[name] = part
    scored = {name: part for name, part in scored.items() if len(part.measured_ms)}
    if not scored:
        raise InvalidError("test rows", expected="at least one beside probes and training rows", got="none")
    return Evaluation(
        {m: scored[m] for m in test.latencies if m in scored}, train_s, predict_s, already_count, importance
    )


def training_settings(*, seed: int = 0, threads_count: int = 1) -> TrainingSettings:
    """Returns the settings for tens of thousands of rows: deeper trees, one fold held out for the intervals."""
    return TrainingSettings(
        seed=seed,
        trees_count=600,
        depth=7,
        learning_rate=0.1,
        loss="Huber:delta=0.03",  # single rows are off by the host's state: the mean would follow them
        borders_count=64,
        threads_count=threads_count,
        folds_count=10,
        folds_evaluated=1,
    )


def samples_of(data: Data) -> list[Sample]:
    """Returns the training models that have operators, by name."""
    return [
        Sample(Workload.of(data.operators[m]), t.configurations, t.latency_ms, dict(data.graph_probes.get(m, {})))
        for m, t in sorted(data.latencies.items())
        if m in data.operators
    ]


def profile_of(name: str, table: Measured) -> Profile:
    """Returns measurements as a profile of device model ""; raises InvalidError for an SM share of a fraction."""
    points = []
    for (batch, sm, quota), ms in zip(table.configurations, table.latency_ms, strict=True):
        if sm != int(sm):
            raise InvalidError(f"sm_pct of {name}", expected="a whole number of per cent", got=f"{sm:g}")
        points.append(ProfilePoint(int(batch), int(sm), max(1, round(10 * quota)), ms / 1e3))
    return Profile(name, "", tuple(points))


def importances(regressor: object) -> dict[str, float]:
    """Returns the features' shares of what a CatBoost model does, in per cent; empty for None."""
    if regressor is None:
        return {}
    shares = regressor.get_feature_importance()  # type: ignore[attr-defined]  # CatBoost has no types
    names = TRANSFER_FEATURES if len(shares) == len(TRANSFER_FEATURES) else FEATURES
    return {name: float(share) for name, share in zip(names, shares, strict=True)}


def _score_unseen(model: TransferModel, test: Data, name: str, probe_rows: ProbeRows) -> Scored:
    table = test.latencies[name]
    probe = probe_rows.mask(table.configurations)
    by_quota = dict(zip(table.configurations[probe, 2].tolist(), table.latency_ms[probe].tolist(), strict=True))
    probes = Probes(probe_rows.batch, probe_rows.sm_pct, by_quota, dict(test.graph_probes.get(name, {})))
    view = model.view(Workload.of(test.operators[name]), probes)
    surface = model.surface(view, _axes(table.configurations))
    asked = table.configurations[~probe]
    free_ms = np.exp(model.predict_log_ms(view, asked)[0]) if len(asked) else np.zeros(0)
    return _scored(surface, asked, table.latency_ms[~probe], free_ms, unseen_model=True)


def _score_seen(model: LatencyModel, profile: Profile, known: Measured, table: Measured) -> tuple[Scored, int]:
    trained = {tuple(place) for place in known.configurations.tolist()}
    fresh = np.array([tuple(place) not in trained for place in table.configurations.tolist()], bool)
    configurations = table.configurations[fresh]
    held = profile_of("", Measured(configurations, table.latency_ms[fresh])).points
    surface = model.surface(profile, measured_axes((*profile.points, *held)))
    free_ms = np.zeros(0)
    if held:
        asked = np.array([point.configuration for point in held], float)
        free_ms = 1e3 * model.latencies_s(FunctionView(profile.points), asked)
    part = _scored(surface, configurations, table.latency_ms[fresh], free_ms, unseen_model=False)
    return part, int((~fresh).sum())


def _axes(configurations: Array) -> Axes:
    scaled = configurations * np.array([1.0, 1.0, 10.0])
    batch, sm, quota = (tuple(sorted({max(1, round(value)) for value in column})) for column in scaled.T)
    return Axes(batch, sm, quota)


def _scored(
    surface: Surface, configurations: Array, measured_ms: Array, free_ms: Array, *, unseen_model: bool
) -> Scored:
    batch, sm, quota = configurations.T
    predicted_ms = 1e3 * surface.at(batch, sm, 10 * quota)
    bounds = surface.bounds_at(batch, sm, 10 * quota)
    low, high = (1e3 * bound for bound in bounds) if bounds else (predicted_ms, predicted_ms)
    values = surface.latency_s
    rises = (np.diff(values, axis=1) > 0).any() or (np.diff(values, axis=2) > 0).any()
    return Scored(unseen_model, configurations, measured_ms, predicted_ms, low, high, free_ms, not rises)
