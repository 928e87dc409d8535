"""What the command says when something is wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from hasgpu_cli.__main__ import COMMANDS, cli
from hasgpu_cli.home import Home, RunRecord, UnitRecord, read_run_record, write_run_record
from hasgpu_cli.processes import ProcessId

GOOD = """\
name: f
format: python
inputs: [{name: x, datatype: FP32, shape: [-1, 4]}]
outputs: [{name: y, datatype: FP32, shape: [-1, 2]}]
slo_ms: 100
"""


def call(home: Path, *words: str) -> Result:
    return CliRunner().invoke(cli, ["--home", str(home), *words])


@pytest.fixture(autouse=True)
def _no_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    for service in ("GATEWAY", "SCALER", "SCHEDULER", "RAPP"):
        monkeypatch.delenv(f"HASGPU_{service}", raising=False)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name: str, tmp_path: Path) -> None:
    result = call(tmp_path, name, "--help")
    assert result.exit_code == 0, result.output
    if name != "simulate":  # it needs no system
        assert "--home" in result.output or "COMMAND" in result.output, "a group's commands have options of their own"


@pytest.mark.parametrize(
    "words",
    [
        ("functions",),
        ("describe", "f"),
        ("delete", "f"),
        ("infer", "f", "--text", "a"),
        ("explain", "f"),
        ("scale", "f", "--quota", "10"),
        ("replay", "f"),
        ("top", "--json"),
    ],
)
def test_nothing_runs(words: tuple[str, ...], tmp_path: Path) -> None:
    result = call(tmp_path, *words)
    assert result.exit_code == 1
    assert result.output == f"Error: nothing runs in {tmp_path}: is hasgpu up? (`hasgpu up` starts it)\n"


def test_a_refused_connection_asks_whether_it_is_up(tmp_path: Path) -> None:
    result = call(tmp_path, "functions", "--gateway", "127.0.0.1:1")
    assert result.exit_code == 1
    assert (
        result.output == "Error: the gateway at 127.0.0.1:1 can't be reached: is hasgpu up? (`hasgpu up` starts it)\n"
    )


def test_a_bad_file_is_told_before_anything_is_asked(tmp_path: Path) -> None:
    (tmp_path / "handler.py").write_text("")
    path = tmp_path / "function.yaml"
    path.write_text(GOOD.replace("slo_ms", "slo"))
    result = call(tmp_path, "deploy", str(path))
    assert result.exit_code == 1
    assert result.output == f"Error: {path}: unknown key 'slo'; did you mean 'slo_ms'?\n"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("nonsense",), "No such command 'nonsense'"),
        (("scale", "f"), "nothing to do: give --quota, --limit or --instances"),
        (("replay", "f", "--rates", "1", "--trace", "x"), "give --rates or --trace, not both"),
        (("infer",), "Missing argument 'NAME'"),
    ],
)
def test_wrong_usage_exits_with_2(words: tuple[str, ...], says: str, tmp_path: Path) -> None:
    result = call(tmp_path, *words)
    assert result.exit_code == 2
    assert says in result.output


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("scale", "f", "--quota", "120"), "--quota: expected 0.1..100 per cent, got 120"),
        (("replay", "f", "--rates", "x"), "--rates: expected numbers of 0 or more"),
        (("up", "--nodes", "0"), "--nodes: expected 1..64, got 0"),
        (("logs", "gatway"), "log 'gatway' is not found; did you mean gateway?"),
    ],
)
def test_values_that_can_not_be(words: tuple[str, ...], says: str, tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "gateway.log").write_text("one\ntwo\n")
    result = call(tmp_path, *words)
    assert result.exit_code == 1
    assert says in result.output


def test_logs(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "gateway.log").write_text("one\ntwo\n")
    folder = tmp_path / "state" / "node0" / "instances" / "f-0"
    folder.mkdir(parents=True)
    (folder / "worker.log").write_text("three\n")
    assert call(tmp_path, "logs", "gateway", "-n", "1").output == "two\n"
    assert call(tmp_path, "logs", "f-0").output == "three\n"


def record(process: ProcessId) -> RunRecord:
    unit = UnitRecord("gateway", "service", "127.0.0.1:1", "/l", state="running", process=process)
    return RunRecord(process, "nats://n", "redis://r", {"gateway": unit})


def test_up_says_that_what_runs_keeps_its_options(tmp_path: Path) -> None:
    me = ProcessId.of(os.getpid())
    assert me is not None
    write_run_record(Home(tmp_path), record(me))
    result = call(tmp_path, "up", "--device", "emulated", "--nodes", "2")
    assert result.exit_code == 0
    assert "already up" in result.output
    assert "it runs as it was started; --device, --nodes would count after `hasgpu down`" in result.output
    assert "would count" not in call(tmp_path, "up").output


def test_a_stale_run_file_counts_as_down(tmp_path: Path) -> None:
    """The pid is alive but belongs to another process by now: nothing may be signalled."""
    me = ProcessId.of(os.getpid())
    assert me is not None
    home = Home(tmp_path)
    write_run_record(home, record(ProcessId(me.pid, me.started_unix_s - 1_000)))
    status = json.loads(call(tmp_path, "status", "--json").output)
    assert status["up"] is False
    assert status["units"][0]["health"] == "not running"
    result = call(tmp_path, "down")
    assert result.exit_code == 0
    assert "stopped" in result.output
    assert not home.run_file.exists()


def test_up_when_it_is_up_says_so(tmp_path: Path) -> None:
    me = ProcessId.of(os.getpid())
    assert me is not None
    write_run_record(Home(tmp_path), record(me))
    result = call(tmp_path, "up")
    assert result.exit_code == 0
    assert f"hasgpu is already up in {tmp_path}" in result.output


def test_run_records_there_and_back(tmp_path: Path) -> None:
    home, written = Home(tmp_path), record(ProcessId(1, 2.5))
    assert read_run_record(home) is None
    write_run_record(home, written)
    assert read_run_record(home) == written
    assert home.run_file.stat().st_mode & 0o077 == 0, "an external broker's URL may hold its password"


def test_down_when_nothing_runs(tmp_path: Path) -> None:
    result = call(tmp_path, "down")
    assert (result.exit_code, result.output) == (0, f"nothing ran in {tmp_path}\n")


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from click.testing import CliRunner; from hasgpu_cli.__main__ import cli\n"
        "assert CliRunner().invoke(cli, ['--help']).exit_code == 0\n"
        "print([m for m in ('torch', 'grpc', 'numpy', 'matplotlib', 'rich', 'hasgpu_runtime') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"
