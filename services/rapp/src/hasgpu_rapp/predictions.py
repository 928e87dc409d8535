"""Models, profiles, corrections and the tables made of them. No I/O and no event loop; heavy calls go to a thread."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, field, replace

import numpy as np
from hasgpu_core.capacity import CapacityTable
from hasgpu_core.events import FunctionEvent
from hasgpu_predictor import (
    PROBES_MAX,
    Axes,
    Correction,
    Factors,
    FunctionTransfer,
    Known,
    LatencyModel,
    ModelCard,
    ObservedBatch,
    Operator,
    PhysicalModel,
    Profile,
    Surface,
    Workload,
    capacity_table,
    fit_physical,
    profile_axes,
    static_physical,
    static_surface,
    surface_points,
    table_axes,
    workload_digest,
)
from numpy.typing import NDArray

from hasgpu_rapp.world import DeviceModel

Array = NDArray[np.float64]

STATIC_SPREAD = 3.0
"""A guess may be that many times too high or too low; its interval says so."""
UNKNOWN_SPREAD = 1.25
"""The same of a profiled surface without intervals of its own and without a measured error."""
NORMAL_P95, NORMAL_MEAN = 1.645, 0.798
"""Of a standard normal: its 95th percentile, and the mean of its absolute value."""


@dataclass(frozen=True, slots=True)
class Served:
    """What predictions of one device model are made from: a model, and the profiles as it knows them."""

    model: LatencyModel
    profiles: Mapping[str, Profile]


@dataclass(frozen=True, slots=True)
class FunctionOperators:
    """What is known of the graph of a workload's model."""

    rows: tuple[Operator, ...] = ()
    """At batch 1, in order of execution."""
    reason: str = ""
    """Why there are none."""


@dataclass(frozen=True, slots=True)
class Transfer:
    """What predicts the functions of a device model that were not profiled on it."""

    data: Mapping[str, Known]
    """What it was, or was to be, fitted to, by workload."""
    model: FunctionTransfer | None
    reason: str = ""
    """Why there is no model."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """All that a function's surface on a device model depends on; equal recipes give equal surfaces."""

    device: DeviceModel
    workload: str
    artifact_bytes: int
    slo_ms: int
    max_batch: int
    version: int
    profile: Profile | None
    """None: static."""
    factors: Factors
    """Of the online correction."""
    drift: str
    """In words; nothing is computed from it, but it is published."""
    transfer: FunctionTransfer | None = None
    """None: nothing to transfer from, or nothing to transfer to."""
    operators: FunctionOperators = FunctionOperators()
    """Of the model."""
    reason: str = ""
    """What the prediction rests on when it is not the profile alone, in words."""

    @classmethod
    def of_profile(cls, profile: Profile, device: DeviceModel, max_batch: int) -> Recipe:
        """Returns that of a profile alone, without a function."""
        largest = max(max_batch, *(point.batch for point in profile.points))
        return cls(device, profile.workload, 0, 1, largest, 0, profile, Factors(), "")

    @property
    def basis(self) -> str:
        """What is published as the table's basis."""
        if self.profile is None:
            return "static"
        return "transferred" if self.transfer is not None else "profiled"

    @property
    def profiled_max_batch(self) -> int:
        """The largest batch measured; 0: none."""
        return max((point.batch for point in self.profile.points), default=0) if self.profile else 0

    def uncorrected(self) -> Recipe:
        """Returns what the surface depends on before any correction."""
        return replace(self, factors=Factors(), drift="")


@dataclass(slots=True)
class Predictions:
    """The state that predictions are made from."""

    served: dict[str, Served] = field(default_factory=dict)
    """By device model."""
    profiles: dict[str, dict[str, Profile]] = field(default_factory=dict)
    """By device model and workload; newer than the served ones while a training runs."""
    versions: dict[str, int] = field(default_factory=dict)
    """Largest version known to have been published for each device model; versions go on from it."""
    corrections: dict[tuple[str, str], Correction] = field(default_factory=dict)
    """By function and device model."""
    operators: dict[str, FunctionOperators] = field(default_factory=dict)
    """By workload."""
    shipped: dict[str, dict[str, Known]] = field(default_factory=dict)
    """Of profile files, by device model and workload."""
    transfers: dict[str, Transfer] = field(default_factory=dict)
    """By device model."""

    def serve(self, model: LatencyModel, profiles: Mapping[str, Profile]) -> None:
        """Makes predictions of the model's device model from it and the profiles that it was trained on."""
        self.served[model.card.device_model] = Served(model, dict(profiles))

    def learn(self, profile: Profile) -> None:
        """Takes a newer profile; it serves once a model was trained on it."""
        self.profiles.setdefault(profile.device_model, {})[profile.workload] = profile

    def profile(self, device_model: str, workload: str) -> Profile:
        """Returns the newest profile, which may have no points."""
        return self.profiles.get(device_model, {}).get(workload) or Profile(workload, device_model)

    def stale(self, device_model: str) -> bool:
        """Whether the served model has not learnt the newest profiles."""
        served = self.served.get(device_model)
        profiles = self.profiles.get(device_model, {})
        if served is None:
            return bool(profiles)
        rows_count = sum(len(profile.points) for profile in profiles.values())
        return served.profiles != profiles or served.model.card.rows_count != rows_count

    def known(self, device_model: str) -> dict[str, Known]:
        """Returns what a transfer can be learnt from: profiles whose operators are known, and those of files."""
        served = self.served.get(device_model)
        own = {
            workload: Known(workload, operators.rows, profile)
            for workload, profile in (served.profiles if served is not None else {}).items()
            if profile.points and (operators := self.operators.get(workload)) is not None and operators.rows
        }
        return {**self.shipped.get(device_model, {}), **own}

    def _rests_on(
        self, profile: Profile | None, operators: FunctionOperators | None, device_model: str
    ) -> tuple[FunctionTransfer | None, str]:
        """Returns what transfers to a function, and the reason in words; None and nothing: its profile is enough."""
        if profile is not None and len(profile.points) > PROBES_MAX:
            return None, ""
        transfer = self.transfers.get(device_model)
        missing = ""
        if operators is None:
            missing = "the operators of its model are not known yet"
        elif not operators.rows:
            missing = operators.reason or "its model has no operators"
        elif transfer is None:
            missing = "nothing was learnt on this device model yet"
        elif transfer.model is None:
            missing = transfer.reason
        if missing or transfer is None or transfer.model is None or operators is None:
            return None, "" if profile is not None else f"a guess from the size of its artifact: {missing}"
        card = transfer.model.card
        count = len(card.models)
        if profile is None:
            error = f"{card.static_mape_pct:.0f} % error on functions left out"
            return transfer.model, f"from its {len(operators.rows)} operators and {count} other functions, {error}"
        error = f"{card.probed_mape_pct:.0f} % error on functions left out"
        points = f"{len(profile.points)} points of its own"
        return transfer.model, f"from its {len(operators.rows)} operators, {points} and {count} functions, {error}"

    def recipe(self, event: FunctionEvent, device: DeviceModel) -> Recipe:
        """Returns what the function's surface depends on now."""
        spec = event.spec
        served = self.served.get(device.name)
        workload = workload_digest(spec)
        correction = self.corrections.get((spec.name, device.name))
        profile = served.profiles.get(workload) if served else None
        operators = self.operators.get(workload)
        transfer, reason = self._rests_on(profile, operators, device.name)
        return Recipe(
            device=device,
            workload=workload,
            artifact_bytes=spec.artifact.size_bytes,
            slo_ms=spec.slo_ms,
            max_batch=spec.max_batch,
            version=served.model.card.version if served else 0,
            profile=profile,
            factors=correction.factors if correction else Factors(),
            drift=correction.drift if correction else "",
            transfer=transfer,
            operators=operators if transfer is not None and operators is not None else FunctionOperators(),
            reason=reason,
        )

    def observe(
        self, function: str, device_model: str, batches: Sequence[ObservedBatch], sources: Sequence[str] = ()
    ) -> None:
        """Remembers executed batches of an instance."""
        if batches:
            self.corrections.setdefault((function, device_model), Correction()).observe(batches, sources=sources)

    def forget(self, function: str) -> None:
        """Drops the observations of a function that was deleted."""
        for key in [key for key in self.corrections if key[0] == function]:
            del self.corrections[key]

    def next_version(self, device_model: str) -> int:
        """Returns the version of the next model, larger than any before, also when the model's file was lost."""
        return 1 + max(self.versions.get(device_model, 0), self.model(device_model).card.version)

    def model(self, device_model: str) -> LatencyModel:
        """Returns the served model; the untrained one when there is none."""
        served = self.served.get(device_model)
        return served.model if served else LatencyModel.untrained(device_model)


def physical_of(recipe: Recipe) -> PhysicalModel:
    """Returns the physical estimate that a surface rests on."""
    if recipe.transfer is not None:
        return _transferred(recipe, recipe.transfer)[0]
    if recipe.profile is not None:
        return fit_physical(recipe.profile.points)
    return static_physical(
        artifact_bytes=recipe.artifact_bytes, backend=recipe.device.backend, slo_s=recipe.slo_ms / 1e3
    )


def surface_of(recipe: Recipe, model: LatencyModel) -> Surface:
    """Computes the surface of a recipe before any correction; it has intervals."""
    return predicted_by(recipe, model)[1]


def predicted_by(recipe: Recipe, model: LatencyModel) -> tuple[PhysicalModel, Surface]:
    """Returns the physical estimate and the surface of a recipe before any correction."""
    if recipe.transfer is not None:
        physical, surface = _transferred(recipe, recipe.transfer)
        return physical, _with_interval(surface, STATIC_SPREAD)
    physical, axes = physical_of(recipe), _axes(recipe)
    if recipe.profile is None:
        return physical, _with_interval(static_surface(physical, axes), STATIC_SPREAD)
    surface = replace(model.surface(recipe.profile, axes), measured_max_batch=recipe.profiled_max_batch)
    return physical, _with_interval(surface, spread_of(model.card))


def _axes(recipe: Recipe) -> Axes:
    profile = recipe.profile or Profile(recipe.workload, recipe.device.name)
    return profile_axes(profile, max_batch=recipe.max_batch, sm_rungs_pct=recipe.device.sm_rungs_pct)


def _transferred(recipe: Recipe, transfer: FunctionTransfer) -> tuple[PhysicalModel, Surface]:
    points = recipe.profile.points if recipe.profile is not None else ()
    physical, surface = transfer.surface(Workload.of(recipe.operators.rows), _axes(recipe), points)
    return physical, replace(surface, measured_max_batch=recipe.profiled_max_batch)


def spread_of(card: ModelCard) -> float:
    """Returns the factor by which 90 % of latencies are expected to lie off at most, from the card's mean error."""
    if card.mape_pct is None:
        return UNKNOWN_SPREAD
    return float(np.exp(max(0.01, NORMAL_P95 / NORMAL_MEAN * card.mape_pct / 100)))


def _with_interval(surface: Surface, spread: float) -> Surface:
    if surface.low_s is not None and surface.high_s is not None:
        return surface
    return replace(surface, low_s=surface.latency_s / spread, high_s=surface.latency_s * spread)


def table_of(event: FunctionEvent, recipe: Recipe, surface: Surface, *, computed_unix_ns: int) -> CapacityTable:
    """Returns the table to publish.

    A static one must not forbid a function to run, and so to be measured: one by which no configuration would meet the
    objective is published as if batch 1 on a whole device took a third of it.
    """
    axes = table_axes(max_batch=recipe.max_batch, sm_rungs_pct=recipe.device.sm_rungs_pct)
    if recipe.profile is None and recipe.transfer is not None:
        surface = _permitting(surface, axes, recipe.slo_ms)
    table = capacity_table(
        surface,
        function=event.spec.name,
        function_revision=event.revision,
        device_model=recipe.device.name,
        version=recipe.version,
        computed_unix_ns=computed_unix_ns,
        slo_ms=recipe.slo_ms,
        axes=axes,
    )
    return replace(
        table,
        correction_permille=round(1e3 * recipe.factors.device),
        run_correction_permille=round(1e3 * recipe.factors.run),
        drift=recipe.drift,
        profiled_max_batch=recipe.profiled_max_batch,
    )


def _permitting(surface: Surface, axes: Axes, slo_ms: int) -> Surface:
    if any(point.capacity_rps > 0 for point in surface_points(surface, axes, slo_ms=slo_ms)):
        return surface
    whole_s = float(surface.at(1.0, 100.0, 1_000.0))
    return surface.scaled(min(1.0, slo_ms / 3e3 / whole_s))


def data_sha256(profiles: Mapping[str, Profile]) -> str:
    """Returns the digest of what a model was trained on, lower-case hex."""
    rows = [[workload, [astuple(point) for point in profiles[workload].points]] for workload in sorted(profiles)]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()
