"""Metrics out of the process: a Prometheus endpoint and, by the standard variables, OTLP; both OpenTelemetry's own.

Both exporters run on threads of their own and ask for the metrics through `_Source`, which reads them on the event
loop's thread. Their modules are imported only when one is wanted.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Any

from hasgpu_core.errors import UnavailableError

from hasgpu_runtime.metric_catalogue import Kind, MetricSpec
from hasgpu_runtime.metrics import Metrics, Point

if TYPE_CHECKING:
    from opentelemetry.sdk.metrics.export import Metric, MetricReader, MetricsData
    from opentelemetry.sdk.resources import Resource

_log = logging.getLogger(__name__)

COLLECT_TIMEOUT_S = 5.0
"""A scrape fails when the event loop has not answered for so long; that is news too."""
MILLIS = 1_000


Collected = list[tuple[MetricSpec, tuple[Point, ...]]]


class _Source:
    """Reads the metrics on the event loop's thread and makes OpenTelemetry's data of them on the caller's."""

    def __init__(self, metrics: Metrics, resource: Resource, unix_ns: Callable[[], int]) -> None:
        self._metrics = metrics
        self._resource = resource
        self._unix_ns = unix_ns
        self._start_unix_ns = unix_ns()
        self._loop = asyncio.get_running_loop()

    def read(self) -> MetricsData | None:
        """Returns all metrics; None when the event loop has ended. Raises TimeoutError when it does not answer."""
        if self._loop.is_closed():
            return None
        reading = asyncio.run_coroutine_threadsafe(self._collect(), self._loop)
        try:
            collected = reading.result(COLLECT_TIMEOUT_S)
        finally:
            reading.cancel()
        from opentelemetry.sdk.metrics.export import MetricsData, ResourceMetrics, ScopeMetrics
        from opentelemetry.sdk.util.instrumentation import InstrumentationScope

        now_unix_ns = self._unix_ns()
        found = [self._metric(spec, points, now_unix_ns) for spec, points in collected]
        scope = ScopeMetrics(InstrumentationScope("hasgpu"), found, "")
        return MetricsData([ResourceMetrics(self._resource, [scope], "")])

    async def _collect(self) -> Collected:
        return list(self._metrics.collect())

    def _metric(self, spec: MetricSpec, points: tuple[Point, ...], now_unix_ns: int) -> Metric:
        from opentelemetry.sdk.metrics import export

        cumulative = export.AggregationTemporality.CUMULATIVE
        data: export.DataT
        if spec.kind is Kind.HISTOGRAM:
            data = export.Histogram([self._distribution(spec, point, now_unix_ns) for point in points], cumulative)
        else:
            numbers = [
                export.NumberDataPoint(_attributes(spec, point), self._start_unix_ns, now_unix_ns, point.value)
                for point in points
            ]
            is_counter = spec.kind is Kind.COUNTER
            data = export.Sum(numbers, cumulative, is_monotonic=True) if is_counter else export.Gauge(numbers)
        return export.Metric(spec.name, spec.description, spec.unit, data)

    def _distribution(self, spec: MetricSpec, point: Point, now_unix_ns: int) -> Any:
        from opentelemetry.sdk.metrics.export import HistogramDataPoint

        return HistogramDataPoint(
            attributes=_attributes(spec, point),
            start_time_unix_nano=self._start_unix_ns,
            time_unix_nano=now_unix_ns,
            count=sum(point.counts),
            sum=point.value,
            bucket_counts=point.counts,
            explicit_bounds=spec.buckets,
            min=None,  # type: ignore[arg-type]  # optional in OTLP, and not kept
            max=None,  # type: ignore[arg-type]  # see above
        )


def _attributes(spec: MetricSpec, point: Point) -> dict[str, str]:
    return dict(zip(spec.attributes, point.labels, strict=True))


class Exporters:
    """The exporters of a process.

    Args:
        metrics: What to export.
        service: "gateway", ...; exported as `hasgpu-<service>`.
        instance: Tells replicas apart.
        environ: OTLP is on when OTEL_METRICS_EXPORTER is "otlp" or OTEL_EXPORTER_OTLP_METRICS_ENDPOINT is set, and off
            in any case when OTEL_SDK_DISABLED is "true".
        listen: host:port of the service; the endpoint listens on that host.
        port: Of the Prometheus endpoint, `http://host:port/metrics`; 0: none.
    """

    def __init__(
        self, metrics: Metrics, *, service: str, instance: str, environ: Mapping[str, str], listen: str, port: int
    ) -> None:
        self.metrics = metrics
        self._service = service
        self._instance = instance
        self._pushes = wants_otlp(environ)
        self._host = listen.rpartition(":")[0].strip("[]")
        self._port = port
        self.ending: threading.Thread | None = None
        """What stops the endpoint at the end of `running`: its own thread looks only twice a second."""

    @asynccontextmanager
    async def running(self, unix_ns: Callable[[], int]) -> AsyncIterator[None]:
        """Exports for the length of the block, on the event loop; does nothing when nothing is wanted.

        Raises:
            UnavailableError: The port is taken.
        """
        if not self._port and not self._pushes:
            yield
            return
        from hasgpu_runtime.otel_resource import resource

        source = _Source(self.metrics, resource(self._service, instance=self._instance), unix_ns)
        async with AsyncExitStack() as closing:
            if self._port:
                closing.callback(self._serve(source))
            if self._pushes:
                # In a thread: the last values are read on the event loop.
                closing.push_async_callback(asyncio.to_thread, self._push(source))
            yield

    def _serve(self, source: _Source) -> Callable[[], None]:
        """Begins to serve; returns what ends it."""
        from opentelemetry.exporter.prometheus import PrometheusMetricReader
        from prometheus_client import CollectorRegistry, ProcessCollector, start_http_server

        registry = CollectorRegistry()
        reader = PrometheusMetricReader(registry=registry, scope_info_enabled=False)
        _read_from(source, reader)
        ProcessCollector(registry=registry)
        try:
            server, thread = start_http_server(self._port, addr=self._host, registry=registry)
        except OSError as error:
            raise UnavailableError(
                f"the metrics can't be served on {self._host}:{self._port}: {error.strerror}; "
                "choose another HASGPU_METRICS_PORT"
            ) from error

        def end() -> None:
            server.shutdown()
            server.server_close()
            thread.join()
            reader.shutdown()

        self.ending = threading.Thread(target=end, name="metrics end", daemon=True)
        _log.info("metrics are served on http://%s:%d/metrics", self._host, self._port)
        return self.ending.start

    def _push(self, source: _Source) -> Callable[[], None]:
        """Begins to send; returns what sends the rest, within seconds, and ends it."""
        from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter
        from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader

        reader = PeriodicExportingMetricReader(OTLPMetricExporter())
        _read_from(source, reader)
        _log.info("metrics go out over OTLP")
        return lambda: reader.shutdown(2 * MILLIS)


def _read_from(source: _Source, reader: MetricReader) -> None:
    """Has a reader collect from `source` in place of the SDK's instruments.

    The specification knows this as a MetricProducer; the Python SDK has no public way to register one, so this makes
    the call that its MeterProvider makes.
    """

    def collect(_reader: MetricReader, timeout_millis: float = 10_000) -> MetricsData | None:
        try:
            return source.read()
        except TimeoutError:
            _log.warning("metrics can't be read now: the event loop does not answer")
            from opentelemetry.sdk.metrics import MetricsTimeoutError

            raise MetricsTimeoutError("the event loop does not answer") from None

    reader._set_collect_callback(collect)  # type: ignore[arg-type]  # None, for no data, is allowed by `collect`


def wants_otlp(environ: Mapping[str, str]) -> bool:
    """Whether metrics are to be sent over OTLP.

    OTEL_EXPORTER_OTLP_ENDPOINT alone does not mean it: the collector of traces (Jaeger) takes no metrics.
    """
    if environ.get("OTEL_SDK_DISABLED", "").lower() == "true" or environ.get("OTEL_METRICS_EXPORTER", "") == "none":
        return False
    return environ.get("OTEL_METRICS_EXPORTER", "") == "otlp" or bool(
        environ.get("OTEL_EXPORTER_OTLP_METRICS_ENDPOINT")
    )
