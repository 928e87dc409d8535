"""The trace of a decision goes on through the scheduler."""

from __future__ import annotations

import asyncio

from hasgpu_core.clock import ManualClock
from hasgpu_core.events import horizontal_subject, node_subject, plan_subject
from hasgpu_runtime import trace_catalogue as names
from hasgpu_runtime import wire
from hasgpu_runtime.bus.memory import MemoryBus
from hasgpu_runtime.store.memory import MemoryStore
from hasgpu_runtime.telemetry import TRACEPARENT
from hasgpu_runtime.tracer import ExportingTelemetry
from hasgpu_scheduler.adapters.plan_store import PlanStore
from hasgpu_scheduler.app import SchedulerApp
from hasgpu_scheduler.core import SchedulerCore
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

TRACE = "0af7651916cd43dd8448eb211c80319c"


async def test_the_plan_carries_a_span_of_the_commands_trace(make):
    exporter = InMemorySpanExporter()
    clock = ManualClock(10.0)
    bus, store = MemoryBus(), MemoryStore(clock)
    fence = await store.acquire_lease("scheduler", "one", ttl_s=3.0)
    app = SchedulerApp(
        bus=bus,
        plans=PlanStore(store),
        clock=clock,
        core=SchedulerCore(node_timeout_s=6.0, silence_s=3.0),
        telemetry=ExportingTelemetry(SimpleSpanProcessor(exporter)),
        fence=lambda: fence,
        fenced=lambda: None,
        poke=lambda: None,
    )
    await bus.put(node_subject("a"), wire.encode(make.node("a")))
    await bus.send_command(
        horizontal_subject("f"),
        wire.encode(make.wanted("f", 1, (0, make.allocation()))),
        dedup_id="f:1",
        headers={TRACEPARENT: f"00-{TRACE}-b7ad6b7169203331-01"},
    )
    tasks = [asyncio.ensure_future(app.watch()), asyncio.ensure_future(app.take_commands())]
    for _ in range(100):
        await asyncio.sleep(0)
    (span,) = [s for s in exporter.get_finished_spans() if s.name == "scheduler.plan"]
    assert f"{span.context.trace_id:032x}" == TRACE
    assert f"{span.parent.span_id:016x}" == "b7ad6b7169203331"
    assert span.attributes[names.NODES] == ("a",)
    assert span.attributes[names.MESSAGING_DESTINATION] == horizontal_subject("f")
    assert set(names.SPANS["scheduler.plan"].attributes) <= set(span.attributes)
    said = bus._state[plan_subject("a")].headers[TRACEPARENT]
    assert said == f"00-{TRACE}-{span.context.span_id:016x}-01"
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
