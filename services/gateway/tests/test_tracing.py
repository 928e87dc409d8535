"""One trace holds a request's way, and batches are linked with their requests."""

from __future__ import annotations

import asyncio

import pytest
from hasgpu_runtime.telemetry import ExportingTelemetry
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

TRACE = "0af7651916cd43dd8448eb211c80319c"


@pytest.fixture
def spans() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def telemetry(spans: InMemorySpanExporter):
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(spans))
    telemetry = ExportingTelemetry(provider)
    yield telemetry
    telemetry.shutdown()


async def test_a_request_s_trace_goes_from_its_caller_to_the_worker(harness, spans) -> None:
    worker = await harness.worker()
    await harness.deploy(harness.make_spec())
    first = harness.inference.ModelInfer(
        harness.request((1.0, 2.0)), metadata=(("traceparent", f"00-{TRACE}-b7ad6b7169203331-01"),), timeout=20
    )
    await harness.until(lambda: harness.lane().queued_count == 1)
    second = harness.infer()
    await harness.until(lambda: harness.lane().queued_count == 2)
    await harness.announce(worker)
    await asyncio.gather(first, second)
    await harness.until(lambda: sum(span.name == "gateway.infer" for span in spans.get_finished_spans()) == 2)

    ours = {s.name: s for s in spans.get_finished_spans() if f"{s.context.trace_id:032x}" == TRACE}
    assert {"gateway.infer", "gateway.queue", "gateway.batch"} <= set(ours)
    infer, queue, batch = ours["gateway.infer"], ours["gateway.queue"], ours["gateway.batch"]
    assert queue.parent.span_id == batch.parent.span_id == infer.context.span_id
    assert len(batch.links) == 2
    request = worker.requests[0]
    assert request.traceparent == f"00-{TRACE}-{batch.context.span_id:016x}-01"
    assert request.items[0].traceparent == f"00-{TRACE}-{infer.context.span_id:016x}-01"
    assert request.items[1].traceparent.split("-")[1] != TRACE


async def test_a_failed_request_s_span_says_why(harness, spans) -> None:
    await harness.deploy(harness.make_spec(timeout_ms=30))
    results = await asyncio.gather(harness.infer(), return_exceptions=True)
    assert len(results) == 1
    await harness.until(lambda: any(span.name == "gateway.infer" for span in spans.get_finished_spans()))
    (infer,) = [span for span in spans.get_finished_spans() if span.name == "gateway.infer"]
    assert infer.status.description == "Request timeout expired"
