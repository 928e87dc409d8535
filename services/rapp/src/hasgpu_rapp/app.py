"""The shell: hears of functions and devices, has them profiled, trains, publishes capacity tables."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence

from hasgpu_core.errors import InvalidError, NotFoundError, UnavailableError
from hasgpu_core.events import FunctionEvent, capacity_subject
from hasgpu_core.ports import Bus, CaughtUp, Clock, StateChange
from hasgpu_predictor import (
    Profile,
    ProfilePoint,
    TrainingSettings,
    batch_axis,
    plan_probes,
    probe_candidates,
    workload_digest,
)
from hasgpu_runtime import wire
from hasgpu_runtime.logs import about
from hasgpu_runtime.telemetry import Telemetry

from hasgpu_rapp.adapters.repository import Repository
from hasgpu_rapp.corrections import Corrections, Pair
from hasgpu_rapp.predictions import FunctionOperators, Predictions, Recipe, physical_of, table_of
from hasgpu_rapp.profiling import PROFILE_BUDGET_S, Cell, Key, Measurer, Profiling
from hasgpu_rapp.surfaces import Surfaces
from hasgpu_rapp.training import Trainer
from hasgpu_rapp.world import DeviceModel, ProfilePlace, World

_log = logging.getLogger(__name__)

WATCHED = ("function.>", "node.>", "instance.>", "capacity.>")
PLAN_SLACK = 4.0
"""So many times the budget is planned: the first estimate of a function's costs may be that much too high."""
AGREEMENT = 1.2
"""Rows of one configuration in one call may differ by so much; they are averaged."""
POINTS_MAX = 100_000
"""Configurations in one call."""


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
        self.surfaces = Surfaces(self.predictions)
        self.corrections = Corrections(
            predictions=self.predictions, repository=repository, clock=clock, world=self.world
        )
        self.profiling = Profiling(
            clock=clock,
            measurer=measurer,
            tasks=tasks,
            places=self._places,
            plan=self._plan,
            done=self._profiled,
            wants_operators=self._wants_operators,
            heard=self._heard,
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
        self.training = training
        self._bus = bus
        self._clock = clock
        self._repository = repository
        self._poke = poke
        self._telemetry = telemetry
        self._caught_up = False
        self._published: dict[str, tuple[int, Recipe]] = {}
        self._seen: set[str] = set()
        self._again: set[Key] = set()
        """Profiles measured again because of drift."""
        self.table_computed_unix_ns: dict[Pair, int] = {}
        """Of the tables that this process published."""

    async def load(self) -> None:
        """Reads profiles, models and operators of earlier runs, and the profile files that were named."""
        self.predictions.operators.update(await asyncio.to_thread(self._repository.load_operators))
        self.predictions.shipped.update(await asyncio.to_thread(self._repository.load_shipped))
        for device_model, kept in (await asyncio.to_thread(self._repository.load)).items():
            self.predictions.profiles[device_model] = dict(kept.profiles)
            self.predictions.serve(kept.model, kept.profiles)
            self.trainer.versions[device_model] = kept.versions
            self.corrections.restore(kept)
            _log.info(
                "%s: %d profiles, %d corrections, model version %d",
                device_model,
                len(kept.profiles),
                len(kept.corrections),
                kept.model.card.version,
            )

    async def close(self) -> None:
        """Writes what would be lost with the process."""
        await self.corrections.save(all_of_them=True)

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
                self.corrections.instance_gone(rest[0], rest[-1])
            return kind == "function"
        if kind == "function":
            event = wire.decode_function(change.payload)
            if self.world.function(event):
                self.corrections.function_gone(event.spec.name)
            self.corrections.function(event)
            return True
        if kind == "node":
            before = self.world.device_models()
            node = wire.decode_node(change.payload)
            new_place = not any(self._places(device.model) for device in node.devices)
            self.world.node(node, now_s=self._clock.now_s(), unix_ns=self._clock.unix_ns())
            return new_place or before != self.world.device_models()
        return self.corrections.observe(wire.decode_instance(change.payload))

    def _function_gone(self, function: str) -> None:
        self.world.function_gone(function)
        self.corrections.function_gone(function)
        self.surfaces.forget(function)

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
            workload, pair = workload_digest(event.spec), (event.spec.name, device.name)
            drifted = self.corrections.wants_profile(pair)
            if drifted or not self.predictions.profile(device.name, workload).points:
                began = self.profiling.ensure((workload, device.name), event)
                if drifted and began:
                    self._again.add((workload, device.name))
                    self.corrections.profile_asked(pair)
                    _log.info(
                        "%s is profiled again on %s, because it has drifted",
                        *pair,
                        extra=about(function=event.spec.name),
                    )
        for device_model in list(self.predictions.profiles):
            self.trainer.refresh(device_model)
        for device in devices.values():
            self.trainer.refresh_transfer(device)
        await self._delete_orphans()
        await self.corrections.save()

    async def _publish(self, event: FunctionEvent, device: DeviceModel) -> None:
        """Puts the table of a function on a device model, when what it depends on has changed."""
        await self._correct(event, device)
        subject = capacity_subject(event.spec.name, device.name)
        recipe = self.predictions.recipe(event, device)
        if self._published.get(subject) == (event.revision, recipe):
            return
        try:
            recipe, surface = await self.surfaces.surface(event, device)
            computed_unix_ns = self._clock.unix_ns()
            table = await asyncio.to_thread(table_of, event, recipe, surface, computed_unix_ns=computed_unix_ns)
            payload = wire.encode(table)
        except InvalidError as error:
            _log.error(
                "no table of %s on %s: %s", event.spec.name, device.name, error, extra=about(function=event.spec.name)
            )
            return
        if self.world.functions.get(event.spec.name) != event:
            return
        await self._bus.put(subject, payload, self._telemetry.inject())
        self._published[subject] = (event.revision, recipe)
        self.table_computed_unix_ns[event.spec.name, device.name] = computed_unix_ns
        self._seen.add(subject)
        _log.info(
            "%s: %s table of revision %d, version %d%s",
            subject,
            table.basis,
            table.function_revision,
            table.version,
            f"; infeasible: {table.infeasible_reason}" if table.infeasible_reason else "",
        )

    async def _correct(self, event: FunctionEvent, device: DeviceModel) -> None:
        pair = (event.spec.name, device.name)
        if self.corrections.due(pair):
            base = await self.surfaces.base(event, device)
            if self.corrections.due(pair):  # it was computed in a thread, and the function may have gone meanwhile
                profiled = base.recipe.profile is not None
                self.corrections.compare(pair, base.physical, base.surface, profiled=profiled)

    async def _delete_orphans(self) -> None:
        for subject in sorted(self._seen | set(self._published)):
            if subject.split(".")[1] not in self.world.functions:
                await self._bus.delete(subject, self._telemetry.inject())
                self._seen.discard(subject)
                self._published.pop(subject, None)
                _log.info("%s is deleted: the function is gone", subject)

    async def _plan(self, event: FunctionEvent, device_model: str) -> list[Cell]:
        """What to measure of a function: as much as PROFILE_BUDGET_S may do, if the estimate is far too pessimistic."""
        device = self.world.device_models().get(device_model)
        if device is None:
            raise UnavailableError(f"no node has a {device_model}")
        recipe = self.predictions.recipe(event, device)
        candidates = probe_candidates(batch_axis(event.spec.max_batch), device.sm_rungs_pct)
        plan = await asyncio.to_thread(
            lambda: plan_probes(physical_of(recipe), candidates, budget_s=PROFILE_BUDGET_S, slack=PLAN_SLACK)
        )
        return [probe.cell for probe in plan]

    async def _profiled(self, event: FunctionEvent, device_model: str, points: Sequence[ProfilePoint]) -> None:
        """A run is over. If drift asked for it, what was measured before is no longer so and is dropped."""
        workload = workload_digest(event.spec)
        again = (workload, device_model) in self._again
        self._again.discard((workload, device_model))
        with self.trainer.reserved(device_model):
            await self._learn(workload, device_model, points, afresh=again)
        await self.trainer.train(device_model)
        if again:
            self.corrections.rebase(device_model, workload)
            self._poke()

    async def _learn(
        self, workload: str, device_model: str, points: Sequence[ProfilePoint], *, afresh: bool = False
    ) -> None:
        before = Profile(workload, device_model) if afresh else self.predictions.profile(device_model, workload)
        profile = before.merged(points)
        self.predictions.learn(profile)
        try:
            await asyncio.to_thread(self._repository.save_profile, profile)
        except OSError as error:
            self._repository.note(f"a profile could not be kept; a restart will measure again: {error}")

    def _wants_operators(self, event: FunctionEvent) -> bool:
        known = self.predictions.operators.get(workload_digest(event.spec))
        return known is None or not known.rows

    async def _heard(self, event: FunctionEvent, operators: FunctionOperators) -> None:
        """Takes a model's operators; a table of the function is made of them while it is measured."""
        workload = workload_digest(event.spec)
        if not operators.rows and not self._wants_operators(event):
            return
        self.predictions.operators[workload] = operators
        if operators.reason:
            _log.warning(
                "the model of %s has no operators: %s",
                event.spec.name,
                operators.reason,
                extra=about(function=event.spec.name),
            )
        try:
            await asyncio.to_thread(self._repository.save_operators, workload, operators)
        except OSError as error:
            self._repository.note(f"operators could not be kept; the next profile tells them again: {error}")
        self._poke()

    def pair(self, function: str, device_model: str) -> tuple[FunctionEvent, DeviceModel]:
        """Returns what is known of a function and a device model; raises NotFoundError."""
        event = self.world.functions.get(function)
        if event is None:
            raise NotFoundError("function", function)
        device = self.world.device_models().get(device_model)
        if device is None:
            raise NotFoundError("device model", device_model, "no node has reported one")
        return event, device

    async def ingest(
        self,
        function: str,
        device_model: str,
        points: Sequence[ProfilePoint],
        operators: FunctionOperators | None = None,
    ) -> int:
        """Adds measurements and returns how many; the model is trained again in the background.

        Args:
            function: Of which.
            device_model: Where it was measured.
            points: None are fine when there are operators.
            operators: Of its model; None: they stay as they are known.

        Raises NotFoundError for a function or device model, InvalidError for a point that can't be or rows of one
        configuration that disagree (none is taken then).
        """
        event, device = self.pair(function, device_model)
        if not (0 if operators is not None else 1) <= len(points) <= POINTS_MAX:
            raise InvalidError("points", expected=f"1..{POINTS_MAX} of them", got=str(len(points)))
        check_agreement(points)
        if operators is not None:
            await self._heard(event, operators)
        if points:
            await self._learn(workload_digest(event.spec), device.name, points)
        self._poke()
        return len(points)

    @property
    def notes(self) -> Sequence[str]:
        """What could not be read or written, in words, newest last."""
        return self._repository.notes


def check_agreement(points: Sequence[ProfilePoint]) -> None:
    """Raises InvalidError for a point that can't be, and for two of one configuration whose times disagree."""
    seen: dict[Cell, ProfilePoint] = {}
    for point in points:
        point.validate()
        other = seen.setdefault(point.configuration, point)
        for name, a_s, b_s in (
            ("latency", point.latency_s, other.latency_s),
            ("device time", point.device_time_s, other.device_time_s),
        ):
            if max(a_s, b_s) > AGREEMENT * min(a_s, b_s):
                batch, sm_pct, quota = point.configuration
                raise InvalidError(
                    f"points of batch {batch}, SM {sm_pct} %, quota {quota / 10:g} %",
                    expected=f"rows that agree within {AGREEMENT - 1:.0%}, or one row",
                    got=f"{name} {1e3 * b_s:.4g} ms and {1e3 * a_s:.4g} ms",
                )
