"""What users type, against the running system: each command's output and exit status."""

from __future__ import annotations

import gzip
import json
import pathlib
from collections.abc import Iterator

import pytest
from hasgpu_runtime.brokers import NatsServer, RedisServer
from hasgpu_system import FUNCTIONS, System

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]


def test_replay_of_given_rates_sends_their_sum(system: System) -> None:
    summary = system.json("replay", "tricky", "--rates", "5 20 5", "--stage-seconds", "1")
    assert summary["requests"] == 30
    assert (summary["ok"], summary["failures"]) == (30, {})
    assert 0 < summary["p50_ms"] <= summary["p95_ms"] <= summary["p99_ms"]
    assert summary["slo_ms"] == 500


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("content", "requests"), [("t_s\n10.0\n10.1\n10.1\n10.4\n", 4), ("counts,day\n3,mon\n0,mon\n5,mon\n", 8)]
)
def test_replay_of_a_trace_sends_what_it_holds(
    system: System, tmp_path: pathlib.Path, content: str, requests: int, packed: bool
) -> None:
    path = tmp_path / ("trace.csv.gz" if packed else "trace.csv")
    path.write_bytes(gzip.compress(content.encode()) if packed else content.encode())
    summary = system.json("replay", "tricky", "--trace", str(path), "--stage-seconds", "0.5", "--text", "hello")
    assert (summary["requests"], summary["ok"]) == (requests, requests)


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["replay", "tricky", "--rates", "5 many"], 1, ["--rates", "many"]),
        (["replay", "tricky", "--rates", "5", "--trace", "x.csv"], 2, ["--rates or --trace"]),
        (["replay", "tricky", "--trace", "/nowhere/trace.csv"], 1, ["/nowhere/trace.csv"]),
        (["replay", "nobody", "--rates", "5"], 1, ["nobody", "not found"]),
        (["infer", "nobody", "--text", "x"], 1, ["nobody", "not found"]),
        (["infer", "tricky"], 1, ["text", "--text"]),
        (["infer", "tricky", "--input", "txet=1"], 1, ["txet", "text"]),
        (["describe", "nobody"], 1, ["nobody"]),
        (["delete", "nobody"], 1, ["nobody"]),
        (["explain", "nobody"], 1, ["nobody", "tricky"]),
        (["scale", "nobody", "--quota", "30"], 1, ["nobody", "tricky"]),
        (["scale", "tricky"], 2, ["--quota", "--instances"]),
        (["scale", "tricky", "--quota", "130"], 1, ["--quota", "130"]),
        (["scale", "tricky", "--instances", "9"], 1, ["instances", "1..3", "9"]),
        (["logs", "gatewya"], 1, ["gatewya", "did you mean gateway"]),
        (["deploy", "/nowhere/function.yaml"], 1, ["/nowhere/function.yaml"]),
        (["dance"], 2, ["No such command", "dance"]),
        (["status", "--loud"], 2, ["No such option", "--loud"]),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else None,
)
def test_a_mistake_is_told_in_words_and_with_its_status(
    system: System, arguments: list[str], status: int, words: list[str]
) -> None:
    done = system.cli(*arguments, check=False)
    assert done.returncode == status, done.stdout + done.stderr
    for word in words:
        assert word in done.stderr
    assert "Traceback" not in done.stderr


def test_explain_tells_decisions_newest_first_with_their_numbers(system: System) -> None:
    system.cli("scale", "tricky", "--quota", "12", "--hold", "1")
    decisions = system.json("explain", "tricky")
    assert decisions
    times = [decision["decided_unix_ns"] for decision in decisions]
    assert times == sorted(times, reverse=True)
    by_hand = next(decision for decision in decisions if decision["origin"] == "manual")
    assert "set by hand" in by_hand["reason"]
    assert by_hand["slo_ms"] == 500
    shown = system.cli("explain", "tricky").stdout
    assert by_hand["reason"] in shown


def test_demand_is_counted_in_items(system: System) -> None:
    texts = [word for text in ("a", "b", "c", "d") for word in ("--text", text)]
    summary = system.json("replay", "tricky", "--rates", "10", "--stage-seconds", "4", *texts)
    assert (summary["requests"], summary["ok"]) == (40, 40)
    looks = system.json("explain", "tricky", "--all", "--limit", "60")
    newest_ns = looks[0]["decided_unix_ns"]
    during = [look["observed_rps"] for look in looks if newest_ns - look["decided_unix_ns"] < 10e9]
    assert max(during) > 25  # 10 requests of 4 texts a second


def test_logs_shows_the_end_of_a_services_log(system: System) -> None:
    lines = system.cli("logs", "gateway", "-n", "500").stdout.splitlines()
    assert any("127.0.0.1" in line for line in lines)
    assert len(system.cli("logs", "gateway", "-n", "1").stdout.splitlines()) == 1
    everything = system.cli("logs", "-n", "1").stdout
    for service in ("gateway", "scaler", "scheduler", "rapp", "node-agent-0"):
        assert f"{service} " in everything


def test_status_functions_and_top_show_what_runs(system: System) -> None:
    status = system.json("status")
    assert status["up"]
    assert {"nats", "redis", "gateway", "scaler", "scheduler", "rapp", "node-agent-0"} == {
        unit["name"] for unit in status["units"]
    }
    for command in (["status"], ["functions"], ["top", "--count", "2", "--period", "0.2"]):
        assert "tricky" in system.cli(*command).stdout
    (row,) = [row for row in system.json("top") if row["name"] == "tricky"]
    assert row["function"]["spec"]["slo_ms"] == 500
    assert row["decision"]["reason"]
    assert "tricky" in [function["spec"]["name"] for function in system.json("functions")]


def test_up_when_it_is_up_changes_nothing(system: System) -> None:
    before = {unit["name"]: unit["pid"] for unit in system.units()}
    done = system.cli("up")
    assert "already up" in done.stdout
    assert system.address in done.stdout
    assert system.json("up")["already"]
    assert {unit["name"]: unit["pid"] for unit in system.units()} == before


@pytest.fixture
def brokers(tmp_path: pathlib.Path) -> Iterator[tuple[NatsServer, RedisServer]]:
    with NatsServer(tmp_path / "nats") as nats, RedisServer(tmp_path / "redis") as redis:
        yield nats, redis


def test_brokers_of_somebody_else_are_used_and_left_alone(
    tmp_path: pathlib.Path, brokers: tuple[NatsServer, RedisServer]
) -> None:
    nats, redis = brokers
    other = System(tmp_path / "home")
    pids = (nats.pid, redis.pid)
    try:
        other.up("--nats-url", nats.url, "--redis-url", redis.url)
        status = other.json("status")
        assert {"nats", "redis"}.isdisjoint(unit["name"] for unit in status["units"])
        endpoints = json.loads(other.cli("up", "--json").stdout)["endpoints"]
        assert (endpoints["nats"], endpoints["redis"]) == (nats.url, redis.url)
        other.cli("deploy", str(FUNCTIONS / "tricky" / "function.yaml"), "--wait")
        answer = other.json("infer", "tricky", "--text", "elsewhere")
        assert answer["outputs"][0]["data"] == ["elsewhere"]
    finally:
        other.down()
    assert nats.running
    assert redis.running
    assert (nats.pid, redis.pid) == pids
    done = other.cli("status", check=False)
    assert done.returncode == 1


def test_a_setting_that_a_service_refuses_ends_the_start(tmp_path: pathlib.Path) -> None:
    other = System(tmp_path / "home")
    done = other.cli("up", "--port", str(other.port), "--devices", "quantum", "--timeout", "600", check=False)
    assert done.returncode == 1
    assert "it keeps ending: node-agent-0" in done.stderr
    assert "HASGPU_DEVICES: expected cpu" in done.stderr
    assert "got 'quantum'" in done.stderr
    assert other.cli("status", check=False).returncode == 1
