"""What the doctor makes of the answers."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

from click.testing import CliRunner
from hasgpu_cli import diagnosis
from hasgpu_cli.__main__ import cli
from hasgpu_cli.diagnosis import FAULT, OK, WARNING, Finding, judge

NOW_NS = 1_700_000_000_000_000_000


def report(service: str, **changes: Any) -> dict[str, Any]:
    plain = {
        "service": service,
        "instance": f"{service}-1",
        "version": diagnosis.version(),
        "started_unix_ns": NOW_NS - 90_000_000_000,
        "asked_unix_ns": NOW_NS,
        "answered_unix_ns": NOW_NS + 1_000_000,
        "received_unix_ns": NOW_NS + 2_000_000,
        "checks": [{"level": "ok", "subject": "NATS", "found": "2.12.0", "advice": ""}],
    }
    return plain | changes


def device(**changes: Any) -> dict[str, Any]:
    plain = {"gpu": "gpu0", "model": "H100", "backend": "cuda", "mode": "mps+green", "health": "ok"}
    return {**plain, "health_reason": "", "capabilities": [], **changes}


def node(**changes: Any) -> dict[str, Any]:
    return {"node": "n", "address": "h:1", "heartbeat_age_ms": 500, "draining": False, "devices": [device()], **changes}


WELL: dict[str, Any] = {
    "reports": [report(service) for service in diagnosis.SERVICES],
    "checks": [{"level": "ok", "subject": "stream STATE", "found": "3 messages", "advice": ""}],
    "nodes": [node()],
}


def bad(answer: dict[str, Any]) -> list[Finding]:
    found = judge(answer)
    assert all(bool(finding.advice) == (finding.level != OK) for finding in found), found
    return [finding for finding in found if finding.level != OK]


def test_all_is_well() -> None:
    assert bad(WELL) == []
    subjects = [finding.subject for finding in judge(WELL)]
    assert subjects == [*diagnosis.SERVICES, "clocks", "NATS", "stream STATE", "node n", "device n/gpu0"]


def test_who_does_not_answer_is_named() -> None:
    answer = deepcopy(WELL)
    answer["reports"] = [report for report in answer["reports"] if report["service"] != "rapp"]
    (finding,) = bad(answer)
    assert (finding.level, finding.subject) == (FAULT, "rapp")
    assert "hasgpu logs rapp" in finding.advice


def test_another_version_is_a_warning() -> None:
    answer = deepcopy(WELL)
    answer["reports"].append(report("node-agent", instance="node-agent-2", version="0.0.9"))
    (finding,) = bad(answer)
    assert (finding.level, finding.subject) == (WARNING, "node-agent")
    assert "0.0.9" in finding.found
    assert "2 processes" in finding.found


def test_a_clock_that_is_off_is_a_fault_and_a_slow_answer_is_none() -> None:
    answer = deepcopy(WELL)
    slow = {"answered_unix_ns": NOW_NS + 900_000_000, "received_unix_ns": NOW_NS + 950_000_000}
    answer["reports"][1] |= slow
    assert bad(answer) == []
    answer["reports"][2]["answered_unix_ns"] = NOW_NS - 300_000_000
    (finding,) = bad(answer)
    assert (finding.level, finding.subject) == (FAULT, "clocks")
    assert "scaler (scaler-1) is at least 300 ms off" in finding.found


def test_equal_faults_of_brokers_are_told_once_and_others_each() -> None:
    answer = deepcopy(WELL)
    slow = {"level": "warning", "subject": "NATS", "found": "2.12.0, 80 ms", "advice": "slow"}
    away = {"level": "fault", "subject": "NATS", "found": "no connection", "advice": "is it running?"}
    for at, check in ((0, slow), (1, dict(slow, found="2.12.0, 90 ms")), (2, away)):
        answer["reports"][at]["checks"] = [check]
    found = bad(answer)
    assert [(finding.level, finding.advice) for finding in found] == [(WARNING, "slow"), (FAULT, "is it running?")]
    assert found[1].found.endswith("(seen by scaler)")


def test_nodes_and_devices() -> None:
    answer = deepcopy(WELL)
    answer["nodes"] = []
    assert [finding.subject for finding in bad(answer)] == ["nodes"]
    lost, shared = device(health="lost", health_reason="Xid 79"), device(gpu="gpu1", mode="timeshare")
    answer["nodes"] = [node(node="old", heartbeat_age_ms=9_000), node(devices=[lost, shared])]
    levels = {finding.subject: finding.level for finding in bad(answer)}
    assert levels == {"node old": FAULT, "device n/gpu0": FAULT, "device n/gpu1": WARNING}


def test_without_a_system_it_says_what_to_do(tmp_path) -> None:
    result = CliRunner().invoke(cli, ["doctor", "--home", str(tmp_path)])
    assert result.exit_code == 1
    assert "✗ gateway" in result.output
    assert "docker compose up" in result.output
    assert "1 fault, 0 warnings" in result.output
