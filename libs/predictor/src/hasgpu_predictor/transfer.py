"""Latency of a model that is not in the training data, from its operators and a few probes.

    operators -> rooflines + Gaussian process -> device time d(batch, SM)     `device_times`
    probes at one (batch, SM) -> launch curve c(quota)                          `curves`
    estimate = max(d, c); CatBoost learns log(latency / estimate)

Training imitates the use: the features of a training model come from rooflines, process and curves of the others, and
from probes of its own at the places where a new model is probed (and at some more, so that one probe's noise is not
learnt). Data: latencies in ms, quotas in per cent, natural logarithms, unless a name says otherwise.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from hasgpu_core.errors import InvalidError, ModelError
from numpy.typing import NDArray

from hasgpu_predictor.curves import BatchSteps, CurveBank, groups_per_launch
from hasgpu_predictor.device_times import DeviceTimeModel, Observation, Places, fit_device_times
from hasgpu_predictor.intervals import Intervals
from hasgpu_predictor.likeness import folds_of_like
from hasgpu_predictor.operators import V100, Array, DataSheet, Workload
from hasgpu_predictor.surface import Axes, Surface, monotone

if TYPE_CHECKING:
    from catboost import CatBoost, CatBoostRegressor

TRANSFER_FEATURES: tuple[str, ...] = (
    "quota_log",
    "batch_log2",
    "sm_from_probe_octaves",
    "device_over_curve_log",
    "device_over_fast_curve_log",
    "device_over_slow_curve_log",
    "device_spread_log",
    "curve_over_interpolation_log",
    "curve_range_log",
    "host_over_probe_log",
    "graph_5_over_host_log",
    "probe_per_launch_log",
    "device_over_probe_at_probe_log",
    "octaves_of_batch_from_probe_if_grouped",
    "depthwise_launch_share",
    "group_width_log2",
    "groups_mean",
    "intensity_log2",
    "probes_count",
)
"""Of a configuration of a model. `curve`: the launch curve at the quota; fast and slow: at the largest quota and at
20 %; `spread`: the process's standard deviation; `host`: the graph probes at large SM shares; NaN: not measured."""
_STATIC_FEATURES = ("octaves_of_batch_from_probe_if_grouped", "group_width_log2", "groups_mean")
"""Used without probes only: with them the curve's step says it, and the few grouped models would be learnt by heart."""
MODELS_MIN = 4
_ANCHOR_SM_OFFSETS = (0.0, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0)
"""A training model is probed at SM shares that much smaller, each row from one of them: probes are noisy, and it is not
the noise of one that is to be learnt."""
_STEP_QUOTA_MAX = 60.0
"""Up to which a launch curve stands above device time in most models."""
_MARGIN = 0.06
"""A probe that is no slower than the device time by so much (log) was decided by the device."""


@dataclass(frozen=True, slots=True)
class Probes:
    """What was measured of a model."""

    batch: float = 4.0
    sm_pct: float = 100.0
    """Where the curve was probed."""
    by_quota_ms: Mapping[float, float] = field(default_factory=dict)
    """Latency there, by quota in per cent."""
    graph_ms: Mapping[float, float] = field(default_factory=dict)
    """Time of the whole graph at batch 1 without a quota, by SM share."""
    others: tuple[tuple[float, float, float, float], ...] = ()
    """More points: batch, SM share, quota in per cent, latency in ms. Those that the device decided tell its time."""

    @property
    def count(self) -> int:
        """Measurements."""
        return len(self.by_quota_ms) + len(self.graph_ms) + len(self.others)


@dataclass(frozen=True, slots=True)
class Sample:
    """One training model: its operators and everything measured of it."""

    workload: Workload
    configurations: Array
    """Shape (n, 3): batch, SM share, quota in per cent."""
    latency_ms: Array
    graph_ms: Mapping[float, float]


@dataclass(frozen=True, slots=True)
class TransferSettings:
    """How it is trained."""

    seed: int = 0
    seeds_count: int = 3
    """Regressors that are averaged into one, each from a seed of its own."""
    trees_count: int = 200
    """Of one seed."""
    static_trees_count: int = 150
    depth: int = 6
    learning_rate: float = 0.08
    l2_leaf_reg: float = 10.0
    threads_count: int = 1
    folds_count: int = 5
    """Of models: for the features, and for the intervals."""
    probe_batch: float = 4.0
    probe_sm_pct: float = 100.0
    sheet: DataSheet = V100


@dataclass(frozen=True, slots=True)
class Grid:
    """Latencies of all training models on one grid, NaN where not measured."""

    batches: Array
    sm_pcts: Array
    quotas_pct: Array
    log_ms: Array
    """Shape (models, batches, SMs, quotas)."""


class TransferView:
    """One model's device times and curve; predictions are made from it.

    Surfaces on one grid after the first take the device times from a cache.
    """

    def __init__(self, parts: TransferParts, workload: Workload, probes: Probes) -> None:
        self.workload = workload
        self.probes = probes
        self._parts = parts
        bank = parts.bank
        launches = workload.value("launches_log2") * np.log(2.0)
        self.host = _host(probes)
        quotas = bank.quotas_pct
        self.probed = np.full(len(quotas), np.nan)
        known = sorted((q, ms) for q, ms in probes.by_quota_ms.items() if q > 0)
        for quota, ms in known:
            self.probed[int(np.argmin(np.abs(quotas - quota)))] = np.log(ms)
        at = np.array([probes.batch]), np.array([probes.sm_pct])
        self._observations = _observations(probes, self.probed, quotas, self.host, parts.device, workload)
        self.probe_log_ms = float(parts.device.at(workload, *at, self._observations)[0][0])
        launched = np.where(self.probed > self.probe_log_ms + _MARGIN, self.probed, np.nan)
        if np.isfinite(self.probed).any() and not np.isfinite(launched).any():
            launched = np.where(quotas == quotas[np.isfinite(self.probed)].min(), self.probed, np.nan)
        self.curve = bank.curve(launched, self.host, launches)
        self._launches = launches
        self._groups = groups_per_launch(workload)
        self._step = float(parts.steps.at(self._groups, np.array([probes.batch]))[0])
        self._cache: dict[tuple[tuple[int, ...], tuple[int, ...]], tuple[Array, Array]] = {}

    def device_log_ms(self, batch: Array, sm_pct: Array) -> tuple[Array, Array]:
        """Device time and its spread, shape (n,)."""
        return self._parts.device.at(self.workload, batch, sm_pct, self._observations)

    def grid_log_ms(self, batches: tuple[int, ...], sm_pcts: tuple[int, ...]) -> tuple[Array, Array]:
        """Device times of a grid, shape (batches * SMs,), remembered."""
        if (batches, sm_pcts) not in self._cache:
            if len(self._cache) > 8:
                self._cache.clear()
            b, s = np.meshgrid(np.array(batches, float), np.array(sm_pcts, float), indexing="ij")
            self._cache[batches, sm_pcts] = self.device_log_ms(b.ravel(), s.ravel())
        return self._cache[batches, sm_pcts]

    def features(
        self, batch: Array, sm_pct: Array, quota_pct: Array, device: Array, spread: Array
    ) -> tuple[Array, Array]:
        """Returns shape (n, len(TRANSFER_FEATURES)), and the estimate's natural log of ms, shape (n,)."""
        quotas, w = self._parts.bank.quotas_pct, self.workload
        logs = np.log(quotas)
        asked = np.log(quota_pct)
        step = self._parts.steps.at(self._groups, batch) - self._step
        probed = np.interp(asked, logs, self.curve) + np.maximum(0.0, logs[0] - asked)
        curve = probed + step
        fast = self.curve[-1] + step
        slow = float(np.interp(np.log(20.0), logs, self.curve)) + step
        known = np.isfinite(self.probed)
        straight = np.interp(asked, logs[known], self.probed[known]) if known.any() else probed
        fastest = self.probed[known][-1] if known.any() else np.nan
        graph_5 = np.log(self.probes.graph_ms[5.0]) - self.host if 5.0 in self.probes.graph_ms else np.nan
        columns = (
            asked,
            np.log2(batch),
            np.log2(sm_pct / self.probes.sm_pct),
            device - curve,
            device - fast,
            device - slow,
            spread,
            probed - straight,
            slow - fast,
            self.host - fastest,
            graph_5,
            fastest - self._launches,
            self.probe_log_ms - fastest,
            np.log2(batch / self.probes.batch) * (w.value("grouped_launch_share") > 0),
            w.value("depthwise_launch_share"),
            w.value("group_width_log2"),
            w.value("groups_mean"),
            w.value("intensity_log2"),
            float(known.sum()),
        )
        out = np.empty((len(batch), len(columns)))
        for k, column in enumerate(columns):
            out[:, k] = column
        return out, np.maximum(device, curve)


@dataclass(frozen=True, slots=True)
class TransferParts:
    """What a model's view is computed from."""

    device: DeviceTimeModel
    bank: CurveBank
    steps: BatchSteps


@dataclass(frozen=True, slots=True)
class TransferModel:
    """Fitted to training models; immutable."""

    parts: TransferParts
    probed: CatBoost
    static: CatBoost
    """For models without any probe."""
    probed_intervals: Intervals | None
    static_intervals: Intervals | None
    cross_validated_mape_pct: float
    """Over training models held out in folds, mean over models; with probes."""
    static_mape_pct: float

    def view(self, workload: Workload, probes: Probes) -> TransferView:
        """Returns a model's view."""
        return TransferView(self.parts, workload, probes)

    def predict_log_ms(self, view: TransferView, configurations: Array) -> tuple[Array, Array]:
        """Returns natural log of ms and the key of the interval, each (n,), for (n, 3): batch, SM, quota in per cent.

        Not yet monotone: see `surface`.
        """
        batch, sm, quota = configurations.T
        device, spread = view.device_log_ms(batch, sm)
        return self._predict(view, batch, sm, quota, device, spread)

    def _predict(
        self,
        view: TransferView,
        batch: Array,
        sm: Array,
        quota: Array,
        device: Array,
        spread: Array,
        *,
        correct: bool = True,
    ) -> tuple[Array, Array]:
        rows, estimate = view.features(batch, sm, quota, device, spread)
        regressor = self.probed if view.probes.by_quota_ms else self.static
        logs = estimate + np.asarray(regressor.predict(rows, thread_count=1), float)
        if view.probes.others and correct:
            logs = logs + self._misfit(view, batch, sm, quota)
        return logs, rows[:, TRANSFER_FEATURES.index("device_over_curve_log")]

    def _misfit(self, view: TransferView, batch: Array, sm: Array, quota: Array) -> Array:
        """What further probes say of the prediction beyond the device time, spread over their neighbourhood."""
        others = np.array(view.probes.others)
        b, s, q, ms = others.T
        known, _ = self._predict(view, b, s, q, *view.device_log_ms(b, s), correct=False)
        off = np.log(ms) - known
        near = _likeness(np.column_stack([batch, sm, quota]), others[:, :3])
        among = _likeness(others[:, :3], others[:, :3]) + 0.3 * np.eye(len(others))
        return np.asarray(near @ np.linalg.solve(among, off))

    def surface(self, view: TransferView, axes: Axes) -> Surface:
        """Returns the monotone surface with its interval, in seconds."""
        batches, sms, quotas = axes.shape
        device, spread = (np.repeat(part, quotas) for part in view.grid_log_ms(axes.batches, axes.sm_pcts))
        batch, sm, quota = axes.configurations().T
        logs, keys = self._predict(view, batch, sm, quota / 10.0, device, spread)
        latency_s = np.exp(monotone(logs.reshape(axes.shape))) / 1e3
        intervals = self.probed_intervals if view.probes.by_quota_ms else self.static_intervals
        basis = "transferred" if view.probes.count else "static"
        if intervals is None:
            return Surface(axes, latency_s, basis)
        low, high = intervals.at(keys.reshape(batches, sms, quotas))
        return Surface(axes, latency_s, basis, latency_s * low, latency_s * high)

    def digest(self) -> str:
        """SHA-256 of everything that predictions depend on."""
        hashed = hashlib.sha256()
        parts = self.parts
        for array in (parts.device.theta, parts.device.residuals, parts.bank.cells, parts.steps.weights):
            hashed.update(np.ascontiguousarray(array).tobytes())
        for regressor in (self.probed, self.static):
            # the file carries a time stamp; what it predicts does not
            hashed.update(np.asarray(regressor.get_leaf_values()).tobytes())
        return hashed.hexdigest()


def _likeness(a: Array, b: Array) -> Array:
    scale = np.array([1.0, 1.0, 0.7])
    la, lb = np.log2(a) / scale, np.log2(b) / scale
    return np.asarray(np.exp(-np.abs(la[:, None, :] - lb[None, :, :]).sum(-1)))


def _host(probes: Probes) -> float:
    large = [ms for sm, ms in probes.graph_ms.items() if sm >= 60]
    return float(np.log(np.median(large))) if large else float("nan")


def _observations(
    probes: Probes, probed: Array, quotas: Array, host: float, device: DeviceTimeModel, workload: Workload
) -> list[Observation]:
    """Probes that tell device time: graph probes above the host's, and a curve that is flat where the device may be."""
    found = []
    if np.isfinite(host):
        for sm, ms in sorted(probes.graph_ms.items()):
            if ms > 1.15 * np.exp(host):
                found.append(Observation(1.0, sm, float(np.log(ms)), 0.04))
    tail = probed[(quotas >= 60) & np.isfinite(probed)]
    if len(tail) >= 2 and np.ptp(tail) < 0.02:
        base = float(device.base_log_ms(workload, np.array([probes.batch]), np.array([probes.sm_pct]))[0])
        level = float(tail.mean())
        if abs(level - base) < 0.35 and not level < host - 0.3:
            found.append(Observation(probes.batch, probes.sm_pct, level, 0.02))
    if np.isfinite(probed).any():
        fastest = float(np.nanmin(probed))
        for batch, sm, quota, ms in probes.others:
            # a curve at a smaller quota may be higher: only what is as free as the fastest probe is sure to be device
            free = quota >= quotas[np.isfinite(probed)].max()
            if free and np.log(ms) > fastest + _MARGIN:
                found.append(Observation(batch, sm, float(np.log(ms)), 0.02))
    return found


@dataclass(frozen=True, slots=True)
class _Rows:
    """Rows of one training model with one set of probes."""

    model: int
    static: bool
    """Without any probe."""
    learnt: bool
    judged: bool
    """All rows of the model, with the probes that a new one gets."""
    features: Array
    estimate: Array
    """Natural log of ms, as `measured`."""
    measured: Array


def train_transfer(
    samples: Sequence[Sample],
    settings: TransferSettings,
    progress: Callable[[str], None] = lambda _text: None,
) -> TransferModel:
    """Fits to training models; equal arguments give equal predictions.

    Raises InvalidError for fewer than MODELS_MIN models, ModelError when CatBoost can't fit the rows.
    """
    if len(samples) < MODELS_MIN:
        raise InvalidError("training models", expected=f"at least {MODELS_MIN}", got=str(len(samples)))
    rng = np.random.default_rng(settings.seed)
    workloads = [sample.workload for sample in samples]
    grid = _grid(samples)
    places = _device_bound(grid)
    cells = _launched(grid, places)
    bank, steps = _bank(samples, grid, cells), _steps(grid, cells)
    groups = np.array([groups_per_launch(workload) for workload in workloads])
    fold_of = rng.permutation(len(samples)) % settings.folds_count

    def features(fold_of: NDArray[np.int64], told: str) -> list[_Rows]:
        table: list[_Rows] = []
        for fold in range(settings.folds_count):
            progress(f"features{told}: fold {fold + 1} of {settings.folds_count}")
            held = np.flatnonzero(fold_of == fold)
            kept = ~np.isin(places.model, held)
            fewer = Places(*(getattr(places, name)[kept] for name in ("model", "batch", "sm_pct", "log_ms")))
            device = fit_device_times(workloads, fewer, settings.sheet, folds_count=5, rng=rng)
            others = fold_of != fold
            parts = TransferParts(device, bank.without(held), BatchSteps.fit(groups[others], steps[others]))
            for model in held.tolist():
                table += _rows(parts, samples[model], model, settings, rng)
        return table

    table = features(fold_of, "")
    alike_of = folds_of_like(workloads, settings.folds_count)
    alike = features(alike_of, " without models alike")
    device = fit_device_times(workloads, places, settings.sheet, folds_count=5, rng=rng)
    regressors, intervals, errors = [], [], []
    for static in (False, True):
        progress("fitting " + ("without probes" if static else "with probes"))
        mine = [rows for rows in table if rows.static == static]
        log_errors, keys, mape = _held_out(mine, fold_of, settings)
        # a new model may have relatives among the training models or none: the interval is that of both cases
        strange = _held_out([rows for rows in alike if rows.static == static], alike_of, settings)
        intervals.append(Intervals.fit(np.concatenate([keys, strange[1]]), np.concatenate([log_errors, strange[0]])))
        errors.append(mape)
        regressors.append(_regressor(mine, settings, settings.seeds_count))
    return TransferModel(TransferParts(device, bank, BatchSteps.fit(groups, steps)), *regressors, *intervals, *errors)


def _rows(
    parts: TransferParts, sample: Sample, model: int, settings: TransferSettings, rng: np.random.Generator
) -> list[_Rows]:
    """One model's rows: all with the probes that a new model gets, a share of them with each other set, all without."""
    batch, sm, quota = sample.configurations.T
    measured = np.log(sample.latency_ms)
    places, inverse = np.unique(sample.configurations[:, :2], axis=0, return_inverse=True)
    share = rng.integers(len(_ANCHOR_SM_OFFSETS), size=len(measured))
    rows: list[_Rows] = []
    for k, offset in enumerate((0.0, *_ANCHOR_SM_OFFSETS, None)):
        probes = Probes(settings.probe_batch, settings.probe_sm_pct)
        if offset is not None:
            probes = probes_of(sample, settings.probe_batch, settings.probe_sm_pct - offset)
        view = TransferView(parts, sample.workload, probes)
        device, spread = (part[inverse.ravel()] for part in view.device_log_ms(*places.T))
        features, estimate = view.features(batch, sm, quota, device, spread)
        keep = ~((batch == probes.batch) & (sm == probes.sm_pct) & np.isin(quota, list(probes.by_quota_ms)))
        if 0 < k <= len(_ANCHOR_SM_OFFSETS):
            keep &= share == k - 1
        static = offset is None
        rows.append(_Rows(model, static, k > 0, k == 0 or static, features[keep], estimate[keep], measured[keep]))
    return rows


def probes_of(
    sample: Sample, batch: float, sm_pct: float, quotas_pct: Sequence[float] = (20, 40, 60, 80, 100)
) -> Probes:
    """Takes probes out of what was measured: at the nearest measured SM share where the one asked for is missing."""
    found: dict[float, float] = {}
    b, s, q = sample.configurations.T
    batches = np.unique(b)
    nearest = float(batches[np.argmin(np.abs(np.log2(batches / batch)))])
    for quota in quotas_pct:
        at = np.flatnonzero((q == quota) & (b == nearest))
        if len(at):
            best = at[np.argmin(np.abs(s[at] - sm_pct))]
            found[float(quota)] = float(sample.latency_ms[best])
    return Probes(nearest, sm_pct, found, dict(sample.graph_ms))


def _regressor(table: Sequence[_Rows], settings: TransferSettings, seeds_count: int) -> CatBoost:
    from catboost import CatBoostError, sum_models

    features = np.concatenate([rows.features for rows in table if rows.learnt])
    target = np.concatenate([rows.measured - rows.estimate for rows in table if rows.learnt])
    static = table[0].static
    try:
        grown = [_grower(settings, settings.seed + k, static=static).fit(features, target) for k in range(seeds_count)]
        return grown[0] if seeds_count == 1 else sum_models(grown, weights=[1 / seeds_count] * seeds_count)
    except CatBoostError as error:
        raise ModelError(f"CatBoost can't fit {len(target)} rows: {error}") from error


def _grower(settings: TransferSettings, seed: int, *, static: bool) -> CatBoostRegressor:
    from catboost import CatBoostRegressor

    return CatBoostRegressor(
        iterations=settings.static_trees_count if static else settings.trees_count,
        depth=settings.depth,
        learning_rate=settings.learning_rate,
        l2_leaf_reg=settings.l2_leaf_reg,
        rsm=0.6,
        subsample=0.5,
        bootstrap_type="Bernoulli",
        border_count=64,
        # with probes, single rows are off by the host's state, which a mean would follow; without, all rows are
        loss_function="RMSE" if static else "Huber:delta=0.05",
        ignored_features=[] if static else [TRANSFER_FEATURES.index(name) for name in _STATIC_FEATURES],
        random_seed=seed,
        thread_count=settings.threads_count,
        allow_writing_files=False,
        verbose=False,
    )


def _held_out(
    table: Sequence[_Rows], fold_of: NDArray[np.int64], settings: TransferSettings
) -> tuple[Array, Array, float]:
    """Log errors and interval keys on held-out models probed as a new one is, and the mean MAPE of models."""
    errors, keys, mapes = [], [], []
    key = TRANSFER_FEATURES.index("device_over_curve_log")
    for fold in range(settings.folds_count):
        regressor = _regressor([rows for rows in table if fold_of[rows.model] != fold], settings, 1)
        for rows in table:
            if fold_of[rows.model] == fold and rows.judged:
                residual = np.asarray(regressor.predict(rows.features, thread_count=1), float)
                off = rows.measured - rows.estimate - residual
                errors.append(off)
                keys.append(rows.features[:, key])
                mapes.append(100 * float(np.abs(np.expm1(-off)).mean()))
    return np.concatenate(errors), np.concatenate(keys), float(np.mean(mapes))


def _grid(samples: Sequence[Sample]) -> Grid:
    axes = [np.unique(np.concatenate([s.configurations[:, k] for s in samples])) for k in range(3)]
    logs = np.full((len(samples), *(len(axis) for axis in axes)), np.nan)
    for model, sample in enumerate(samples):
        index = tuple(np.searchsorted(axis, sample.configurations[:, k]) for k, axis in enumerate(axes))
        logs[model][index] = np.log(sample.latency_ms)
    return Grid(axes[0], axes[1], axes[2], logs)


def _median(values: Array, axis: int) -> Array:
    """Median without the holes, NaN where there are only holes, and no warning about it."""
    filled = np.sort(values, axis=axis)
    count = np.isfinite(filled).sum(axis=axis, keepdims=True)
    low = np.take_along_axis(filled, np.maximum(0, (count - 1) // 2), axis)
    high = np.take_along_axis(filled, np.maximum(0, count // 2), axis)
    return np.asarray(np.where(count > 0, (low + high) / 2, np.nan).squeeze(axis))


def _device_bound(grid: Grid) -> Places:
    """Finds places where latency does not depend on the quota, is above the host's floor and falls with SMs."""
    logs, quotas = grid.log_ms, grid.quotas_pct
    top, upper, middle = quotas >= 80, (quotas >= 60) & (quotas < 90), (quotas >= 40) & (quotas <= 60)
    if not top.any():
        top = quotas == quotas.max()
    level = _median(logs[..., top], 3)
    flat = np.abs(_median(logs[..., upper], 3) - level) < 0.025 if upper.any() else np.ones(level.shape, bool)
    rest = _median(logs[..., middle], 3) - level if middle.any() else np.zeros(level.shape)
    deep = rest < 0.03
    deep |= ~np.isfinite(rest)
    falls = np.zeros(level.shape, bool)
    falls[:, :, :-1] = level[:, :, :-1] - level[:, :, 1:] > 0.01
    falls[:, :, -1:] = falls[:, :, -2:-1]
    known = np.where(np.isfinite(level), level, np.inf).reshape(len(level), -1)
    floor = np.quantile(known, 0.15, axis=1, method="lower")
    bound = flat & np.isfinite(level) & (level > floor[:, None, None] + 0.2) & (deep | ((rest < 0.25) & falls))
    model, b, s = np.nonzero(bound)
    return Places(model, grid.batches[b], grid.sm_pcts[s], level[bound])


def _launched(grid: Grid, places: Places) -> Array:
    """Measured latencies that the launch curve decided, as the grid; NaN where the device may have."""
    logs = grid.log_ms
    lowest = np.sort(logs, axis=3)[..., : min(3, logs.shape[3])]
    low = _median(lowest, 3)
    device = np.zeros(low.shape, bool)
    device[places.model, np.searchsorted(grid.batches, places.batch), np.searchsorted(grid.sm_pcts, places.sm_pct)] = (
        True
    )
    known = np.where(np.isfinite(low), low, np.inf).reshape(len(low), -1)
    floor = np.quantile(known, 0.15, axis=1, method="lower")[:, None, None]
    doubtful = device | (low > floor + 0.15)
    launched = ~doubtful[..., None] | (logs > low[..., None] + 0.1)
    return np.where(launched, logs, np.nan)


def _bank(samples: Sequence[Sample], grid: Grid, cells: Array) -> CurveBank:
    """Lines (batch, SM) of the training models, of cells that the launch curve decided."""
    curves = _median(cells, 2)
    few = np.isfinite(cells).sum(2) < 2
    curves[few] = np.nan
    usable = np.isfinite(cells).sum(3) >= max(2, (cells.shape[3] + 1) // 2)
    model, b, s = np.nonzero(usable)
    hosts = np.array([_host(Probes(graph_ms=sample.graph_ms)) for sample in samples])
    launches = np.array([sample.workload.value("launches_log2") * np.log(2.0) for sample in samples])
    return CurveBank(grid.quotas_pct, cells[model, b, s], curves[model, b], model, hosts[model], launches[model])


def _steps(grid: Grid, cells: Array) -> Array:
    """How much lower the curves of training models lie at batch 1 and at 2 than from 4, shape (models, 2)."""
    curves = _median(cells[..., grid.quotas_pct <= _STEP_QUOTA_MAX], 2)
    batches = grid.batches
    if not (batches >= 4).any():
        return np.full((len(curves), 2), np.nan)
    reference = _median(curves[:, batches >= 4], 1)
    found = []
    for chosen in (batches < 2, (batches >= 2) & (batches < 4)):
        none = np.full(reference.shape, np.nan)
        found.append(_median((_median(curves[:, chosen], 1) if chosen.any() else none) - reference, 1))
    return np.stack(found, axis=1)
