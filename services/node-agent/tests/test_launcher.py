"""Folders, control blocks and adoption with real processes in place of workers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hasgpu_core.errors import UnavailableError
from hasgpu_core.resources import InstanceState
from hasgpu_device.control import ControlBlock
from hasgpu_device.worker_config import WorkerConfig
from hasgpu_node_agent.adapters import folders as folders_module
from hasgpu_node_agent.adapters import launcher as launcher_module
from hasgpu_node_agent.adapters.folders import LOG_LIMIT_BYTES, NodeFolders
from hasgpu_node_agent.adapters.launcher import ProcessLauncher
from hasgpu_node_agent.adapters.process import WORKER_MODULE
from hasgpu_node_agent.ports import LaunchRequest
from hasgpu_node_agent.row_guard import WorkerKey
from hasgpu_node_agent.row_layout import Lease


@pytest.fixture
def folders(tmp_path: Path) -> Iterator[NodeFolders]:
    made = NodeFolders(tmp_path / "n")
    yield made
    made.drop_pages()


@pytest.fixture
def launcher(folders: NodeFolders, monkeypatch: pytest.MonkeyPatch) -> ProcessLauncher:
    def argv(config: Path) -> list[str]:
        return [sys.executable, "-c", "import time; time.sleep(60)", WORKER_MODULE, "--config", str(config)]

    monkeypatch.setattr(launcher_module, "worker_argv", argv)
    return ProcessLauncher(folders, {"cpu0": 2.0}, listen_host="127.0.0.1", advertise_host="")


def request(make: Any, generation: int = 1, *, profiling: bool = False) -> LaunchRequest:
    return LaunchRequest(
        key=WorkerKey("f-0", generation),
        function=make.function(revision=3),
        device=make.device(),
        row=1,
        allocation=make.share(300, sm=50, limit=600),
        lease=Lease(25, 50),
        allocation_revision=7,
        artifact=Path("/artifacts/x"),
        profiling=profiling,
    )


async def end(worker: Any) -> None:
    worker.kill()
    await worker.wait()
    worker.remove()


async def test_a_worker_gets_its_configuration_control_block_and_gate(
    launcher: ProcessLauncher, folders: NodeFolders, make: Any
) -> None:
    worker = launcher.launch(request(make), lambda: None)
    folder = folders.worker(WorkerKey("f-0", 1))
    config = WorkerConfig.load(folder.config)
    assert (config.instance, config.function, config.function_revision) == ("f-0", "f", 3)
    assert (config.device_cores, config.gate_path) == (2.0, str(folders.gate("cpu0", 1)))
    with ControlBlock.open(config.control_path) as block:
        shares = block.read_shares()
        assert (shares.first_pct, shares.sm_pct, shares.exclusive) == (25, 50, False)
        assert (shares.request_permille, shares.limit_permille) == (300, 600)
        epoch = worker.write_share(make.share(200), Lease(25, 50, exclusive=True))
        assert (block.read_shares().epoch, block.read_shares().request_permille) == (epoch, 200)
        assert (block.read_shares().first_pct, block.read_shares().exclusive) == (25, True)
        assert worker.written_lease() == (Lease(25, 50, exclusive=True), epoch)
        block.write_usage(epoch, used_ns=5, batches_count=2)
        assert worker.applied_epoch() == epoch
        assert worker.counters().device_time_ns == 5
    assert folders.gate("cpu0", 1).exists()
    assert worker.status() is None
    await end(worker)
    assert worker.counters().batches_count == 2, "the last counters outlive the folder"
    assert not folder.path.exists()
    assert folder.log.exists()
    launcher.forget("f-0")
    assert not folder.log.exists()


async def test_a_status_that_is_half_there_is_none(launcher: ProcessLauncher, folders: NodeFolders, make: Any) -> None:
    worker = launcher.launch(request(make), lambda: None)
    status = folders.worker(WorkerKey("f-0", 1)).status
    for text in ("", "{", "[]", '{"state": "odd", "reason": "", "address": ""}'):
        status.write_text(text)
        assert worker.status() is None
    status.write_text(json.dumps({"pid": 1, "state": "ready", "reason": "", "address": "h:1", "started_unix_ns": 1}))
    found = worker.status()
    assert found is not None
    assert (found.state, found.address) == (InstanceState.READY, "h:1")
    await end(worker)


async def test_a_running_worker_is_adopted_with_the_share_in_force(launcher: ProcessLauncher, make: Any) -> None:
    worker = launcher.launch(request(make), lambda: None)
    worker.note_share(make.share(450), 9)
    worker.let_go()
    (adopted,) = launcher.adopt(lambda: None)
    assert adopted.process.pid == worker.pid
    assert adopted.record.key == WorkerKey("f-0", 1)
    assert (adopted.record.allocation, adopted.record.allocation_revision) == (make.share(450), 9)
    assert (adopted.record.gpu, adopted.record.row, adopted.record.function_revision) == ("cpu0", 1, 3)
    await end(adopted.process)


async def test_what_is_left_of_dead_workers_is_cleared_away(
    launcher: ProcessLauncher, folders: NodeFolders, make: Any
) -> None:
    worker = launcher.launch(request(make), lambda: None)
    worker.kill()
    await worker.wait()
    assert launcher.adopt(lambda: None) == []
    assert list(folders.instances.iterdir()) == []


async def test_shared_pages_stay_while_a_worker_runs_and_go_with_the_last(
    launcher: ProcessLauncher, folders: NodeFolders, make: Any
) -> None:
    worker = launcher.launch(request(make), lambda: None)
    control = folders.worker(WorkerKey("f-0", 1)).control
    launcher.tidy()
    assert control.exists()
    assert folders.gate("cpu0", 1).exists()
    await end(worker)
    assert not control.exists()
    launcher.tidy()
    assert not folders.pages.exists()


def test_a_page_folder_that_is_not_ours_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody else's link in the world-writable place must not decide where we write."""
    monkeypatch.setattr(folders_module, "SHARED_MEMORY", tmp_path / "shm")
    (tmp_path / "shm").mkdir()
    first = NodeFolders(tmp_path / "n")
    assert first.pages.parent == tmp_path / "shm"
    first.drop_pages()
    first.pages.symlink_to(tmp_path)
    assert NodeFolders(tmp_path / "n").pages == tmp_path / "n" / "pages"


async def test_another_process_with_the_pid_of_a_worker_is_not_adopted(
    launcher: ProcessLauncher, folders: NodeFolders, make: Any
) -> None:
    worker = launcher.launch(request(make), lambda: None)
    worker.kill()
    await worker.wait()
    status = folders.worker(WorkerKey("f-0", 1)).status
    status.write_text(
        json.dumps({"pid": os.getpid(), "state": "ready", "reason": "", "address": "h:1", "started_unix_ns": 1})
    )
    assert launcher.adopt(lambda: None) == []


@pytest.mark.parametrize("damage", ["record", "control", "profiling"])
async def test_a_worker_that_cannot_be_adopted_is_ended(
    launcher: ProcessLauncher, folders: NodeFolders, make: Any, damage: str
) -> None:
    worker = launcher.launch(request(make, profiling=damage == "profiling"), lambda: None)
    if damage != "profiling":
        getattr(folders.worker(WorkerKey("f-0", 1)), damage).write_text("not this")
    assert launcher.adopt(lambda: None) == []
    assert await worker.wait() == "was killed by SIGKILL"
    assert list(folders.instances.iterdir()) == list(folders.profiles.iterdir()) == []


async def test_pages_of_another_version_are_made_anew(
    launcher: ProcessLauncher, folders: NodeFolders, make: Any
) -> None:
    worker = launcher.launch(request(make), lambda: None)
    gate = folders.gate("cpu0", 1)
    content = bytearray(gate.read_bytes())
    content[8:12] = (99).to_bytes(4, "little")
    gate.write_bytes(content)
    with pytest.raises(OSError, match="version 99"):
        launcher.launch(request(make, 2), lambda: None)
    # The next agent can't adopt what works with them, and starts all anew.
    assert launcher.adopt(lambda: None) == []
    assert await worker.wait() == "was killed by SIGKILL"
    worker.remove()
    again = launcher.launch(request(make), lambda: None)
    (adopted,) = launcher.adopt(lambda: None)
    assert gate.exists(), "the pages of those that run stay"
    await end(adopted.process)
    await again.wait()


async def test_a_worker_that_cannot_be_started_leaves_nothing_open(
    launcher: ProcessLauncher, make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is tried again for as long as that lasts, so each try must give back what it opened."""
    monkeypatch.setattr(launcher_module, "worker_argv", lambda config: [str(config.parent / "no such program")])

    def try_once() -> int:
        with pytest.raises(OSError, match="no such program"):
            launcher.launch(request(make), lambda: None)
        return len(os.listdir("/proc/self/fd"))

    first = try_once()
    assert [try_once() for _ in range(3)] == [first] * 3


async def test_a_long_log_is_set_aside_when_a_worker_starts(
    launcher: ProcessLauncher, folders: NodeFolders, make: Any
) -> None:
    log = folders.worker(WorkerKey("f-0", 1)).log
    log.parent.mkdir(parents=True)
    log.write_bytes(b"x" * (LOG_LIMIT_BYTES + 1))
    worker = launcher.launch(request(make), lambda: None)
    assert log.stat().st_size < 1_000
    assert (log.parent / "worker.log.1").stat().st_size == LOG_LIMIT_BYTES + 1
    await end(worker)


def test_a_second_agent_of_a_node_is_kept_away(folders: NodeFolders, tmp_path: Path) -> None:
    second = NodeFolders(tmp_path / "n")
    with folders.locked(), pytest.raises(UnavailableError, match="another node agent runs"), second.locked():
        pass
    with folders.locked():
        pass


def test_no_torch_is_loaded_by_the_agent() -> None:
    code = "import hasgpu_node_agent.app, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
