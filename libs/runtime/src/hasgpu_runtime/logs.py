"""Logging to stderr, as text for people or one JSON object a line, with the trace that a record belongs to."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable
from datetime import UTC, datetime

_NOISY = ("nats", "asyncio", "grpc", "opentelemetry")
"""Libraries that log what we log ourselves; they start at WARNING."""


def set_up(service: str, *, level: str, style: str, traceparent: Callable[[], str]) -> None:
    """Sends all records of `level` and above to stderr.

    Args:
        service: Named in every record.
        level: "debug", "info", "warning" or "error".
        style: "text" or "json".
        traceparent: Returns the trace context current where a record is made; "" for none.
    """
    handler = logging.StreamHandler(sys.stderr)
    formatter = JsonFormatter(service, traceparent) if style == "json" else TextFormatter(service, traceparent)
    handler.setFormatter(formatter)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    for name in _NOISY:
        logging.getLogger(name).setLevel(max(logging.WARNING, root.level))


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
        trace_id = _trace_id(self._traceparent())
        if trace_id:
            line += f" [trace {trace_id}]"
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        return line


class JsonFormatter(logging.Formatter):
    """One object a line: time, level, service, logger, message, and trace_id and error where there are such."""

    def __init__(self, service: str, traceparent: Callable[[], str]) -> None:
        super().__init__()
        self._service = service
        self._traceparent = traceparent

    def format(self, record: logging.LogRecord) -> str:
        """Returns the object as one line."""
        fields = {
            "time": _stamp(record),
            "level": record.levelname.lower(),
            "service": self._service,
            "logger": record.name,
            "message": record.getMessage(),
        }
        trace_id = _trace_id(self._traceparent())
        if trace_id:
            fields["trace_id"] = trace_id
        if record.exc_info:
            fields["error"] = self.formatException(record.exc_info)
        return json.dumps(fields, ensure_ascii=False)


def _stamp(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _trace_id(traceparent: str) -> str:
    return traceparent.split("-")[1] if traceparent else ""
