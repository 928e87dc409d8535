"""The learnt part: CatBoost on the log residual of the physical estimate; one model a device model.

Its card tells rows, features, digest and cross-validated error. With fewer than `ROWS_MIN` rows there is nothing to
learn and the physical estimate serves alone; likewise when cross-validation finds the learnt part worse than it.
CatBoost's own monotone constraints are not used: they would bind the residual, while it is the product that has to be
monotone, which `surface.monotone` sees to.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from hasgpu_core.errors import IntegrityError, InvalidError, ModelError

from hasgpu_predictor.features import FEATURES, FunctionView, training_rows
from hasgpu_predictor.intervals import Intervals
from hasgpu_predictor.physical import Array, PhysicalModel
from hasgpu_predictor.profile import Profile, ProfilePoint, write_atomically
from hasgpu_predictor.surface import Axes, Surface, canonical_axes, monotone

if TYPE_CHECKING:
    from catboost import CatBoostRegressor

ROWS_MIN = 8
MODEL_FORMAT = "hasgpu-latency-model-1"
FOLDS_COUNT = 5
"""Of the cross-validation, and of the cross-fitting of the features."""


@dataclass(frozen=True, slots=True)
class TrainingSettings:
    """How the regressor is grown; the defaults take seconds for a few hundred rows."""

    seed: int = 0
    trees_count: int = 400
    depth: int = 6
    learning_rate: float = 0.05
    l2_leaf_reg: float = 30.0
    """Shrinks the residual to 0 (the physical estimate) where rows are few; hardly felt with thousands."""
    loss: str = "RMSE"
    """As CatBoost names it."""
    borders_count: int = 254
    """Candidates for a split, of each feature."""
    threads_count: int = 1
    cross_validate: bool = True
    """For the card's errors, and for the intervals beside predictions."""
    folds_count: int = FOLDS_COUNT
    folds_evaluated: int = FOLDS_COUNT
    """Of the folds; each costs a training. Fewer than all give errors and intervals from a part of the rows."""


@dataclass(frozen=True, slots=True)
class ModelCard:
    """What a model was made from and how good it is."""

    device_model: str
    version: int
    sha256: str
    """Of the CatBoost binary; of nothing (the empty digest) while the physical estimate serves alone."""
    rows_count: int
    workloads: tuple[str, ...]
    """`workload_digest` of each profile."""
    features: tuple[str, ...]
    mape_pct: float | None
    """Mean absolute error in per cent of the measured latency, cross-validated over rows; None: fewer than 8 rows or
    not asked for."""
    physical_mape_pct: float | None
    """The same of the physical estimate alone."""
    seed: int
    train_s: float = 0.0
    trained_unix_ns: int = 0
    intervals: Intervals | None = None
    """Of errors on held-out rows, by the quota's bound over the device time; None: not known."""


class LatencyModel:
    """Predicts a function's whole latency surface from its points."""

    def __init__(self, card: ModelCard, regressor: CatBoostRegressor | None) -> None:
        self.card = card
        self._regressor = regressor

    @classmethod
    def untrained(cls, device_model: str) -> LatencyModel:
        """Returns the model of version 0: the physical estimate alone."""
        return cls(_card(device_model, 0, b"", {}, 0, None, TrainingSettings()), None)

    @classmethod
    def train(
        cls,
        profiles: Sequence[Profile],
        *,
        device_model: str,
        version: int,
        settings: TrainingSettings,
        progress: Callable[[str], None] = lambda _text: None,
    ) -> LatencyModel:
        """Fits a model; equal arguments give equal predictions. `progress` is told in words how far it is.

        The caller stamps the card (`stamped`) with when and how long. Raises InvalidError when a profile is of
        another device model, ModelError when the rows can't be fitted.
        """
        by_workload = {profile.workload: profile.points for profile in profiles if profile.points}
        for profile in profiles:
            if profile.device_model != device_model:
                raise InvalidError("profile.device_model", expected=device_model, got=profile.device_model)
        rows_count = sum(len(points) for points in by_workload.values())
        errors: tuple[float, float] | None = None
        intervals: Intervals | None = None
        if rows_count >= ROWS_MIN and settings.cross_validate:
            held_out = _cross_validated(by_workload, settings, progress)
            if held_out is not None:
                *errors_, intervals = held_out
                errors = errors_[0], errors_[1]
        progress(f"fitting {rows_count} rows of {len(by_workload)} functions")
        regressor = _fit(by_workload, settings) if rows_count >= ROWS_MIN else None
        if errors is not None and errors[0] > errors[1]:
            progress(f"the learnt part does not help ({errors[0]:.1f} % against {errors[1]:.1f} %) and is left out")
            regressor, errors, intervals = None, (errors[1], errors[1]), None
        binary = _binary(regressor)
        card = _card(device_model, version, binary, by_workload, rows_count, errors, settings)
        return cls(replace(card, intervals=intervals), regressor)

    def stamped(self, *, train_s: float, trained_unix_ns: int) -> LatencyModel:
        """Returns the model with the card saying when it was trained and how long that took."""
        return LatencyModel(replace(self.card, train_s=train_s, trained_unix_ns=trained_unix_ns), self._regressor)

    @property
    def regressor(self) -> CatBoostRegressor | None:
        """The learnt part; None: the physical estimate serves alone."""
        return self._regressor

    def latencies_s(self, view: FunctionView, configurations: Array) -> Array:
        """Returns raw predictions (n,) for configurations (n, 3); not yet monotone: see `surface`."""
        estimate_s = view.physical.latency_s(*configurations.T)
        if self._regressor is None:
            return estimate_s
        residual = self._regressor.predict(view.features(configurations), thread_count=1)
        return np.asarray(estimate_s * np.exp(np.asarray(residual, float)))

    def surface(self, profile: Profile, axes: Axes) -> Surface:
        """Returns the monotone surface of a profiled function. Raises InvalidError for a profile without points."""
        return self._monotone(FunctionView(profile.points), profile.points, axes, "profiled")

    def _monotone(self, view: FunctionView, points: Sequence[ProfilePoint], axes: Axes, basis: str) -> Surface:
        """The surface through what was measured, as near as a monotone one comes, and what is predicted between.

        Where the physical estimate serves alone, points are too few or too noisy to stand as they are.
        """
        axes.validate()
        configurations = axes.configurations()
        values = np.log(self.latencies_s(view, configurations)).reshape(axes.shape)
        if self._regressor is not None:
            _measured_into(values, points, axes)
        latency_s = np.exp(monotone(values))
        if self.card.intervals is None:
            return Surface(axes, latency_s, basis)
        low, high = self.card.intervals.at(interval_keys(view, configurations).reshape(axes.shape))
        return Surface(axes, latency_s, basis, latency_s * low, latency_s * high)

    def save(self, folder: Path) -> None:
        """Writes `model.cbm` (when there is a learnt part) and then `card.json`, each atomically."""
        if self._regressor is not None:
            write_atomically(folder / f"{self.card.sha256}.cbm", _binary(self._regressor))
        content = {"format": MODEL_FORMAT, "card": asdict(self.card)}
        write_atomically(folder / "card.json", json.dumps(content, indent=1).encode())
        for old in folder.glob("*.cbm"):
            if old.stem != self.card.sha256:
                old.unlink(missing_ok=True)

    @classmethod
    def load(cls, folder: Path) -> LatencyModel:
        """Reads what `save` wrote.

        Raises InvalidError when a file is missing, corrupt, foreign or of other features, IntegrityError when the
        binary is not the card's.
        """
        try:
            content = json.loads((folder / "card.json").read_bytes())
            if content["format"] != MODEL_FORMAT:
                raise InvalidError(f"model card in {folder}", expected=MODEL_FORMAT, got=repr(content["format"]))
            fields = dict(content["card"])
            fields["workloads"], fields["features"] = tuple(fields["workloads"]), tuple(fields["features"])
            if fields.get("intervals"):
                fields["intervals"] = Intervals(**{name: tuple(v) for name, v in fields["intervals"].items()})
            card = ModelCard(**fields)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InvalidError(f"model card in {folder}", expected="a card", got=repr(error)) from error
        if card.features != FEATURES:
            raise InvalidError(f"model in {folder}", expected="the present features", got="a model of other features")
        if card.sha256 == hashlib.sha256(b"").hexdigest():
            return cls(card, None)
        return cls(card, _read_binary(folder / f"{card.sha256}.cbm", card.sha256))


def static_surface(physical: PhysicalModel, axes: Axes) -> Surface:
    """Returns the surface of a function without any point (see `physical.static_physical`)."""
    axes.validate()
    latency_s = physical.latency_s(*axes.configurations().T).reshape(axes.shape)
    return Surface(axes, latency_s, "static")


def profile_axes(profile: Profile, *, max_batch: int, sm_rungs_pct: Sequence[int]) -> Axes:
    """Returns the canonical grid with the measured batches and SM shares in it."""
    return canonical_axes(
        max_batch,
        batches=(p.batch for p in profile.points),
        sm_pcts={*sm_rungs_pct, *(p.sm_pct for p in profile.points)},
    )


def measured_axes(points: Sequence[ProfilePoint]) -> Axes:
    """Returns the grid of the points' own values.

    Errors are told on it: places that nothing was measured at would pull at their neighbours when the surface is made
    monotone.
    """
    return Axes(
        tuple(sorted({p.batch for p in points})),
        tuple(sorted({p.sm_pct for p in points})),
        tuple(sorted({p.quota_permille for p in points})),
    )


def _measured_into(values: Array, points: Sequence[ProfilePoint], axes: Axes) -> None:
    """Sets the places of `values` (natural log of seconds, shape of the axes) that were measured."""
    batches, sms, quotas = ({x: k for k, x in enumerate(a)} for a in (axes.batches, axes.sm_pcts, axes.quotas_permille))
    for point in points:
        at = batches.get(point.batch), sms.get(point.sm_pct), quotas.get(point.quota_permille)
        if None not in at:
            values[at] = np.log(point.latency_s)


def _fit(by_workload: Mapping[str, Sequence[ProfilePoint]], settings: TrainingSettings) -> CatBoostRegressor | None:
    from catboost import CatBoostError, CatBoostRegressor

    rng = np.random.default_rng(settings.seed)
    rows = [
        training_rows(by_workload[workload], folds_count=settings.folds_count, rng=rng)
        for workload in sorted(by_workload)
    ]
    features = np.concatenate([part for part, _ in rows])
    targets = np.concatenate([part for _, part in rows])
    if len(targets) < ROWS_MIN or float(np.ptp(targets)) == 0.0:
        return None
    regressor = CatBoostRegressor(
        iterations=settings.trees_count,
        depth=settings.depth,
        learning_rate=settings.learning_rate,
        l2_leaf_reg=settings.l2_leaf_reg,
        loss_function=settings.loss,
        border_count=settings.borders_count,
        boost_from_average=False,  # few rows: shrink to the physical estimate, not to the mean residual
        random_seed=settings.seed,
        thread_count=settings.threads_count,
        allow_writing_files=False,
        verbose=False,
    )
    try:
        regressor.fit(features, targets)
    except CatBoostError as error:
        raise ModelError(f"CatBoost can't fit {len(targets)} rows: {error}") from error
    return regressor


def interval_keys(view: FunctionView, configurations: Array) -> Array:
    """Returns what tells the regime of a configuration, shape (n,): log2 of the quota's bound over the device time."""
    batch, sm, quota = configurations.T
    device_time_s = view.physical.device_time_s(batch, sm)
    return np.asarray(np.log2(view.physical.quota_bound_s(device_time_s, quota) / device_time_s))


def _cross_validated(
    by_workload: Mapping[str, Sequence[ProfilePoint]], settings: TrainingSettings, progress: Callable[[str], None]
) -> tuple[float, float, Intervals | None] | None:
    """Mean absolute percentage errors (model, physical alone) over rows held out in folds, and their intervals."""
    rng = np.random.default_rng(settings.seed + 1)
    count = settings.folds_count
    folds = {w: rng.permutation(len(by_workload[w])) % count for w in sorted(by_workload)}
    logs: list[Array] = []
    physical_errors: list[Array] = []
    keys: list[Array] = []
    for fold in range(min(count, settings.folds_evaluated)):
        progress(f"cross-validating: fold {fold + 1} of {min(count, settings.folds_evaluated)}")
        kept = {w: [p for p, f in zip(by_workload[w], folds[w], strict=True) if f != fold] for w in folds}
        regressor = _fit(kept, settings)
        model = LatencyModel(LatencyModel.untrained("").card, regressor)
        for w in folds:
            held = [p for p, f in zip(by_workload[w], folds[w], strict=True) if f == fold]
            if held and kept[w]:
                predicted_s, measured_s, estimate_s, regimes = held_out(model, kept[w], held)
                logs.append(np.log(measured_s / predicted_s))
                physical_errors.append(np.abs(estimate_s / measured_s - 1))
                keys.append(regimes)
    if not logs:
        return None
    log_errors = np.concatenate(logs)
    mape_pct = 100 * float(np.abs(np.expm1(-log_errors)).mean())
    physical_mape_pct = 100 * float(np.concatenate(physical_errors).mean())
    return mape_pct, physical_mape_pct, Intervals.fit(np.concatenate(keys), log_errors)


def held_out(
    model: LatencyModel, known: Sequence[ProfilePoint], held: Sequence[ProfilePoint]
) -> tuple[Array, Array, Array, Array]:
    """Returns at `held`, each (n,): what the surface made from `known` predicts, what was measured, the physical
    estimate (all in seconds), and the interval's key."""
    configurations = np.array([p.configuration for p in held], float)
    axes = measured_axes((*known, *held))
    view = FunctionView(known)
    measured_s = np.array([p.latency_s for p in held])
    predicted_s = model._monotone(view, known, axes, "profiled").at(*configurations.T)
    return predicted_s, measured_s, view.physical.latency_s(*configurations.T), interval_keys(view, configurations)


def held_out_errors(
    model: LatencyModel, known: Sequence[ProfilePoint], held: Sequence[ProfilePoint]
) -> tuple[Array, Array]:
    """Returns absolute relative errors (n,) at `held`: of the surface made from `known`, of the physical estimate."""
    predicted_s, measured_s, estimate_s, _ = held_out(model, known, held)
    return np.abs(predicted_s / measured_s - 1), np.abs(estimate_s / measured_s - 1)


def _card(
    device_model: str,
    version: int,
    binary: bytes,
    by_workload: Mapping[str, object],
    rows_count: int,
    errors: tuple[float, float] | None,
    settings: TrainingSettings,
) -> ModelCard:
    return ModelCard(
        device_model=device_model,
        version=version,
        sha256=hashlib.sha256(binary).hexdigest(),
        rows_count=rows_count,
        workloads=tuple(sorted(by_workload)),
        features=FEATURES,
        mape_pct=errors[0] if errors else None,
        physical_mape_pct=errors[1] if errors else None,
        seed=settings.seed,
    )


def _binary(regressor: CatBoostRegressor | None) -> bytes:
    return b"" if regressor is None else bytes(regressor._serialize_model())


def _read_binary(path: Path, sha256: str) -> CatBoostRegressor:
    from catboost import CatBoostError, CatBoostRegressor

    try:
        data = path.read_bytes()
    except OSError as error:
        raise InvalidError(f"model file {path}", expected="a file", got=str(error)) from error
    if (got := hashlib.sha256(data).hexdigest()) != sha256:
        raise IntegrityError(expected_sha256=sha256, got_sha256=got)
    regressor = CatBoostRegressor()
    try:
        regressor.load_model(blob=data)
    except CatBoostError as error:
        raise InvalidError(f"model file {path}", expected="a CatBoost model", got=str(error)) from error
    return regressor
