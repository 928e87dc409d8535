"""What rapp answers: predictions, capacities, plans, errors, and what it knows of each function. It changes nothing."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from hasgpu_core.capacity import CapacityPoint
from hasgpu_core.errors import InvalidError, NotFoundError
from hasgpu_core.events import FunctionEvent
from hasgpu_predictor import (
    Axes,
    LatencyModel,
    ModelCard,
    ObservedError,
    Probe,
    Profile,
    ProfilePoint,
    Surface,
    TrainingSettings,
    batch_axis,
    plan_probes,
    probe_candidates,
    surface_points,
    table_axes,
    workload_digest,
)
from hasgpu_predictor.capacity import LATENCY_MAX_S, capacity_points
from numpy.typing import NDArray

from hasgpu_rapp.app import POINTS_MAX, RappApp
from hasgpu_rapp.corrections import Pair, instance_source
from hasgpu_rapp.predictions import Recipe, Served, physical_of, surface_of
from hasgpu_rapp.profiling import PROFILE_BUDGET_S, Cell
from hasgpu_rapp.world import DeviceModel

Array = NDArray[np.float64]

SLO_MAX_MS = 3_600_000
PLAN_BUDGET_MAX_S = 3_600.0
EVALUATED_FOLDS_COUNT = 5
EVALUATED_ROWS_MAX = 20_000
"""An evaluation trains five times; beyond so many rows that is no answer to a call."""


@dataclass(frozen=True, slots=True)
class Predicted:
    """Latencies of configurations with their 90 % intervals; arrays of equal length, seconds."""

    latency_s: Array
    low_s: Array
    high_s: Array
    extrapolated: NDArray[np.bool_]
    """The batch is larger than any that was measured."""
    recipe: Recipe


@dataclass(frozen=True, slots=True)
class PredictedSurface:
    """A grid's predictions, batch-major."""

    points: tuple[CapacityPoint, ...]
    low_s: Array
    high_s: Array
    extrapolated_batches: tuple[int, ...]
    recipe: Recipe


@dataclass(frozen=True, slots=True)
class FunctionErrors:
    """A function's points, each predicted from the others; arrays of equal length, seconds."""

    function: str
    cells: tuple[Cell, ...]
    measured_s: Array
    predicted: Predicted
    observed: ObservedError | None

    @property
    def ape_pct(self) -> Array:
        """Absolute errors in per cent of what was measured."""
        return np.asarray(100 * np.abs(self.predicted.latency_s / self.measured_s - 1))

    @property
    def coverage(self) -> float:
        """Share of the points in their intervals."""
        inside = (self.predicted.low_s <= self.measured_s) & (self.measured_s <= self.predicted.high_s)
        return float(inside.mean())


class Queries:
    """Answers from the app's state.

    Raises NotFoundError for a function or device model that is not known, InvalidError for values that can't be; every
    method does.
    """

    def __init__(self, app: RappApp) -> None:
        self._app = app

    async def predict(
        self, function: str, device_model: str, cells: Sequence[Cell], *, instance: str = ""
    ) -> Predicted:
        """Returns latencies of (batch, sm_pct, quota_permille).

        Args:
            instance: Corrected by what this one was seen to take; empty: by what all do.
        """
        event, device = self._app.pair(function, device_model)
        _check_cells(cells, event.spec.max_batch)
        recipe, surface = await self._surface(event, device, instance)
        return _predicted(recipe, surface, np.array(cells, float))

    async def surface(
        self,
        function: str,
        device_model: str,
        *,
        batches: Sequence[int] = (),
        sm_pcts: Sequence[int] = (),
        quotas_permille: Sequence[int] = (),
        instance: str = "",
    ) -> PredictedSurface:
        """Returns a grid; an empty axis is the published table's."""
        event, device = self._app.pair(function, device_model)
        usual = table_axes(max_batch=event.spec.max_batch, sm_rungs_pct=device.sm_rungs_pct)
        axes = Axes(
            tuple(batches) or usual.batches,
            tuple(sm_pcts) or usual.sm_pcts,
            tuple(quotas_permille) or usual.quotas_permille,
        )
        axes.validate()
        if len(axes.batches) * len(axes.sm_pcts) * len(axes.quotas_permille) > POINTS_MAX:
            raise InvalidError("grid", expected=f"at most {POINTS_MAX} configurations", got="more")
        if axes.batches[-1] > event.spec.max_batch:
            raise InvalidError("batches", expected=f"1..{event.spec.max_batch}", got=str(axes.batches[-1]))
        recipe, surface = await self._surface(event, device, instance)
        points = surface_points(surface, axes, slo_ms=event.spec.slo_ms)
        bounds = _predicted(recipe, surface, axes.configurations())
        beyond = tuple(batch for batch in axes.batches if surface.extrapolated(batch))
        return PredictedSurface(points, bounds.low_s, bounds.high_s, beyond, recipe)

    async def capacity(
        self, function: str, device_model: str, *, slo_ms: int = 0, cells: Sequence[Cell] = ()
    ) -> tuple[tuple[CapacityPoint, ...], Recipe, int]:
        """Returns rates inside an objective, queueing included, with what they were made from and the objective.

        Args:
            slo_ms: 0: the function's.
            cells: Empty: the published grid.
        """
        event, device = self._app.pair(function, device_model)
        if not 0 <= slo_ms <= SLO_MAX_MS:
            raise InvalidError("slo_ms", expected=f"1..{SLO_MAX_MS}, or 0 for the function's", got=str(slo_ms))
        slo_ms = slo_ms or event.spec.slo_ms
        recipe, surface = await self._surface(event, device, "")
        if not cells:
            axes = table_axes(max_batch=event.spec.max_batch, sm_rungs_pct=device.sm_rungs_pct)
            return surface_points(surface, axes, slo_ms=slo_ms), recipe, slo_ms
        _check_cells(cells, event.spec.max_batch)
        configurations = np.array(cells, float)
        latencies_s = surface.at(*configurations.T).clip(max=LATENCY_MAX_S)
        return capacity_points(configurations, latencies_s, slo_ms=slo_ms), recipe, slo_ms

    async def plan(
        self, function: str, device_model: str, *, budget_s: float = 0.0, candidates: Sequence[Cell] = ()
    ) -> list[Probe]:
        """Returns what to measure next.

        Args:
            budget_s: 0: that of a new function's profile.
            candidates: Empty: the batch ladder, the device's rungs, usual quotas.
        """
        event, device = self._app.pair(function, device_model)
        if not 0 <= budget_s <= PLAN_BUDGET_MAX_S:
            raise InvalidError("budget", expected=f"up to {PLAN_BUDGET_MAX_S:g} s", got=f"{budget_s:g} s")
        if candidates:
            _check_cells(candidates, event.spec.max_batch)
        usual = probe_candidates(batch_axis(event.spec.max_batch), device.sm_rungs_pct)
        recipe = self._app.predictions.recipe(event, device)
        known = recipe.profile.points if recipe.profile is not None else ()
        budget_s = budget_s or PROFILE_BUDGET_S
        return await asyncio.to_thread(
            lambda: plan_probes(physical_of(recipe), candidates or usual, budget_s=budget_s, known=known)
        )

    async def evaluate(self, device_model: str, function: str = "") -> tuple[list[FunctionErrors], int]:
        """Predicts each fifth of every function's points from the others, and returns the model's version.

        Raises NotFoundError also when nothing was measured.
        """
        served = self._app.predictions.served.get(device_model)
        if served is None or not any(profile.points for profile in served.profiles.values()):
            raise NotFoundError("profile on device model", device_model, "nothing was measured on it yet")
        if (rows_count := sum(len(profile.points) for profile in served.profiles.values())) > EVALUATED_ROWS_MAX:
            raise InvalidError("rows", expected=f"at most {EVALUATED_ROWS_MAX}", got=str(rows_count))
        device = self._app.world.device_models().get(device_model) or DeviceModel(device_model, "", (100,))
        names = {
            workload_digest(event.spec): name
            for name, event in sorted(self._app.world.functions.items())
            if function in ("", name)
        }
        if function and not names:
            raise NotFoundError("function", function)
        settings = self._app.training
        found = await asyncio.to_thread(lambda: _cross_validated(served, device, names, settings))
        if function and not found:
            raise NotFoundError("profile", function, f"nothing of it was measured on {device_model}")
        errors = []
        for name, known, predicted in found:
            observed = await self.observed_error((name, device_model))
            measured_s = np.array([point.latency_s for point in known])
            errors.append(FunctionErrors(name, tuple(p.configuration for p in known), measured_s, predicted, observed))
        return errors, served.model.card.version

    async def observed_error(self, pair: Pair) -> ObservedError | None:
        """Returns how far observed batches lie from the prediction; None: none was observed."""
        correction = self._app.predictions.corrections.get(pair)
        event, device = self._app.world.functions.get(pair[0]), self._app.world.device_models().get(pair[1])
        if correction is None or event is None or device is None:
            return None
        base = await self._app.surfaces.base(event, device)
        return correction.error(base.physical, base.surface)

    def cards(self, device_model: str = "") -> list[ModelCard]:
        """Returns the cards of the served models, of one device model or of all."""
        served = self._app.predictions.served
        if device_model and device_model not in {*served, *self._app.world.device_models()}:
            raise NotFoundError("device model", device_model)
        names = [device_model] if device_model else sorted(served)
        return [served[name].model.card for name in names if name in served]

    def versions(self, device_model: str = "") -> list[Mapping[str, Any]]:
        """Returns cards of earlier models too, newest first, as fields with `data_sha256`."""
        kept = self._app.trainer.versions
        return [card for name in sorted(kept) if device_model in ("", name) for card in reversed(kept[name])]

    def profiling_texts(self, device_model: str = "") -> dict[str, str]:
        """Returns "function on device model" -> progress of the runs under way, waiting or failed."""
        return {
            f"{event.spec.name} on {key[1]}": job.progress
            for key, job in self._app.profiling.jobs.items()
            for event in self._app.world.functions.values()
            if workload_digest(event.spec) == key[0] and device_model in ("", key[1])
        }

    def operators_count(self, event: FunctionEvent) -> int:
        """Returns how many operators of a function's model are known."""
        known = self._app.predictions.operators.get(workload_digest(event.spec))
        return len(known.rows) if known is not None else 0

    def function_names(self, workloads: Sequence[str]) -> list[str]:
        """Returns names of the deployed functions with these workloads; a shortened digest for one not deployed."""
        names: dict[str, list[str]] = {}
        for event in self._app.world.functions.values():
            names.setdefault(workload_digest(event.spec), []).append(event.spec.name)
        return sorted(name for workload in workloads for name in names.get(workload, [workload[:12]]))

    async def _surface(self, event: FunctionEvent, device: DeviceModel, instance: str) -> tuple[Recipe, Surface]:
        return await self._app.surfaces.surface(event, device, instance_source(instance) if instance else "")


def _check_cells(cells: Sequence[Cell], max_batch: int) -> None:
    if not 1 <= len(cells) <= POINTS_MAX:
        raise InvalidError("configurations", expected=f"1..{POINTS_MAX} of them", got=str(len(cells)))
    for cell in cells:
        for name, value, high in zip(("batch", "sm_pct", "quota_permille"), cell, (max_batch, 100, 1_000), strict=True):
            if not 1 <= value <= high:
                raise InvalidError(f"configuration.{name}", expected=f"1..{high}", got=str(value))


def _predicted(recipe: Recipe, surface: Surface, configurations: Array) -> Predicted:
    batch, sm, quota = configurations.T
    latency_s = surface.at(batch, sm, quota).clip(max=LATENCY_MAX_S)
    bounds = surface.bounds_at(batch, sm, quota)
    assert bounds is not None, "surfaces of predictions have intervals"
    low_s, high_s = (bound.clip(max=LATENCY_MAX_S) for bound in bounds)
    return Predicted(latency_s, low_s, high_s, surface.extrapolated(batch), recipe)


def _cross_validated(
    served: Served, device: DeviceModel, names: Mapping[str, str], settings: TrainingSettings
) -> list[tuple[str, tuple[ProfilePoint, ...], Predicted]]:
    """Points of each named function in order, and what a model of the other four fifths says of them."""
    profiles = {workload: profile for workload, profile in served.profiles.items() if profile.points}
    folds = {workload: _folds(profile) for workload, profile in profiles.items()}
    parts: dict[str, list[tuple[NDArray[np.intp], Predicted]]] = {w: [] for w in profiles if w in names}
    for fold in range(EVALUATED_FOLDS_COUNT):
        kept = {
            w: replace(p, points=tuple(x for x, f in zip(p.points, folds[w], strict=True) if f != fold))
            for w, p in profiles.items()
        }
        model = LatencyModel.train(list(kept.values()), device_model=device.name, version=0, settings=settings)
        for workload, found in parts.items():
            held = np.flatnonzero(folds[workload] == fold)
            if len(held) and kept[workload].points:
                cells = np.array([profiles[workload].points[index].configuration for index in held], float)
                found.append((held, _held_out(kept[workload], model, device, cells)))
    return [
        (names[workload], *_joined(profiles[workload], found)) for workload, found in sorted(parts.items()) if found
    ]


def _folds(profile: Profile) -> NDArray[np.int64]:
    seed = int(hashlib.sha256(profile.workload.encode()).hexdigest()[:8], 16)
    return np.random.default_rng(seed).permutation(len(profile.points)) % EVALUATED_FOLDS_COUNT


def _held_out(profile: Profile, model: LatencyModel, device: DeviceModel, cells: Array) -> Predicted:
    recipe = Recipe.of_profile(
        profile, replace(device, sm_rungs_pct=tuple(sorted({int(sm) for sm in cells[:, 1]}))), int(cells[:, 0].max())
    )
    return _predicted(recipe, surface_of(recipe, model), cells)


def _joined(
    profile: Profile, found: Sequence[tuple[NDArray[np.intp], Predicted]]
) -> tuple[tuple[ProfilePoint, ...], Predicted]:
    index = np.concatenate([held for held, _ in found])
    order = np.argsort(index)

    def join(name: str) -> Any:
        return np.concatenate([getattr(part, name) for _, part in found])[order]

    predicted = Predicted(join("latency_s"), join("low_s"), join("high_s"), join("extrapolated"), found[0][1].recipe)
    return tuple(profile.points[i] for i in index[order]), predicted
