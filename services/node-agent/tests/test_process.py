"""Real processes: watched, told how they ended, found by their command line."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hasgpu_node_agent.adapters.process import (
    WORKER_MODULE,
    Process,
    exit_in_words,
    running_workers,
    wait_until_ended,
)

SLEEP = [sys.executable, "-c", "import time; time.sleep(60)"]


async def _start(tmp_path: Path, code: str) -> tuple[Process, list[str]]:
    ends: list[str] = []
    with (tmp_path / "log").open("ab") as log:
        process = Process.start([sys.executable, "-c", code], log, lambda: ends.append("end"))
    return process, ends


async def test_the_exit_code_is_told_and_the_output_kept(tmp_path: Path) -> None:
    process, ends = await _start(tmp_path, "import sys; print('hello', flush=True); sys.exit(3)")
    assert await process.wait() == "ended with exit code 3"
    assert process.exit_reason == "ended with exit code 3"
    assert ends == ["end"]
    assert (tmp_path / "log").read_text() == "hello\n"


async def test_a_signal_is_told_by_its_name(tmp_path: Path) -> None:
    process, _ = await _start(tmp_path, "import time; time.sleep(60)")
    process.send(signal.SIGKILL)
    assert await process.wait() == "was killed by SIGKILL"
    process.send(signal.SIGTERM)


async def test_what_a_handler_started_ends_with_its_worker(tmp_path: Path) -> None:
    code = f"import subprocess; print(subprocess.Popen({SLEEP!r}).pid, flush=True); input()"
    process, _ = await _start(tmp_path, code)  # input() fails at once: there is no standard input
    assert await process.wait() == "ended with exit code 1"
    child = int((tmp_path / "log").read_text().split()[0])
    assert wait_until_ended([child], 60.0)


async def test_a_process_of_another_parent_is_watched(tmp_path: Path) -> None:
    with subprocess.Popen(SLEEP) as other:  # noqa: ASYNC220  another parent's child is what is tested
        process = Process.adopt(other.pid, lambda: None)
        assert process.exit_reason is None
        process.send(signal.SIGTERM)
        assert "not known" in await process.wait()


async def test_a_process_that_is_gone_already_is_told_so() -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as other:  # noqa: ASYNC220  as above
        other.wait()
    process = Process.adopt(other.pid, lambda: None)
    assert process.exit_reason is not None


async def test_it_works_without_pidfd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_pidfd(pid: int) -> int:
        raise OSError("not offered by this kernel")

    monkeypatch.setattr("os.pidfd_open", no_pidfd)
    process, ends = await _start(tmp_path, "import time; time.sleep(60)")
    process.send(signal.SIGTERM)
    assert await process.wait() == "was killed by SIGTERM"
    assert ends == ["end"]


async def test_a_process_that_was_let_go_runs_on(tmp_path: Path) -> None:
    process, ends = await _start(tmp_path, "import time; time.sleep(60)")
    process.let_go()
    other = Process.adopt(process.pid, lambda: None)
    await asyncio.sleep(0)
    assert other.exit_reason is None
    other.send(signal.SIGKILL)
    await other.wait()
    assert ends == []


def test_workers_are_found_by_the_configuration_on_their_command_line(tmp_path: Path) -> None:
    config = tmp_path / "n" / "instances" / "f-0" / "worker-1" / "config.json"
    with subprocess.Popen([*SLEEP, WORKER_MODULE, "--config", str(config)]) as worker:
        try:
            found = dict(running_workers(tmp_path / "n"))
            assert found == {worker.pid: config}
            assert dict(running_workers(tmp_path / "other")) == {}
        finally:
            worker.kill()


@pytest.mark.parametrize(
    ("code", "words"),
    [(0, "ended with exit code 0"), (-9, "was killed by SIGKILL"), (-77, "was killed by signal 77")],
)
def test_exit_codes_in_words(code: int, words: str) -> None:
    assert exit_in_words(code) == words
