"""ScalerService: what is wanted, why, and changing it by hand."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from hasgpu.scaler.v1 import scaler_pb2, scaler_pb2_grpc
from hasgpu_core.errors import InvalidError, NotFoundError, UnavailableError
from hasgpu_core.policy.choice import LIVE_POLICIES
from hasgpu_runtime import wire

from hasgpu_scaler.adapters.recording_files import read_chunks
from hasgpu_scaler.app import ScalerApp
from hasgpu_scaler.decisions import KEPT_COUNT, LoggedDecision
from hasgpu_scaler.manual import DEFAULT_HOLD_S, ManualRequest
from hasgpu_scaler.records import DesiredRecord


class ScalerServicer(scaler_pb2_grpc.ScalerServiceServicer):
    """Asks the shell; errors of the domain become gRPC status in `hasgpu_runtime.rpc`."""

    def __init__(self, app: ScalerApp) -> None:
        self._app = app

    async def GetDesiredState(
        self, request: scaler_pb2.GetDesiredStateRequest, context: Any
    ) -> scaler_pb2.GetDesiredStateResponse:
        """Returns one function's desired state, or all; raises NotFoundError, UnavailableError."""
        await self._app.refresh()
        core = self._app.core
        names = [request.function] if request.function else sorted(core.functions)
        return scaler_pb2.GetDesiredStateResponse(
            states=[self._state(core.shown(name)) for name in names], leader=self._app.leading
        )

    async def WatchDesiredState(
        self, request: scaler_pb2.WatchDesiredStateRequest, context: Any
    ) -> AsyncIterator[scaler_pb2.WatchDesiredStateResponse]:
        """Yields every state as it is, then each change; a function that was deleted comes once with no instances.

        Raises NotFoundError, and UnavailableError where another process leads: only the leader sees each change.
        """
        core = self._app.core
        if not self._app.leading:
            raise UnavailableError("this scaler does not lead now", retry_after_s=1.0)
        if request.function:
            core.shown(request.function)
        told: dict[str, scaler_pb2.DesiredState] = {}
        async for _ in self._app.changes():
            for name in sorted({*core.functions, *core.records}):
                record = core.records.get(name, DesiredRecord(name))
                gone = bool(record.deleted_unix_ns) and name not in core.functions
                if request.function not in ("", name) or (gone and name not in told):
                    continue
                state = self._state(record)
                if told.get(name) != state:
                    told[name] = state
                    yield scaler_pb2.WatchDesiredStateResponse(state=state)
                if gone:
                    del told[name]

    async def ExplainDecisions(
        self, request: scaler_pb2.ExplainDecisionsRequest, context: Any
    ) -> scaler_pb2.ExplainDecisionsResponse:
        """Returns the last decisions of a function, newest first; raises NotFoundError, InvalidError."""
        if request.limit > KEPT_COUNT:
            raise InvalidError("limit", expected=f"at most {KEPT_COUNT}", got=str(request.limit))
        if request.function not in self._app.core.functions:
            raise self._app.core.not_found(request.function)
        found = self._app.log.newest(request.function, limit=request.limit, include_idle=request.include_idle)
        return scaler_pb2.ExplainDecisionsResponse(decisions=[_decision(logged) for logged in found])

    async def Pause(self, request: scaler_pb2.PauseRequest, context: Any) -> scaler_pb2.PauseResponse:
        """Stops or resumes deciding; may be repeated. Raises NotFoundError, UnavailableError."""
        await self._app.pause(request.function, paused=request.paused)
        return scaler_pb2.PauseResponse()

    async def ManualScale(self, request: scaler_pb2.ManualScaleRequest, context: Any) -> scaler_pb2.ManualScaleResponse:
        """Scales by hand; raises NotFoundError, InvalidError, CapacityError, UnavailableError."""
        record = await self._app.scale_by_hand(
            ManualRequest(
                function=request.function,
                instance=request.instance,
                request_permille=request.request_permille if request.HasField("request_permille") else None,
                limit_permille=request.limit_permille if request.HasField("limit_permille") else None,
                instances_count=request.instances if request.HasField("instances") else None,
                hold_s=request.hold_s or DEFAULT_HOLD_S,
            )
        )
        return scaler_pb2.ManualScaleResponse(state=self._state(record))

    async def GetPolicy(self, request: scaler_pb2.GetPolicyRequest, context: Any) -> scaler_pb2.GetPolicyResponse:
        """Returns which policy decides, and those there are; raises UnavailableError."""
        await self._app.refresh()
        return scaler_pb2.GetPolicyResponse(
            policy=self._app.core.policy.name, available=LIVE_POLICIES, configured=self._app.configured_policy
        )

    async def SetPolicy(self, request: scaler_pb2.SetPolicyRequest, context: Any) -> scaler_pb2.SetPolicyResponse:
        """Lets another policy decide; may be repeated. Raises NotFoundError, UnavailableError."""
        return scaler_pb2.SetPolicyResponse(policy=await self._app.set_policy(request.policy))

    async def ReadRecording(
        self, request: scaler_pb2.ReadRecordingRequest, context: Any
    ) -> AsyncIterator[scaler_pb2.ReadRecordingResponse]:
        """Yields the segments of this process's host that hold a stretch of time; raises NotFoundError."""
        files = self._app.recordings
        if files is None:
            raise NotFoundError("recording", "", "this scaler records nothing: HASGPU_SCALER_RECORDING_MIB is 0")
        chosen = files.segments(request.from_unix_ns, request.to_unix_ns)
        if not chosen:
            raise NotFoundError("recording", "of that time", f"segments lie in {files.folder}")
        chunks = read_chunks(chosen)
        while chunk := await asyncio.to_thread(next, chunks, b""):
            yield scaler_pb2.ReadRecordingResponse(data=chunk)

    def _state(self, record: DesiredRecord) -> scaler_pb2.DesiredState:
        return scaler_pb2.DesiredState(
            function=record.function,
            revision=record.revision,
            instances=[wire.desired_instance_to_proto(item) for item in record.instances],
            paused=record.paused or self._app.core.paused,
            held_until_unix_ns=self._app.core.held_until_unix_ns(record),
        )


def _decision(logged: LoggedDecision) -> scaler_pb2.Decision:
    decision = logged.decision
    return scaler_pb2.Decision(
        function=decision.function,
        decided_unix_ns=logged.decided_unix_ns,
        revision=logged.revision,
        actions=[
            scaler_pb2.Action(
                kind=action.kind.value,
                instance=action.instance,
                sm_pct=action.sm_pct,
                from_permille=action.from_permille,
                to_permille=action.to_permille,
            )
            for action in decision.actions
        ],
        reason=decision.reason,
        origin=logged.origin,
        observed_rps=decision.observed_rps or 0.0,
        predicted_rps=decision.predicted_rps or 0.0,
        capacity_rps=decision.capacity_rps,
        queued_count=decision.queued_items_count,
        p95_ms=round(decision.p95_s * 1e3) if decision.p95_s is not None else 0,
        slo_ms=logged.slo_ms,
        policy=logged.policy,
    )
