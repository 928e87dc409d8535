from __future__ import annotations

import logging
import threading

import pytest
from hasgpu_runtime import telemetry
from hasgpu_runtime.span_export import SpanQueue, queue_bounds
from hasgpu_runtime.tracer import ExportingTelemetry
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

GENEROUS_S = 60


class Collector(SpanExporter):
    """Takes spans unless told to refuse them, one message at a time when held."""

    def __init__(self):
        self.names: list[str] = []
        self.sizes: list[int] = []
        self.refuses = False
        self.free = threading.Event()
        self.free.set()
        self.entered = threading.Event()
        self.was_shut = False

    def export(self, spans):
        self.entered.set()
        assert self.free.wait(GENEROUS_S)
        self.sizes.append(len(spans))
        if self.refuses:
            return SpanExportResult.FAILURE
        self.names.extend(span.name for span in spans)
        return SpanExportResult.SUCCESS

    def shutdown(self):
        self.was_shut = True


@pytest.fixture
def collector():
    return Collector()


def begin(collector, **bounds):
    queue = SpanQueue(collector, where="http://collector:4317", **bounds)
    return queue, ExportingTelemetry(queue, queue=queue)


def test_all_that_ended_is_sent_in_order_at_the_end(collector):
    queue, traces = begin(collector, batch_max=10, delay_ms=60_000)
    for _ in range(25):
        traces.start("gateway.infer").end()
    traces.shutdown()
    assert collector.names == ["gateway.infer"] * 25
    assert max(collector.sizes) <= 10
    assert collector.was_shut
    assert queue.dropped_count == traces.dropped_count == 0
    traces.shutdown()


def test_what_finds_the_queue_full_is_dropped_counted_and_told(collector, caplog):
    queue, traces = begin(collector, queue_max=8, batch_max=4, delay_ms=60_000)
    collector.free.clear()
    for _ in range(4):
        traces.start("gateway.infer").end()
    assert collector.entered.wait(GENEROUS_S)
    for _ in range(11):
        traces.start("gateway.queue").end()
    assert traces.dropped_count == 3, "the collector holds 4, the queue 8"
    with caplog.at_level(logging.WARNING):
        collector.free.set()
        traces.shutdown()
    assert len(collector.names) == 12
    assert caplog.text.count("spans are dropped, 3 so far: more than 8 wait") == 1
    assert "3 spans never reached http://collector:4317" in caplog.text
    assert queue.dropped_count == 3


def test_a_collector_that_is_away_is_told_of_once_and_once_when_it_is_back(collector, caplog):
    queue, traces = begin(collector, batch_max=1, delay_ms=1)
    collector.refuses = True

    def send(count):
        done = len(collector.sizes) + count
        for _ in range(count):
            traces.start("gateway.infer").end()
        waiting = threading.Event()
        for _ in range(GENEROUS_S * 100):
            if len(collector.sizes) >= done and not queue.waiting_count:
                return
            waiting.wait(0.01)
        raise AssertionError("not sent")

    with caplog.at_level(logging.INFO):
        send(5)
        collector.refuses = False
        send(2)
        traces.shutdown()
    assert caplog.text.count("traces can't be sent to http://collector:4317") == 1
    assert caplog.text.count("traces reach http://collector:4317 again; 5 spans were lost so far") == 1
    assert queue.dropped_count == 5


def test_without_a_collector_the_process_ends_in_time_and_says_what_was_lost(monkeypatch, caplog):
    environ = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1", "OTEL_EXPORTER_OTLP_TIMEOUT": "30"}
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    on = telemetry.setup("gateway", environ=environ)
    with caplog.at_level(logging.WARNING):
        on.start("gateway.infer").end()
        on.shutdown()
    assert on.dropped_count == 1
    assert "1 spans never reached http://127.0.0.1:1" in caplog.text


def test_the_bounds_are_the_standard_variables(caplog):
    assert queue_bounds({}) == {"queue_max": 16_384, "batch_max": 1_024, "delay_ms": 500}
    environ = {
        "OTEL_BSP_MAX_QUEUE_SIZE": "5",
        "OTEL_BSP_MAX_EXPORT_BATCH_SIZE": "2",
        "OTEL_BSP_SCHEDULE_DELAY": "soon",
    }
    assert queue_bounds(environ) == {"queue_max": 5, "batch_max": 2, "delay_ms": 500}
    assert "OTEL_BSP_SCHEDULE_DELAY: expected a whole number above 0, got 'soon'" in caplog.text
