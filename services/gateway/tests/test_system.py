"""The gateway asks everybody how they are."""

from __future__ import annotations

import asyncio

import grpc
import pytest
from hasgpu.system.v1 import system_pb2 as pb
from hasgpu.system.v1.system_pb2_grpc import SystemServiceStub
from hasgpu_runtime.diagnosis import Reporter


async def test_reports_are_gathered_over_grpc(harness) -> None:
    answering = asyncio.create_task(Reporter("scaler", "h-1", harness.clock, 0).answer(harness.bus))
    await asyncio.sleep(0.05)
    answer = await SystemServiceStub(harness.channel).Diagnose(pb.DiagnoseRequest(wait_ms=300), timeout=30)
    assert [(report.service, report.instance) for report in answer.reports] == [("scaler", "h-1")]
    assert not answer.nodes
    answering.cancel()


async def test_a_wait_out_of_bounds_is_refused(harness) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await SystemServiceStub(harness.channel).Diagnose(pb.DiagnoseRequest(wait_ms=50), timeout=30)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "100..10000" in (caught.value.details() or "")
