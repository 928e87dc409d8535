"""Spans of the batches that a worker ran."""

from __future__ import annotations

from collections.abc import Mapping

from hasgpu_device.engine import BatchRecord
from hasgpu_device.segments import Run
from hasgpu_runtime import trace_catalogue as names
from hasgpu_runtime.telemetry import Attribute, Telemetry

SHORTEST_WAIT_NS = 100_000
"""Later waits at the gate that are shorter get no span of their own."""
MAX_LATER_WAITS = 32


class SpanObserver:
    """Implements `hasgpu_device.engine.Observer`: `worker.batch` with its `worker.gate_wait` and `worker.execute`.

    They are recorded in the trace of each traced request of the batch, below the gateway's span of that request, and
    linked with the gateway's span of the batch. Where a batch is cut into segments, the waits between them are spans
    below `worker.execute`, in the first of these traces only. A batch without a traced request costs a look at it.
    """

    def __init__(self, telemetry: Telemetry) -> None:
        self._telemetry = telemetry

    def batch_done(self, record: BatchRecord) -> None:
        """Records a batch."""
        parents = [traceparent for traceparent in record.item_traceparents if traceparent]
        if not parents:
            return
        attributes = _attributes(record)
        for position, parent in enumerate(parents):
            batch = self._telemetry.record(
                "worker.batch",
                start_unix_ns=record.arrived_unix_ns,
                end_unix_ns=record.ended_unix_ns,
                parent=parent,
                links=[record.traceparent] if record.traceparent else [],
                attributes=attributes,
                failure=record.error,
            )
            if record.run is not None:
                self._run(record.run, batch, attributes, later_waits=position == 0)

    def close(self) -> None:
        """Sends what is left."""
        self._telemetry.shutdown()

    def _run(self, run: Run, batch: str, attributes: Mapping[str, Attribute], *, later_waits: bool) -> None:
        first_unix_ns = run.segments[0].start_unix_ns if run.segments else run.end_unix_ns
        self._telemetry.record(
            "worker.gate_wait",
            start_unix_ns=run.start_unix_ns,
            end_unix_ns=first_unix_ns,
            parent=batch,
            attributes=attributes,
        )
        if not run.segments:
            return
        execute = self._telemetry.record(
            "worker.execute",
            start_unix_ns=first_unix_ns,
            end_unix_ns=run.end_unix_ns,
            parent=batch,
            attributes=attributes,
        )
        if not later_waits:
            return
        later = [s for s in run.segments[1:] if s.wait_ns >= SHORTEST_WAIT_NS]
        for segment in later[:MAX_LATER_WAITS]:
            self._telemetry.record(
                "worker.gate_wait",
                start_unix_ns=segment.start_unix_ns - segment.wait_ns,
                end_unix_ns=segment.start_unix_ns,
                parent=execute,
            )


def _attributes(record: BatchRecord) -> dict[str, Attribute]:
    attributes: dict[str, Attribute] = {
        names.FUNCTION: record.function,
        names.INSTANCE: record.instance,
        names.BATCH_ROWS: record.rows,
        names.BATCH_REQUESTS_COUNT: len(record.item_traceparents),
        names.LINE_MS: _ms(max(0, record.started_unix_ns - record.arrived_unix_ns)),
    }
    run = record.run
    if run is not None:
        attributes |= {
            names.SM_PCT: run.sm_pct,
            names.REQUEST_PERMILLE: run.request_permille,
            names.GATE_WAIT_MS: _ms(run.gate_wait_ns),
            names.EXECUTE_MS: _ms(run.execute_ns),
            names.DEVICE_TIME_MS: _ms(run.device_ns),
            names.SEGMENTS_COUNT: run.segments_count,
        }
    return attributes


def _ms(duration_ns: int) -> float:
    return round(duration_ns / 1e6, 3)
