"""gRPC servers and channels as every service has them: errors mapped, contexts traced, health and reflection served."""

from __future__ import annotations

import inspect
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import aclosing
from typing import Any, NoReturn
from urllib.parse import quote

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from hasgpu_core.errors import HasgpuError, InvalidError, UnavailableError

from hasgpu_runtime.rpc_errors import STATUS, from_rpc_error, status_of, trailing_metadata
from hasgpu_runtime.telemetry import Telemetry

__all__ = ["MAX_MESSAGE_BYTES", "STATUS", "Server", "create_server", "from_rpc_error", "open_channel", "status_of"]

_log = logging.getLogger(__name__)

MAX_MESSAGE_BYTES = 64 * 1024 * 1024
KEEPALIVE_S = 5.0
"""A connection with calls on it is pinged so often, and given up when no answer comes for so long again."""
CONNECT_TIMEOUT_S = 5.0
"""Of one attempt to connect, the HTTP/2 greeting included: a busy host may take a while to answer."""
FIRST_RECONNECT_S = 0.1
LONGEST_RECONNECT_S = 1.0
SHORTEST_PING_INTERVAL_S = 0.5
"""A server breaks a connection off on which pings come faster."""
LONGEST_DETAILS_BYTES = 6_000
"""Of a status message on the wire; clients refuse headers of more than 8 to 16 KiB with an error of their own."""
_UNTRACED = ("grpc.health.", "grpc.reflection.")

_Context = grpc.aio.ServicerContext[Any, Any]


def create_server(
    *, address: str, max_message_bytes: int = MAX_MESSAGE_BYTES, telemetry: Telemetry | None = None
) -> Server:
    """Returns a server bound to `address` that does not serve yet; call it inside the event loop.

    Add servicers with their generated `add_...Servicer_to_server`, then `start`. Handlers raise domain errors; see
    `rpc_errors` for what the caller gets.

    Args:
        address: host:port; port 0 takes a free one, found in `Server.address`.
        max_message_bytes: Larger messages are refused with RESOURCE_EXHAUSTED.
        telemetry: None: RPCs are not traced.

    Raises:
        UnavailableError: The address can't be listened on.
    """
    inner = grpc.aio.server(
        options=(
            ("grpc.max_receive_message_length", max_message_bytes),
            ("grpc.max_send_message_length", max_message_bytes),
            ("grpc.so_reuseport", 0),
            # Without these the pings of `open_channel` would count as abuse (by default one in 5 minutes is allowed).
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.http2.min_ping_interval_without_data_ms", _ms(SHORTEST_PING_INTERVAL_S)),
        )
    )
    server = Server(inner, telemetry=telemetry)
    server.add_insecure_port(address)
    return server


class Server(grpc.aio.Server):
    """A grpc.aio server whose handlers are wrapped once, when they are added, so that a call costs no interceptor."""

    def __init__(self, inner: grpc.aio.Server, *, telemetry: Telemetry | None) -> None:
        self._inner = inner
        self._telemetry = telemetry if telemetry is not None and telemetry.enabled else None
        self._health = health.aio.HealthServicer()
        self._services: list[str] = []
        self._address = ""

    @property
    def address(self) -> str:
        """host:port listened on."""
        return self._address

    def add_insecure_port(self, address: str) -> int:
        """Takes the address and returns its port; raises UnavailableError when that fails."""
        return self._bound(address, self._inner.add_insecure_port)

    def add_secure_port(self, address: str, server_credentials: grpc.ServerCredentials) -> int:
        """Takes the address for TLS and returns its port; raises UnavailableError when that fails."""
        return self._bound(address, lambda where: self._inner.add_secure_port(where, server_credentials))

    def _bound(self, address: str, bind: Callable[[str], int]) -> int:
        host, _, wanted = address.rpartition(":")
        if not host or not wanted.isdigit():
            raise InvalidError("address to listen on", expected="host:port", got=repr(address))
        try:
            port = bind(address)
        except RuntimeError as error:
            raise UnavailableError(f"can't listen on {address}: is another process using the port?") from error
        self._address = f"{host}:{port}"
        return port

    async def wait_for_termination(self, timeout: float | None = None) -> bool:
        """Waits until the server has stopped; True when the time ran out first."""
        return await self._inner.wait_for_termination(timeout)

    async def start(self) -> None:
        """Serves; health says NOT_SERVING until `set_serving(True)`."""
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self)
        await self.set_serving(False)
        reflection.enable_server_reflection([*self._services, reflection.SERVICE_NAME], self)
        await self._inner.start()

    async def set_serving(self, serving: bool) -> None:
        """Sets what health checks answer, for the server and each of its services."""
        status = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        for service in ("", *self._services):
            await self._health.set(service, status)

    async def stop(self, grace: float | None = 1.0) -> None:
        """Refuses new calls, gives running ones `grace` seconds, then cuts them off."""
        await self._health.enter_graceful_shutdown()
        await self._inner.stop(grace)

    def add_generic_rpc_handlers(self, generic_rpc_handlers: Iterable[grpc.GenericRpcHandler]) -> None:
        """Adds handlers, wrapped."""
        self._inner.add_generic_rpc_handlers(
            tuple(_WrappedGeneric(handler, self._telemetry) for handler in generic_rpc_handlers)
        )

    def add_registered_method_handlers(
        self, service_name: str, method_handlers: Mapping[str, grpc.RpcMethodHandler[Any, Any]]
    ) -> None:
        """Adds handlers of a service, wrapped, and remembers its name for health and reflection."""
        if service_name not in self._services:
            self._services.append(service_name)
        self._inner.add_registered_method_handlers(
            service_name,
            {
                method: wrap_handler(handler, f"/{service_name}/{method}", self._telemetry)
                for method, handler in method_handlers.items()
            },
        )


class _WrappedGeneric(grpc.GenericRpcHandler):
    """For handlers that are looked up by call rather than registered."""

    def __init__(self, inner: grpc.GenericRpcHandler, telemetry: Telemetry | None) -> None:
        self._inner = inner
        self._telemetry = telemetry

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[Any, Any] | None:
        """Looks a handler up and wraps it."""
        handler = self._inner.service(handler_call_details)
        return wrap_handler(handler, handler_call_details.method, self._telemetry) if handler is not None else None


def wrap_handler(
    handler: grpc.RpcMethodHandler[Any, Any], method: str, telemetry: Telemetry | None
) -> grpc.RpcMethodHandler[Any, Any]:
    """Returns the handler with errors mapped and, with telemetry, a server span around each call."""
    if telemetry is not None and method.lstrip("/").startswith(_UNTRACED):
        telemetry = None
    codecs = (handler.request_deserializer, handler.response_serializer)
    if handler.response_streaming:
        if handler.request_streaming:
            stream = _wrap_stream(handler.stream_stream, method, telemetry)
            return grpc.stream_stream_rpc_method_handler(stream, *codecs)
        return grpc.unary_stream_rpc_method_handler(_wrap_stream(handler.unary_stream, method, telemetry), *codecs)
    if handler.request_streaming:
        return grpc.stream_unary_rpc_method_handler(_wrap_unary(handler.stream_unary, method, telemetry), *codecs)
    return grpc.unary_unary_rpc_method_handler(_wrap_unary(handler.unary_unary, method, telemetry), *codecs)


def _wrap_unary(behavior: Any, method: str, telemetry: Telemetry | None) -> Callable[[Any, _Context], Awaitable[Any]]:
    async def plain(request: Any, context: _Context) -> Any:
        try:
            return await behavior(request, context)
        except Exception as error:  # noqa: BLE001  the border: every error becomes a status, and is logged if unforeseen
            await _abort(context, method, error)

    if telemetry is None:
        return plain

    from hasgpu_runtime.rpc_tracing import ServerMethod

    traces = ServerMethod(telemetry, method)

    async def traced(request: Any, context: _Context) -> Any:
        try:
            with traces.span(context) as span:
                if not span.recording:
                    return await behavior(request, context)
                with traces.outcome(span, context):
                    return await behavior(request, context)
        except Exception as error:  # noqa: BLE001  as above
            await _abort(context, method, error)

    return traced


def _wrap_stream(behavior: Any, method: str, telemetry: Telemetry | None) -> Callable[[Any, _Context], Any]:
    """Handlers that yield stay generators; those that write to the context stay coroutines."""
    if not inspect.isasyncgenfunction(behavior):
        return _wrap_unary(behavior, method, telemetry)

    async def plain(request: Any, context: _Context) -> AsyncIterator[Any]:
        try:
            async with aclosing(behavior(request, context)) as responses:
                async for response in responses:
                    yield response
        except Exception as error:  # noqa: BLE001  as above
            await _abort(context, method, error)

    if telemetry is None:
        return plain

    from hasgpu_runtime.rpc_tracing import ServerMethod

    traces = ServerMethod(telemetry, method)

    async def traced(request: Any, context: _Context) -> AsyncIterator[Any]:
        try:
            async with aclosing(behavior(request, context)) as responses:
                with traces.span(context) as span, traces.outcome(span, context):
                    async for response in responses:
                        yield response
        except Exception as error:  # noqa: BLE001  as above
            await _abort(context, method, error)

    return traced


def short_details(text: str) -> str:
    """Returns a message that a status can carry: it travels as a header, percent-encoded, and headers have a bound."""
    if len(quote(text)) <= LONGEST_DETAILS_BYTES:
        return text
    return text.encode(errors="replace")[: LONGEST_DETAILS_BYTES // 3].decode(errors="ignore") + " ..."


async def _abort(context: _Context, method: str, error: Exception) -> NoReturn:
    """Ends a call with the status of an error."""
    if isinstance(error, grpc.aio.AbortError):
        raise error
    if isinstance(error, grpc.aio.AioRpcError):
        error = from_rpc_error(error)
    if isinstance(error, HasgpuError):
        await context.abort(status_of(error), short_details(str(error)), trailing_metadata(error))
    _log.error("%s failed", method, exc_info=error)
    await context.abort(
        grpc.StatusCode.INTERNAL, f"{method} failed: {type(error).__name__}; the server's log says more"
    )


def open_channel(
    address: str,
    *,
    max_message_bytes: int = MAX_MESSAGE_BYTES,
    telemetry: Telemetry | None = None,
    keepalive_s: float = KEEPALIVE_S,
) -> grpc.aio.Channel:
    """Returns a channel that connects on first use and, when its peer is lost, again within a second of its return.

    A peer that vanishes without a word (its host or the network is gone) is noticed by the pings that are sent while
    calls are under way: these then fail with UNAVAILABLE instead of waiting for their deadlines.

    Args:
        address: host:port.
        max_message_bytes: Larger messages are refused with RESOURCE_EXHAUSTED.
        telemetry: When switched on, each call carries the trace context that is current where it is made.
        keepalive_s: Between two pings, and how long an answer may take; not below the server's
            `SHORTEST_PING_INTERVAL_S`.
    """
    interceptors: Sequence[grpc.aio.ClientInterceptor] = ()
    if telemetry is not None and telemetry.enabled:
        from hasgpu_runtime.rpc_tracing import client_interceptors

        interceptors = client_interceptors(telemetry, address)
    return grpc.aio.insecure_channel(
        address,
        options=(
            ("grpc.max_receive_message_length", max_message_bytes),
            ("grpc.max_send_message_length", max_message_bytes),
            ("grpc.initial_reconnect_backoff_ms", _ms(FIRST_RECONNECT_S)),
            ("grpc.max_reconnect_backoff_ms", _ms(LONGEST_RECONNECT_S)),
            # Against its name this only bounds an attempt (https://github.com/grpc/grpc/issues/12830): one that is
            # refused is repeated after the back-off above.
            ("grpc.min_reconnect_backoff_ms", _ms(CONNECT_TIMEOUT_S)),
            ("grpc.keepalive_time_ms", _ms(keepalive_s)),
            ("grpc.keepalive_timeout_ms", _ms(keepalive_s)),
            # Counts for keepalive pings too, seen with grpc 1.85; 60 s by default.
            ("grpc.http2.ping_timeout_ms", _ms(keepalive_s)),
            # By default pings stop after two on a stream that is quiet, as one to an idle worker is.
            ("grpc.http2.max_pings_without_data", 0),
            ("grpc.enable_http_proxy", 0),
        ),
        interceptors=interceptors,
    )


def _ms(duration_s: float) -> int:
    return round(duration_s * 1e3)
