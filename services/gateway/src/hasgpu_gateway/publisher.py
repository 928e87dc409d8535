"""Publishing demand: what each function's callers want of this gateway."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass

from hasgpu_core.events import DemandEvent, demand_subject
from hasgpu_core.ports import Bus, Clock
from hasgpu_runtime import wire

from hasgpu_gateway.lane import Lane
from hasgpu_gateway.lanes import Lanes


@dataclass(frozen=True, slots=True)
class PublisherSettings:
    """How often demand is published."""

    active_period_s: float = 0.25
    """For a function with requests, or with changed counters."""
    idle_period_s: float = 1.0
    """For every other: zero is news too."""


class DemandPublisher:
    """Publishes each function's demand event in its rhythm, and at once for a function that a request wakes."""

    def __init__(
        self, lanes: Lanes, *, bus: Bus, clock: Clock, gateway: str, epoch: str, settings: PublisherSettings
    ) -> None:
        self._lanes = lanes
        self._bus = bus
        self._clock = clock
        self._gateway = gateway
        self._epoch = epoch
        self._settings = settings
        self._woken: set[str] = set()
        self._wake = asyncio.Event()
        self._last: dict[str, tuple[float, DemandEvent]] = {}
        lanes.on_starved = self.wake

    def wake(self, function: str) -> None:
        """Publishes a function's demand without waiting for its turn."""
        self._woken.add(function)
        self._wake.set()

    async def run(self) -> None:
        """Publishes for ever."""
        while True:
            await self.publish_due()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._settings.active_period_s):
                    await self._wake.wait()

    async def publish_due(self) -> None:
        """Publishes the demand of each function whose turn it is."""
        self._wake.clear()
        woken, self._woken = self._woken, set()
        lanes = self._lanes.all()
        for name in self._last.keys() - {lane.name for lane in lanes}:
            del self._last[name]
        for lane in lanes:
            event = lane.demand(gateway=self._gateway, epoch=self._epoch)
            now_s = self._clock.now_s()
            if lane.name in woken or self._is_due(lane, event, now_s):
                self._last[lane.name] = now_s, event
                await self._bus.publish(demand_subject(lane.name, self._gateway), wire.encode(event))

    def _is_due(self, lane: Lane, event: DemandEvent, now_s: float) -> bool:
        last_s, last = self._last.get(lane.name, (float("-inf"), None))
        passed_s = now_s - last_s
        if last is None or passed_s >= self._settings.idle_period_s:
            return True
        active = event.queued_count or event.in_flight_count or _counters(event) != _counters(last)
        return bool(active) and passed_s >= 0.9 * self._settings.active_period_s


def _counters(event: DemandEvent) -> tuple[int, ...]:
    return event.arrived_count, event.ok_count, event.failed_count, event.refused_count
