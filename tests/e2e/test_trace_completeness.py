"""Of many traced requests, batched together, every trace is whole; a caller's own decision to trace or not is kept."""

from __future__ import annotations

import secrets
from collections.abc import Sequence

import grpc
import pytest
from hasgpu_runtime.trace_catalogue import REQUEST_CHAIN, chain_faults, orphans
from hasgpu_system import System, eventually, text_request
from otlp_sink import OtlpSink, Span

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]

REQUESTS_COUNT = 100
AT_ONCE = 10


def infer_traced(system: System, count: int, *, flags: str) -> list[str]:
    """Sends requests, `AT_ONCE` at a time, each in a trace of its own; returns the traces' ids."""
    ids = [secrets.token_hex(16) for _ in range(count)]
    with system.stub() as stub:
        for begin in range(0, count, AT_ONCE):
            calls: list[grpc.Future] = []
            for trace_id in ids[begin : begin + AT_ONCE]:
                context = f"00-{trace_id}-{secrets.token_hex(8)}-{flags}"
                request = text_request("tricky", f"traced {trace_id}")
                calls.append(stub.ModelInfer.future(request, timeout=60, metadata=(("traceparent", context),)))
            for call in calls:
                call.result(timeout=60)
    return ids


def test_every_traced_request_leaves_a_whole_trace(system: System, sink: OtlpSink) -> None:
    untraced = infer_traced(system, AT_ONCE, flags="00")
    traced = infer_traced(system, REQUESTS_COUNT, flags="01")

    def complete() -> list[list[Span]]:
        traces = sink.traces()
        found = [traces[trace_id] for trace_id in traced if faults(traces.get(trace_id, ())) == ()]
        return found if len(found) == len(traced) else []

    try:
        traces: list[list[Span]] = eventually(complete, within_s=60)
    except AssertionError as error:
        seen = sink.traces()
        lacking = {found for trace_id in traced if (found := faults(seen.get(trace_id, ())))}
        raise AssertionError(f"incomplete traces lack {sorted(lacking)}") from error
    assert not set(untraced) & set(sink.traces())

    ids = {span.span_id: span for spans in traces for span in spans}
    batches = [span for span in ids.values() if span.name == "gateway.batch"]
    assert sum(len(batch.links) for batch in batches) == REQUESTS_COUNT
    for spans in traces:
        (route,) = (span for span in spans if span.name == "gateway.route")
        (batch,) = (ids[linked] for linked in route.links)
        assert route.span_id in batch.links
        (worker,) = (span for span in spans if span.name == "worker.batch")
        assert worker.links == (batch.span_id,)


def faults(spans: Sequence[Span]) -> tuple[str, ...]:
    """What a trace lacks, loose ends included."""
    seen = [span.seen for span in spans]
    return chain_faults(seen, REQUEST_CHAIN) + tuple(f"{name} has no parent" for name in orphans(seen))
