"""Puts a node agent together: devices, folders, the agent and its gRPC server."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Coroutine
from dataclasses import replace

from hasgpu.node_agent.v1 import node_agent_pb2_grpc
from hasgpu_core.ports import Bus, Clock, ObjectStore
from hasgpu_runtime.layout import claim_folder
from hasgpu_runtime.metrics import Metrics
from hasgpu_runtime.rpc import create_server
from hasgpu_runtime.service import Service
from hasgpu_runtime.settings import environment
from hasgpu_runtime.tasks import end_task
from hasgpu_runtime.telemetry import Telemetry

from hasgpu_node_agent.adapters.artifacts import ArtifactCache
from hasgpu_node_agent.adapters.folders import NodeFolders
from hasgpu_node_agent.adapters.launcher import ProcessLauncher
from hasgpu_node_agent.adapters.node_names import claimed_name
from hasgpu_node_agent.adapters.workers import GrpcWorkerClient
from hasgpu_node_agent.agent import NodeAgent
from hasgpu_node_agent.hardware import Hardware, find_hardware
from hasgpu_node_agent.row_guard import RowGuard
from hasgpu_node_agent.server import NodeAgentServicer
from hasgpu_node_agent.settings import AgentSettings

log = logging.getLogger(__name__)


class Node:
    """A node: its agent and the agent's service. Make it inside the event loop.

    Args:
        settings: Of the agent.
        folders: Of the node.
        hardware: Its devices.
        listen: host:port of its service; port 0: a free one.
        advertise: What others dial, host:port or host alone; "": the address listened on.
        bus: Events.
        store: Artifacts.
        clock: Time.
        telemetry: Spans.
        metrics: Metrics.
        spawn: Starts work in the background that outlasts a call.

    Raises:
        UnavailableError: the address is taken.
    """

    def __init__(
        self,
        settings: AgentSettings,
        *,
        folders: NodeFolders,
        hardware: Hardware,
        listen: str,
        advertise: str,
        bus: Bus,
        store: ObjectStore,
        clock: Clock,
        telemetry: Telemetry,
        metrics: Metrics,
        spawn: Callable[[Coroutine[object, object, None]], object],
    ) -> None:
        self.settings = settings
        self._folders = folders
        devices = hardware.devices
        for device in devices:
            log.info("%s is %s: %s", device.info.gpu, device.info.model, "; ".join(device.info.capabilities))
        self.server = create_server(address=listen, telemetry=telemetry)
        listen_host, _, port = self.server.address.rpartition(":")
        host, _, advertised_port = advertise.rpartition(":")
        self.address = advertise if host and advertised_port != "0" else f"{host or advertise or listen_host}:{port}"
        self._client = GrpcWorkerClient(telemetry)
        guard = RowGuard([device.info for device in devices])
        self._launcher = ProcessLauncher(
            self._folders,
            {device.info.gpu: device.cores for device in devices},
            profiles={device.info.gpu: device.profile_path for device in devices},
            environment=hardware.environment,
            listen_host=listen_host,
            advertise_host=self.address.rpartition(":")[0],
        )
        self.agent = NodeAgent(
            node=settings.node,
            address=self.address,
            bus=bus,
            clock=clock,
            telemetry=telemetry,
            guard=guard,
            launcher=self._launcher,
            artifacts=ArtifactCache(store, self._folders.artifacts),
            client=self._client,
            gpus=hardware.gpus,
            gauges=hardware.gauges,
            metrics=metrics,
            gpu_price_per_hour=settings.gpu_price_per_hour,
            spawn=spawn,
        )
        servicer = NodeAgentServicer(
            status=self.agent,
            profiler=self.agent.profiler,
            set_draining=self.agent.set_draining,
            telemetry=telemetry,
        )
        node_agent_pb2_grpc.add_NodeAgentServiceServicer_to_server(servicer, self.server)

    async def _ready(self) -> None:
        await self.server.set_serving(True)
        log.info("node %s serves at %s", self.settings.node, self.address)

    async def stop(self) -> None:
        """Ends the node's workers in an orderly way, if that is wanted; while `run` runs."""
        await self.server.set_serving(False)
        if self.settings.stop_workers_on_exit:
            await self.agent.stop_workers()
            await self.agent.watch.stop()

    async def close(self) -> None:
        """Lets go of everything; workers that still run serve on."""
        self.agent.let_go()
        self.agent.watch.let_go()
        await self.server.stop()

    async def run(self) -> None:
        """Serves until it is cancelled; raises UnavailableError when another agent has this node's folder."""
        with self._folders.locked():
            await self.server.start()
            try:
                # Before any worker: one that finds no daemon would run without its limits.
                await self.agent.watch.start()
                await self.agent.run(self._ready)
            finally:
                self._launcher.tidy()
                with contextlib.suppress(asyncio.CancelledError):
                    await self._client.close()


async def serve(service: Service[AgentSettings]) -> None:
    """The body of the service: runs a node until the process is told to stop."""
    state_dir = service.settings.state_dir
    claim_folder(state_dir)
    with claimed_name(state_dir, service.settings.node) as name:
        await _serve(service, replace(service.settings, node=name))


async def _serve(service: Service[AgentSettings], settings: AgentSettings) -> None:
    folders = NodeFolders(settings.state_dir / settings.node)
    hardware = await asyncio.to_thread(find_hardware, settings, folders, environment(), service.clock.now_s)
    node = Node(
        settings,
        folders=folders,
        hardware=hardware,
        listen=service.common.listen,
        advertise=service.common.advertise,
        bus=service.bus,
        store=service.objects,
        clock=service.clock,
        telemetry=service.telemetry,
        metrics=service.metrics,
        spawn=service.group.create_task,
    )
    running = service.group.create_task(node.run(), name="node")
    try:
        await service.stop.wait()
        await node.stop()
        await end_task(running)
        if settings.stop_workers_on_exit:
            await node.agent.leave()
    finally:
        await node.close()
