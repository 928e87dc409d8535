from __future__ import annotations

from typing import get_args

import pytest
from hasgpu_core.events import COMMAND_SUBJECTS, STATE_SUBJECTS, plan_subject
from hasgpu_runtime import trace_catalogue as names
from hasgpu_runtime.bus.memory import MemoryBus
from hasgpu_runtime.bus.traced import TracedBus
from hasgpu_runtime.trace_catalogue import Link, SeenSpan, chain_faults, orphans
from hasgpu_runtime.tracer import ExportingTelemetry
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture
def spans():
    return InMemorySpanExporter()


@pytest.fixture
def inner():
    return MemoryBus()


@pytest.fixture
def bus(spans, inner):
    return TracedBus(inner, ExportingTelemetry(SimpleSpanProcessor(spans)))


async def test_a_message_of_a_trace_is_sent_in_a_span_that_it_carries_on(bus, inner, spans):
    await bus.put(plan_subject("a.b"), b"12345", {"traceparent": PARENT})
    (span,) = spans.get_finished_spans()
    assert (span.name, span.kind.name) == ("publish plan", "PRODUCER")
    assert f"{span.parent.span_id:016x}" in PARENT
    assert dict(span.attributes) == {
        "messaging.system": "nats",
        "messaging.destination.name": "plan.a.b",
        "messaging.destination.template": "plan.{node}",
        "messaging.operation.name": "publish",
        "messaging.operation.type": "send",
        "messaging.message.body.size": 5,
    }
    carried = inner._state[plan_subject("a.b")].headers["traceparent"]
    assert carried.split("-")[2] == f"{span.context.span_id:016x}"
    await bus.delete(plan_subject("a.b"), {"traceparent": PARENT})
    assert len(spans.get_finished_spans()) == 2


@pytest.mark.parametrize("headers", [None, {}, {"a": "b"}, {"traceparent": PARENT[:-2] + "00"}, {"traceparent": "x"}])
async def test_any_other_message_passes_unchanged(bus, inner, spans, headers):
    await bus.send_command("scale.horizontal.f", b"", dedup_id="1", headers=headers)
    (command,) = inner._commands._waiting
    assert dict(command.headers) == (headers or {})
    assert spans.get_finished_spans() == ()


def test_every_subject_and_every_span_is_in_the_catalogue():
    for pattern in (*STATE_SUBJECTS, *COMMAND_SUBJECTS):
        assert pattern.removesuffix(".>") in names.SUBJECT_TEMPLATES
    assert set(get_args(names.SpanName)) == set(names.SPANS)


CHAIN = (Link("a", "s", "", ("x",)), Link("b", "s", "a", ()), Link("c", "t", "b", ("y",)))


def seen(name, parent="", service="s", attributes=()):
    return SeenSpan(name, service, name, parent, attributes)


def test_what_a_trace_lacks_is_named():
    whole = [seen("c", "b", "t", ("y", "z")), seen("b", "a"), seen("a", "", "s", ("x",))]
    assert chain_faults(whole, CHAIN) == ()
    assert chain_faults(whole[1:], CHAIN) == ("no c of t",)
    assert chain_faults([seen("c", "elsewhere", "t", ("y",)), *whole[1:]], CHAIN) == ("c is no child of b",)
    assert chain_faults([*whole[:2], seen("a")], CHAIN) == ("a lacks x",)
    assert chain_faults([], CHAIN) == ("no a of s", "no b of s", "no c of t")


def test_spans_without_their_parent_are_named_but_for_the_first_of_a_traced_caller():
    assert orphans([seen("a", "caller", "s", ("rpc.system",)), seen("b", "a"), seen("c", "gone")]) == ("c",)
