"""A decision begins a trace that goes out with what it causes."""

from __future__ import annotations

from hasgpu_runtime.telemetry import TRACEPARENT, ExportingTelemetry
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter


async def test_commands_and_shares_carry_the_span_of_their_decision(world):
    exporter = InMemorySpanExporter()
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    async with world.scaler(telemetry=ExportingTelemetry(provider)) as app:
        await world.ready(app)
        (first,) = exporter.get_finished_spans()
        assert first.name == "scaler.decide"
        (stored,) = world.bus._commands._waiting
        assert f"{first.context.span_id:016x}" in stored.headers[TRACEPARENT]
        await world.load(app, 60.0, 6.0)
        spans = {f"{s.context.span_id:016x}": s for s in exporter.get_finished_spans()}
        said = [c for name, c in world.bus._state.items() if name.startswith("scale.vertical.")]
        assert said
        for change in said:
            span = spans[change.headers[TRACEPARENT].split("-")[2]]
            assert span.attributes["function"] == "f"
            assert span.attributes["predicted_rps"] > 0
            assert "capacity_rps" in span.attributes
            assert span.attributes["reason"]
