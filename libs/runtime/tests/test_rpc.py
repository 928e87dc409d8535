from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator

import grpc
import grpc.aio
import pytest
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from hasgpu.gateway.v1 import gateway_pb2, gateway_pb2_grpc
from hasgpu_core import errors
from hasgpu_runtime import rpc
from hasgpu_runtime.rpc_errors import STATUS
from hasgpu_runtime.testing import TcpProxy

EXAMPLES = [
    errors.InvalidError("slo_ms", expected="1..600000", got="0"),
    errors.ProfileFileError(3, "latency_us", expected="a number above 0", got="nan"),
    errors.NotFoundError("function", "minilm"),
    errors.AlreadyExistsError("function", "minilm"),
    errors.ConflictError("hasgpu:plan:a", expected_revision=3, actual_revision=4),
    errors.FencedError("scaler", token=1, current_token=2),
    errors.UnavailableError("no instance", retry_after_s=0.25),
    errors.UnavailableError("no instance"),
    errors.QueueFullError("full", retry_after_s=1.5),
    errors.DeadlineError("too late"),
    errors.CapacityError("nothing free"),
    errors.ModelError("the handler raised"),
    errors.UnsupportedError("not here"),
    errors.IntegrityError(expected_sha256="a" * 64, got_sha256="b" * 64),
    errors.HasgpuError("anything"),
]


class Service(gateway_pb2_grpc.FunctionServiceServicer):
    def __init__(self) -> None:
        self.error: Exception | None = None
        self.closed = asyncio.Event()

    async def GetFunction(self, request, context):
        if self.error is not None:
            raise self.error
        return gateway_pb2.GetFunctionResponse()

    async def ListFunctions(self, request, context):
        await context.abort(grpc.StatusCode.PERMISSION_DENIED, "by hand")

    async def DeployFunction(self, request_iterator, context):
        async for _ in request_iterator:
            pass
        raise errors.AlreadyExistsError("function", "x")

    async def WatchFunctions(self, request, context):
        try:
            yield gateway_pb2.WatchFunctionsResponse(deleted=True)
            if self.error is not None:
                raise self.error
            await asyncio.Event().wait()
        finally:
            self.closed.set()


@pytest.fixture
async def service() -> AsyncIterator[tuple[Service, rpc.Server, grpc.aio.Channel]]:
    servicer = Service()
    server = rpc.create_server(address="127.0.0.1:0", max_message_bytes=10_000)
    gateway_pb2_grpc.add_FunctionServiceServicer_to_server(servicer, server)
    await server.start()
    async with rpc.open_channel(server.address) as channel:
        yield servicer, server, channel
    await server.stop(None)


def test_every_domain_error_has_a_status():
    kinds = {kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, errors.HasgpuError)}
    assert kinds == set(STATUS)


@pytest.mark.parametrize("error", EXAMPLES, ids=lambda error: type(error).__name__)
async def test_a_domain_error_crosses_the_wire(service, error):
    servicer, _, channel = service
    servicer.error = error
    stub = gateway_pb2_grpc.FunctionServiceStub(channel)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.GetFunction(gateway_pb2.GetFunctionRequest())
    assert caught.value.code() is STATUS[type(error)]
    rebuilt = rpc.from_rpc_error(caught.value)
    assert type(rebuilt) is type(error)
    assert str(rebuilt) == str(error)
    if isinstance(error, errors.UnavailableError):
        assert rebuilt.retry_after_s == error.retry_after_s


async def test_a_retry_hint_is_also_there_for_strangers(service):
    servicer, _, channel = service
    servicer.error = errors.UnavailableError("busy", retry_after_s=0.25)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await gateway_pb2_grpc.FunctionServiceStub(channel).GetFunction(gateway_pb2.GetFunctionRequest())
    metadata = dict(caught.value.trailing_metadata())
    assert metadata["retry-after-ms"] == "250"
    status = status_pb2.Status.FromString(metadata["grpc-status-details-bin"])
    info = error_details_pb2.RetryInfo()
    assert status.details[0].Unpack(info)
    assert info.retry_delay.ToMilliseconds() == 250


async def test_an_unforeseen_error_is_internal_logged_and_breaks_nothing(service, caplog):
    servicer, _, channel = service
    stub = gateway_pb2_grpc.FunctionServiceStub(channel)
    servicer.error = KeyError("secret detail")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.GetFunction(gateway_pb2.GetFunctionRequest())
    assert caught.value.code() is grpc.StatusCode.INTERNAL
    assert "secret detail" not in caught.value.details()
    assert any(record.exc_info and "GetFunction" in record.getMessage() for record in caplog.records)
    servicer.error = None
    await stub.GetFunction(gateway_pb2.GetFunctionRequest())


async def test_a_message_too_long_for_a_header_is_cut(service):
    servicer, _, channel = service
    for text in ("модель " * 5_000, "x" * 50_000):
        servicer.error = errors.ModelError(text)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await gateway_pb2_grpc.FunctionServiceStub(channel).GetFunction(
                gateway_pb2.GetFunctionRequest(), timeout=60
            )
        assert caught.value.code() is grpc.StatusCode.INTERNAL
        assert caught.value.details().removesuffix(" ...") in text
        assert len(caught.value.details()) > 1_000


async def test_an_abort_by_hand_passes_through(service, caplog):
    _, _, channel = service
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await gateway_pb2_grpc.FunctionServiceStub(channel).ListFunctions(gateway_pb2.ListFunctionsRequest())
    assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
    assert not caplog.records


async def test_streams_map_errors_too(service):
    servicer, _, channel = service
    stub = gateway_pb2_grpc.FunctionServiceStub(channel)
    servicer.error = errors.NotFoundError("function", "x")
    call = stub.WatchFunctions(gateway_pb2.WatchFunctionsRequest())
    assert (await call.read()).deleted
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call.read()
    assert isinstance(rpc.from_rpc_error(caught.value), errors.NotFoundError)

    async def parts():
        yield gateway_pb2.DeployFunctionRequest(chunk=b"x")

    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.DeployFunction(parts())
    assert isinstance(rpc.from_rpc_error(caught.value), errors.AlreadyExistsError)


async def test_a_cancelled_stream_ends_its_handler(service):
    servicer, _, channel = service
    call = gateway_pb2_grpc.FunctionServiceStub(channel).WatchFunctions(gateway_pb2.WatchFunctionsRequest())
    await call.read()
    call.cancel()
    await asyncio.wait_for(servicer.closed.wait(), 10)


async def test_calls_to_a_peer_that_vanished_fail_without_a_deadline(service):
    _, server, _ = service
    async with (
        asyncio.timeout(30),
        TcpProxy(server.address) as proxy,
        rpc.open_channel(proxy.address, keepalive_s=1) as channel,
    ):
        watched = gateway_pb2_grpc.FunctionServiceStub(channel).WatchFunctions(gateway_pb2.WatchFunctionsRequest())
        assert (await watched.read()).deleted
        proxy.passes.clear()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await watched.read()
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_a_quiet_stream_outlives_many_pings(service):
    servicer, server, _ = service
    async with rpc.open_channel(server.address, keepalive_s=2 * rpc.SHORTEST_PING_INTERVAL_S) as channel:
        watched = gateway_pb2_grpc.FunctionServiceStub(channel).WatchFunctions(gateway_pb2.WatchFunctionsRequest())
        assert (await watched.read()).deleted
        reading = asyncio.ensure_future(watched.read())
        ended, _ = await asyncio.wait({reading}, timeout=5)
        assert not ended, "the server took the pings for abuse"
        assert not servicer.closed.is_set()
        watched.cancel()
        await asyncio.wait({reading})


async def test_a_slow_greeting_does_not_break_the_attempt_off(service):
    _, server, _ = service
    async with TcpProxy(server.address) as proxy:
        proxy.passes.clear()
        asyncio.get_running_loop().call_later(1, proxy.passes.set)
        async with rpc.open_channel(proxy.address) as channel:
            stub = gateway_pb2_grpc.FunctionServiceStub(channel)
            await stub.GetFunction(gateway_pb2.GetFunctionRequest(), wait_for_ready=True, timeout=60)
        assert proxy.connections_count == 1


async def test_an_oversize_message_is_refused(service):
    _, _, channel = service
    stub = gateway_pb2_grpc.FunctionServiceStub(channel)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.GetFunction(gateway_pb2.GetFunctionRequest(name="x" * 20_000))
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_health_follows_set_serving(service):
    _, server, channel = service
    stub = health_pb2_grpc.HealthStub(channel)
    request = health_pb2.HealthCheckRequest(service="hasgpu.gateway.v1.FunctionService")
    assert (await stub.Check(request)).status == health_pb2.HealthCheckResponse.NOT_SERVING
    await server.set_serving(True)
    assert (await stub.Check(request)).status == health_pb2.HealthCheckResponse.SERVING
    assert (await stub.Check(health_pb2.HealthCheckRequest())).status == health_pb2.HealthCheckResponse.SERVING


async def test_reflection_lists_the_services(service):
    _, _, channel = service
    call = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo()
    await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
    names = {item.name for item in (await call.read()).list_services_response.service}
    assert {"hasgpu.gateway.v1.FunctionService", "grpc.health.v1.Health"} <= names
    call.cancel()


async def test_a_taken_port_is_a_clear_error(service):
    _, server, _ = service
    with pytest.raises(errors.UnavailableError, match=server.address):
        rpc.create_server(address=server.address)
    with pytest.raises(errors.InvalidError, match="host:port"):
        rpc.create_server(address="nonsense")
