"""A decision begins a trace that goes out with what it causes."""

from __future__ import annotations

from hasgpu_runtime import trace_catalogue as names
from hasgpu_runtime.sampling import Sampler
from hasgpu_runtime.telemetry import TRACEPARENT
from hasgpu_runtime.tracer import ExportingTelemetry
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter


async def test_commands_and_shares_carry_the_span_of_their_decision(world):
    exporter = InMemorySpanExporter()
    # No request would be kept; decisions are.
    telemetry = ExportingTelemetry(SimpleSpanProcessor(exporter), sampler=Sampler(ratio=0.0))
    async with world.scaler(telemetry=telemetry) as app:
        await world.ready(app)
        stored, first = exporter.get_finished_spans()
        assert (stored.name, first.name) == ("scaler.store_desired", "scaler.decide")
        assert stored.parent.span_id == first.context.span_id
        (command,) = world.bus._commands._waiting
        assert f"{first.context.span_id:016x}" in command.headers[TRACEPARENT]
        await world.load(app, 60.0, 6.0)
        spans = {f"{s.context.span_id:016x}": s for s in exporter.get_finished_spans()}
        said = [c for name, c in world.bus._state.items() if name.startswith("scale.vertical.")]
        assert said
        for change in said:
            decide = spans[change.headers[TRACEPARENT].split("-")[2]]
            demand = spans[f"{decide.parent.span_id:016x}"]
            assert (demand.name, demand.parent) == ("scaler.demand", None)
            assert demand.end_time >= demand.start_time
            assert decide.attributes[names.FUNCTION] == "f"
            assert decide.attributes[names.PREDICTED_RPS] > 0
            assert decide.attributes[names.REASON]
            for span in (demand, decide, stored):
                assert set(names.SPANS[span.name].attributes) <= set(span.attributes), span.name
