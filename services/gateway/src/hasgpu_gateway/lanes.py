"""All lanes: one for each function in the directory, kept in step with it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass

import grpc.aio
from hasgpu_core.errors import UnavailableError
from hasgpu_core.events import FunctionEvent
from hasgpu_core.ports import Clock
from hasgpu_runtime.metrics import Metrics
from hasgpu_runtime.telemetry import Telemetry

from hasgpu_gateway.adapters.worker_link import LinkSettings, WorkerLink
from hasgpu_gateway.calls import BatchAnswer
from hasgpu_gateway.directory import Directory
from hasgpu_gateway.errors import UnknownModelError
from hasgpu_gateway.lane import Lane, LaneSettings
from hasgpu_gateway.metering import LaneMetrics, watch_lanes
from hasgpu_gateway.routes import Link, Route


@dataclass(frozen=True, slots=True)
class _RouteListener:
    """Tells a lane what happens on one route's stream."""

    lane: Lane
    route: Route

    def link_up(self) -> None:
        self.lane.link_up(self.route)

    def link_down(self, reason: str) -> None:
        self.lane.link_down(self.route, reason)

    def answered(self, answer: BatchAnswer) -> None:
        self.lane.answered(self.route, answer)


class Lanes:
    """The lanes of all functions; owns the streams' tasks through the task group given."""

    def __init__(
        self,
        directory: Directory,
        *,
        clock: Clock,
        group: asyncio.TaskGroup,
        open_channel: Callable[[str], grpc.aio.Channel],
        telemetry: Telemetry,
        metrics: Metrics,
        lane_settings: LaneSettings,
        link_settings: LinkSettings,
    ) -> None:
        self._directory = directory
        self._clock = clock
        self._group = group
        self._open_channel = open_channel
        self._telemetry = telemetry
        self._metrics = metrics
        self._lane_settings = lane_settings
        self._link_settings = link_settings
        self._lanes: dict[str, Lane] = {}
        self._closing: set[Lane] = set()
        self._stopping = False
        self.on_starved: Callable[[str], None] = lambda _: None
        """Called when a request waits at a function without a ready instance."""
        watch_lanes(metrics, self.all, clock.now_s)
        directory.listen(self._changed)
        for name in directory.functions:
            self._changed(name)

    def all(self) -> tuple[Lane, ...]:
        """Returns every lane."""
        return tuple(self._lanes.values())

    def get(self, function: str) -> Lane:
        """Returns a function's lane; raises UnknownModelError, or UnavailableError while the gateway stops."""
        lane = self._lanes.get(function)
        if lane is not None:
            return lane
        if self._stopping:
            raise UnavailableError("the gateway stops")
        raise UnknownModelError(function)

    def find(self, function: str) -> Lane | None:
        """Returns a function's lane, or None."""
        return self._lanes.get(function)

    async def stop(self, *, bound_s: float) -> None:
        """Fails what waits, lets what is at workers finish within the bound, then closes all streams."""
        self._stopping = True
        self._directory.unlisten(self._changed)
        lanes = [*self._lanes.values(), *self._closing]
        for lane in lanes:
            lane.close(UnavailableError("the gateway stops"))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(bound_s):
                for lane in lanes:
                    await lane.finished()
        for lane in lanes:
            lane.shut()

    def _changed(self, name: str) -> None:
        event = self._directory.functions.get(name)
        lane = self._lanes.get(name)
        if event is None:
            if lane is not None:
                del self._lanes[name]
                self._metrics.forget("function", name)
                lane.close(UnknownModelError(name))
                self._closing.add(lane)
                self._group.create_task(self._finish(lane), name=f"finish {name}")
            return
        if lane is None:
            lane = self._lanes[name] = self._open_lane(event)
        elif event != lane.event:
            lane.update(event)
        lane.set_instances(self._directory.instances(name), self._directory.tables(name))

    async def _finish(self, lane: Lane) -> None:
        """Lets a deleted function's batches end, as long as their requests may take."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(lane.event.spec.timeout_ms / 1e3):
                await lane.finished()
        lane.shut()
        self._closing.discard(lane)

    def _open_lane(self, event: FunctionEvent) -> Lane:
        return Lane(
            event,
            clock=self._clock,
            settings=self._lane_settings,
            telemetry=self._telemetry,
            metrics=LaneMetrics(self._metrics, event.spec.name),
            open_link=self._open_link,
            on_starved=self._starved,
        )

    def _starved(self, name: str) -> None:
        self.on_starved(name)

    def _open_link(self, lane: Lane, route: Route) -> Link:
        link = WorkerLink(
            route.address,
            _RouteListener(lane, route),
            clock=self._clock,
            open_channel=self._open_channel,
            settings=self._link_settings,
        )
        link.start(self._group)
        return link
