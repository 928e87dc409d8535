"""The shell: hears of functions and devices, has them profiled, trains, publishes capacity tables."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence

from hasgpu_core.capacity import CapacityPoint
from hasgpu_core.errors import InvalidError, NotFoundError
from hasgpu_core.events import FunctionEvent, InstanceEvent, capacity_subject
from hasgpu_core.ports import Bus, CaughtUp, Clock, StateChange
from hasgpu_predictor import (
    Axes,
    ModelCard,
    ProfilePoint,
    Surface,
    TrainingSettings,
    surface_points,
    table_axes,
    workload_digest,
)
from hasgpu_runtime import wire
from hasgpu_runtime.telemetry import Telemetry

from hasgpu_rapp.adapters.repository import Repository
from hasgpu_rapp.predictions import Predictions, Recipe, physical_of, surface_of, table_of
from hasgpu_rapp.profiling import Measurer, Profiling
from hasgpu_rapp.training import Trainer
from hasgpu_rapp.world import DeviceModel, ProfilePlace, World

_log = logging.getLogger(__name__)

WATCHED = ("function.>", "node.>", "instance.>", "capacity.>")
CORRECTION_PERIOD_S = 5.0
"""A correction changes a published table at most so often."""
POINTS_MAX = 100_000
"""Configurations in one call."""

Pair = tuple[str, str]
"""(function, device model)."""


class RappApp:
    """One rapp process.

    Args:
        poke: Makes `reconcile` run soon.
        tasks: Owns profile runs and trainings.
    """

    def __init__(
        self,
        *,
        bus: Bus,
        clock: Clock,
        repository: Repository,
        measurer: Measurer,
        tasks: asyncio.TaskGroup,
        poke: Callable[[], None],
        training: TrainingSettings,
        telemetry: Telemetry,
    ) -> None:
        self.world = World()
        self.predictions = Predictions()
        self.profiling = Profiling(
            clock=clock, measurer=measurer, tasks=tasks, places=self._places, done=self._profiled
        )
        self.trainer = Trainer(
            predictions=self.predictions,
            repository=repository,
            clock=clock,
            tasks=tasks,
            settings=training,
            telemetry=telemetry,
            trained=poke,
        )
        self._bus = bus
        self._clock = clock
        self._repository = repository
        self._poke = poke
        self._telemetry = telemetry
        self._caught_up = False
        self._published: dict[str, tuple[int, Recipe]] = {}
        self._seen: set[str] = set()
        self._surfaces: dict[Pair, tuple[Recipe, Surface]] = {}
        self._compared_at_s: dict[Pair, float] = {}
        self._observed: set[Pair] = set()

    async def load(self) -> None:
        """Reads profiles and models of earlier runs."""
        for device_model, (model, profiles) in (await asyncio.to_thread(self._repository.load)).items():
            self.predictions.profiles[device_model] = dict(profiles)
            self.predictions.serve(model, profiles)
            _log.info("%s: %d profiles, model version %d", device_model, len(profiles), model.card.version)

    async def listen(self, caught_up: Callable[[], Awaitable[None]]) -> None:
        """Follows the bus until cancelled; each change asks for a pass. `caught_up`: all last values have been read."""
        async with self._bus.watch(*WATCHED) as changes:
            async for change in changes:
                if isinstance(change, CaughtUp):
                    self._caught_up = True
                    self._poke()
                    await caught_up()
                    continue
                try:
                    relevant = self._take(change)
                except InvalidError as error:
                    _log.warning("a message on %s is left out: %s", change.subject, error)
                    continue
                if relevant:
                    self._poke()

    def _take(self, change: StateChange) -> bool:
        """Takes one change in; tells whether it may change what is to be published."""
        kind, *rest = change.subject.split(".")
        if kind == "capacity":
            if change.payload is None:
                self._seen.discard(change.subject)
                return self._published.pop(change.subject, None) is not None
            if change.subject not in self._seen:
                self._seen.add(change.subject)
                table = wire.decode_capacity(change.payload)
                versions = self.predictions.versions
                versions[table.device_model] = max(versions.get(table.device_model, 0), table.version)
            return False
        if change.payload is None:
            if kind == "function":
                self._function_gone(rest[0])
            elif kind == "node":
                self.world.node_gone(".".join(rest))
            else:
                self.world.instance_gone(rest[-1])
            return kind == "function"
        if kind == "function":
            event = wire.decode_function(change.payload)
            if self.world.function(event):
                self.predictions.forget(event.spec.name)
            return True
        if kind == "node":
            before = self.world.device_models()
            node = wire.decode_node(change.payload)
            new_place = not any(self._places(device.model) for device in node.devices)
            self.world.node(node, now_s=self._clock.now_s(), unix_ns=self._clock.unix_ns())
            return new_place or before != self.world.device_models()
        return self._observe(wire.decode_instance(change.payload))

    def _observe(self, event: InstanceEvent) -> bool:
        batches = self.world.new_batches(event)
        if not batches or not event.device_model or event.function not in self.world.functions:
            return False
        if event.function_revision < self.world.workload_since[event.function]:
            return False
        pair = (event.function, event.device_model)
        self.predictions.observe(*pair, batches)
        self._observed.add(pair)
        return self._clock.now_s() >= self._compared_at_s.get(pair, float("-inf")) + CORRECTION_PERIOD_S

    def _function_gone(self, function: str) -> None:
        self.world.function_gone(function)
        self.predictions.forget(function)
        self._surfaces = {pair: known for pair, known in self._surfaces.items() if pair[0] != function}
        self._compared_at_s = {pair: at_s for pair, at_s in self._compared_at_s.items() if pair[0] != function}
        self._observed = {pair for pair in self._observed if pair[0] != function}

    def _places(self, device_model: str) -> list[ProfilePlace]:
        return self.world.places(device_model, now_s=self._clock.now_s())

    async def reconcile(self) -> None:
        """One pass: what is missing is profiled and trained, what changed is published, what is gone is deleted.

        Raises UnavailableError while the bus is away; the next pass does what is left.
        """
        if not self._caught_up:
            return
        devices = self.world.device_models()
        pairs = [(event, device) for event in self.world.functions.values() for device in devices.values()]
        self.profiling.keep_only({(workload_digest(event.spec), device.name) for event, device in pairs})
        for event, device in pairs:
            await self._publish(event, device)
        for event, device in pairs:
            workload = workload_digest(event.spec)
            if not self.predictions.profile(device.name, workload).points:
                self.profiling.ensure((workload, device.name), event)
        for device_model in list(self.predictions.profiles):
            self.trainer.refresh(device_model)
        await self._delete_orphans()

    async def _publish(self, event: FunctionEvent, device: DeviceModel) -> None:
        """Puts the table of a function on a device model, when what it depends on has changed."""
        self._correct(event, device)
        subject = capacity_subject(event.spec.name, device.name)
        recipe = self.predictions.recipe(event, device)
        if self._published.get(subject) == (event.revision, recipe):
            return
        try:
            surface = await self._surface(event, device, recipe)
            table = await asyncio.to_thread(table_of, event, recipe, surface, computed_unix_ns=self._clock.unix_ns())
            payload = wire.encode(table)
        except InvalidError as error:
            _log.error("no table of %s on %s: %s", event.spec.name, device.name, error)
            return
        if self.world.functions.get(event.spec.name) != event:
            return
        await self._bus.put(subject, payload, self._telemetry.inject())
        self._published[subject] = (event.revision, recipe)
        self._seen.add(subject)
        _log.info(
            "%s: %s table of revision %d, version %d%s",
            subject,
            table.basis,
            table.function_revision,
            table.version,
            f"; infeasible: {table.infeasible_reason}" if table.infeasible_reason else "",
        )

    def _correct(self, event: FunctionEvent, device: DeviceModel) -> None:
        pair = (event.spec.name, device.name)
        now_s = self._clock.now_s()
        if pair not in self._observed or now_s < self._compared_at_s.get(pair, float("-inf")) + CORRECTION_PERIOD_S:
            return
        self._observed.discard(pair)
        self._compared_at_s[pair] = now_s
        correction = self.predictions.corrections.get(pair)
        if correction is not None and correction.update(physical_of(self.predictions.recipe(event, device))):
            _log.info("%s on %s: observed device times correct the prediction by %.2f", *pair, correction.factor)

    async def _delete_orphans(self) -> None:
        for subject in sorted(self._seen | set(self._published)):
            if subject.split(".")[1] not in self.world.functions:
                await self._bus.delete(subject, self._telemetry.inject())
                self._seen.discard(subject)
                self._published.pop(subject, None)
                _log.info("%s is deleted: the function is gone", subject)

    async def _surface(self, event: FunctionEvent, device: DeviceModel, recipe: Recipe) -> Surface:
        pair = (event.spec.name, device.name)
        known = self._surfaces.get(pair)
        if known is not None and known[0] == recipe:
            return known[1]
        surface = await asyncio.to_thread(surface_of, recipe, self.predictions.model(device.name))
        self._surfaces[pair] = (recipe, surface)
        return surface

    async def _profiled(self, event: FunctionEvent, device_model: str, points: Sequence[ProfilePoint]) -> None:
        await self._learn(workload_digest(event.spec), device_model, points)
        await self.trainer.train(device_model)

    async def _learn(self, workload: str, device_model: str, points: Sequence[ProfilePoint]) -> None:
        profile = self.predictions.profile(device_model, workload).merged(points)
        self.predictions.learn(profile)
        try:
            await asyncio.to_thread(self._repository.save_profile, profile)
        except OSError as error:
            _log.error("a profile could not be kept; a restart will measure again: %s", error)

    def _pair(self, function: str, device_model: str) -> tuple[FunctionEvent, DeviceModel]:
        event = self.world.functions.get(function)
        if event is None:
            raise NotFoundError("function", function)
        device = self.world.device_models().get(device_model)
        if device is None:
            raise NotFoundError("device model", device_model, "no node has reported one")
        return event, device

    async def predict(
        self, function: str, device_model: str, configurations: Sequence[tuple[int, int, int]]
    ) -> tuple[list[float], Recipe]:
        """Returns latencies in seconds of (batch, sm_pct, quota_permille), and what they were made from.

        Raises NotFoundError for a function or device model, InvalidError for a configuration that can't be.
        """
        event, device = self._pair(function, device_model)
        if not 1 <= len(configurations) <= POINTS_MAX:
            raise InvalidError("configurations", expected=f"1..{POINTS_MAX} of them", got=str(len(configurations)))
        for batch, sm_pct, quota_permille in configurations:
            for name, value, high in (
                ("batch", batch, event.spec.max_batch),
                ("sm_pct", sm_pct, 100),
                ("quota_permille", quota_permille, 1000),
            ):
                if not 1 <= value <= high:
                    raise InvalidError(f"configuration.{name}", expected=f"1..{high}", got=str(value))
        recipe = self.predictions.recipe(event, device)
        surface = await self._surface(event, device, recipe)
        return surface.at(*zip(*configurations, strict=True)).tolist(), recipe

    async def predict_surface(
        self,
        function: str,
        device_model: str,
        *,
        batches: Sequence[int] = (),
        sm_pcts: Sequence[int] = (),
        quotas_permille: Sequence[int] = (),
    ) -> tuple[tuple[CapacityPoint, ...], Recipe]:
        """Returns the points of a grid (an empty axis: the published table's), and what they were made from.

        Raises NotFoundError for a function or device model, InvalidError for an axis that can't be.
        """
        event, device = self._pair(function, device_model)
        usual = table_axes(max_batch=event.spec.max_batch, sm_rungs_pct=device.sm_rungs_pct)
        axes = Axes(
            tuple(batches) or usual.batches,
            tuple(sm_pcts) or usual.sm_pcts,
            tuple(quotas_permille) or usual.quotas_permille,
        )
        axes.validate()
        if axes.batches[-1] > event.spec.max_batch:
            raise InvalidError("batches", expected=f"1..{event.spec.max_batch}", got=str(axes.batches[-1]))
        recipe = self.predictions.recipe(event, device)
        surface = await self._surface(event, device, recipe)
        return surface_points(surface, axes, slo_ms=event.spec.slo_ms), recipe

    async def ingest(self, function: str, device_model: str, points: Sequence[ProfilePoint]) -> int:
        """Adds measurements and returns how many; the model is trained again in the background.

        Raises NotFoundError for a function or device model, InvalidError for a point that can't be (none is taken).
        """
        event, device = self._pair(function, device_model)
        if not 1 <= len(points) <= POINTS_MAX:
            raise InvalidError("points", expected=f"1..{POINTS_MAX} of them", got=str(len(points)))
        await self._learn(workload_digest(event.spec), device.name, points)
        self._poke()
        return len(points)

    def cards(self, device_model: str = "") -> list[ModelCard]:
        """Returns the cards of the served models, of one device model or of all. Raises NotFoundError."""
        if device_model and device_model not in {*self.predictions.served, *self.world.device_models()}:
            raise NotFoundError("device model", device_model)
        names = [device_model] if device_model else sorted(self.predictions.served)
        return [self.predictions.served[name].model.card for name in names if name in self.predictions.served]

    def profiling_texts(self, device_model: str = "") -> dict[str, str]:
        """Returns "function on device model" -> progress of the runs under way, waiting or failed."""
        return {
            f"{event.spec.name} on {key[1]}": job.progress
            for key, job in self.profiling.jobs.items()
            for event in self.world.functions.values()
            if workload_digest(event.spec) == key[0] and device_model in ("", key[1])
        }

    def function_names(self, workloads: Sequence[str]) -> list[str]:
        """Returns names of the deployed functions with these workloads; a shortened digest for one not deployed."""
        names: dict[str, list[str]] = {}
        for event in self.world.functions.values():
            names.setdefault(workload_digest(event.spec), []).append(event.spec.name)
        return sorted(name for workload in workloads for name in names.get(workload, [workload[:12]]))
