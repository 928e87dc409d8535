from __future__ import annotations

import json
import logging
import threading
from concurrent import futures

import grpc
import grpc.aio
import pytest
from hasgpu.gateway.v1 import gateway_pb2, gateway_pb2_grpc
from hasgpu_core.errors import NotFoundError, UnavailableError
from hasgpu_runtime import telemetry
from hasgpu_runtime.logs import JsonFormatter, TextFormatter
from hasgpu_runtime.rpc import create_server, open_channel
from hasgpu_runtime.sampling import Sampler
from hasgpu_runtime.telemetry import Telemetry, current_traceparent
from hasgpu_runtime.tracer import ExportingTelemetry
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture
def spans() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def traces(spans) -> Telemetry:
    return ExportingTelemetry(SimpleSpanProcessor(spans))


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": ""},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:4317", "OTEL_SDK_DISABLED": "true"},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:4317", "OTEL_TRACES_EXPORTER": "none"},
    ],
)
def test_switched_off_it_starts_no_thread_and_says_nothing(environ):
    before = threading.active_count()
    off = telemetry.setup("test", environ=environ)
    assert not off.enabled
    assert threading.active_count() == before
    with off.span("scaler.decide", parent=PARENT, links=[PARENT]) as span:
        span.set("a", 1)
        assert span.traceparent == off.traceparent() == current_traceparent() == ""
        assert not span.recording
        assert not off.recording
    off.start("gateway.queue").end()
    assert off.record("gateway.queue", start_unix_ns=1, end_unix_ns=2) == ""
    assert off.inject({"a": "b"}) == {"a": "b"}
    off.shutdown()


def test_spans_nest_and_cross_borders_as_traceparent(traces, spans):
    with traces.span("scaler.decide", attributes={"function": "f"}) as outer:
        headers = traces.inject({"a": "b"})
        assert headers == {"a": "b", "traceparent": outer.traceparent}
        with traces.span("scheduler.plan"):
            pass
    assert traces.inject() == {}
    with traces.span("agent.apply_plan", parent=traces.extract(headers)):
        pass
    inner, decide, applied = spans.get_finished_spans()
    assert decide.attributes == {"function": "f"}
    assert inner.parent.span_id == applied.parent.span_id == decide.context.span_id
    assert inner.context.trace_id == applied.context.trace_id == decide.context.trace_id


def test_a_span_can_be_recorded_after_the_fact_with_links(traces, spans):
    context = traces.record(
        "gateway.queue",
        start_unix_ns=1_000,
        end_unix_ns=3_000,
        parent=PARENT,
        links=[PARENT, "rubbish"],
        failure="late",
    )
    (span,) = spans.get_finished_spans()
    assert (span.start_time, span.end_time) == (1_000, 3_000)
    assert f"{span.parent.trace_id:032x}-{span.parent.span_id:016x}" in PARENT
    assert len(span.links) == 1
    assert context.split("-")[1] == PARENT.split("-")[1]
    assert (span.status.is_ok, span.status.description) == (False, "late")


def test_an_unsampled_parent_silences_its_children(traces, spans):
    unsampled = PARENT[:-2] + "00"
    with traces.span("worker.batch", parent=unsampled) as span:
        assert span.traceparent == unsampled
        assert not traces.recording
        assert traces.inject() == {"traceparent": unsampled}
        assert not traces.start("worker.execute").recording
    assert spans.get_finished_spans() == ()


def test_what_is_no_traceparent_is_ignored(traces, spans):
    wrong = ("", "x", "00-" + "0" * 32 + "-" + "0" * 16 + "-01", PARENT.replace("a", "z"), "ff" + PARENT[2:])
    for rubbish in (*wrong, PARENT + "-more"):
        with traces.span("worker.batch", parent=traces.extract({"traceparent": rubbish})):
            pass
    assert all(span.parent is None for span in spans.get_finished_spans())


def test_an_exception_marks_the_span_failed(traces, spans):
    with pytest.raises(NotFoundError), traces.span("scaler.decide"):
        raise NotFoundError("function", "f")
    (span,) = spans.get_finished_spans()
    assert "'f' is not found" in span.status.description


async def test_a_call_is_a_child_of_its_caller(traces, spans):
    class Service(gateway_pb2_grpc.FunctionServiceServicer):
        async def GetFunction(self, request, context):
            return gateway_pb2.GetFunctionResponse()

        async def WatchFunctions(self, request, context):
            yield gateway_pb2.WatchFunctionsResponse()

    server = create_server(address="127.0.0.1:0", telemetry=traces)
    gateway_pb2_grpc.add_FunctionServiceServicer_to_server(Service(), server)
    await server.start()
    try:
        async with open_channel(server.address, telemetry=traces) as channel:
            stub = gateway_pb2_grpc.FunctionServiceStub(channel)
            with traces.span("scaler.decide"):
                await stub.GetFunction(gateway_pb2.GetFunctionRequest())
                async for _ in stub.WatchFunctions(gateway_pb2.WatchFunctionsRequest()):
                    pass
    finally:
        await server.stop(None)
    found = {(span.kind.name, span.name): span for span in spans.get_finished_spans()}
    caller = found["INTERNAL", "scaler.decide"]
    for method in ("GetFunction", "WatchFunctions"):
        name = f"hasgpu.gateway.v1.FunctionService/{method}"
        client, server_side = found["CLIENT", name], found["SERVER", name]
        assert client.parent.span_id == caller.context.span_id
        assert server_side.parent.span_id == client.context.span_id
        assert server_side.attributes["rpc.system"] == "grpc"
        assert server_side.attributes["rpc.service"] == "hasgpu.gateway.v1.FunctionService"
        assert server_side.attributes["rpc.method"] == method
        assert server_side.attributes["rpc.grpc.status_code"] == 0


async def test_an_rpcs_span_has_its_status_and_fails_only_when_the_server_is_at_fault(traces, spans):
    class Service(gateway_pb2_grpc.FunctionServiceServicer):
        async def GetFunction(self, request, context):
            raise NotFoundError("function", "f") if request.name == "f" else UnavailableError("the store is away")

    server = create_server(address="127.0.0.1:0", telemetry=traces)
    gateway_pb2_grpc.add_FunctionServiceServicer_to_server(Service(), server)
    await server.start()
    try:
        async with open_channel(server.address) as channel:
            stub = gateway_pb2_grpc.FunctionServiceStub(channel)
            for name in ("f", "g"):
                with pytest.raises(grpc.aio.AioRpcError):
                    await stub.GetFunction(gateway_pb2.GetFunctionRequest(name=name))
    finally:
        await server.stop(None)
    missing, away = spans.get_finished_spans()
    assert (missing.attributes["rpc.grpc.status_code"], missing.status.status_code.name) == (5, "UNSET")
    assert (away.attributes["rpc.grpc.status_code"], away.status.status_code.name) == (14, "ERROR")
    assert "the store is away" in away.status.description


async def test_calls_of_a_trace_that_is_not_kept_leave_none_on_the_other_side(spans):
    class Service(gateway_pb2_grpc.FunctionServiceServicer):
        async def GetFunction(self, request, context):
            return gateway_pb2.GetFunctionResponse()

    nothing = ExportingTelemetry(SimpleSpanProcessor(spans), sampler=Sampler(ratio=0.0))
    everything = ExportingTelemetry(SimpleSpanProcessor(spans))
    server = create_server(address="127.0.0.1:0", telemetry=everything)
    gateway_pb2_grpc.add_FunctionServiceServicer_to_server(Service(), server)
    await server.start()
    try:
        async with open_channel(server.address, telemetry=nothing) as channel:
            with nothing.span("rapp.train"):
                await gateway_pb2_grpc.FunctionServiceStub(channel).GetFunction(gateway_pb2.GetFunctionRequest())
    finally:
        await server.stop(None)
    assert spans.get_finished_spans() == ()


def test_a_decision_is_kept_whatever_the_ratio(spans):
    traces = ExportingTelemetry(SimpleSpanProcessor(spans), sampler=Sampler(ratio=0.0))
    with traces.span("gateway.infer"), traces.span("scaler.decide") as decision:
        assert decision.recording
        traces.record("scheduler.plan", start_unix_ns=1, end_unix_ns=2)
    plan, decide = spans.get_finished_spans()
    assert decide.parent is None, "what is not kept is nobody's parent"
    assert plan.parent.span_id == decide.context.span_id
    off = ExportingTelemetry(SimpleSpanProcessor(spans), sampler=Sampler(ratio=0.0, decisions=False))
    assert not off.start("scaler.decide").recording


def test_spans_reach_a_collector_under_the_services_name(monkeypatch):
    received: list[trace_service_pb2.ExportTraceServiceRequest] = []

    class Collector(trace_service_pb2_grpc.TraceServiceServicer):
        def Export(self, request, context):
            received.append(request)
            return trace_service_pb2.ExportTraceServiceResponse()

    server = grpc.server(futures.ThreadPoolExecutor(2))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(Collector(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    environ = {"OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{port}"}
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=lab,service.version=7")
    on = telemetry.setup("scaler", environ=environ, instance="a", attributes={"hasgpu.gpu": "gpu0"})
    assert on.enabled
    with on.span("scaler.decide"):
        pass
    on.shutdown()
    server.stop(None).wait()
    (resource,) = [spans for request in received for spans in request.resource_spans]
    attributes = {item.key: item.value.string_value for item in resource.resource.attributes}
    assert attributes["service.name"] == "hasgpu-scaler"
    assert attributes["service.instance.id"] == "a"
    assert attributes["service.version"] == "7", "the environment has the last word"
    assert attributes["deployment.environment.name"] == "lab"
    assert attributes["hasgpu.gpu"] == "gpu0"
    assert attributes["host.name"]
    assert [span.name for scope in resource.scope_spans for span in scope.spans] == ["scaler.decide"]


def test_log_lines_carry_the_trace(traces):
    record = logging.LogRecord("hasgpu_scaler.app", logging.INFO, "", 0, "scaled %s", ("f",), None)
    assert TextFormatter("scaler", traces.traceparent).format(record).endswith("INFO scaler app: scaled f")
    with traces.span("scaler.decide") as span:
        text = TextFormatter("scaler", traces.traceparent).format(record)
        fields = json.loads(JsonFormatter("scaler", traces.traceparent).format(record))
    trace_id = span.traceparent.split("-")[1]
    assert text.endswith(f"scaled f [trace {trace_id}]")
    assert fields["trace_id"] == trace_id
    assert (fields["level"], fields["service"], fields["message"]) == ("info", "scaler", "scaled f")
