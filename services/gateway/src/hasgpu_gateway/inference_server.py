"""`inference.GRPCInferenceService`: the Open Inference Protocol."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import grpc.aio
from hasgpu.inference.v2 import inference_pb2 as pb
from hasgpu.inference.v2.inference_pb2_grpc import GRPCInferenceServiceServicer
from hasgpu_core.errors import HasgpuError, UnavailableError
from hasgpu_runtime.telemetry import Telemetry

from hasgpu_gateway.directory import Directory
from hasgpu_gateway.lane import Lane
from hasgpu_gateway.lanes import Lanes
from hasgpu_gateway.protocol import build_metadata, build_response, check_version, parse_infer
from hasgpu_gateway.tracing import trace_request

_Context = grpc.aio.ServicerContext[Any, Any]


class InferenceServer(GRPCInferenceServiceServicer):
    """Answers the protocol's six calls."""

    def __init__(self, lanes: Lanes, directory: Directory, telemetry: Telemetry) -> None:
        self._lanes = lanes
        self._directory = directory
        self._telemetry = telemetry
        self._stopping = False

    def stop(self) -> None:
        """From now on the server says that it is not there."""
        self._stopping = True

    async def ServerLive(self, request: pb.ServerLiveRequest, context: _Context) -> pb.ServerLiveResponse:
        """True from the start; UNAVAILABLE while the gateway stops."""
        self._check_here()
        return pb.ServerLiveResponse(live=True)

    async def ServerReady(self, request: pb.ServerReadyRequest, context: _Context) -> pb.ServerReadyResponse:
        """True once functions and routes are known; a function may still be starting or scaled to zero."""
        self._check_here()
        return pb.ServerReadyResponse(ready=self._directory.caught_up)

    async def ModelReady(self, request: pb.ModelReadyRequest, context: _Context) -> pb.ModelReadyResponse:
        """True for every function that exists, instances or not, since a request wakes it; NOT_FOUND otherwise."""
        lane = self._lane(request.name)
        check_version(request.version, request.name, lane.event.revision)
        return pb.ModelReadyResponse(ready=True)

    async def ServerMetadata(self, request: pb.ServerMetadataRequest, context: _Context) -> pb.ServerMetadataResponse:
        """Names the server; no extension of the protocol is offered."""
        return pb.ServerMetadataResponse(name="hasgpu", version=version("hasgpu-gateway"))

    async def ModelMetadata(self, request: pb.ModelMetadataRequest, context: _Context) -> pb.ModelMetadataResponse:
        """Describes a function's tensors."""
        lane = self._lane(request.name)
        check_version(request.version, request.name, lane.event.revision)
        return build_metadata(lane.event)

    async def ModelInfer(self, request: pb.ModelInferRequest, context: _Context) -> pb.ModelInferResponse:
        """Runs a request, waiting for an instance within its deadline if there is none."""
        lane = self._lane(request.model_name)
        trace = trace_request(self._telemetry, request.model_name)
        failure = "the caller went away"
        try:
            call = parse_infer(request, lane.signature)
            revision = lane.signature.revision
            answer = await lane.submit(call, timeout_s=context.time_remaining(), trace=trace)
            response = build_response(call, answer, revision)
            failure = ""
        except HasgpuError as error:
            failure = str(error)
            raise
        finally:
            trace.ended(failure)
        return response

    def _lane(self, name: str) -> Lane:
        self._check_here()
        if not self._directory.caught_up:
            raise UnavailableError("the gateway is starting and does not know its functions yet", retry_after_s=0.5)
        return self._lanes.get(name)

    def _check_here(self) -> None:
        if self._stopping:
            raise UnavailableError("the gateway stops")
