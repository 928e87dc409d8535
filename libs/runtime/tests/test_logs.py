from __future__ import annotations

import io
import json
import logging
import sys
from collections.abc import Iterator

import pytest
from hasgpu_runtime import logs
from hasgpu_runtime.metric_catalogue import LOG_RECORDS
from hasgpu_runtime.metrics import Metrics

TRACEPARENT = f"00-{'a' * 32}-{'b' * 16}-01"


@pytest.fixture(autouse=True)
def root_logger() -> Iterator[None]:
    root = logging.getLogger()
    before = root.handlers[:], root.level, {name: logging.getLogger(name).level for name in logs._NOISY}
    yield
    root.handlers[:], levels = before[0], before[2]
    root.setLevel(before[1])
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


def set_up(style: str, *, level: str = "info", traceparent: str = "", metrics: Metrics | None = None) -> logging.Logger:
    logs.set_up("scaler", level=level, style=style, traceparent=lambda: traceparent, instance="host-7", metrics=metrics)
    return logging.getLogger("hasgpu_scaler.app")


def test_json_has_the_trace_and_what_it_is_about(capsys: pytest.CaptureFixture[str]) -> None:
    set_up("json", traceparent=TRACEPARENT).info("%d ‰", 150, extra=logs.about(function="f", instance="f-0"))
    record = json.loads(capsys.readouterr().err)
    assert record.pop("time").endswith("Z")
    assert record == {
        "level": "info",
        "service": "scaler",
        "process": "host-7",
        "logger": "hasgpu_scaler.app",
        "message": "150 ‰",
        "trace_id": "a" * 32,
        "span_id": "b" * 16,
        "function": "f",
        "instance": "f-0",
    }


def test_json_is_one_line_with_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    log = set_up("json")
    try:
        raise ValueError("wrong")
    except ValueError:
        log.exception("it\nfailed")
    (line,) = capsys.readouterr().err.splitlines()
    record = json.loads(line)
    assert "trace_id" not in record
    assert "ValueError: wrong" in record["error"]


def test_text_is_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    set_up("text", traceparent=TRACEPARENT).info("all is well", extra=logs.about(function="f"))
    assert capsys.readouterr().err.endswith(f"INFO scaler app: all is well [trace {'a' * 32}]\n")


@pytest.mark.parametrize(("terminal", "is_json"), [(True, False), (False, True)])
def test_auto_is_text_on_a_terminal(monkeypatch: pytest.MonkeyPatch, terminal: bool, is_json: bool) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: terminal)
    monkeypatch.setattr(sys, "stderr", stream)
    set_up("auto").info("x")
    assert stream.getvalue().startswith("{") is is_json


def test_warnings_are_counted_also_below_the_level(capsys: pytest.CaptureFixture[str]) -> None:
    metrics = Metrics()
    log = set_up("text", level="error", metrics=metrics)
    log.info("not")
    log.warning("counted, not written")
    log.error("both")
    counts = {p.labels[0]: p.value for spec, points in metrics.collect() if spec is LOG_RECORDS for p in points}
    assert counts == {"warning": 1, "error": 1, "critical": 0}
    assert [line.split()[1] for line in capsys.readouterr().err.splitlines()] == ["ERROR"]
