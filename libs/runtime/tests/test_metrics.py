from __future__ import annotations

import asyncio
import socket
import time
import urllib.error
import urllib.request
from concurrent import futures

import grpc
import pytest
from hasgpu_core.errors import UnavailableError
from hasgpu_runtime import metric_catalogue as names
from hasgpu_runtime import metrics as metrics_module
from hasgpu_runtime.metrics import Metrics, Point, Sink
from hasgpu_runtime.metrics_export import Exporters, wants_otlp
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2, metrics_service_pb2_grpc
from prometheus_client.parser import text_string_to_metric_families


def collected(metrics: Metrics) -> dict[str, dict[tuple[str, ...], Point]]:
    return {spec.name: {point.labels: point for point in points} for spec, points in metrics.collect()}


def test_cells_are_bound_once_and_add_up() -> None:
    metrics = Metrics()
    cell = metrics.counter(names.LOG_RECORDS, "error")
    cell.add()
    cell.add(2)
    assert metrics.counter(names.LOG_RECORDS, "error") is cell
    assert collected(metrics)[names.LOG_RECORDS.name][("error",)].value == 3


def test_a_bound_belongs_to_its_bucket() -> None:
    """The share answered in time is read from the bucket of 1.0, which holds what took exactly as long as allowed."""
    metrics = Metrics()
    cell = metrics.histogram(names.REQUEST_SLO_RATIO, "f")
    for value in (1.0, 1.0001, 0.05, 99.0):
        cell.record(value)
    point = collected(metrics)[names.REQUEST_SLO_RATIO.name][("f",)]
    bound = names.SLO_BUCKETS.index(1.0)
    assert sum(point.counts[: bound + 1]) == 2
    assert point.counts[-1] == 1
    assert point.value == pytest.approx(101.0501)


def test_collectors_put_what_is_so_now() -> None:
    metrics = Metrics()
    lengths = {"f": 3, "g": 4}

    def collect(sink: Sink) -> None:
        for function, length in lengths.items():
            sink.put(names.QUEUE_LENGTH, length, function)

    metrics.collect_with(collect)
    metrics.collect_with(collect)  # two lanes of one function add up
    assert collected(metrics)[names.QUEUE_LENGTH.name][("g",)].value == 8
    del lengths["g"]
    assert set(collected(metrics)[names.QUEUE_LENGTH.name]) == {("f",)}


def test_a_collector_that_fails_does_not_hide_the_others(caplog: pytest.LogCaptureFixture) -> None:
    metrics = Metrics()

    def broken(_sink: Sink) -> None:
        raise ValueError("broken")

    metrics.collect_with(broken)
    metrics.collect_with(lambda sink: sink.put(names.SCALING_PAUSED, 1))
    assert collected(metrics)[names.SCALING_PAUSED.name][()].value == 1
    assert "a collector of metrics failed" in caplog.text


def test_a_deleted_functions_series_go() -> None:
    metrics = Metrics()
    for function in ("f", "g"):
        metrics.histogram(names.REQUEST_DURATION, function).record(0.1)
        metrics.histogram(names.BATCH_ITEMS, function).record(2)
    metrics.counter(names.LOG_RECORDS, "f").add()  # another attribute of the same value stays
    metrics.forget("function", "f")
    found = collected(metrics)
    assert set(found[names.REQUEST_DURATION.name]) == {("g",)}
    assert set(found[names.BATCH_ITEMS.name]) == {("g",)}
    assert set(found[names.LOG_RECORDS.name]) == {("f",)}


def test_series_are_bounded(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(metrics_module, "MAX_SERIES", 3)
    metrics = Metrics()
    for number in range(5):
        metrics.histogram(names.REQUEST_DURATION, f"f{number}").record(0.1)
    metrics.collect_with(lambda sink: [sink.put(names.QUEUE_LENGTH, 1, f"f{number}") for number in range(4)] and None)
    assert len(collected(metrics)[names.REQUEST_DURATION.name]) == 3
    found = collected(metrics)
    assert len(found[names.QUEUE_LENGTH.name]) == 3
    assert found[names.SERIES_DROPPED.name][(names.REQUEST_DURATION.name,)].value == 2
    assert caplog.text.count(names.REQUEST_DURATION.name) == 1


@pytest.mark.parametrize(
    "use",
    [
        lambda metrics: metrics.counter(names.REQUEST_DURATION, "f"),
        lambda metrics: metrics.histogram(names.REQUEST_DURATION),
        lambda metrics: metrics.histogram(names.QUEUE_LENGTH, "f"),
        lambda metrics: Sink(metrics).put(names.REQUEST_DURATION, 1, "f"),
        lambda metrics: Sink(metrics).put(names.QUEUE_LENGTH, 1, "f", "g"),
    ],
)
def test_what_the_catalogue_does_not_allow_is_refused(use) -> None:
    with pytest.raises(TypeError, match=r"hasgpu\.\S+: expected a "):
        use(Metrics())


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def exporters(metrics: Metrics, *, port: int = 0, environ: dict[str, str] | None = None) -> Exporters:
    return Exporters(
        metrics, service="gateway", instance="host-1", environ=environ or {}, listen="127.0.0.1:0", port=port
    )


def scrape(port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as answer:
        return answer.read().decode()


async def test_every_metric_has_its_name_at_the_endpoint() -> None:
    """`MetricSpec.prometheus` foresees what OpenTelemetry's exporter makes of name, unit and kind."""
    metrics = Metrics()

    def collect(sink: Sink) -> None:
        for spec in names.CATALOGUE.values():
            if spec.kind is not names.Kind.HISTOGRAM:
                sink.put(spec, 1, *spec.attributes)

    metrics.collect_with(collect)
    for spec in names.CATALOGUE.values():
        if spec.kind is names.Kind.HISTOGRAM:
            metrics.histogram(spec, *spec.attributes).record(0.5)
    made = exporters(metrics, port=free_port())
    async with made.running(time.time_ns):
        text = await asyncio.to_thread(scrape, made._port)
    found = {sample.name for family in text_string_to_metric_families(text) for sample in family.samples}
    assert found == names.series_names() - {"up"}
    assert 'service_name="hasgpu-gateway"' in text
    assert made.ending is not None
    await asyncio.to_thread(made.ending.join, 60)
    with pytest.raises(urllib.error.URLError):
        scrape(made._port)


async def test_a_scrape_reads_on_the_event_loop() -> None:
    metrics = Metrics()
    loop = asyncio.get_running_loop()
    seen = []

    def collect(sink: Sink) -> None:
        seen.append(asyncio.get_running_loop() is loop)
        sink.put(names.SCALING_PAUSED, 0)

    metrics.collect_with(collect)
    made = exporters(metrics, port=free_port())
    async with made.running(time.time_ns):
        assert "hasgpu_scaling_paused 0.0" in await asyncio.to_thread(scrape, made._port)
    assert seen == [True]
    assert made.ending is not None
    await asyncio.to_thread(made.ending.join, 60)


async def test_a_port_that_is_taken_is_told() -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        with pytest.raises(
            UnavailableError, match=rf"127\.0\.0\.1:{port}: Address already in use.*HASGPU_METRICS_PORT"
        ):
            async with exporters(Metrics(), port=port).running(time.time_ns):
                pass


@pytest.mark.parametrize(
    ("environ", "wanted"),
    [
        ({}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://jaeger:4317"}, False),
        ({"OTEL_METRICS_EXPORTER": "otlp"}, True),
        ({"OTEL_EXPORTER_OTLP_METRICS_ENDPOINT": "http://collector:4317"}, True),
        ({"OTEL_METRICS_EXPORTER": "otlp", "OTEL_SDK_DISABLED": "true"}, False),
        ({"OTEL_METRICS_EXPORTER": "none", "OTEL_EXPORTER_OTLP_METRICS_ENDPOINT": "http://c:4317"}, False),
    ],
)
def test_when_metrics_go_over_otlp(environ: dict[str, str], wanted: bool) -> None:
    assert wants_otlp(environ) is wanted


class Collector(metrics_service_pb2_grpc.MetricsServiceServicer):
    def __init__(self) -> None:
        self.requests: list[metrics_service_pb2.ExportMetricsServiceRequest] = []

    def Export(self, request, context):
        self.requests.append(request)
        return metrics_service_pb2.ExportMetricsServiceResponse()


async def test_the_last_values_go_over_otlp(monkeypatch: pytest.MonkeyPatch) -> None:
    server = grpc.server(futures.ThreadPoolExecutor(1))
    collector = Collector()
    metrics_service_pb2_grpc.add_MetricsServiceServicer_to_server(collector, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    endpoint = f"http://127.0.0.1:{port}"
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_METRICS_ENDPOINT", endpoint)
    metrics = Metrics()
    async with exporters(metrics, environ={"OTEL_EXPORTER_OTLP_METRICS_ENDPOINT": endpoint}).running(time.time_ns):
        metrics.histogram(names.REQUEST_DURATION, "f").record(0.25)
        metrics.counter(names.LOG_RECORDS, "error").add(7)
    server.stop(0).wait(60)
    (resource,) = collector.requests[-1].resource_metrics
    assert {a.key: a.value.string_value for a in resource.resource.attributes}["service.instance.id"] == "host-1"
    sent = {metric.name: metric for metric in resource.scope_metrics[0].metrics}
    (histogram,) = sent["hasgpu.request.duration"].histogram.data_points
    assert (histogram.count, histogram.sum) == (1, 0.25)
    assert sent["hasgpu.request.duration"].unit == "s"
    assert sent["hasgpu.log.records"].sum.data_points[0].as_double == 7
