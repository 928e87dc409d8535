"""MpsDaemon against the fake control program of fake_mps/: processes, sockets, pid files are real, the GPU is not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hasgpu_core.errors import InvalidError
from hasgpu_device.backends.cuda.mps import (
    MpsDaemon,
    MpsState,
    client_environment,
    replace_cuda_variables,
    timeshare_environment,
)
from hasgpu_device.backends.cuda.mps_control import MpsControl, parse_lspart
from hasgpu_device.errors import MpsError, MpsTimeoutError

GPU = "GPU-74d43ed3-cdf7-e667-3644-bf5b4f46ed65"
FAKE = Path(__file__).parent / "fake_mps" / "nvidia_cuda_mps_control.py"


class Host:
    """A PATH with the fake on it, its scenario, its record, and a short folder for daemons."""

    def __init__(self, tmp_path: Path, short: Path) -> None:
        self.folder = short / "gpu0"
        self._bin = tmp_path / "bin"
        self._bin.mkdir()
        self._scenario = tmp_path / "scenario.json"
        self._record = tmp_path / "record.jsonl"
        program = self._bin / "nvidia-cuda-mps-control"
        program.write_text(f"#!{sys.executable} -IS\n{FAKE.read_text()}")
        program.chmod(0o755)
        self.environment = {
            "PATH": str(self._bin),
            "FAKE_MPS_SCENARIO": str(self._scenario),
            "FAKE_MPS_RECORD": str(self._record),
            # What a careless parent would hand on.
            "CUDA_VISIBLE_DEVICES": "3",
            "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": "7",
            "CUDA_MPS_PIPE_DIRECTORY": "/tmp/nvidia-mps",
        }
        self._daemons: list[MpsDaemon] = []

    def says(self, **scenario: Any) -> None:
        draft = self._scenario.with_suffix(".draft")
        draft.write_text(json.dumps(scenario))
        draft.replace(self._scenario)

    def daemon(self, **options: Any) -> MpsDaemon:
        daemon = MpsDaemon(GPU, self.folder, environment=self.environment, **({"timeout_s": 30.0} | options))
        self._daemons.append(daemon)
        return daemon

    def recorded(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self._record.read_text().splitlines()]

    def commands(self) -> list[str]:
        return [entry["command"] for entry in self.recorded() if "command" in entry]

    def end(self) -> None:
        for entry in self.recorded() if self._record.exists() else []:
            pid = entry.get("pid", 0)
            if pid and str(self._bin).encode() in _cmdline(pid):
                os.kill(pid, signal.SIGKILL)
        for daemon in self._daemons:
            if daemon._child is not None:
                daemon._child.wait(60)


def _cmdline(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    with tempfile.TemporaryDirectory(prefix="m", dir="/tmp") as short:
        host = Host(tmp_path, Path(short))
        yield host
        host.end()


def eventually(condition: Callable[[], object]) -> None:
    deadline_s = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline_s, "did not come true within 60 s"
        time.sleep(0.01)


# --- start, health, quit ---


def test_a_daemon_starts_in_private_folders_for_one_gpu_and_quits(host: Host) -> None:
    daemon = host.daemon()
    daemon.start(server_uid=1234)

    assert daemon.health().state is MpsState.ACTIVE
    started = host.recorded()[0]
    assert started["start"] == ["-f"]
    assert started["env"] == {
        "CUDA_VISIBLE_DEVICES": GPU,
        "CUDA_MPS_PIPE_DIRECTORY": str(host.folder / "p"),
        "CUDA_MPS_LOG_DIRECTORY": str(host.folder / "log"),
    }
    assert "start_server -uid 1234" in host.commands()
    for folder in (host.folder, daemon.pipe_dir, daemon.log_dir):
        assert folder.stat().st_mode & 0o777 == 0o700
    # A session of its own: what ends the agent's group does not end it.
    pid = daemon.pid
    assert pid is not None
    assert os.getsid(pid) == pid

    assert daemon.quit() is True
    assert host.commands()[-1] == "quit"
    assert daemon.health().state is MpsState.GONE
    assert not daemon.pipe_dir.exists()
    assert daemon.quit() is False


def test_starting_twice_keeps_the_daemon(host: Host) -> None:
    daemon = host.daemon()
    daemon.start()
    pid = daemon.pid
    daemon.start()
    assert daemon.pid == pid
    assert sum("start" in entry for entry in host.recorded()) == 1


def test_without_a_server_it_is_idle(host: Host) -> None:
    daemon = host.daemon()
    daemon.start()
    assert daemon.health().state is MpsState.IDLE


@pytest.mark.parametrize(
    ("status", "state"),
    [("INITIALIZING", MpsState.INITIALIZING), ("ACTIVE", MpsState.ACTIVE), ("FAULT", MpsState.FAULT)],
)
def test_health_tells_the_servers_state(host: Host, status: str, state: MpsState) -> None:
    daemon = host.daemon()
    daemon.start()
    host.says(status=status, clients=[11])
    health = daemon.health()
    assert health.state is state
    assert len(health.servers) == 1


def test_an_undocumented_status_is_not_taken_for_health(host: Host) -> None:
    daemon = host.daemon()
    daemon.start()
    host.says(status="DREAMING", clients=[11])
    health = daemon.health()
    assert health.state is MpsState.UNRESPONSIVE
    assert "INITIALIZING, ACTIVE, FAULT" in health.reason
    assert "DREAMING" in health.reason


def test_a_daemon_that_does_not_answer_is_told_as_such(host: Host) -> None:
    daemon = host.daemon()
    daemon.start()
    host.says(mute=["get_server_list"])
    daemon.control._timeout_s = 0.2
    health = daemon.health()
    assert health.state is MpsState.UNRESPONSIVE
    assert "no answer within 0.2 s" in health.reason


def test_a_daemon_that_dies_is_gone_and_its_exit_is_told(host: Host) -> None:
    daemon = host.daemon()
    daemon.start()
    host.says(die_on="get_server_list")
    daemon.health()
    eventually(lambda: daemon.pid is None)
    health = daemon.health()
    assert health.state is MpsState.GONE
    assert "killed by signal 9" in health.reason

    host.says()
    daemon.start()
    assert daemon.health().state is MpsState.IDLE


def test_start_awaits_an_active_server(host: Host) -> None:
    host.says(status=["INITIALIZING", "INITIALIZING", "ACTIVE"])
    daemon = host.daemon()
    daemon.start(server_uid=0)
    assert sum(command.startswith("get_server_status") for command in host.commands()) == 3


def test_start_fails_when_the_server_meets_a_fault(host: Host) -> None:
    host.says(status=["INITIALIZING", "FAULT"])
    daemon = host.daemon()
    with pytest.raises(MpsError, match="FAULT") as caught:
        daemon.start(server_uid=0)
    assert caught.value.command == "start_server -uid 0"
    assert daemon.pid is None


def test_start_fails_with_what_the_daemon_said(host: Host) -> None:
    host.says(exit_at_start=3)
    with pytest.raises(MpsError) as caught:
        host.daemon().start()
    assert "exit code 3" in str(caught.value)
    assert "Failed to create the control socket" in caught.value.answer


def test_start_ends_a_daemon_that_never_answers(host: Host) -> None:
    host.says(mute=["*"])
    daemon = host.daemon(timeout_s=0.2)
    with pytest.raises(MpsTimeoutError):
        daemon.start(timeout_s=1.0)
    assert daemon.pid is None
    pid = host.recorded()[0]["pid"]
    eventually(lambda: not _cmdline(pid))


def test_a_missing_program_is_told(host: Host) -> None:
    host.environment["PATH"] = "/nonexistent"
    daemon = host.daemon()
    with pytest.raises(MpsError, match="nvidia-cuda-mps-control can't be run: No such file"):
        daemon.start()
    assert daemon.health().state is MpsState.GONE
    with pytest.raises(MpsError, match="can't be run"):
        daemon.version()


# --- whose daemon ---


def test_a_restarted_agent_finds_its_daemon_again(host: Host) -> None:
    first = host.daemon()
    first.start()
    pid = first.pid
    child = first._child
    first.let_go()

    second = host.daemon()
    assert second.adopt() is True
    assert second.pid == pid
    assert second.health().state is MpsState.IDLE
    second.start()
    assert sum("start" in entry for entry in host.recorded()) == 1

    assert second.quit() is True
    assert child is not None
    assert os.waitpid(child.pid, 0)[1] == 0


def test_nothing_is_adopted_from_a_pid_that_was_used_again(host: Host) -> None:
    daemon = host.daemon()
    daemon.start()
    record = json.loads((host.folder / "daemon.json").read_text())
    daemon.quit()
    record["pid"], record["started_ticks"] = os.getpid(), 1
    (host.folder / "daemon.json").write_text(json.dumps(record))
    assert host.daemon().adopt() is False
    assert host.daemon().quit() is False


@pytest.mark.parametrize("keep_pid_file", [True, False])
def test_somebody_elses_daemon_is_left_alone(host: Host, keep_pid_file: bool) -> None:
    pipe = host.folder / "p"
    pipe.mkdir(parents=True)
    host.folder.chmod(0o700)
    environment = replace_cuda_variables(host.environment, {"CUDA_MPS_PIPE_DIRECTORY": str(pipe)})
    foreign = subprocess.Popen(
        [Path(host.environment["PATH"]) / "nvidia-cuda-mps-control", "-f"], env=environment, stdout=subprocess.DEVNULL
    )
    try:
        pid_file = pipe / "nvidia-cuda-mps-control.pid"
        eventually(lambda: (pipe / "control").exists() and pid_file.exists() and pid_file.read_text())
        if not keep_pid_file:
            pid_file.unlink()
        daemon = host.daemon()
        assert daemon.adopt() is False
        with pytest.raises(MpsError, match="left alone"):
            daemon.start()
        assert daemon.quit() is False
        assert daemon.health().state is MpsState.GONE
        assert foreign.poll() is None
        assert "quit" not in host.commands()
        assert (pipe / "control").exists()
    finally:
        foreign.kill()
        foreign.wait(60)


def test_what_a_dead_daemon_left_is_cleared(host: Host) -> None:
    pipe = host.folder / "p"
    pipe.mkdir(parents=True)
    host.folder.chmod(0o700)
    # The pid of a process that lives, but is no MPS daemon.
    (pipe / "nvidia-cuda-mps-control.pid").write_text(str(os.getpid()))
    (pipe / "control").write_text("")
    (pipe / "junk").write_text("")
    daemon = host.daemon()
    daemon.start()
    assert daemon.health().state is MpsState.IDLE
    assert not (pipe / "junk").exists()


def test_a_folder_that_others_may_enter_is_refused(host: Host) -> None:
    host.folder.mkdir()
    host.folder.chmod(0o755)
    with pytest.raises(MpsError, match="mode 0700"):
        host.daemon().start()


def test_quit_of_a_daemon_that_does_not_listen_kills_it(host: Host) -> None:
    host.says(ignore_quit=True, deaf=True)
    daemon = host.daemon()
    daemon.start()
    pid = daemon.pid
    assert daemon.quit(timeout_s=1.0) is True
    assert pid is not None
    eventually(lambda: not _cmdline(pid))


def test_quit_grants_connected_clients_a_moment(host: Host) -> None:
    daemon = host.daemon()
    daemon.start()
    host.says(clients=[77])
    daemon.quit()
    assert host.commands()[-1] == "quit -t 5"


# --- clients ---


def test_clients_are_listed_and_terminated(host: Host) -> None:
    daemon = host.daemon()
    daemon.start(server_uid=0)
    assert daemon.clients() == ()
    host.says(clients=[501, 502])
    assert daemon.clients() == (501, 502)
    assert daemon.terminate_client(502) is True
    server = daemon.health().servers[0]
    assert f"terminate_client {server} 502" in host.commands()
    assert daemon.terminate_client(999) is False


def test_a_refusal_is_an_error_with_command_answer_and_code(host: Host) -> None:
    daemon = host.daemon()
    daemon.start(server_uid=0)
    host.says(clients=[501], refuse={"terminate_client": "Failed to terminate client 501"})
    with pytest.raises(MpsError) as caught:
        daemon.terminate_client(501)
    error = caught.value
    assert error.command.startswith("terminate_client ")
    assert error.command.endswith(" 501")
    assert error.answer == "Failed to terminate client 501"
    assert error.exit_code == 0
    assert not isinstance(error, MpsTimeoutError)


def test_a_terminate_that_hangs_is_a_time_out(host: Host) -> None:
    daemon = host.daemon()
    daemon.start(server_uid=0)
    host.says(clients=[501], mute=["terminate_client"])
    with pytest.raises(MpsTimeoutError, match="no answer within"):
        daemon.terminate_client(501, timeout_s=0.2)


def test_a_failing_program_is_told_with_its_exit_code(host: Host) -> None:
    daemon = host.daemon()
    daemon.start()
    host.says(fail={"get_server_list": [7, "out of cheese"]})
    with pytest.raises(MpsError, match=r"exit code 7.*out of cheese"):
        daemon.clients()


def test_nonsense_instead_of_pids_is_told(host: Host) -> None:
    daemon = host.daemon()
    daemon.start()
    host.says(answer={"get_server_list": "twelve"})
    with pytest.raises(MpsError, match=r"expected a list of pids.*twelve"):
        daemon.clients()


# --- environment ---


def test_environment_of_a_green_worker_has_no_percentage() -> None:
    assert client_environment(Path("/r/p"), "mps+green", pinned_limit_bytes=(1536 << 20) + 5) == {
        "CUDA_MPS_PIPE_DIRECTORY": "/r/p",
        "CUDA_MPS_PINNED_DEVICE_MEM_LIMIT": "0=1536M",
    }


def test_environment_of_a_percentage_worker() -> None:
    assert client_environment(Path("/r/p"), "mps+pct", sm_pct=25) == {
        "CUDA_MPS_PIPE_DIRECTORY": "/r/p",
        "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": "25",
    }


def test_environment_of_a_static_worker() -> None:
    assert client_environment(Path("/r/p"), "mps+static", partition=f"{GPU}/Dx4") == {
        "CUDA_MPS_PIPE_DIRECTORY": "/r/p",
        "CUDA_MPS_SM_PARTITION": f"{GPU}/Dx4",
    }


@pytest.mark.parametrize(
    ("mode", "options", "message"),
    [
        ("mps+green", {"sm_pct": 50}, "active thread percentage in mode mps\\+green: expected none, got 50"),
        ("mps+static", {"sm_pct": 50, "partition": "GPU-1/a"}, "expected none, got 50"),
        ("mps+pct", {"sm_pct": 0}, "expected 1..100, got 0"),
        ("mps+pct", {"sm_pct": 101}, "expected 1..100, got 101"),
        ("mps+static", {}, "expected the ID of a partition, got ''"),
        ("mps+green", {"partition": "GPU-1/a"}, "mode mps\\+green: expected none, got 'GPU-1/a'"),
        ("mps+green", {"pinned_limit_bytes": 1000}, "expected at least 1048576 bytes, got 1000"),
        ("timeshare", {}, "expected mps\\+green, mps\\+pct or mps\\+static, got 'timeshare'"),
    ],
)
def test_environment_refuses_what_does_not_belong(mode: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidError, match=message):
        client_environment(Path("/r/p"), mode, **options)


def test_inherited_cuda_variables_are_taken_away(host: Host) -> None:
    merged = replace_cuda_variables(
        host.environment | {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}, timeshare_environment(GPU, Path("/r/none"))
    )
    assert merged["CUDA_VISIBLE_DEVICES"] == GPU
    assert merged["CUDA_MPS_PIPE_DIRECTORY"] == "/r/none"
    assert "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE" not in merged
    assert merged["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
    assert merged["PATH"] == host.environment["PATH"]


# --- static partitions ---


@pytest.mark.parametrize("bare_ids", [False, True])
def test_partitions_are_made_listed_and_removed(host: Host, bare_ids: bool) -> None:
    host.says(bare_ids=bare_ids)
    daemon = host.daemon()
    daemon.start(static=True)
    assert host.recorded()[0]["start"] == ["-f", "-S"]
    one = daemon.add_partition(4)
    two = daemon.add_partition(7)
    assert one == f"{GPU}/D14+AAA/A="
    listed = daemon.partitions()
    assert (listed.free_chunks_count, listed.used_chunks_count) == (5, 11)
    assert (listed.free_sms_count, listed.used_sms_count) == (40, 88)
    assert [(p.chunks_count, p.sms_count, p.has_clients) for p in listed.partitions] == [
        (4, 32, False),
        (7, 56, False),
    ]
    with pytest.raises(MpsError, match="INVALID_RESOURCE_CONFIGURATION"):
        daemon.add_partition(6)
    daemon.remove_partition(two)
    assert [p.name for p in daemon.partitions().partitions] == [one.split("/", 1)[1]]
    with pytest.raises(InvalidError, match="at least 1, got 0"):
        daemon.add_partition(0)


def test_partitions_need_a_static_daemon(host: Host) -> None:
    daemon = host.daemon()
    with pytest.raises(MpsError, match="no daemon of ours runs"):
        daemon.add_partition(1)
    daemon.start()
    with pytest.raises(MpsError, match=r"not started for static partitions"):
        daemon.add_partition(1)
    with pytest.raises(MpsError, match="runs without -S: quit it"):
        daemon.start(static=True)


def test_a_program_without_static_partitions_is_told(host: Host) -> None:
    host.says(no_static=True)
    with pytest.raises(MpsError, match="invalid option"):
        host.daemon().start(static=True)


def test_the_mode_of_an_adopted_daemon_is_known(host: Host) -> None:
    first = host.daemon()
    first.start(static=True)
    second = host.daemon()
    assert second.adopt()
    assert second.is_static
    assert second.add_partition(1).startswith(GPU)


def test_lspart_with_blanks_instead_of_dashes_and_other_gpus() -> None:
    text = """GPU           Partition   free    used    free    used    clients
                          chunks  chunks  SM      SM
GPU-99999999              16      0       128     0
GPU-99999999  AAAA                2               16      No
GPU-74d43ed3              9       7       76      56
GPU-74d43ed3  Dx4AAA==            7               56      Yes
"""
    found = parse_lspart(text, GPU)
    assert found is not None
    assert (found.free_chunks_count, found.used_sms_count) == (9, 56)
    assert [(p.name, p.chunks_count, p.sms_count, p.has_clients) for p in found.partitions] == [
        ("Dx4AAA==", 7, 56, True)
    ]
    assert parse_lspart("Partition table is empty", GPU) is None


# --- versions, bad input ---


@pytest.mark.parametrize(
    ("text", "number", "may_partition"),
    [
        ("CUDA MPS 13010", 13010, True),
        ("version 12080", 12080, False),
        ("CUDA 13.1", 13010, True),
        ("r615", None, False),
    ],
)
def test_version(host: Host, text: str, number: int | None, may_partition: bool) -> None:
    host.says(version=text)
    version = MpsControl(host.environment).version()
    assert (version.number, version.may_partition) == (number, may_partition)


def test_a_uuid_that_is_none_and_a_path_too_long_are_refused(host: Host, tmp_path: Path) -> None:
    with pytest.raises(InvalidError, match=r'expected "GPU-\.\.\.", got \'0\''):
        MpsDaemon("0", host.folder, environment={})
    with pytest.raises(InvalidError, match="at most 107 bytes"):
        MpsDaemon(GPU, tmp_path / ("x" * 100), environment={})
