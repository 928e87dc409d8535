"""One trace holds a request's way, and batches are linked with their requests."""

from __future__ import annotations

import asyncio

import pytest
from hasgpu_runtime import trace_catalogue as names
from hasgpu_runtime.tracer import ExportingTelemetry
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

TRACE = "0af7651916cd43dd8448eb211c80319c"


@pytest.fixture
def spans() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def telemetry(spans: InMemorySpanExporter):
    telemetry = ExportingTelemetry(SimpleSpanProcessor(spans))
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
    infer, queue, route, batch = (ours[f"gateway.{name}"] for name in ("infer", "queue", "route", "batch"))
    assert infer.parent.span_id == ours[names.INFER].context.span_id
    assert {s.parent.span_id for s in (queue, route, batch)} == {infer.context.span_id}
    routes = [span for span in spans.get_finished_spans() if span.name == "gateway.route"]
    assert {link.context.span_id for link in batch.links} == {span.context.span_id for span in routes}
    assert [link.context.span_id for span in routes for link in span.links] == [batch.context.span_id] * 2
    request = worker.requests[0]
    assert request.traceparent == f"00-{TRACE}-{batch.context.span_id:016x}-01"
    assert request.items[0].traceparent == f"00-{TRACE}-{route.context.span_id:016x}-01"
    assert request.items[1].traceparent.split("-")[1] != TRACE
    for name in ("gateway.infer", "gateway.queue", "gateway.route", "gateway.batch"):
        assert set(names.SPANS[name].attributes) <= set(ours[name].attributes), name
    assert route.attributes[names.BATCH_REQUESTS_COUNT] == 2


async def test_a_failed_request_s_span_says_why(harness, spans) -> None:
    await harness.deploy(harness.make_spec(timeout_ms=30))
    results = await asyncio.gather(harness.infer(), return_exceptions=True)
    assert len(results) == 1
    await harness.until(lambda: any(span.name == "gateway.infer" for span in spans.get_finished_spans()))
    (infer,) = [span for span in spans.get_finished_spans() if span.name == "gateway.infer"]
    assert infer.status.description == "Request timeout expired: 30 ms passed while 'echo' had no instance"


async def test_a_request_that_its_caller_does_not_trace_leaves_no_trace(harness, spans) -> None:
    worker = await harness.worker()
    await harness.deploy(harness.make_spec())
    await harness.announce(worker)
    await harness.inference.ModelInfer(
        harness.request((1.0, 2.0)), metadata=(("traceparent", f"00-{TRACE}-b7ad6b7169203331-00"),), timeout=20
    )
    request = worker.requests[0]
    assert (request.traceparent, request.items[0].traceparent) == ("", "")
    assert not [span for span in spans.get_finished_spans() if span.name in ("gateway.infer", names.INFER)]
