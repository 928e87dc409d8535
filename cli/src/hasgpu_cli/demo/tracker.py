"""Follows shares and decisions while a load runs."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from hasgpu_core.errors import HasgpuError

from hasgpu_cli.client import Target
from hasgpu_cli.commands.rapp_service import describe
from hasgpu_cli.commands.scaling import explain
from hasgpu_cli.demo.report_data import InstanceSample, LoadView, Prediction, Sample
from hasgpu_cli.status import fetch_functions

PERIOD_S = 0.5
DECISIONS_EVERY = 6
DECISIONS_LIMIT = 200
LIVE_STATES = ("pending", "loading", "ready", "draining")
"""An instance in these states is charged for: its share is set aside for it."""


class Tracker:
    """Samples instances every half second and collects every decision once."""

    def __init__(self, target: Target, functions: Sequence[str], *, began_s: float, began_unix_ns: int) -> None:
        self._target = target
        self._functions = functions
        self._began_s = began_s
        self.began_unix_ns = began_unix_ns
        self.samples: list[Sample] = []
        self._decisions: dict[str, dict[tuple[int, int], Mapping[str, Any]]] = {name: {} for name in functions}
        self.misses_count = 0

    async def run(self) -> None:
        """Samples until cancelled."""
        count = 0
        while True:
            await self.sample(with_decisions=count % DECISIONS_EVERY == 0)
            count += 1
            await asyncio.sleep(PERIOD_S)

    async def sample(self, *, with_decisions: bool) -> None:
        """Takes one sample; a service that does not answer in time costs the sample, not the run."""
        try:
            found = await fetch_functions(self._target)
            self.samples.append(self._sample(found, await self._loads()))
            if with_decisions:
                await self.collect_decisions()
        except HasgpuError:
            self.misses_count += 1

    async def collect_decisions(self) -> None:
        """Adds the newest decisions that changed something since the replay began."""
        for name in self._functions:
            for decision in await explain(self._target, name, limit=DECISIONS_LIMIT, include_idle=False):
                if decision["decided_unix_ns"] >= self.began_unix_ns:
                    self._decisions[name][decision["decided_unix_ns"], decision["revision"]] = decision

    async def predictions(self) -> dict[str, Prediction]:
        """Returns what rapp says of its own predictions now, by function; those of which it has seen batches."""
        try:
            described = await describe(self._target)
        except HasgpuError:
            self.misses_count += 1
            return {}
        found = {state["function"]: Prediction.of(state) for state in described["functions"]}
        return {name: prediction for name, prediction in found.items() if prediction is not None}

    def decisions(self, function: str) -> list[Mapping[str, Any]]:
        """What was decided of a function since the replay began, oldest first."""
        return [decision for _, decision in sorted(self._decisions[function].items(), key=lambda item: item[0])]

    def share(self, function: str) -> float:
        """The part of a device that the function is allowed now."""
        return self.samples[-1].allowed_share(function) if self.samples else 0.0

    def shrank(self) -> bool:
        """Whether shares have come down and an instance went since anything last grew."""
        return came_down([decision for name in self._functions for decision in self.decisions(name)])

    async def _loads(self) -> dict[str, LoadView]:
        newest = {name: await explain(self._target, name, limit=1, include_idle=True) for name in self._functions}
        return {name: LoadView(d[0]["capacity_rps"], d[0]["predicted_rps"]) for name, d in newest.items() if d}

    def _sample(self, found: Sequence[Mapping[str, Any]], loads: Mapping[str, LoadView]) -> Sample:
        instances = [
            InstanceSample(
                function["spec"]["name"],
                instance["instance"],
                instance["state"],
                instance["allocation"]["sm_pct"],
                instance["allocation"]["request_permille"],
                instance["allocation"]["limit_permille"],
                instance["device_time_ns"] / 1e9,
            )
            for function in found
            for instance in function["instances"]
            if instance["allocation"] and instance["state"] in LIVE_STATES
        ]
        return Sample(time.monotonic() - self._began_s, tuple(instances), loads)


def came_down(decisions: Iterable[Mapping[str, Any]]) -> bool:
    """Whether, since the last of these decisions that made anything grow, a share shrank and an instance went."""
    seen: set[str] = set()
    for decision in sorted(decisions, key=lambda decision: decision["decided_unix_ns"]):
        kinds = {action["kind"] for action in decision["actions"]}
        seen = set() if kinds & {"vertical_up", "horizontal_up"} else seen | kinds
    return {"vertical_down", "horizontal_down"} <= seen
