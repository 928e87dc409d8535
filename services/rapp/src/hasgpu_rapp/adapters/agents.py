"""Asking a node agent to measure a function."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence

import grpc
import grpc.aio
from hasgpu.node_agent.v1 import node_agent_pb2, node_agent_pb2_grpc
from hasgpu_core.errors import InvalidError
from hasgpu_core.function import FunctionSpec
from hasgpu_predictor import ProfilePoint, parse_operator
from hasgpu_runtime import wire
from hasgpu_runtime.rpc import from_rpc_error, open_channel
from hasgpu_runtime.telemetry import Telemetry

from hasgpu_rapp.predictions import FunctionOperators
from hasgpu_rapp.profiling import PROFILE_BUDGET_S, Cell
from hasgpu_rapp.world import ProfilePlace

PROFILE_TIMEOUT_S = 600.0
"""Of one run, waiting for other runs on the device and loading the model included."""
OPERATORS_MAX = 100_000
OPERATOR_FIELDS = ("op", "flops", "input_bytes", "weight_bytes", "output_bytes", "output_shape")


class AgentProfiler:
    """Implements `hasgpu_rapp.profiling.Measurer` over gRPC; one channel a run."""

    def __init__(self, telemetry: Telemetry | None = None) -> None:
        self._telemetry = telemetry

    async def measure(
        self, place: ProfilePlace, spec: FunctionSpec, cells: Sequence[Cell], *, operators: bool
    ) -> AsyncGenerator[ProfilePoint | FunctionOperators | str, None]:
        """Yields points, operators if they are asked for, and progress in words.

        Raises HasgpuError: what the agent said, or that it is away.
        """
        async with open_channel(place.address, telemetry=self._telemetry) as channel:
            stub = node_agent_pb2_grpc.NodeAgentServiceStub(channel)
            request = node_agent_pb2.ProfileRequest(
                spec=wire.spec_to_proto(spec),
                gpu=place.gpu,
                budget_ms=round(PROFILE_BUDGET_S * 1e3),
                configurations=[
                    node_agent_pb2.ProfileConfiguration(batch=batch, sm_pct=sm_pct, quota_permille=quota)
                    for batch, sm_pct, quota in cells
                ],
                in_order=True,
                operators=operators,
            )
            try:
                async for response in stub.Profile(request, timeout=PROFILE_TIMEOUT_S):
                    kind = response.WhichOneof("event")
                    if kind == "point":
                        yield point_from_proto(response.point)
                    elif kind == "operators":
                        yield operators_from_proto(response.operators)
                    else:
                        yield response.progress
            except grpc.aio.AioRpcError as error:
                raise from_rpc_error(error) from error


def point_from_proto(point: node_agent_pb2.ProfilePoint) -> ProfilePoint:
    """Converts a measurement; repetitions left out count as one."""
    return ProfilePoint(
        batch=point.batch,
        sm_pct=point.sm_pct,
        quota_permille=point.quota_permille,
        latency_s=point.latency_ns / 1e9,
        device_time_s=point.device_time_ns / 1e9,
        longest_segment_s=point.longest_segment_ns / 1e9,
        repetitions_count=point.repetitions_count or 1,
    )


def operators_from_proto(table: node_agent_pb2.OperatorTable) -> FunctionOperators:
    """Converts a model's operators; raises InvalidError for one that can't be, or for neither rows nor a reason."""
    if not table.rows and not table.reason:
        raise InvalidError("operators", expected="at least one, or why there are none", got="neither")
    if len(table.rows) > OPERATORS_MAX:
        raise InvalidError("operators", expected=f"at most {OPERATORS_MAX}", got=str(len(table.rows)))
    rows = tuple(
        parse_operator({name: getattr(row, name) for name in OPERATOR_FIELDS} | {"groups": row.groups or 1})
        for row in table.rows
    )
    return FunctionOperators(rows, "" if rows else table.reason)
