"""Traces: of batches in the worker, and from a scaling decision to the share in force."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from hasgpu_core.events import PlanEvent
from hasgpu_device.engine import BatchRecord
from hasgpu_device.segments import Run, SegmentRecord
from hasgpu_node_agent.reconciler import Reconciler
from hasgpu_node_agent.shares import ShareApplier
from hasgpu_node_agent.traces import ShareTraces
from hasgpu_node_agent.worker_spans import SpanObserver
from hasgpu_runtime import trace_catalogue as names
from hasgpu_runtime.telemetry import Telemetry


class Recorded:
    recording = True

    def __init__(self, name: str, number: int, given: Mapping[str, Any]) -> None:
        self.name = name
        self.traceparent = f"00-{number:032x}-{number:016x}-01"
        self.given = dict(given)
        self.ended = False
        self.failure = given.get("failure", "")

    def set(self, key: str, value: Any) -> None:
        self.given.setdefault("attributes", {})[key] = value

    def link(self, traceparent: str) -> None:
        self.given.setdefault("links", []).append(traceparent)

    def fail(self, message: str) -> None:
        self.failure = message

    def end(self, *, end_unix_ns: int | None = None) -> None:
        self.ended = True


class Recorder(Telemetry):
    """Keeps spans."""

    def __init__(self) -> None:
        self.spans: list[Recorded] = []

    @property
    def enabled(self) -> bool:
        return True

    def start(self, name: Any, **given: Any) -> Recorded:
        self.spans.append(Recorded(name, len(self.spans) + 1, given))
        return self.spans[-1]

    def record(self, name: Any, **given: Any) -> str:
        span = self.start(name, **given)
        span.end()
        return span.traceparent

    def extract(self, headers: Mapping[str, str]) -> str:
        return headers.get("traceparent", "")

    def named(self, name: str) -> list[Recorded]:
        return [span for span in self.spans if span.name == name]


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


def record(
    segments: Sequence[SegmentRecord],
    *,
    error: str = "",
    ran: bool = True,
    items: tuple[str, ...] = ("one", "", "two"),
) -> BatchRecord:
    run = Run(start_unix_ns=200, sm_pct=50, request_permille=300, end_unix_ns=9_000_000, gate_wait_ns=300)
    run.segments.extend(segments)
    return BatchRecord("f-0", "f", 7, "parent", items, 3, 100, 200, 9_000_100, run if ran else None, error)


def test_a_batch_is_a_child_of_the_gateways_and_linked_to_its_requests(recorder: Recorder) -> None:
    segments = [
        SegmentRecord(500, 4_000_000, 300, 1, False),
        SegmentRecord(4_000_010, 5_000_000, 10, 1, False),
        SegmentRecord(7_000_000, 9_000_000, 2_000_000, 1, False),
    ]
    SpanObserver(recorder).batch_done(record(segments))
    batch, first_wait, execute, later_wait, other, *_ = recorder.spans
    assert [span.name for span in recorder.spans[-3:]] == ["worker.batch", "worker.gate_wait", "worker.execute"]
    assert len(recorder.spans) == 7, "the waits between segments are told once"
    assert (batch.name, batch.given["parent"], batch.given["links"]) == ("worker.batch", "one", ["parent"])
    assert (other.given["parent"], other.given["links"]) == ("two", ["parent"])
    assert (batch.given["start_unix_ns"], batch.given["end_unix_ns"]) == (100, 9_000_100)
    for span in (batch, first_wait, execute):
        assert set(names.SPANS[span.name].attributes) <= set(span.given["attributes"]), span.name
    assert (first_wait.given["start_unix_ns"], first_wait.given["end_unix_ns"]) == (200, 500)
    assert (execute.given["start_unix_ns"], execute.given["end_unix_ns"]) == (500, 9_000_000)
    assert first_wait.given["parent"] == execute.given["parent"] == batch.traceparent
    assert later_wait.given["parent"] == execute.traceparent
    assert (later_wait.given["start_unix_ns"], later_wait.given["end_unix_ns"]) == (5_000_000, 7_000_000)


def test_a_batch_in_which_no_request_is_traced_leaves_no_trace(recorder: Recorder) -> None:
    SpanObserver(recorder).batch_done(record([], items=("", "", "")))
    assert recorder.spans == []


def test_a_batch_that_never_ran_has_a_span_of_its_own_only(recorder: Recorder) -> None:
    SpanObserver(recorder).batch_done(record([], error="the deadline passed", ran=False))
    first, second = recorder.spans
    assert first.name == second.name == "worker.batch"
    assert first.failure == second.failure == "the deadline passed"


@pytest.fixture
def traced(world: Any, recorder: Recorder) -> Any:
    """The world with real traces in place of its own listener."""
    world.traces = ShareTraces(recorder, world.clock, world.publisher.mark)
    world.shares = ShareApplier(world.guard, world.traces, world.clock.now_s)
    world.reconciler = Reconciler(
        guard=world.guard,
        launcher=world.launcher,
        artifacts=world.artifacts,
        client=world.client,
        publisher=world.publisher,
        shares=world.shares,
        sites=world.sites,
        clock=world.clock,
        spawn=world.spawn,
        poke=world.poke,
    )
    return world


async def change(world: Any, event: Any) -> None:
    world.traces.heard(event)
    world.reconciler.set_vertical(event, {"traceparent": "decision"})
    await world.step(2)


async def test_a_vertical_change_is_traced_until_it_is_in_force(traced: Any, make: Any, recorder: Recorder) -> None:
    traced.reconciler.set_function(make.function())
    traced.plan(1, make.planned(allocation=make.share(800, sm=50)))
    await traced.step(2)
    process = traced.process("f-0")
    process.ready()
    await traced.step()
    process.instantly = False
    await change(traced, make.vertical(allocation=make.share(200, sm=100)))
    (applying,), (applied,) = recorder.named("agent.apply_vertical"), recorder.named("agent.applied")
    assert applying.given["parent"] == "decision"
    assert applied.given["parent"] == applying.traceparent
    process.confirm()
    await traced.step()
    assert not applied.ended, "only the half that lowers is in force"
    process.confirm()
    await traced.step()
    assert applied.ended
    assert traced.traces.headers("f-0") == {"traceparent": applied.traceparent}
    assert traced.traces.headers("f-0") == {}
    assert len(recorder.named("agent.apply_vertical")) == 1


async def test_an_unconfirmed_change_is_marked_so(traced: Any, make: Any, recorder: Recorder) -> None:
    traced.reconciler.set_function(make.function())
    traced.plan(1, make.planned())
    await traced.step(2)
    traced.process("f-0").instantly = False
    await change(traced, make.vertical(allocation=make.share(200)))
    traced.clock.advance(3)
    await traced.step()
    (applied,) = recorder.named("agent.applied")
    assert "did not confirm" in applied.failure


def test_a_plan_is_traced_until_it_is_carried_out_or_superseded(world: Any, recorder: Recorder) -> None:
    traces = ShareTraces(recorder, world.clock, lambda instance: None)
    traces.plan(PlanEvent("n", 1), {"traceparent": "scheduler"})
    first = recorder.spans[0]
    traces.settle_plan(False)
    assert (first.name, first.given["parent"], first.ended) == ("agent.apply_plan", "scheduler", False)
    traces.plan(PlanEvent("n", 2), {})
    assert first.ended
    traces.settle_plan(True)
    assert recorder.spans[1].ended


async def test_a_worker_is_traced_from_its_start_to_its_share_in_force(
    traced: Any, make: Any, recorder: Recorder
) -> None:
    traced.traces.plan(PlanEvent("n", 1), {"traceparent": "scheduler"})
    traced.reconciler.set_function(make.function())
    traced.plan(1, make.planned())
    await traced.step(2)
    instances = traced.reconciler.instances.values()
    traced.traces.starts(instances)
    (start,) = recorder.named("agent.start")
    assert start.given["parent"] == recorder.named("agent.apply_plan")[0].traceparent
    assert not start.ended
    traced.process("f-0").ready()
    await traced.step()
    traced.traces.starts(instances)
    (applied,) = recorder.named("agent.applied")
    assert start.ended
    assert applied.given["parent"] == start.traceparent
    for span in (start, applied):
        assert set(names.SPANS[span.name].attributes) - {names.EPOCH} <= set(span.given["attributes"])
    traced.traces.starts(())
    assert applied.ended
