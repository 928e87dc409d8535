"""One trace covers a request from gateway to device; another a scaling decision to the quota in force."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hasgpu_system import System, eventually
from otlp_sink import OtlpSink, Span

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]

REQUEST = {"gateway.infer", "gateway.queue", "worker.batch", "worker.gate_wait", "worker.execute"}
VERTICAL = {"scaler.decide", "agent.apply_vertical", "agent.applied"}
HORIZONTAL = {"scaler.decide", "scheduler.plan", "agent.apply_plan", "agent.applied"}


def trace_with(sink: OtlpSink, names: set[str]) -> list[Span]:
    for spans in sink.traces().values():
        if names <= {span.name for span in spans}:
            return spans
    return []


def assert_connected(spans: list[Span]) -> None:
    ids = {span.span_id for span in spans}
    orphans = [span.name for span in spans if span.parent_id and span.parent_id not in ids]
    assert orphans == []


def test_a_request_is_one_trace(system: System, sink: OtlpSink) -> None:
    system.infer_text("tricky", "traced")

    def found() -> list[Span]:
        return trace_with(sink, REQUEST)

    spans = eventually(found, within_s=20)
    assert_connected(spans)
    services = {span.service for span in spans}
    assert {"hasgpu-gateway", "hasgpu-worker"} <= services
    by_name = {span.name: span for span in spans}
    assert by_name["gateway.infer"].start_ns <= by_name["worker.batch"].start_ns
    assert by_name["worker.gate_wait"].end_ns <= by_name["worker.execute"].end_ns <= by_name["gateway.infer"].end_ns


@pytest.mark.parametrize(
    ("change", "names"), [(["--quota", "70"], VERTICAL), (["--quota", "30", "--instances", "2"], HORIZONTAL)]
)
def test_a_scaling_decision_is_one_trace(
    scale: Callable[..., None], sink: OtlpSink, change: list[str], names: set[str]
) -> None:
    scale("tricky", *change, "--hold", "5")

    def found() -> list[Span]:
        return trace_with(sink, names)

    spans = eventually(found, within_s=40)
    assert_connected(spans)
    assert {"hasgpu-scaler", "hasgpu-node-agent"} <= {span.service for span in spans}
    scale("tricky", "--quota", "30", "--instances", "1", "--hold", "1")
