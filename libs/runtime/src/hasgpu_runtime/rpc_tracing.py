"""Client interceptors that put the current trace context on outgoing calls; only made when tracing is on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import grpc.aio

from hasgpu_runtime.telemetry import TRACEPARENT, Telemetry


def client_interceptors(telemetry: Telemetry) -> Sequence[grpc.aio.ClientInterceptor]:
    """Returns one interceptor for each shape of call."""
    return (_UnaryUnary(telemetry), _UnaryStream(telemetry), _StreamUnary(telemetry), _StreamStream(telemetry))


class _Injecting:
    def __init__(self, telemetry: Telemetry) -> None:
        self._telemetry = telemetry

    def _with_context(self, details: grpc.aio.ClientCallDetails) -> grpc.aio.ClientCallDetails:
        context = self._telemetry.traceparent()
        if not context:
            return details
        metadata = grpc.aio.Metadata(*(details.metadata or ()))
        metadata.add(TRACEPARENT, context)
        return grpc.aio.ClientCallDetails(
            details.method, details.timeout, metadata, details.credentials, details.wait_for_ready
        )


class _UnaryUnary(_Injecting, grpc.aio.UnaryUnaryClientInterceptor):
    async def intercept_unary_unary(
        self, continuation: Callable[..., Any], client_call_details: grpc.aio.ClientCallDetails, request: Any
    ) -> Any:
        """Adds the context."""
        return await continuation(self._with_context(client_call_details), request)


class _UnaryStream(_Injecting, grpc.aio.UnaryStreamClientInterceptor):
    async def intercept_unary_stream(
        self, continuation: Callable[..., Any], client_call_details: grpc.aio.ClientCallDetails, request: Any
    ) -> Any:
        """Adds the context."""
        return await continuation(self._with_context(client_call_details), request)


class _StreamUnary(_Injecting, grpc.aio.StreamUnaryClientInterceptor):
    async def intercept_stream_unary(
        self, continuation: Callable[..., Any], client_call_details: grpc.aio.ClientCallDetails, request_iterator: Any
    ) -> Any:
        """Adds the context."""
        return await continuation(self._with_context(client_call_details), request_iterator)


class _StreamStream(_Injecting, grpc.aio.StreamStreamClientInterceptor):
    async def intercept_stream_stream(
        self, continuation: Callable[..., Any], client_call_details: grpc.aio.ClientCallDetails, request_iterator: Any
    ) -> Any:
        """Adds the context."""
        return await continuation(self._with_context(client_call_details), request_iterator)
