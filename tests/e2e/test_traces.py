"""One trace covers a request from gateway to device; another a scaling decision to the quota in force."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
from hasgpu_runtime import trace_catalogue as names
from hasgpu_runtime.trace_catalogue import (
    HORIZONTAL_CHAIN,
    REQUEST_CHAIN,
    VERTICAL_CHAIN,
    Link,
    chain_faults,
    from_demand,
    orphans,
)
from hasgpu_system import System, eventually
from otlp_sink import OtlpSink, Span

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]


def complete_trace(sink: OtlpSink, chain: Sequence[Link]) -> list[Span]:
    """A trace that has the whole chain and no loose end; an empty one while there is none."""
    for spans in sink.traces().values():
        seen = [span.seen for span in spans]
        if not chain_faults(seen, chain) and not orphans(seen):
            return spans
    return []


def nearest_faults(sink: OtlpSink, chain: Sequence[Link]) -> str:
    """What the traces that come nearest to a chain lack, for the message of a test that fails."""
    found = [chain_faults([s.seen for s in spans], chain) for spans in sink.traces().values()]
    return f"{len(found)} traces; nearest: {min(found, key=len, default=())}"


def awaited(sink: OtlpSink, chain: Sequence[Link], within_s: float) -> list[Span]:
    def found() -> list[Span]:
        return complete_trace(sink, chain)

    try:
        spans: list[Span] = eventually(found, within_s=within_s)
    except AssertionError as error:
        raise AssertionError(nearest_faults(sink, chain)) from error
    return spans


def test_a_request_is_one_trace(system: System, sink: OtlpSink) -> None:
    system.infer_text("tricky", "traced")
    spans = awaited(sink, REQUEST_CHAIN, 60)
    by_name = {span.name: span for span in spans}
    assert by_name[names.INFER].kind == "server"
    assert by_name["gateway.infer"].start_ns <= by_name["worker.batch"].start_ns
    assert by_name["worker.gate_wait"].end_ns <= by_name["worker.execute"].end_ns <= by_name["gateway.infer"].end_ns
    route, execute = by_name["gateway.route"], by_name["worker.execute"]
    for name in (names.FUNCTION, names.INSTANCE, names.SM_PCT, names.BATCH_ROWS):
        assert route.attributes[name] == execute.attributes[name]
    for span in (by_name["gateway.infer"], execute):
        assert span.resource["service.version"] != "unknown"
        assert span.resource["service.instance.id"]
        assert span.resource["host.name"]
    assert execute.resource["hasgpu.device_model"].startswith("cpu-")


@pytest.mark.parametrize(
    ("change", "chain"),
    [(["--quota", "70"], VERTICAL_CHAIN), (["--quota", "30", "--instances", "2"], HORIZONTAL_CHAIN)],
)
def test_a_scaling_decision_is_one_trace(
    scale: Callable[..., None], sink: OtlpSink, change: list[str], chain: Sequence[Link]
) -> None:
    scale("tricky", *change, "--hold", "5")
    spans = awaited(sink, chain, 60)
    assert {"hasgpu-scaler", "hasgpu-node-agent"} <= {span.service for span in spans}
    decide = next(span for span in spans if span.name == "scaler.decide")
    assert decide.attributes[names.REASON]
    published = [span for span in spans if span.name.startswith("publish ")]
    assert {span.kind for span in published} == {"producer"}
    scale("tricky", "--quota", "30", "--instances", "1", "--hold", "1")


def test_a_decision_of_the_policy_begins_with_the_demand_that_it_rests_on(system: System, sink: OtlpSink) -> None:
    """Nothing was asked of the function for a while, or little: the policy has taken quota away by itself."""
    spans = awaited(sink, from_demand(VERTICAL_CHAIN), 60)
    decide = next(span for span in spans if span.name == "scaler.decide")
    assert decide.attributes[names.ORIGIN] == "policy"
    demand = next(span for span in spans if span.name == "scaler.demand")
    assert demand.end_ns <= decide.end_ns
