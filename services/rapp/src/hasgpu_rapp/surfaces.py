"""Surfaces of functions on device models, computed in threads and kept until what they depend on changes."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace

from hasgpu_core.events import FunctionEvent
from hasgpu_predictor import PhysicalModel, Surface, corrected

from hasgpu_rapp.predictions import Predictions, Recipe, predicted_by
from hasgpu_rapp.world import DeviceModel


@dataclass(frozen=True, slots=True)
class Base:
    """What is predicted before any correction."""

    recipe: Recipe
    physical: PhysicalModel
    surface: Surface


class Surfaces:
    """Surfaces by function and device model."""

    def __init__(self, predictions: Predictions) -> None:
        self._predictions = predictions
        self._bases: dict[tuple[str, str], Base] = {}
        self._corrected: dict[tuple[str, str], tuple[Recipe, Surface]] = {}

    async def base(self, event: FunctionEvent, device: DeviceModel) -> Base:
        """Returns the uncorrected prediction."""
        pair = (event.spec.name, device.name)
        recipe = self._predictions.recipe(event, device).uncorrected()
        known = self._bases.get(pair)
        if known is not None and known.recipe == recipe:
            return known
        model = self._predictions.model(device.name)
        physical, surface = await asyncio.to_thread(lambda: predicted_by(recipe, model))
        self._bases[pair] = base = Base(recipe, physical, surface)
        return base

    async def surface(self, event: FunctionEvent, device: DeviceModel, source: str = "") -> tuple[Recipe, Surface]:
        """Returns the prediction with the correction on it, and what it was made from.

        Args:
            source: An instance or device of the function (`corrections.instance_source`); empty: all of them.
        """
        pair = (event.spec.name, device.name)
        recipe = self._predictions.recipe(event, device)
        correction = self._predictions.corrections.get(pair)
        if source and correction is not None:
            recipe = replace(recipe, factors=correction.factors_of(source))
        known = self._corrected.get(pair)
        if known is not None and known[0] == recipe:
            return known
        base = await self.base(event, device)
        recipe = replace(base.recipe, factors=recipe.factors, drift=recipe.drift)
        made = recipe, corrected(base.surface, recipe.factors)
        if not source:
            self._corrected[pair] = made
        return made

    def forget(self, function: str) -> None:
        """Drops a function's."""
        self._bases = {pair: base for pair, base in self._bases.items() if pair[0] != function}
        self._corrected = {pair: made for pair, made in self._corrected.items() if pair[0] != function}
