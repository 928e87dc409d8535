"""Where a function is measured: a device of a live node."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hasgpu_core.errors import NotFoundError, UnavailableError
from hasgpu_core.resources import DeviceHealth, DeviceInfo

from hasgpu_cli.client import CALL_TIMEOUT_S, Target

if TYPE_CHECKING:
    from hasgpu.common.v1 import common_pb2
    from hasgpu.scheduler.v1 import scheduler_pb2


@dataclass(frozen=True, slots=True)
class Place:
    """A device and its agent."""

    node: str
    address: str
    """Of the node's agent."""
    device: DeviceInfo


async def fetch_spec(target: Target, function: str) -> common_pb2.FunctionSpec:
    """Returns a deployed function's spec; raises NotFoundError."""
    from hasgpu.gateway.v1 import gateway_pb2, gateway_pb2_grpc

    async with target.channel("gateway") as channel:
        stub = gateway_pb2_grpc.FunctionServiceStub(channel)
        answer = await stub.GetFunction(gateway_pb2.GetFunctionRequest(name=function), timeout=CALL_TIMEOUT_S)
    return answer.function.spec


async def find_place(target: Target, *, node: str, gpu: str) -> Place:
    """Returns the device named; without names the first one fit to measure on.

    Raises:
        NotFoundError: No such node or device; says which there are.
        UnavailableError: The node is lost, the device has failed, or no node is up.
    """
    from hasgpu.scheduler.v1 import scheduler_pb2, scheduler_pb2_grpc
    from hasgpu_runtime.wire import device_info_from_proto

    async with target.channel("scheduler") as channel:
        stub = scheduler_pb2_grpc.SchedulerServiceStub(channel)
        cluster = await stub.GetCluster(scheduler_pb2.GetClusterRequest(), timeout=CALL_TIMEOUT_S)
    places = [
        Place(one.name, one.address, device_info_from_proto(status.device))
        for one in _nodes(cluster, node)
        for status in one.devices
        if gpu in ("", status.device.gpu)
    ]
    if not places:
        there = sorted({f"{one.name}/{status.device.gpu}" for one in cluster.nodes for status in one.devices})
        raise NotFoundError("device", "/".join(filter(None, (node, gpu))) or "any", f"there is {', '.join(there)}")
    healthy = [place for place in places if place.device.health is not DeviceHealth.LOST]
    if not healthy:
        lost = places[0]
        reason = lost.device.health_reason or "it is lost"
        raise UnavailableError(f"{lost.node}/{lost.device.gpu} can't be measured on: {reason}")
    return healthy[0]


def _nodes(cluster: scheduler_pb2.GetClusterResponse, name: str) -> list[scheduler_pb2.Node]:
    """Live nodes (of this name), those that are draining last."""
    if name and name not in {node.name for node in cluster.nodes}:
        there = ", ".join(sorted(node.name for node in cluster.nodes)) or "none"
        raise NotFoundError("node", name, f"there is {there}")
    alive = [node for node in cluster.nodes if node.alive and name in ("", node.name)]
    if not alive:
        raise UnavailableError(f"node {name} is lost: nothing can be measured there" if name else "no node is up")
    return sorted(alive, key=lambda node: (node.draining, node.name))
