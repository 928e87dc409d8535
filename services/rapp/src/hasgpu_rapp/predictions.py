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
    Correction,
    Factors,
    LatencyModel,
    ModelCard,
    ObservedBatch,
    PhysicalModel,
    Profile,
    Surface,
    capacity_table,
    fit_physical,
    profile_axes,
    static_physical,
    static_surface,
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

    @classmethod
    def of_profile(cls, profile: Profile, device: DeviceModel, max_batch: int) -> Recipe:
        """Returns that of a profile alone, without a function."""
        largest = max(max_batch, *(point.batch for point in profile.points))
        return cls(device, profile.workload, 0, 1, largest, 0, profile, Factors(), "")

    @property
    def basis(self) -> str:
        """What is published as the table's basis."""
        return "static" if self.profile is None else "profiled"

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

    def recipe(self, event: FunctionEvent, device: DeviceModel) -> Recipe:
        """Returns what the function's surface depends on now."""
        spec = event.spec
        served = self.served.get(device.name)
        workload = workload_digest(spec)
        correction = self.corrections.get((spec.name, device.name))
        return Recipe(
            device=device,
            workload=workload,
            artifact_bytes=spec.artifact.size_bytes,
            slo_ms=spec.slo_ms,
            max_batch=spec.max_batch,
            version=served.model.card.version if served else 0,
            profile=served.profiles.get(workload) if served else None,
            factors=correction.factors if correction else Factors(),
            drift=correction.drift if correction else "",
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
    if recipe.profile is not None:
        return fit_physical(recipe.profile.points)
    return static_physical(
        artifact_bytes=recipe.artifact_bytes, backend=recipe.device.backend, slo_s=recipe.slo_ms / 1e3
    )


def surface_of(recipe: Recipe, model: LatencyModel) -> Surface:
    """Computes the surface of a recipe before any correction; it has intervals."""
    profile = recipe.profile or Profile(recipe.workload, recipe.device.name)
    axes = profile_axes(profile, max_batch=recipe.max_batch, sm_rungs_pct=recipe.device.sm_rungs_pct)
    if recipe.profile is None:
        return _with_interval(static_surface(physical_of(recipe), axes), STATIC_SPREAD)
    return _with_interval(model.surface(profile, axes), spread_of(model.card))


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
    """Returns the table to publish."""
    table = capacity_table(
        surface,
        function=event.spec.name,
        function_revision=event.revision,
        device_model=recipe.device.name,
        version=recipe.version,
        computed_unix_ns=computed_unix_ns,
        slo_ms=recipe.slo_ms,
        axes=table_axes(max_batch=recipe.max_batch, sm_rungs_pct=recipe.device.sm_rungs_pct),
    )
    return replace(
        table,
        correction_permille=round(1e3 * recipe.factors.device),
        run_correction_permille=round(1e3 * recipe.factors.run),
        drift=recipe.drift,
        profiled_max_batch=recipe.profiled_max_batch,
    )


def data_sha256(profiles: Mapping[str, Profile]) -> str:
    """Returns the digest of what a model was trained on, lower-case hex."""
    rows = [[workload, [astuple(point) for point in profiles[workload].points]] for workload in sorted(profiles)]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()
