"""Spans of RPCs on both of their sides, and the trace context that goes with a call; only made when tracing is on.

Names and attributes are those of OpenTelemetry: https://opentelemetry.io/docs/specs/semconv/rpc/grpc/. A call on whose
caller's side no trace is kept costs the server a look at its metadata and one random number.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import grpc
import grpc.aio
from hasgpu_core.errors import HasgpuError

from hasgpu_runtime import trace_catalogue as catalogue
from hasgpu_runtime.rpc_errors import status_of
from hasgpu_runtime.telemetry import TRACEPARENT, Span, Telemetry

_FAULTS = frozenset(
    {
        grpc.StatusCode.UNKNOWN,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.UNIMPLEMENTED,
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DATA_LOSS,
    }
)
"""Codes by which a server's span is a failed one; with the others the caller was at fault."""

_Context = grpc.aio.ServicerContext[Any, Any]


class ServerMethod:
    """A method of a server that is traced.

    Args:
        telemetry: Where spans go; switched on.
        path: "/package.Service/Method".
    """

    def __init__(self, telemetry: Telemetry, path: str) -> None:
        self._telemetry = telemetry
        self._name = path.lstrip("/")
        self._attributes = _attributes(self._name)

    def span(self, context: _Context) -> AbstractContextManager[Span]:
        """Opens the span of a call around its handler, as a child of the caller's if it has one."""
        parent: str | None = None
        for key, value in context.invocation_metadata() or ():
            if key == TRACEPARENT:
                parent = str(value)
                break
        return self._telemetry.rpc_span(self._name, kind="server", parent=parent, attributes=self._attributes)

    @contextmanager
    def outcome(self, span: Span, context: _Context) -> Iterator[None]:
        """Notes how a call that is recorded ends."""
        span.set(catalogue.PEER_ADDRESS, context.peer())
        try:
            yield
        except asyncio.CancelledError:
            span.set(catalogue.RPC_STATUS, _number(grpc.StatusCode.CANCELLED))
            raise
        except Exception as error:
            code = _code_of(error, context)
            span.set(catalogue.RPC_STATUS, _number(code))
            if code in _FAULTS:
                span.fail(str(error) or type(error).__name__)
            raise
        span.set(catalogue.RPC_STATUS, 0)


def _code_of(error: Exception, context: _Context) -> grpc.StatusCode:
    """Returns the status that the caller will get."""
    if isinstance(error, HasgpuError):
        return status_of(error)
    if isinstance(error, grpc.aio.AioRpcError):
        return error.code()
    if isinstance(error, grpc.aio.AbortError):
        said: Any = context.code()
        return next((code for code in grpc.StatusCode if said in (code, _number(code))), grpc.StatusCode.UNKNOWN)
    return grpc.StatusCode.INTERNAL


def _number(code: grpc.StatusCode) -> int:
    number: int = code.value[0]
    return number


def _attributes(name: str) -> dict[str, str]:
    service, _, method = name.rpartition("/")
    return {catalogue.RPC_SYSTEM: "grpc", catalogue.RPC_SERVICE: service, catalogue.RPC_METHOD: method}


def client_interceptors(telemetry: Telemetry, address: str) -> Sequence[grpc.aio.ClientInterceptor]:
    """Returns one interceptor for each shape of call to a server at `address`."""
    return tuple(kind(telemetry, address) for kind in (_UnaryUnary, _UnaryStream, _StreamUnary, _StreamStream))


class _Calling:
    """Calls made in a trace that is kept have a span; all calls pass the context on."""

    def __init__(self, telemetry: Telemetry, address: str) -> None:
        self._telemetry = telemetry
        self._address = address

    async def _call(
        self, continuation: Callable[..., Any], details: grpc.aio.ClientCallDetails, request: Any, *, unary: bool
    ) -> Any:
        if not self._telemetry.recording:
            context = self._telemetry.traceparent()
            return await continuation(_with_context(details, context) if context else details, request)
        method: str | bytes = details.method
        name = (method if isinstance(method, str) else method.decode()).lstrip("/")
        attributes = {**_attributes(name), catalogue.SERVER_ADDRESS: self._address}
        if not unary:
            # A stream's span lasts until it is open; what its server does is in the server's span.
            with self._telemetry.rpc_span(name, kind="client", attributes=attributes) as span:
                return await continuation(_with_context(details, span.traceparent), request)
        with self._telemetry.rpc_span(name, kind="client", attributes=attributes) as span:
            call = await continuation(_with_context(details, span.traceparent), request)
            try:
                code: grpc.StatusCode = await call.code()
            except asyncio.CancelledError:
                call.cancel()
                span.set(catalogue.RPC_STATUS, _number(grpc.StatusCode.CANCELLED))
                raise
            span.set(catalogue.RPC_STATUS, _number(code))
            if code is not grpc.StatusCode.OK:
                span.fail(str(await call.details()))
            return call


def _with_context(details: grpc.aio.ClientCallDetails, context: str) -> grpc.aio.ClientCallDetails:
    metadata = grpc.aio.Metadata(*(details.metadata or ()))
    metadata.add(TRACEPARENT, context)
    return grpc.aio.ClientCallDetails(
        details.method, details.timeout, metadata, details.credentials, details.wait_for_ready
    )


class _UnaryUnary(_Calling, grpc.aio.UnaryUnaryClientInterceptor):
    async def intercept_unary_unary(
        self, continuation: Callable[..., Any], client_call_details: grpc.aio.ClientCallDetails, request: Any
    ) -> Any:
        """Makes the call in a span."""
        return await self._call(continuation, client_call_details, request, unary=True)


class _UnaryStream(_Calling, grpc.aio.UnaryStreamClientInterceptor):
    async def intercept_unary_stream(
        self, continuation: Callable[..., Any], client_call_details: grpc.aio.ClientCallDetails, request: Any
    ) -> Any:
        """Makes the call in a span."""
        return await self._call(continuation, client_call_details, request, unary=False)


class _StreamUnary(_Calling, grpc.aio.StreamUnaryClientInterceptor):
    async def intercept_stream_unary(
        self, continuation: Callable[..., Any], client_call_details: grpc.aio.ClientCallDetails, request_iterator: Any
    ) -> Any:
        """Opens the stream in a span."""
        return await self._call(continuation, client_call_details, request_iterator, unary=False)


class _StreamStream(_Calling, grpc.aio.StreamStreamClientInterceptor):
    async def intercept_stream_stream(
        self, continuation: Callable[..., Any], client_call_details: grpc.aio.ClientCallDetails, request_iterator: Any
    ) -> Any:
        """Opens the stream in a span."""
        return await self._call(continuation, client_call_details, request_iterator, unary=False)
