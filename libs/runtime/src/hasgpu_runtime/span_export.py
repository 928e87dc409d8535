"""Ended spans on their way to the collector: a bounded queue and one thread, so that serving never waits for it."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Mapping
from typing import TYPE_CHECKING

from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import Span

_log = logging.getLogger(__name__)

QUEUE_MAX = 16_384
"""Spans that wait at most: above two seconds of a gateway that traces every request. OTEL_BSP_MAX_QUEUE_SIZE."""
BATCH_MAX = 1_024
"""Spans in one message to the collector: below 1 MiB. OTEL_BSP_MAX_EXPORT_BATCH_SIZE."""
DELAY_MS = 500
"""Spans leave at least this often. OTEL_BSP_SCHEDULE_DELAY."""
SHUTDOWN_S = 3.0
"""How long the end of a process may wait for what is left to be sent."""
_EXPORTER_LOG = "opentelemetry.exporter.otlp.proto.grpc.exporter"


class SpanQueue(SpanProcessor):
    """Sends ended spans in batches from a thread of its own; what finds the queue full is dropped and counted.

    A collector that is away is told of once, and once when it takes spans again, with the number that was lost.
    """

    def __init__(
        self,
        exporter: SpanExporter,
        *,
        where: str,
        queue_max: int = QUEUE_MAX,
        batch_max: int = BATCH_MAX,
        delay_ms: int = DELAY_MS,
    ) -> None:
        self._exporter = exporter
        self._where = where
        self._queue_max = queue_max
        self._batch_max = min(batch_max, queue_max)
        self._delay_s = delay_ms / 1e3
        self._queue: deque[ReadableSpan] = deque()
        self._awake = threading.Event()
        self._stopping = False
        self._gave_up = False
        self._refused_count = 0
        self._lost_count = 0
        self._failing = False
        self._told_full = False
        self._reason = _Reason()
        logging.getLogger(_EXPORTER_LOG).addFilter(self._reason)
        self._thread = threading.Thread(target=self._run, name="spans", daemon=True)
        self._thread.start()

    @property
    def dropped_count(self) -> int:
        """Spans that never reached the collector: refused by a full queue, or lost with a message that failed."""
        return self._refused_count + self._lost_count

    @property
    def waiting_count(self) -> int:
        """Spans not handed to the exporter yet."""
        return len(self._queue)

    def on_start(self, span: Span, parent_context: Context | None = None) -> None:
        """Does nothing."""

    def on_end(self, span: ReadableSpan) -> None:
        """Takes a span in, from any thread; never waits."""
        if self._stopping or len(self._queue) >= self._queue_max:
            self._refused_count += 1
            return
        self._queue.append(span)
        if len(self._queue) >= self._batch_max and not self._awake.is_set():
            self._awake.set()

    def shutdown(self) -> None:
        """Sends what is left, for SHUTDOWN_S at most and not at all while the collector is away; ends the thread."""
        if self._stopping:
            return
        self._stopping = True
        self._awake.set()
        if not self._failing:
            self._thread.join(SHUTDOWN_S)
        self._gave_up = True
        self._exporter.shutdown()
        self._thread.join(SHUTDOWN_S)
        self._lost_count += len(self._queue)
        self._queue.clear()
        logging.getLogger(_EXPORTER_LOG).removeFilter(self._reason)
        if self.dropped_count:
            _log.warning("%d spans never reached %s", self.dropped_count, self._where)

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        """Has the queue sent soon; does not wait for it."""
        self._awake.set()
        return True

    def _run(self) -> None:
        while not self._stopping:
            self._awake.wait(self._delay_s)
            self._awake.clear()
            self._send()
        self._send()

    def _send(self) -> None:
        """Sends what is there now, the last batch however small it is."""
        while self._queue and not self._gave_up:
            count = min(self._batch_max, len(self._queue))
            batch = [self._queue.popleft() for _ in range(count)]
            if self._exporter.export(batch) is SpanExportResult.SUCCESS:
                self._tell_success()
            else:
                self._lost_count += count
                self._tell_failure()

    def _tell_failure(self) -> None:
        if not self._failing and not self._stopping:
            self._failing = True
            _log.warning("traces can't be sent to %s, serving goes on without: %s", self._where, self._reason.text)

    def _tell_success(self) -> None:
        if self._failing:
            self._failing = False
            _log.info("traces reach %s again; %d spans were lost so far", self._where, self.dropped_count)
        elif self._refused_count and not self._told_full:
            self._told_full = True
            _log.warning(
                "spans are dropped, %d so far: more than %d wait to be sent (OTEL_BSP_MAX_QUEUE_SIZE); "
                "their number is told again at the end",
                self.dropped_count,
                self._queue_max,
            )


class _Reason(logging.Filter):
    """Keeps what the exporter says of a failure, and keeps it out of the log: it says it for every attempt."""

    text = "no reason was given"

    def filter(self, record: logging.LogRecord) -> bool:
        self.text = record.getMessage()
        return False


def queue_bounds(environ: Mapping[str, str]) -> dict[str, int]:
    """Reads the standard variables of a batch span processor; what can't be is named in a warning and left out."""
    bounds = {"queue_max": QUEUE_MAX, "batch_max": BATCH_MAX, "delay_ms": DELAY_MS}
    for key, name in (
        ("queue_max", "OTEL_BSP_MAX_QUEUE_SIZE"),
        ("batch_max", "OTEL_BSP_MAX_EXPORT_BATCH_SIZE"),
        ("delay_ms", "OTEL_BSP_SCHEDULE_DELAY"),
    ):
        given = environ.get(name, "").strip()
        if not given:
            continue
        if given.isdigit() and int(given) > 0:
            bounds[key] = int(given)
        else:
            _log.warning("%s: expected a whole number above 0, got %r; taken as %d", name, given, bounds[key])
    return bounds
