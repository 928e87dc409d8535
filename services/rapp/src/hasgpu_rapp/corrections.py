"""From observed batches to corrections in force, kept over restarts; drift is told and asks for a new profile."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass

from hasgpu_core.events import FunctionEvent, InstanceEvent
from hasgpu_core.ports import Clock
from hasgpu_predictor import PhysicalModel, Surface, workload_digest
from hasgpu_runtime.logs import about

from hasgpu_rapp.adapters.repository import Kept, KeptCorrection, Repository
from hasgpu_rapp.predictions import Predictions
from hasgpu_rapp.world import World

_log = logging.getLogger(__name__)

CORRECTION_PERIOD_S = 5.0
"""A correction changes a published table at most so often."""
PROFILE_AGAIN_S = 600.0
"""Drift asks for a new profile of the same function at most so often."""

Pair = tuple[str, str]
"""(function, device model)."""


def instance_source(instance: str) -> str:
    """Names an instance among the sources of a correction."""
    return f"instance {instance}"


def device_source(node: str, gpu: str) -> str:
    """Names a device among the sources of a correction."""
    return f"device {node}/{gpu}"


@dataclass(slots=True)
class _Timing:
    compared_at_s: float = float("-inf")
    profile_asked_s: float = float("-inf")
    fresh: bool = False
    """Batches came since it was compared."""


class Corrections:
    """The corrections of all functions on all device models; they lie in `Predictions`."""

    def __init__(self, *, predictions: Predictions, repository: Repository, clock: Clock, world: World) -> None:
        self._predictions = predictions
        self._repository = repository
        self._clock = clock
        self._world = world
        self._saving = asyncio.Lock()
        self._timings: dict[Pair, _Timing] = {}
        self._workloads: dict[Pair, str] = {}
        """What each correction belongs to; one read from a file waits here for its function."""

    def restore(self, kept: Kept) -> None:
        """Takes in what was kept of a device model."""
        for one in kept.corrections:
            pair = (one.function, one.device_model)
            self._predictions.corrections[pair] = one.correction
            self._workloads[pair] = one.workload
            for instance, count in one.batches_read.items():
                self._world.batches_read[instance] = (one.function, count)

    def function(self, event: FunctionEvent) -> None:
        """Hears of a function: what belongs to another workload of that name is dropped."""
        workload = workload_digest(event.spec)
        for pair in [pair for pair in self._predictions.corrections if pair[0] == event.spec.name]:
            if self._workloads.get(pair, workload) != workload:
                self._drop(pair)

    def function_gone(self, function: str) -> None:
        """Drops what was known of a function."""
        for pair in [pair for pair in {*self._predictions.corrections, *self._timings} if pair[0] == function]:
            self._drop(pair)

    def instance_gone(self, function: str, instance: str) -> None:
        """Drops an instance's own level."""
        for pair, correction in self._predictions.corrections.items():
            if pair[0] == function:
                correction.forget_source(instance_source(instance))

    def _drop(self, pair: Pair) -> None:
        self._predictions.corrections.pop(pair, None)
        self._timings.pop(pair, None)
        self._workloads.pop(pair, None)
        try:
            self._repository.delete_correction(pair[1], pair[0])
        except OSError as error:
            self._repository.note(f"the correction of {pair[0]} on {pair[1]} could not be deleted: {error}")

    def observe(self, event: InstanceEvent) -> bool:
        """Takes an instance's new batches; tells whether it is time to compare."""
        batches = self._world.new_batches(event)
        function = self._world.functions.get(event.function)
        if not batches or not event.device_model or function is None:
            return False
        if event.function_revision < self._world.workload_since[event.function]:
            return False
        pair = (event.function, event.device_model)
        sources = (instance_source(event.instance), device_source(event.node, event.gpu))
        self._predictions.observe(*pair, batches, sources)
        self._workloads[pair] = workload_digest(function.spec)
        timing = self._timings.setdefault(pair, _Timing())
        timing.fresh = True
        return self._clock.now_s() >= timing.compared_at_s + CORRECTION_PERIOD_S

    def due(self, pair: Pair) -> bool:
        """Whether there is something new to compare, and the last time is long enough ago."""
        timing = self._timings.get(pair)
        return timing is not None and timing.fresh and self._clock.now_s() >= timing.compared_at_s + CORRECTION_PERIOD_S

    def compare(self, pair: Pair, physical: PhysicalModel, surface: Surface, *, profiled: bool) -> None:
        """Compares what was observed with the uncorrected prediction, tells what changed.

        Args:
            profiled: Drift is looked for; a guess has nothing to drift from.
        """
        timing, correction = self._timings[pair], self._predictions.corrections[pair]
        timing.fresh, timing.compared_at_s = False, self._clock.now_s()
        if correction.update(physical, surface):
            factors = correction.factors
            text = "%s on %s: %d observed batches correct the prediction by %.2f where the quota decides, else by %.2f"
            _log.info(
                text, *pair, correction.observed_count, factors.device, factors.run, extra=about(function=pair[0])
            )
        if profiled and (drift := correction.detect(physical, surface, now_s=self._clock.now_s())):
            _log.warning("%s on %s has drifted from its profile: %s", *pair, drift, extra=about(function=pair[0]))

    def wants_profile(self, pair: Pair) -> bool:
        """Whether drift asks for a new profile now."""
        correction = self._predictions.corrections.get(pair)
        if correction is None or not correction.drift:
            return False
        timing = self._timings.setdefault(pair, _Timing())
        return self._clock.now_s() >= timing.profile_asked_s + PROFILE_AGAIN_S

    def profile_asked(self, pair: Pair) -> None:
        """A profile that drift asked for has begun."""
        self._timings.setdefault(pair, _Timing()).profile_asked_s = self._clock.now_s()

    def rebase(self, device_model: str, workload: str) -> None:
        """A new profile of a workload serves: corrections on it start from there."""
        for pair, correction in self._predictions.corrections.items():
            if pair[1] == device_model and self._workloads.get(pair) == workload:
                correction.rebase()
                timing = self._timings.setdefault(pair, _Timing())
                timing.fresh, timing.compared_at_s = True, float("-inf")

    async def save(self, *, all_of_them: bool = False) -> None:
        """Writes the corrections that changed; those that were not compared yet only with `all_of_them`."""
        async with self._saving:
            await self._save(all_of_them)

    async def _save(self, all_of_them: bool) -> None:
        for pair, correction in list(self._predictions.corrections.items()):
            timing = self._timings.get(pair)
            if not correction.unsaved or (timing is not None and timing.fresh and not all_of_them):
                continue
            kept = KeptCorrection(*pair, self._workloads.get(pair, ""), correction, self._world.read_of(pair[0]))
            try:
                await asyncio.to_thread(self._repository.save_correction, pair[1], pair[0], kept.content())
            except OSError as error:
                self._repository.note(f"the correction of {pair[0]} on {pair[1]} could not be kept: {error}")
