"""Calls workers' services over gRPC, one channel a worker."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import TypeVar

import grpc.aio
from hasgpu.node_agent.v1 import node_agent_pb2, node_agent_pb2_grpc
from hasgpu_runtime.rpc import from_rpc_error, open_channel
from hasgpu_runtime.telemetry import Telemetry
from hasgpu_runtime.wire import batch_observation_from_proto

from hasgpu_node_agent.ports import Measurement, OperatorRow, OperatorTable, WorkerReport

REPORT_TIMEOUT_S = 1.0
DRAIN_MARGIN_S = 2.0
MEASURE_MARGIN_S = 30.0
"""A single repetition at a small quota may take this long past the budget."""

T = TypeVar("T")


class GrpcWorkerClient:
    """Implements `hasgpu_node_agent.ports.WorkerClient`."""

    def __init__(self, telemetry: Telemetry) -> None:
        self._telemetry = telemetry
        self._channels: dict[str, grpc.aio.Channel] = {}

    async def report(self, address: str) -> WorkerReport:
        """Returns counters and new observations; raises HasgpuError."""
        answer = await self._call(
            self._stub(address).GetWorker(node_agent_pb2.GetWorkerRequest(), timeout=REPORT_TIMEOUT_S)
        )
        return WorkerReport(
            in_flight_count=answer.in_flight_count,
            observations=tuple(batch_observation_from_proto(o) for o in answer.observations),
        )

    async def drain(self, address: str, timeout_s: float) -> int:
        """Waits for the batches in flight; returns how many were cut off. Raises HasgpuError."""
        request = node_agent_pb2.DrainWorkerRequest(timeout_ms=round(timeout_s * 1e3))
        answer = await self._call(self._stub(address).DrainWorker(request, timeout=timeout_s + DRAIN_MARGIN_S))
        return answer.abandoned_count

    async def measure(self, address: str, *, batch: int, repetitions_count: int, budget_s: float) -> Measurement:
        """Runs random inputs back to back under the share in force; raises HasgpuError."""
        request = node_agent_pb2.MeasureRequest(
            batch=batch, repetitions_count=repetitions_count, budget_ms=max(1, round(budget_s * 1e3))
        )
        answer = await self._call(self._stub(address).Measure(request, timeout=budget_s + MEASURE_MARGIN_S))
        return Measurement(
            latency_ns=answer.latency_ns,
            device_time_ns=answer.device_time_ns,
            longest_segment_ns=answer.longest_segment_ns,
            repetitions_count=answer.repetitions_count,
        )

    async def list_operators(self, address: str, timeout_s: float) -> OperatorTable:
        """Has the worker export its model; raises HasgpuError."""
        request = node_agent_pb2.ListOperatorsRequest()
        answer = await self._call(self._stub(address).ListOperators(request, timeout=timeout_s))
        rows = tuple(
            OperatorRow(
                row.op,
                row.flops,
                row.input_bytes,
                row.weight_bytes,
                row.output_bytes,
                row.groups,
                tuple(row.output_shape),
            )
            for row in answer.table.rows
        )
        return OperatorTable(rows, answer.table.reason)

    async def forget(self, address: str) -> None:
        """Closes the channel to a worker that has gone."""
        channel = self._channels.pop(address, None)
        if channel is not None:
            await channel.close()

    async def close(self) -> None:
        """Closes all channels."""
        for address in list(self._channels):
            await self.forget(address)

    def _stub(self, address: str) -> node_agent_pb2_grpc.WorkerServiceAsyncStub:
        if address not in self._channels:
            self._channels[address] = open_channel(address, telemetry=self._telemetry)
        return node_agent_pb2_grpc.WorkerServiceStub(self._channels[address])

    async def _call(self, call: Awaitable[T]) -> T:
        try:
            return await call
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from error
