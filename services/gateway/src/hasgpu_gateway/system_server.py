"""`hasgpu.system.v1.SystemService`: tells how the whole installation is, through the one address that users have."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc.aio
from hasgpu.system.v1 import system_pb2 as pb
from hasgpu.system.v1.system_pb2_grpc import SystemServiceServicer
from hasgpu_core.errors import InvalidError
from hasgpu_core.ports import Bus, Clock
from hasgpu_runtime import diagnosis
from hasgpu_runtime.diagnosis import Look

_Context = grpc.aio.ServicerContext[Any, Any]

DEFAULT_WAIT_MS = 1_000
LEAST_WAIT_MS = 100
LONGEST_WAIT_MS = 10_000


class SystemServer(SystemServiceServicer):
    """Asks everybody on the bus.

    Args:
        bus: Where the services are.
        clock: Of the gateway; others' clocks are compared with it.
        looks: What it looks at itself.
    """

    def __init__(self, bus: Bus, clock: Clock, looks: tuple[Look, ...]) -> None:
        self._bus = bus
        self._clock = clock
        self._looks = looks

    async def Diagnose(self, request: pb.DiagnoseRequest, context: _Context) -> pb.DiagnoseResponse:
        """Waits for the answers, and looks at streams and heartbeats meanwhile."""
        wait_ms = request.wait_ms or DEFAULT_WAIT_MS
        if not LEAST_WAIT_MS <= wait_ms <= LONGEST_WAIT_MS:
            raise InvalidError("wait_ms", expected=f"0 or {LEAST_WAIT_MS}..{LONGEST_WAIT_MS}", got=str(request.wait_ms))
        reports, checks, nodes = await asyncio.gather(
            diagnosis.ask_all(self._bus, self._clock, wait_s=wait_ms / 1e3),
            diagnosis.look_at(self._looks),
            diagnosis.nodes(self._bus, self._clock),
        )
        return pb.DiagnoseResponse(reports=reports, checks=[check.to_proto() for check in checks], nodes=nodes)
