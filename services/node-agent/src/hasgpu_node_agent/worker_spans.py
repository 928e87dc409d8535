"""Spans of the batches that a worker ran."""

from __future__ import annotations

from hasgpu_device.engine import BatchRecord
from hasgpu_runtime.telemetry import Attribute, Telemetry

SHORTEST_WAIT_NS = 100_000
"""Later waits at the gate that are shorter get no span of their own."""
MAX_LATER_WAITS = 32


class SpanObserver:
    """Implements `hasgpu_device.engine.Observer`: `worker.batch` with its `worker.gate_wait` and `worker.execute`.

    The batch is a child of the gateway's span and links to those of its requests. Where a batch is cut into segments,
    the waits between them are spans below `worker.execute`.
    """

    def __init__(self, telemetry: Telemetry) -> None:
        self._telemetry = telemetry

    def batch_done(self, record: BatchRecord) -> None:
        """Records a batch."""
        attributes: dict[str, Attribute] = {
            "instance": record.instance,
            "function": record.function,
            "rows": record.rows,
            "items_count": len(record.item_traceparents),
            "line_ns": max(0, record.started_unix_ns - record.arrived_unix_ns),
        }
        run = record.run
        if run is not None:
            attributes.update(
                sm_pct=run.sm_pct,
                request_permille=run.request_permille,
                gate_wait_ns=run.gate_wait_ns,
                device_time_ns=run.device_ns,
                segments_count=run.segments_count,
            )
        batch = self._telemetry.record(
            "worker.batch",
            start_unix_ns=record.arrived_unix_ns,
            end_unix_ns=record.ended_unix_ns,
            parent=record.traceparent,
            links=[traceparent for traceparent in record.item_traceparents if traceparent],
            attributes=attributes,
            failure=record.error,
        )
        if run is None:
            return
        first_unix_ns = run.segments[0].start_unix_ns if run.segments else run.end_unix_ns
        self._telemetry.record(
            "worker.gate_wait", start_unix_ns=run.start_unix_ns, end_unix_ns=first_unix_ns, parent=batch
        )
        if not run.segments:
            return
        execute = self._telemetry.record(
            "worker.execute", start_unix_ns=first_unix_ns, end_unix_ns=run.end_unix_ns, parent=batch
        )
        later = [s for s in run.segments[1:] if s.wait_ns >= SHORTEST_WAIT_NS]
        for segment in later[:MAX_LATER_WAITS]:
            self._telemetry.record(
                "worker.gate_wait",
                start_unix_ns=segment.start_unix_ns - segment.wait_ns,
                end_unix_ns=segment.start_unix_ns,
                parent=execute,
            )

    def close(self) -> None:
        """Sends what is left."""
        self._telemetry.shutdown()
