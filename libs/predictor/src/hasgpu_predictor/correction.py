"""A bounded correction of a function's surface by what its instances really take; nothing is trained.

Two times of every executed batch are compared with the prediction, both without the wait at the gate, which depends on
what the neighbours do:

- its device time: what a quota divides, so it corrects where the quota decides the latency;
- its run, from the first pass of the gate to the end, less later waits: it corrects where the quota does not.

The level of each is a Huber estimate of the logarithm of observed over predicted time of the newest batches, older ones
weighing less (`level_of`). It is kept for the function on a device model, which corrects the published table, and
beside it for every device and instance, whose levels are drawn to the function's while their batches are few.

A level that has moved away from the one that was accepted, for long enough, is **drift**: the profile no longer
describes the function (or one factor can't mend it, because batches of one size went another way than the rest).

Source: Huber, Robust Estimation of a Location Parameter (1964); constant 1.345 for 95 % efficiency.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, fields, replace
from typing import Any

import numpy as np
from hasgpu_core.errors import InvalidError

from hasgpu_predictor.physical import Array, PhysicalModel
from hasgpu_predictor.surface import Surface, monotone

OBSERVATIONS_MAX = 200
"""Remembered for the function, ..."""
SOURCE_OBSERVATIONS_MAX = 100
"""... and for each device and instance of it."""
OBSERVATIONS_MIN = 20
"""Fewer batches than that correct nothing."""
SOURCES_MAX = 64
"""Devices and instances remembered; the one that was silent longest is forgotten."""
HALF_LIFE_BATCHES = 50.0
"""A batch weighs half as much as one that came so many later."""
FACTOR_MIN, FACTOR_MAX = 0.5, 2.0
"""Of device time, ..."""
RUN_FACTOR_MIN, RUN_FACTOR_MAX = 0.25, 4.0
"""... and of runs, which also contain what the host's other work takes from them, now or when the profile was made."""
DEAD_BAND = 0.03
"""A factor within 3 % of the one in force changes nothing, so that tables are not republished for noise."""
SHRINK_BATCHES = 20.0
"""Batches after which the own level of an instance or a device counts half."""
DRIFT_RATIO = 1.3
"""Beyond the accepted level, either way."""
DRIFT_BATCHES_MIN = 100
DRIFT_LASTING_S = 20.0
SETTLING_BATCHES = 50
"""After a new profile, before what is left of the difference is accepted."""
BOUND_RATIO = 1.02
"""The quota decides the latency where it is so much above that at the whole quota."""
_HUBER = 1.345
_SPREAD_MIN = 0.01
_FORMAT = "hasgpu-correction-1"


@dataclass(frozen=True, slots=True)
class ObservedBatch:
    """One executed batch."""

    batch: int
    sm_pct: int
    device_time_s: float
    """0: not measured."""
    run_s: float = 0.0
    """Without any wait at the gate; 0: not told."""
    request_permille: int = 0
    """0: not told."""
    latency_s: float = 0.0
    """Gate wait and run; 0: not told."""

    @property
    def usable(self) -> bool:
        """Whether it tells anything: sizes above 0, times finite and not negative, one of them above 0."""
        times = (self.device_time_s, self.run_s, self.latency_s)
        if self.batch < 1 or self.sm_pct < 1 or not all(math.isfinite(t) and t >= 0 for t in times):
            return False
        return self.device_time_s > 0 or self.run_s > 0


@dataclass(frozen=True, slots=True)
class Factors:
    """What a surface is multiplied by."""

    device: float = 1.0
    """Where the quota decides."""
    run: float = 1.0
    """Where it does not."""

    def times(self, factor: float) -> Factors:
        """Returns both times `factor`, inside the bounds."""
        return Factors(_bounded(self.device * factor), _bounded_run(self.run * factor))


@dataclass(frozen=True, slots=True)
class ObservedError:
    """How far observed times lie from those predicted, over the batches remembered."""

    batches_count: int
    predicted_run_s: float
    """Medians of the run: as predicted, ..."""
    corrected_run_s: float
    """... as predicted and corrected, ..."""
    observed_run_s: float
    """... and as observed."""
    run_mape_pct: float
    """Mean absolute error of the run in per cent of the observed one, before the correction, ..."""
    corrected_run_mape_pct: float
    """... and after it."""
    device_mape_pct: float
    """The same of device time."""
    corrected_device_mape_pct: float
    median_run_error_pct: float
    """Median instead of mean: what the few outliers don't touch."""
    corrected_median_run_error_pct: float


@dataclass(frozen=True, slots=True)
class SourceLevel:
    """What is known of one device or instance."""

    name: str
    factor: float
    """Of its device times, over what is predicted for the function; 1.0 while too little is known."""
    batches_count: int


class Correction:
    """Collects the executed batches of one function on one device model."""

    def __init__(self) -> None:
        self.factors = Factors()
        """In force."""
        self.level = 0.0
        """Natural log of observed over predicted device time, without bounds."""
        self.accepted = 0.0
        """The level that the present profile was found with."""
        self.drift = ""
        """In words while the profile no longer describes the function; else empty."""
        self.unsaved = False
        """Something was observed or decided since `to_json`."""
        self._batches: deque[ObservedBatch] = deque(maxlen=OBSERVATIONS_MAX)
        self._sources: dict[str, deque[ObservedBatch]] = {}
        self._relative: dict[str, float] = {}
        self._since_profile = 0
        self._settling = False
        self._away_since_s: float | None = None

    @property
    def factor(self) -> float:
        """Of device time, in force."""
        return self.factors.device

    @property
    def observed_count(self) -> int:
        """Batches remembered, at most OBSERVATIONS_MAX."""
        return len(self._batches)

    def observe(self, batches: Iterable[ObservedBatch], *, sources: Sequence[str] = ()) -> None:
        """Adds batches, oldest first; those that tell nothing are left out.

        Args:
            batches: Of one instance.
            sources: Names under which they also count: the instance, its device.
        """
        taken = [batch for batch in batches if batch.usable]
        if not taken:
            return
        self._batches.extend(taken)
        self._since_profile += len(taken)
        self.unsaved = True
        for source in sources:
            kept = self._sources.pop(source, None) or deque(maxlen=SOURCE_OBSERVATIONS_MAX)
            kept.extend(taken)
            self._sources[source] = kept  # the one heard of last is last
        while len(self._sources) > SOURCES_MAX:
            self._forget(next(iter(self._sources)))

    def forget_source(self, source: str) -> None:
        """Drops what was kept of an instance that is gone; its batches still count for the function."""
        if source in self._sources:
            self._forget(source)
            self.unsaved = True

    def _forget(self, source: str) -> None:
        self._sources.pop(source, None)
        self._relative.pop(source, None)

    def update(self, physical: PhysicalModel, surface: Surface | None = None) -> bool:
        """Compares what was observed with the uncorrected prediction; tells whether the factors changed.

        Args:
            physical: The estimate of device time that the surface rests on.
            surface: Not corrected; None: the physical estimate.
        """
        if len(self._batches) < OBSERVATIONS_MIN:
            return False
        device, run = _log_ratios(self._batches, physical, surface)
        device_level, run_level = level_of(device), level_of(run)
        if device_level is None and run_level is None:
            return False
        self.level = device_level if device_level is not None else run_level or 0.0
        device_factor = _bounded(math.exp(self.level))
        wanted = Factors(device_factor, device_factor if run_level is None else _bounded_run(math.exp(run_level)))
        self._relate(physical, surface)
        if self._settling and self._since_profile >= SETTLING_BATCHES:
            self.accepted, self._settling, self.unsaved = self.level, False, True
        if max(_apart(wanted.device, self.factors.device), _apart(wanted.run, self.factors.run)) <= DEAD_BAND:
            return False
        self.factors, self.unsaved = wanted, True
        return True

    def _relate(self, physical: PhysicalModel, surface: Surface | None) -> None:
        for source, batches in self._sources.items():
            device, run = _log_ratios(batches, physical, surface)
            own = level_of(device) if np.isfinite(device).any() else level_of(run)
            share = len(batches) / (len(batches) + SHRINK_BATCHES)
            self._relative[source] = 0.0 if own is None else share * (own - self.level)

    def detect(self, physical: PhysicalModel, surface: Surface | None = None, *, now_s: float) -> str:
        """Looks for drift; returns it in words when it begins, else nothing. Call after `update`.

        Drift ends with `rebase`, or by itself when the level comes back.
        """
        why = self._away(physical, surface)
        if not why:
            self._away_since_s = None
            if self.drift:
                self.drift, self.unsaved = "", True
            return ""
        if self._away_since_s is None:
            self._away_since_s = now_s
        if self.drift or now_s < self._away_since_s + DRIFT_LASTING_S:
            return ""
        self.drift, self.unsaved = why, True
        return why

    def _away(self, physical: PhysicalModel, surface: Surface | None) -> str:
        if self._settling or min(len(self._batches), self._since_profile) < DRIFT_BATCHES_MIN:
            return ""
        if abs(self.level - self.accepted) > math.log(DRIFT_RATIO):
            return (
                f"device times are {math.exp(self.level):.2f} times those predicted, "
                f"{math.exp(self.accepted):.2f} times when the profile was new"
            )
        device, run = _log_ratios(self._batches, physical, surface)
        ratios = device if np.isfinite(device).any() else run
        places = np.array([(b.batch, b.sm_pct) for b in self._batches])
        for batch, sm_pct in np.unique(places, axis=0):
            here = (places == (batch, sm_pct)).all(1)
            own = level_of(ratios[here])
            if own is not None and abs(own - self.level) > math.log(DRIFT_RATIO):
                return (
                    f"batches of {batch} at {sm_pct} % SM take {math.exp(own):.2f} times the prediction, "
                    f"all batches {math.exp(self.level):.2f} times: one factor can't mend it"
                )
        return ""

    def rebase(self) -> None:
        """A new profile serves: drift is over, and what is left of the difference will be accepted."""
        self.drift, self._away_since_s = "", None
        self._since_profile, self._settling, self.unsaved = 0, True, True

    def factors_of(self, source: str) -> Factors:
        """Returns the factors of an instance or device; the function's when nothing is known of it."""
        return self.factors.times(math.exp(self._relative.get(source, 0.0)))

    def sources(self) -> list[SourceLevel]:
        """Returns what is known of devices and instances, by name."""
        return [
            SourceLevel(name, self.factors_of(name).device, len(batches))
            for name, batches in sorted(self._sources.items())
        ]

    def error(self, physical: PhysicalModel, surface: Surface | None = None) -> ObservedError | None:
        """Returns the error over the batches remembered; None: nothing was observed that can be compared."""
        device, run = _log_ratios(self._batches, physical, surface)
        device, run = device[np.isfinite(device)], run[np.isfinite(run)]
        if not len(device) and not len(run):
            return None
        observed = np.array([b.run_s or b.device_time_s for b in self._batches])
        batch, sm = _places(self._batches)
        predicted = _run_s(physical, surface, batch, sm)
        if not len(run):
            run = device
        before, after = np.abs(np.expm1(-run)), np.abs(np.exp(-run) * self.factors.run - 1)
        if not len(device):
            device = run
        return ObservedError(
            batches_count=len(self._batches),
            predicted_run_s=float(np.median(predicted)),
            corrected_run_s=float(np.median(predicted)) * self.factors.run,
            observed_run_s=float(np.median(observed)),
            run_mape_pct=100 * float(before.mean()),
            corrected_run_mape_pct=100 * float(after.mean()),
            device_mape_pct=100 * float(np.abs(np.expm1(-device)).mean()),
            corrected_device_mape_pct=100 * float(np.abs(np.exp(-device) * self.factors.device - 1).mean()),
            median_run_error_pct=100 * float(np.median(before)),
            corrected_median_run_error_pct=100 * float(np.median(after)),
        )

    def to_json(self) -> dict[str, Any]:
        """Returns all that a restart must not lose, for `from_json`."""
        self.unsaved = False
        return {
            "format": _FORMAT,
            "factors": astuple(self.factors),
            "level": self.level,
            "accepted": self.accepted,
            "drift": self.drift,
            "since_profile": self._since_profile,
            "settling": self._settling,
            "batches": [astuple(batch) for batch in self._batches],
            "sources": {name: [astuple(batch) for batch in kept] for name, kept in self._sources.items()},
            "relative": dict(self._relative),
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Correction:
        """Returns what `to_json` told. Raises InvalidError for anything else."""
        try:
            if content["format"] != _FORMAT:
                raise InvalidError("correction", expected=_FORMAT, got=repr(content["format"]))
            correction = cls()
            device, run = (float(factor) for factor in content["factors"])
            correction.factors = Factors(_same(device, _bounded(device)), _same(run, _bounded_run(run)))
            correction.level, correction.accepted = _finite(content["level"]), _finite(content["accepted"])
            correction.drift = str(content["drift"])
            correction._since_profile, correction._settling = int(content["since_profile"]), bool(content["settling"])
            correction._batches.extend(_batch(entry) for entry in content["batches"])
            for name, kept in content["sources"].items():
                correction._sources[str(name)] = deque(
                    (_batch(entry) for entry in kept), maxlen=SOURCE_OBSERVATIONS_MAX
                )
            correction._relative = {str(name): _finite(value) for name, value in content["relative"].items()}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            got = f"{type(error).__name__}: {error}"
            raise InvalidError("correction", expected="a correction as written", got=got) from error
        return correction


def level_of(log_ratios: Array) -> float | None:
    """Returns the Huber estimate of the newest values' location; None with fewer than OBSERVATIONS_MIN values.

    Args:
        log_ratios: Oldest first; those that are not finite are left out.
    """
    values = log_ratios[np.isfinite(log_ratios)]
    if len(values) < OBSERVATIONS_MIN:
        return None
    weights = 0.5 ** (np.arange(len(values))[::-1] / HALF_LIFE_BATCHES)
    level = _weighted_median(values, weights)
    spread = max(_SPREAD_MIN, 1.4826 * _weighted_median(np.abs(values - level), weights))
    for _ in range(5):
        apart = np.maximum(np.abs(values - level) / spread, 1e-12)
        pull = weights * np.minimum(1.0, _HUBER / apart)
        level = float((pull * values).sum() / pull.sum())
    return level


def corrected(surface: Surface, factors: Factors) -> Surface:
    """Returns the surface with the factors on it; still monotone, and each latency inside the factors' bounds."""
    if factors.device == factors.run:
        return surface.scaled(factors.run)
    whole = surface.latency_s[:, :, -1:]
    bound = surface.latency_s > BOUND_RATIO * whole
    latency_s = np.where(
        bound,
        np.maximum(factors.run * whole, factors.device * surface.latency_s),
        factors.run * surface.latency_s,
    )
    latency_s = np.exp(monotone(np.log(latency_s)))
    ratio = latency_s / surface.latency_s
    low_s, high_s = (None if bound is None else bound * ratio for bound in (surface.low_s, surface.high_s))
    return replace(surface, latency_s=latency_s, low_s=low_s, high_s=high_s)


def _log_ratios(
    batches: Sequence[ObservedBatch] | deque[ObservedBatch], physical: PhysicalModel, surface: Surface | None
) -> tuple[Array, Array]:
    """Natural logs of observed over predicted device time and run, each of shape (n,); NaN where not observed."""
    batch, sm = _places(batches)
    device_s = np.array([b.device_time_s for b in batches], float)
    run_s = np.array([b.run_s for b in batches], float)
    device = np.full(len(device_s), np.nan)
    if physical.device_metered:  # else the estimate's "device time" is a latency: nothing to compare with
        some = device_s > 0
        device[some] = np.log(device_s[some] / physical.device_time_s(batch[some], sm[some]))
    run = np.full(len(run_s), np.nan)
    some = run_s > 0
    run[some] = np.log(run_s[some] / _run_s(physical, surface, batch[some], sm[some]))
    return device, run


def _run_s(physical: PhysicalModel, surface: Surface | None, batch: Array, sm: Array) -> Array:
    quota = np.full(len(batch), 1_000.0)
    return physical.latency_s(batch, sm, quota) if surface is None else surface.at(batch, sm, quota)


def _places(batches: Sequence[ObservedBatch] | deque[ObservedBatch]) -> tuple[Array, Array]:
    return np.array([b.batch for b in batches], float), np.array([b.sm_pct for b in batches], float)


def _weighted_median(values: Array, weights: Array) -> float:
    order = np.argsort(values, kind="stable")
    passed = np.cumsum(weights[order])
    return float(values[order][np.searchsorted(passed, passed[-1] / 2)])


def _bounded(factor: float) -> float:
    return min(FACTOR_MAX, max(FACTOR_MIN, factor))


def _bounded_run(factor: float) -> float:
    return min(RUN_FACTOR_MAX, max(RUN_FACTOR_MIN, factor))


def _apart(a: float, b: float) -> float:
    return abs(a / b - 1.0)


def _finite(value: Any) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"{number} is no level")
    return number


def _same(factor: float, bounded: float) -> float:
    if factor != bounded:
        raise ValueError(f"the factor {factor} is outside of its bounds")
    return factor


def _batch(entry: Sequence[Any]) -> ObservedBatch:
    batch = ObservedBatch(*entry)
    if len(entry) != len(fields(ObservedBatch)) or not batch.usable:
        raise ValueError(f"{entry} is no executed batch")
    return batch
