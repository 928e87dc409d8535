"""The gateway's parts, put together."""

from __future__ import annotations

import asyncio
import functools
import logging
import secrets
from dataclasses import dataclass, field

from hasgpu.gateway.v1.gateway_pb2_grpc import add_FunctionServiceServicer_to_server
from hasgpu.inference.v2.inference_pb2_grpc import add_GRPCInferenceServiceServicer_to_server
from hasgpu.system.v1.system_pb2_grpc import add_SystemServiceServicer_to_server
from hasgpu_core.ports import Bus, Clock, ObjectStore, Store
from hasgpu_runtime.diagnosis import Look
from hasgpu_runtime.loop import ReconcileLoop
from hasgpu_runtime.metrics import Metrics
from hasgpu_runtime.rpc import Server, open_channel
from hasgpu_runtime.telemetry import Telemetry

from hasgpu_gateway.adapters.worker_link import LinkSettings
from hasgpu_gateway.directory import Directory
from hasgpu_gateway.function_server import FunctionServer
from hasgpu_gateway.inference_server import InferenceServer
from hasgpu_gateway.lane import LaneSettings
from hasgpu_gateway.lanes import Lanes
from hasgpu_gateway.publisher import DemandPublisher, PublisherSettings
from hasgpu_gateway.registry import Registry
from hasgpu_gateway.settings import GatewaySettings
from hasgpu_gateway.system_server import SystemServer

log = logging.getLogger(__name__)

UNBOUNDED_BYTES = 2**31 - 1
"""To and from workers, messages are bounded by what the lanes put into a batch and by what functions answer."""
RECONCILE_PERIOD_S = 30.0
"""Between two comparisons of the store with the bus when nothing asks for one."""


@dataclass(frozen=True, slots=True)
class World:
    """What a gateway is given to work with."""

    bus: Bus
    objects: ObjectStore
    store: Store
    clock: Clock
    telemetry: Telemetry = field(default_factory=Telemetry)
    metrics: Metrics = field(default_factory=Metrics)
    looks: tuple[Look, ...] = ()
    """What it looks at when it is asked how the installation is."""


class Gateway:
    """One gateway: `start`, then `stop`; its tasks live in the task group given.

    Args:
        settings: The gateway's own.
        world: What it works with.
        server: Bound, not started; the gateway adds its services, starts and stops it.
        group: Owns the gateway's tasks.
    """

    def __init__(self, settings: GatewaySettings, world: World, *, server: Server, group: asyncio.TaskGroup) -> None:
        self._settings = settings
        self._world = world
        self._group = group
        self._tasks: list[asyncio.Task[None]] = []
        self.directory = Directory()
        self.lanes = Lanes(
            self.directory,
            clock=world.clock,
            group=group,
            open_channel=functools.partial(open_channel, max_message_bytes=UNBOUNDED_BYTES),
            telemetry=world.telemetry,
            metrics=world.metrics,
            lane_settings=LaneSettings(
                max_batches_in_flight=settings.max_batches_in_flight, max_queue_bytes=settings.max_queue_bytes
            ),
            link_settings=LinkSettings(),
        )
        self.registry = Registry(
            store=world.store,
            bus=world.bus,
            objects=world.objects,
            directory=self.directory,
            clock=world.clock,
            telemetry=world.telemetry,
        )
        self._publisher = DemandPublisher(
            self.lanes,
            bus=world.bus,
            clock=world.clock,
            gateway=settings.gateway_id,
            epoch=secrets.token_hex(8),
            settings=PublisherSettings(),
        )
        self._server = server
        self._inference = InferenceServer(self.lanes, self.directory, world.telemetry)
        self._functions = FunctionServer(
            self.registry, self.directory, self.lanes, world.clock, max_artifact_bytes=settings.max_artifact_bytes
        )
        self._system = SystemServer(world.bus, world.clock, world.looks)
        self._reconciling = ReconcileLoop(world.clock, RECONCILE_PERIOD_S, name="functions", metrics=world.metrics)
        self._known = asyncio.Event()

    @property
    def address(self) -> str:
        """host:port listened on."""
        return self._server.address

    async def start(self) -> None:
        """Serves; health says SERVING as soon as the functions and their routes are known."""
        add_GRPCInferenceServiceServicer_to_server(self._inference, self._server)
        add_FunctionServiceServicer_to_server(self._functions, self._server)
        add_SystemServiceServicer_to_server(self._system, self._server)
        self.directory.on_caught_up(self._caught_up)
        await self._server.start()
        for name, work in (
            ("directory", self.directory.run(self._world.bus)),
            ("publisher", self._publisher.run()),
            ("reconcile", self._reconciling.run(self._reconcile)),
            ("health", self._become_ready()),
        ):
            self._tasks.append(self._group.create_task(work, name=name))
        log.info("gateway %s listens on %s", self._settings.gateway_id, self.address)

    async def stop(self) -> None:
        """Takes nothing more, fails what waits, lets batches at workers finish within the bound, and ends."""
        await self._server.set_serving(False)
        self._inference.stop()
        self._functions.stop()
        await self.lanes.stop(bound_s=self._settings.stop_timeout_s)
        await self._server.stop(1.0)
        for task in self._tasks:
            task.cancel()

    def _caught_up(self) -> None:
        self._known.set()
        self._reconciling.poke()

    async def _become_ready(self) -> None:
        await self._known.wait()
        await self._server.set_serving(True)

    async def _reconcile(self) -> None:
        """Brings the bus in line with the store, once it is known what the bus says."""
        if self.directory.caught_up:
            await self.registry.reconcile()
