"""The demo's report: its numbers and its page."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hasgpu_cli.demo.report import write_report
from hasgpu_cli.demo.report_data import (
    DemoRun,
    FunctionRun,
    InstanceSample,
    Prediction,
    Sample,
    count_actions,
    device_seconds,
)
from hasgpu_cli.demo.tracker import came_down
from hasgpu_cli.load import OK, Answer, Outcome, Replay

BEGAN_NS = 1_000_000_000_000


def decision(at_s: float, *kinds: str, origin: str = "policy", reason: str = "because") -> dict[str, Any]:
    actions = [
        {"kind": kind, "instance": "f-0", "sm_pct": 50, "from_permille": 100, "to_permille": 200} for kind in kinds
    ]
    return {
        "function": "f",
        "decided_unix_ns": BEGAN_NS + round(at_s * 1e9),
        "revision": 1,
        "actions": actions,
        "reason": reason,
        "origin": origin,
        "observed_rps": 1.0,
        "predicted_rps": 2.0,
        "capacity_rps": 3.0,
        "queued_count": 0,
        "p95_ms": 0,
        "slo_ms": 100,
        "policy": "hasgpu",
    }


def sample(at_s: float, *quotas: int) -> Sample:
    return Sample(at_s, tuple(InstanceSample("f", f"f-{i}", "ready", 50, quota) for i, quota in enumerate(quotas)))


PREDICTION = Prediction("profiled", 200, 15.2, 10.0, 15.0, 34.2, 1.31, 1.49, 1.5, "it drifts <fast>")


def demo_run(
    outcomes: list[Outcome],
    decisions: list[dict[str, Any]],
    samples: list[Sample],
    prediction: Prediction | None = PREDICTION,
) -> DemoRun:
    due_s = [outcome.due_s for outcome in outcomes]
    summary = Replay(due_s, outcomes).summary(100)
    function = FunctionRun("f", due_s, outcomes, summary, decisions, 0.5, 1e-6, ("a note",), prediction)
    return DemoRun("cpu-2c", BEGAN_NS, 10.0, 8.0, [function], samples, {"paraphrase": 0.6, "unrelated": -0.1})


def outcome(index: int, due_s: float, latency_s: float, status: str = OK, wrong: bool = False) -> Outcome:
    return Outcome(index, due_s, due_s, due_s + latency_s, Answer(status, wrong=wrong))


def test_device_seconds_is_the_integral_of_the_shares() -> None:
    samples = [sample(0.5, 200), sample(4.0, 400, 200), sample(6.0)]
    assert device_seconds(samples, "f", 10.0) == pytest.approx(4 * 0.1 + 2 * 0.3 + 4 * 0)
    assert device_seconds(samples, "other", 10.0) == 0
    assert device_seconds([], "f", 10.0) == 0


def test_borrowed_time_is_charged() -> None:
    """An instance with a small request and a large limit pays for what it used."""
    samples = [
        Sample(float(t), (InstanceSample("f", "f-0", "ready", 50, 10, 800, used_s=10.0 + 0.4 * t),)) for t in range(11)
    ]
    assert device_seconds(samples, "f", 10.0) == pytest.approx(0.5 * 0.4 * 10, rel=0.1)
    idle = [Sample(float(t), (InstanceSample("f", "f-0", "ready", 50, 10, 800, used_s=10.0),)) for t in range(11)]
    assert device_seconds(idle, "f", 10.0) == pytest.approx(0.5 * 0.01 * 10)
    assert samples[0].allowed_share("f") == pytest.approx(0.4)


def test_actions_of_the_policy_are_counted_by_kind() -> None:
    counts = count_actions(
        [
            decision(1, "vertical_up", "horizontal_up"),
            decision(2, "vertical_up"),
            decision(3, "horizontal_down", origin="manual"),
        ]
    )
    assert counts == {"vertical_up": 2, "vertical_down": 0, "horizontal_up": 1, "horizontal_down": 0}


def test_the_files(tmp_path: Path) -> None:
    outcomes = [
        outcome(0, 0.1, 0.05),
        outcome(1, 1.0, 0.2),
        outcome(2, 2.0, 0.05, wrong=True),
        outcome(3, 3, 0, "INTERNAL"),
    ]
    decisions = [decision(1.5, "vertical_up", reason="rate <5> & rising"), decision(5.0, "vertical_down")]
    data, page = write_report(demo_run(outcomes, decisions, [sample(0, 200), sample(5, 400, 100)]), tmp_path / "out")
    report = json.loads(data.read_text())
    assert set(report) >= {"device", "duration_s", "functions"}
    function = report["functions"]["f"]
    assert (function["requests"], function["ok"], function["wrong_outputs"]) == (4, 3, 1)
    assert function["slo_ms"] == 100
    assert function["slo_attainment"] == 0.5
    assert function["device_seconds"] == pytest.approx(5 * 0.1 + 5 * 0.25)
    assert function["whole_device_seconds"] == 10.0
    assert function["actions"] == {"vertical_up": 1, "vertical_down": 1, "horizontal_up": 0, "horizontal_down": 0}
    html = page.read_text()
    assert html.count("<svg") == 3
    assert "rate &lt;5&gt; &amp; rising" in html
    assert "a note" in html
    assert function["prediction"] == asdict(PREDICTION)
    for cell in ("15.2", "10.0", "34.2 %", "1.3 %", "1.50", "it drifts &lt;fast&gt;"):
        assert f">{cell}</td>" in html
    assert not re.search(r"(src|href)=\"http", html), "the page must stand alone"
    assert not re.search(r"#0[1-5]0[0-9]0[0-9]\b", html), "every stand-in colour is a variable by now"
    assert "var(--series-0)" in html


def test_a_run_without_anything_still_gives_a_page(tmp_path: Path) -> None:
    data, page = write_report(demo_run([], [], [], prediction=None), tmp_path)
    assert "no batch was observed" in page.read_text()
    assert json.loads(data.read_text())["functions"]["f"]["p95_ms"] is None
    assert "none" in page.read_text()


def test_a_prediction_is_read_from_what_rapp_describes() -> None:
    state: dict[str, Any] = {
        "basis": "profiled",
        "correction": {"factor": 1.49, "run_factor": 1.5, "drift": ""},
        "observed": {
            "batches_count": 200,
            "observed_run_ns": 15_200_000,
            "predicted_run_ns": 10_000_000,
            "corrected_run_ns": 15_000_000,
            "median_run_error_pct": 34.2,
            "corrected_median_run_error_pct": 1.31,
        },
    }
    found = Prediction.of(state)
    assert found is not None
    assert (found.observed_ms, found.predicted_ms, found.corrected_ms) == (15.2, 10.0, 15.0)
    assert Prediction.of({**state, "observed": None}) is None


@pytest.mark.parametrize(
    ("kinds", "came"),
    [
        ([], False),
        (["horizontal_up", "vertical_down", "horizontal_down"], True),
        (["vertical_down", "horizontal_down", "vertical_up"], False),
        (["vertical_up", "vertical_down"], False),
        (["vertical_up", "horizontal_down", "horizontal_down"], False),
    ],
)
def test_shares_came_down_when_nothing_grew_after_it(kinds: list[str], came: bool) -> None:
    decisions = [decision(float(at_s), kind) for at_s, kind in enumerate(kinds)]
    assert came_down(reversed(decisions)) is came
