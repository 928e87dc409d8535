"""Models, profiles, corrections and the tables made of them. No I/O and no event loop; heavy calls go to a thread."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from hasgpu_core.capacity import CapacityTable
from hasgpu_core.events import FunctionEvent
from hasgpu_predictor import (
    Correction,
    LatencyModel,
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

from hasgpu_rapp.world import DeviceModel


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
    factor: float
    """Of the online correction."""


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
            factor=correction.factor if correction else 1.0,
        )

    def observe(self, function: str, device_model: str, batches: list[ObservedBatch]) -> None:
        """Remembers executed batches."""
        if batches:
            self.corrections.setdefault((function, device_model), Correction()).observe(batches)

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
    """Computes the surface of a recipe, correction included."""
    profile = recipe.profile or Profile(recipe.workload, recipe.device.name)
    axes = profile_axes(profile, max_batch=recipe.max_batch, sm_rungs_pct=recipe.device.sm_rungs_pct)
    if recipe.profile is None:
        return static_surface(physical_of(recipe), axes).scaled(recipe.factor)
    return model.surface(profile, axes).scaled(recipe.factor)


def table_of(event: FunctionEvent, recipe: Recipe, surface: Surface, *, computed_unix_ns: int) -> CapacityTable:
    """Returns the table to publish."""
    return capacity_table(
        surface,
        function=event.spec.name,
        function_revision=event.revision,
        device_model=recipe.device.name,
        version=recipe.version,
        computed_unix_ns=computed_unix_ns,
        slo_ms=recipe.slo_ms,
        axes=table_axes(max_batch=recipe.max_batch, sm_rungs_pct=recipe.device.sm_rungs_pct),
    )
