"""Logging to stderr, as text for people or one JSON object a line, with the trace that a record belongs to.

What a record is about can be told in fields of its own, `_log.info("...", extra=about(function="f"))`: the JSON has
them beside the message, which is complete without them.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable
from datetime import UTC, datetime

from hasgpu_runtime.metric_catalogue import LOG_RECORDS
from hasgpu_runtime.metrics import Counter, Metrics

_NOISY = ("nats", "asyncio", "grpc", "opentelemetry")
"""Libraries that log what we log ourselves; they start at WARNING."""
FIELDS = ("function", "instance", "node", "gpu")
"""What a record may be about. `instance` is one of a function's; the process that logs is `process`."""
_COUNTED = (logging.WARNING, logging.ERROR, logging.CRITICAL)


def set_up(
    service: str,
    *,
    level: str,
    style: str,
    traceparent: Callable[[], str],
    instance: str = "",
    metrics: Metrics | None = None,
) -> None:
    """Sends all records of `level` and above to stderr.

    Args:
        service: Named in every record.
        level: "debug", "info", "warning" or "error".
        style: "text", "json", or "auto": text on a terminal, else JSON.
        traceparent: Returns the trace context current where a record is made; "" for none.
        instance: Of the service; tells replicas apart in JSON.
        metrics: Where records from WARNING on are counted, whatever the level; None: nowhere.
    """
    if style == "auto":
        style = "text" if sys.stderr.isatty() else "json"
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        JsonFormatter(service, traceparent, instance) if style == "json" else TextFormatter(service, traceparent)
    )
    handler.setLevel(level.upper())
    root = logging.getLogger()
    root.handlers[:] = [handler] if metrics is None else [handler, _Counting(metrics)]
    root.setLevel(min(handler.level, logging.WARNING) if metrics is not None else handler.level)
    for name in _NOISY:
        logging.getLogger(name).setLevel(max(logging.WARNING, root.level))


def about(*, function: str = "", instance: str = "", node: str = "", gpu: str = "") -> dict[str, dict[str, str]]:
    """Returns the `extra` of a record: what it is about; "" stands for nothing in particular."""
    fields = {"function": function, "instance": instance, "node": node, "gpu": gpu}
    return {"about": {name: value for name, value in fields.items() if value}}


class TextFormatter(logging.Formatter):
    """`2026-01-02T03:04:05.678Z INFO scaler loop: text [trace id]`."""

    def __init__(self, service: str, traceparent: Callable[[], str]) -> None:
        super().__init__()
        self._service = service
        self._traceparent = traceparent

    def format(self, record: logging.LogRecord) -> str:
        """Returns the line, and the traceback below it."""
        where = record.name.rpartition(".")[2]
        line = f"{_stamp(record)} {record.levelname} {self._service} {where}: {record.getMessage()}"
        trace_id, _ = _trace(self._traceparent())
        if trace_id:
            line += f" [trace {trace_id}]"
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        return line


class JsonFormatter(logging.Formatter):
    """One object a line.

    Always: time, level, service, process, logger, message. Where there are such: trace_id, span_id, what the record is
    about (FIELDS), and error, a traceback.
    """

    def __init__(self, service: str, traceparent: Callable[[], str], instance: str = "") -> None:
        super().__init__()
        self._service = service
        self._traceparent = traceparent
        self._instance = instance

    def format(self, record: logging.LogRecord) -> str:
        """Returns the object as one line."""
        fields = {
            "time": _stamp(record),
            "level": record.levelname.lower(),
            "service": self._service,
            "process": self._instance,
            "logger": record.name,
            "message": record.getMessage(),
        }
        trace_id, span_id = _trace(self._traceparent())
        if trace_id:
            fields["trace_id"] = trace_id
            fields["span_id"] = span_id
        fields.update(getattr(record, "about", {}))
        if record.exc_info:
            fields["error"] = self.formatException(record.exc_info)
        return json.dumps(fields, ensure_ascii=False)


class _Counting(logging.Handler):
    """Counts what operators want to know of."""

    def __init__(self, metrics: Metrics) -> None:
        super().__init__(logging.WARNING)
        self._cells: dict[int, Counter] = {
            level: metrics.counter(LOG_RECORDS, logging.getLevelName(level).lower()) for level in _COUNTED
        }

    def emit(self, record: logging.LogRecord) -> None:
        """Counts a record."""
        cell = self._cells.get(record.levelno)
        if cell is not None:
            cell.add()


def _stamp(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _trace(traceparent: str) -> tuple[str, str]:
    """Returns the ids of the trace and of the span; "" for none."""
    parts = traceparent.split("-")
    return (parts[1], parts[2]) if len(parts) == 4 else ("", "")
