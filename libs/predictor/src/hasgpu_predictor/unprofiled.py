"""Predictions of functions that were not profiled on a device model, from those that were, for the live service.

    operators + profiles of others --fit_transfer--> FunctionTransfer --surface(operators, own points)--> Surface

Where device time is metered (the live agents), the transfer is of device times: rooflines and a Gaussian process over
operators, batch and SM share (`device_times`); what a quota does to them is arithmetic (`physical`). Where it is not
(published profiles of another gate), latencies are transferred as `transfer` does. Errors are found by leaving each
function (or fold of functions) out, from operators alone and with five points of its own.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from typing import Any

import numpy as np
from hasgpu_core.errors import InvalidError
from numpy.typing import NDArray

from hasgpu_predictor.device_times import DeviceTimeModel, Observation, Places, fit_device_times
from hasgpu_predictor.operators import COLUMNS, SUMMARY, Array, DataSheet, Operator, Workload
from hasgpu_predictor.physical import SEGMENT_S, PhysicalModel, fit_physical
from hasgpu_predictor.profile import Profile, ProfilePoint
from hasgpu_predictor.surface import Axes, Surface, monotone
from hasgpu_predictor.transfer import (
    MODELS_MIN,
    TRANSFER_FEATURES,
    Probes,
    Sample,
    TransferModel,
    TransferSettings,
    train_transfer,
)

PROBES_MAX = 11
"""A function with more points of its own is predicted from them alone."""
FOLDS_MAX = 8
ALL_COLUMNS_FROM = 20
"""With fewer functions the roofline's columns are weighted in three sums: launches, arithmetic, memory."""
_PROBES_COUNT = 5
"""Of a left-out function, when the error with probes is found."""
_NOISE_LOG = 0.05
"""Of a measured device time."""
_WITHIN_LOG = 0.2
"""Standard deviation of a function's places around its level, as the process of `device_times` has it."""
_SPREAD_MIN = 0.05
"""Natural log: an interval is never narrower either way."""


@dataclass(frozen=True, slots=True)
class Known:
    """A function to learn from."""

    name: str
    operators: tuple[Operator, ...]
    profile: Profile


@dataclass(frozen=True, slots=True)
class TransferCard:
    """What a transfer was made from and how good it is."""

    device_model: str
    models: tuple[str, ...]
    rows_count: int
    features: tuple[str, ...]
    static_mape_pct: float
    """Mean over left-out functions, from operators alone."""
    probed_mape_pct: float
    """The same with five points of their own."""
    sha256: str
    """Of what predictions depend on."""
    data_sha256: str
    """Of operators and points."""
    seed: int
    train_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Spread:
    """5 % and 95 % quantiles of the natural log of measured over predicted."""

    low_log: float
    high_log: float


@dataclass(frozen=True, slots=True, eq=False)
class FunctionTransfer:
    """Fitted to the functions of one device model; immutable, equal to itself alone."""

    card: TransferCard
    device: DeviceTimeModel | None
    """Of a device that meters device time."""
    overhead_s: float
    """Median over functions: latency beyond device time at the whole quota."""
    host: TransferModel | None
    """Of data whose gate meters something else."""
    static: Spread
    probed: Spread
    level_variance: float = 0.0
    """Of the natural log of measured over predicted device time, from one left-out function to another."""

    def surface(
        self, workload: Workload, axes: Axes, points: Sequence[ProfilePoint] = ()
    ) -> tuple[PhysicalModel, Surface]:
        """Returns the physical estimate and the monotone surface, with its interval, of a function.

        Args:
            workload: Its operators.
            axes: Where.
            points: A handful of its own; none: basis "static", otherwise "transferred".
        """
        axes.validate()
        if self.host is not None:
            return self._host_surface(self.host, workload, axes, points)
        assert self.device is not None, "one of the two is there"
        batch, sm = (part.ravel() for part in np.meshgrid(_floats(axes.batches), _floats(axes.sm_pcts), indexing="ij"))
        logs = _device_logs(self.device, workload, batch, sm, _places(points), self.level_variance)
        device_s = np.exp(logs) / 1e3
        own = fit_physical(points) if points else None
        overhead_s = own.overhead_s if own is not None else self.overhead_s
        segment_s = own.longest_segment_s if own is not None else SEGMENT_S
        made = [
            ProfilePoint(int(b), int(s), 1_000, d + overhead_s, d, min(d, segment_s))
            for b, s, d in zip(batch.tolist(), sm.tolist(), device_s.tolist(), strict=True)
        ]
        physical = replace(fit_physical(made), points_count=len(points), longest_segment_s=segment_s)
        quota = _floats(axes.quotas_permille) / 1e3
        latency_s = np.maximum(device_s[:, None] + overhead_s, device_s[:, None] / quota)
        return physical, self._with_interval(axes, np.log(latency_s).reshape(axes.shape), points)

    def _host_surface(
        self, model: TransferModel, workload: Workload, axes: Axes, points: Sequence[ProfilePoint]
    ) -> tuple[PhysicalModel, Surface]:
        surface = model.surface(model.view(workload, probes_among(points)), axes)
        made = [
            ProfilePoint(int(b), int(s), int(q), latency_s)
            for (b, s, q), latency_s in zip(axes.configurations(), surface.latency_s.ravel().tolist(), strict=True)
        ]
        physical = replace(fit_physical(made), points_count=len(points))
        surface = replace(surface, basis="transferred" if points else "static")
        if surface.low_s is None:
            return physical, self._with_interval(axes, np.log(surface.latency_s), points)
        return physical, surface

    def _with_interval(self, axes: Axes, logs: Array, points: Sequence[ProfilePoint]) -> Surface:
        latency_s = np.exp(monotone(logs))
        spread = self.probed if points else self.static
        low_s, high_s = (latency_s * float(np.exp(part)) for part in (spread.low_log, spread.high_log))
        return Surface(axes, latency_s, "transferred" if points else "static", low_s, high_s)


def fit_transfer(
    known: Sequence[Known],
    *,
    device_model: str,
    sheet: DataSheet,
    seed: int = 0,
    threads_count: int = 1,
    progress: Callable[[str], None] = lambda _text: None,
) -> FunctionTransfer:
    """Fits to functions of one device model; equal arguments give equal predictions.

    Raises:
        InvalidError: Fewer than MODELS_MIN functions with operators and points, or some meter device time and others
            don't.
        ModelError: CatBoost can't fit the rows.
    """
    known = sorted((one for one in known if one.operators and one.profile.points), key=lambda one: one.profile.workload)
    if len(known) < MODELS_MIN:
        raise InvalidError(
            f"profiled functions with operators on {device_model}",
            expected=f"at least {MODELS_MIN} to learn from",
            got=str(len(known)),
        )
    metered = [all(p.device_time_s > 0 for p in one.profile.points) for one in known]
    if any(metered) != all(metered):
        odd = [one.name for one, m in zip(known, metered, strict=True) if not m]
        raise InvalidError(
            "device times", expected="of all functions of a device model or of none", got=f"none of {', '.join(odd)}"
        )
    card = TransferCard(
        device_model,
        tuple(one.name for one in known),
        sum(len(one.profile.points) for one in known),
        (*SUMMARY, *COLUMNS) if all(metered) else (*TRANSFER_FEATURES, *SUMMARY, *COLUMNS),
        0.0,
        0.0,
        "",
        data_sha256(known),
        seed,
    )
    if all(metered):
        return _fit_metered(known, card, sheet, seed, progress)
    return _fit_host(known, card, sheet, seed, threads_count, progress)


def probes_among(points: Sequence[ProfilePoint]) -> Probes:
    """Takes the line of quotas at one (batch, SM share) that has most points as the probed curve, the rest beside."""
    lines: dict[tuple[int, int], list[ProfilePoint]] = {}
    for point in points:
        lines.setdefault((point.batch, point.sm_pct), []).append(point)
    if not lines:
        return Probes()
    place = max(lines, key=lambda key: (len(lines[key]), key[1], -key[0]))
    return Probes(
        float(place[0]),
        float(place[1]),
        {p.quota_permille / 10: 1e3 * p.latency_s for p in lines[place]},
        {},
        tuple(
            (float(p.batch), float(p.sm_pct), p.quota_permille / 10, 1e3 * p.latency_s)
            for p in points
            if (p.batch, p.sm_pct) != place
        ),
    )


def data_sha256(known: Sequence[Known]) -> str:
    """Returns the digest of operators and points, lower-case hex."""
    rows = [
        [one.profile.workload, [astuple(row) for row in one.operators], [astuple(p) for p in one.profile.points]]
        for one in known
    ]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def _fit_metered(
    known: Sequence[Known], card: TransferCard, sheet: DataSheet, seed: int, progress: Callable[[str], None]
) -> FunctionTransfer:
    workloads = [Workload.of(one.operators) for one in known]
    places = [_places(one.profile.points) for one in known]
    folds_count = min(FOLDS_MAX, len(known))
    fold_of = np.random.default_rng(seed).permutation(len(known)) % folds_count
    without: dict[int, DeviceTimeModel] = {}
    for fold in range(folds_count):
        progress(f"transfer: leaving out {fold + 1} of {folds_count}")
        kept = [index for index in range(len(known)) if fold_of[index] != fold]
        model = _fit_places(workloads, places, kept, sheet, seed)
        without |= dict.fromkeys(np.flatnonzero(fold_of == fold).tolist(), model)
    static = []
    for index, held in enumerate(places):
        batch, sm, told = held.T
        static.append(told - _device_logs(without[index], workloads[index], batch, sm, held[:0], 0.0))
    level_variance = float(np.mean([off.mean() ** 2 for off in static]))
    probed_errors = []
    for index, held in enumerate(places):
        probes = _probe_places(held)
        rest = np.setdiff1d(np.arange(len(held)), probes)
        if len(rest):
            batch, sm, told = held[rest].T
            logs = _device_logs(without[index], workloads[index], batch, sm, held[probes], level_variance)
            probed_errors.append(told - logs)
    probed_errors = probed_errors or static
    device = _fit_places(workloads, places, list(range(len(known))), sheet, seed)
    overhead_s = float(np.median([fit_physical(one.profile.points).overhead_s for one in known]))
    hashed = hashlib.sha256()
    for array in (device.theta, device.points, device.residuals, np.array([overhead_s, level_variance])):
        hashed.update(np.ascontiguousarray(array).tobytes())
    card = replace(
        card, static_mape_pct=_mape_pct(static), probed_mape_pct=_mape_pct(probed_errors), sha256=hashed.hexdigest()
    )
    return FunctionTransfer(card, device, overhead_s, None, _spread(static), _spread(probed_errors), level_variance)


def _fit_host(
    known: Sequence[Known],
    card: TransferCard,
    sheet: DataSheet,
    seed: int,
    threads_count: int,
    progress: Callable[[str], None],
) -> FunctionTransfer:
    samples = []
    for one in known:
        configurations = np.array([p.configuration for p in one.profile.points], float) / np.array([1.0, 1.0, 10.0])
        latency_ms = np.array([1e3 * p.latency_s for p in one.profile.points])
        samples.append(Sample(Workload.of(one.operators), configurations, latency_ms, {}))
    settings = TransferSettings(seed=seed, threads_count=threads_count, sheet=sheet)
    model = train_transfer(samples, settings, progress)
    card = replace(
        card,
        static_mape_pct=model.static_mape_pct,
        probed_mape_pct=model.cross_validated_mape_pct,
        sha256=model.digest(),
    )
    static, probed = _normal(model.static_mape_pct), _normal(model.cross_validated_mape_pct)
    return FunctionTransfer(card, None, 0.0, model, static, probed)


def _fit_places(
    workloads: Sequence[Workload], places: Sequence[Array], kept: Sequence[int], sheet: DataSheet, seed: int
) -> DeviceTimeModel:
    rows = np.concatenate([places[index] for index in kept])
    model: NDArray[np.int64] = np.concatenate([np.full(len(places[i]), n, np.int64) for n, i in enumerate(kept)])
    chosen = [workloads[index] for index in kept]
    return fit_device_times(
        chosen,
        Places(model, rows[:, 0], rows[:, 1], rows[:, 2]),
        sheet,
        folds_count=min(5, len(kept)),
        rng=np.random.default_rng(seed),
        sums=_sums() if len(kept) < ALL_COLUMNS_FROM else None,
    )


def _sums() -> Array:
    """Shape (3, len(COLUMNS)): launches, rooflines of kernels that compute, memory of those that only move."""
    groups = (
        ("launches",),
        (
            *("pointwise_flops", "spatial_flops", "linear_flops", "depthwise_flops"),
            *(name for name in COLUMNS if name.startswith("grouped_") and name != "grouped_memory"),
        ),
        tuple(f"{kind}_memory" for kind in ("depthwise", "layernorm", "element", "cat", "reduce", "pool")),
    )
    return np.array([[float(name in group) for name in COLUMNS] for group in groups])


def _places(points: Sequence[ProfilePoint]) -> Array:
    """Shape (n, 3): batch, SM share, natural log of the median device time in ms over the quotas."""
    found: dict[tuple[int, int], list[float]] = {}
    for point in points:
        if point.device_time_s > 0:
            found.setdefault((point.batch, point.sm_pct), []).append(np.log(1e3 * point.device_time_s))
    return np.array([(*place, float(np.median(logs))) for place, logs in sorted(found.items())], float).reshape(-1, 3)


def _device_logs(
    model: DeviceTimeModel, workload: Workload, batch: Array, sm_pct: Array, told: Array, level_variance: float
) -> Array:
    """Natural log of device times in ms, shape (n,), from operators and what was measured at places of the function.

    The process is made for small misfits. Where functions lie far from what others say (few others, another kind of
    model), the measured places first move the whole surface, the more the farther functions were seen to lie.

    Args:
        model: Of the others.
        workload: Of the function.
        batch: Shape (n,).
        sm_pct: Shape (n,).
        told: As `_places`; may be empty.
        level_variance: See `FunctionTransfer`.
    """
    if not len(told):
        return model.at(workload, batch, sm_pct)[0]
    off = told[:, 2] - model.at(workload, told[:, 0], told[:, 1])[0]
    level = float(off.mean()) * level_variance / (level_variance + _WITHIN_LOG**2 / len(off))
    observations = [Observation(b, s, log_ms - level, _NOISE_LOG) for b, s, log_ms in told.tolist()]
    return model.at(workload, batch, sm_pct, observations)[0] + level


def _probe_places(held: Array) -> NDArray[np.int64]:
    """Indices of places that a first plan would measure: the far corners, and what is farthest from those."""
    at = np.log2(held[:, :2])
    chosen = [int(np.argmin(at[:, 0] - at[:, 1]))]
    while len(chosen) < min(_PROBES_COUNT, len(held)):
        apart = np.abs(at[:, None, :] - at[chosen][None, :, :]).sum(2).min(1)
        if apart.max() <= 0:
            break
        chosen.append(int(np.argmax(apart)))
    return np.array(chosen, np.int64)


def _mape_pct(by_function: Sequence[Array]) -> float:
    return float(np.mean([100 * np.abs(np.expm1(-off)).mean() for off in by_function]))


def _spread(by_function: Sequence[Array]) -> Spread:
    """Quantiles over places, each function weighing as much as any other; wider the fewer functions they rest on."""
    logs = np.concatenate(by_function)
    weights = np.concatenate([np.full(len(off), 1.0 / len(off)) for off in by_function])
    order = np.argsort(logs)
    upto = np.cumsum(weights[order]) / weights.sum()
    low, high = (float(logs[order][min(len(logs) - 1, int(np.searchsorted(upto, q)))]) for q in (0.05, 0.95))
    wider = 1.0 + 2.0 / len(by_function)
    return Spread(min(wider * low, -_SPREAD_MIN), max(wider * high, _SPREAD_MIN))


def _normal(mape_pct: float) -> Spread:
    """Of errors whose absolute value has this mean, if they are normal: 1.645 / 0.798 of it."""
    each = max(_SPREAD_MIN, 1.645 / 0.798 * mape_pct / 100)
    return Spread(-each, each)


def _floats(values: Sequence[int]) -> Array:
    return np.array(values, float)


def parse_operator(fields: Mapping[str, Any]) -> Operator:
    """Returns an operator from the fields of a file or message; raises InvalidError for one that can't be."""
    try:
        operator = Operator(
            str(fields["op"]),
            float(fields["flops"]),
            float(fields["input_bytes"]),
            float(fields["weight_bytes"]),
            float(fields["output_bytes"]),
            int(fields["groups"]),
            tuple(int(size) for size in fields["output_shape"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise InvalidError("operator", expected="op, FLOPs, bytes, groups and output shape", got=repr(error)) from error
    numbers = operator.flops, operator.input_bytes, operator.weight_bytes, operator.output_bytes
    if not operator.op or operator.groups < 1 or not all(math.isfinite(n) and 0 <= n <= 1e18 for n in numbers):
        raise InvalidError(
            "operator", expected="a name, numbers of 0 to 1e18 and at least one group", got=repr(operator)
        )
    return operator
