"""NodeAgentService: what the agent answers to others."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing
from typing import Any, Protocol

import grpc.aio
from hasgpu.node_agent.v1 import node_agent_pb2, node_agent_pb2_grpc
from hasgpu_core.events import DeviceEvent, InstanceEvent, NodeEvent
from hasgpu_runtime import trace_catalogue as names
from hasgpu_runtime.telemetry import Telemetry
from hasgpu_runtime.wire import device_event_to_proto, instance_event_to_proto, node_event_to_proto, spec_from_proto

from hasgpu_node_agent.ports import OperatorTable
from hasgpu_node_agent.profiling import DEFAULT_BUDGET_S, Configuration, Point, ProfileOrder, Profiler

_Context = grpc.aio.ServicerContext[Any, Any]


class Status(Protocol):
    """What the service tells of the node."""

    def node_event(self) -> NodeEvent:
        """The heartbeat, as it would be sent now."""
        ...

    def instance_events(self) -> Sequence[InstanceEvent]:
        """All instances, by id."""
        ...

    def device_events(self) -> Sequence[DeviceEvent]:
        """All devices, as last sent."""
        ...


class NodeAgentServicer(node_agent_pb2_grpc.NodeAgentServiceServicer):
    """Implements the service; errors are mapped to statuses by the server that it is added to."""

    def __init__(
        self, *, status: Status, profiler: Profiler, set_draining: Callable[[bool], None], telemetry: Telemetry
    ) -> None:
        self._status = status
        self._profiler = profiler
        self._set_draining = set_draining
        self._telemetry = telemetry

    async def GetStatus(
        self, request: node_agent_pb2.GetStatusRequest, context: _Context
    ) -> node_agent_pb2.GetStatusResponse:
        """Returns the node, its instances and its devices."""
        return node_agent_pb2.GetStatusResponse(
            node=node_event_to_proto(self._status.node_event()),
            instances=[instance_event_to_proto(event) for event in self._status.instance_events()],
            devices=[device_event_to_proto(event) for event in self._status.device_events()],
        )

    async def Profile(
        self, request: node_agent_pb2.ProfileRequest, context: _Context
    ) -> AsyncIterator[node_agent_pb2.ProfileResponse]:
        """Measures a function; streams progress and points as they come."""
        order = ProfileOrder(
            spec=spec_from_proto(request.spec),
            gpu=request.gpu,
            budget_s=request.budget_ms / 1e3 if request.budget_ms else DEFAULT_BUDGET_S,
            batches=tuple(request.batches),
            sm_pcts=tuple(request.sm_pcts),
            quotas_permille=tuple(request.quotas_permille),
            configurations=tuple(Configuration(c.batch, c.sm_pct, c.quota_permille) for c in request.configurations),
            in_order=request.in_order,
            operators=request.operators,
        )
        span = self._telemetry.start(
            "agent.profile",
            parent=self._telemetry.traceparent(),
            attributes={names.FUNCTION: order.spec.name, names.GPU: order.gpu},
        )
        points_count = 0
        try:
            async with aclosing(self._profiler.run(order)) as found:
                async for item in found:
                    if isinstance(item, Point):
                        points_count += 1
                        yield node_agent_pb2.ProfileResponse(point=_point_to_proto(item))
                    elif isinstance(item, OperatorTable):
                        yield node_agent_pb2.ProfileResponse(operators=_operators_to_proto(item))
                    else:
                        yield node_agent_pb2.ProfileResponse(progress=item)
        finally:
            span.set(names.POINTS_COUNT, points_count)
            span.end()

    async def Drain(self, request: node_agent_pb2.DrainRequest, context: _Context) -> node_agent_pb2.DrainResponse:
        """Takes no new instance from now on (or does again)."""
        self._set_draining(request.draining)
        return node_agent_pb2.DrainResponse()


def _point_to_proto(point: Point) -> node_agent_pb2.ProfilePoint:
    return node_agent_pb2.ProfilePoint(
        batch=point.configuration.batch,
        sm_pct=point.configuration.sm_pct,
        quota_permille=point.configuration.quota_permille,
        latency_ns=point.measurement.latency_ns,
        device_time_ns=point.measurement.device_time_ns,
        longest_segment_ns=point.measurement.longest_segment_ns,
        repetitions_count=point.measurement.repetitions_count,
    )


def _operators_to_proto(table: OperatorTable) -> node_agent_pb2.OperatorTable:
    rows = [
        node_agent_pb2.Operator(
            op=row.op,
            flops=row.flops,
            input_bytes=row.input_bytes,
            weight_bytes=row.weight_bytes,
            output_bytes=row.output_bytes,
            groups=row.groups,
            output_shape=row.output_shape,
        )
        for row in table.rows
    ]
    return node_agent_pb2.OperatorTable(rows=rows, reason=table.reason)
