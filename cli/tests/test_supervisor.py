"""The supervisor with commands that only wait."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
from hasgpu_cli.home import Home, RunRecord, read_run_record
from hasgpu_cli.processes import ProcessId, find_leftovers, stop_processes
from hasgpu_cli.supervisor import CommandUnit, Supervisor

WAIT = "import signal; signal.pause()"
STUBBORN = """
import signal
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("deaf", flush=True)
while True:
    signal.pause()
"""


def unit(home: Home, name: str, code: str, rank: int = 1, grace_s: float = 10.0) -> CommandUnit:
    return CommandUnit(
        name,
        "service",
        "127.0.0.1:1",
        home.logs / f"{name}.log",
        (sys.executable, "-c", code),
        rank=rank,
        grace_s=grace_s,
    )


def make_home(tmp_path: Path) -> Home:
    home = Home(tmp_path / "home")
    home.logs.mkdir(parents=True)
    return home


async def until(home: Home, condition: Callable[[RunRecord], bool]) -> RunRecord:
    async with asyncio.timeout(60):
        while True:
            record = read_run_record(home)
            if record is not None and condition(record):
                return record
            await asyncio.sleep(0.01)


def all_running(record: RunRecord) -> bool:
    return all(unit.state == "running" and unit.process for unit in record.units.values())


async def test_a_killed_process_comes_back_and_the_end_leaves_nothing(tmp_path: Path) -> None:
    home = make_home(tmp_path)
    supervisor = Supervisor(
        home, [unit(home, "a", WAIT, rank=0), unit(home, "b", WAIT)], nats_url="nats://n", redis_url="redis://r"
    )
    task = asyncio.create_task(supervisor.run())
    record = await until(home, all_running)
    first, other = record.units["b"].process, record.units["a"].process
    assert first is not None
    assert other is not None
    assert record.supervisor.pid == os.getpid()
    os.kill(first.pid, signal.SIGKILL)
    record = await until(home, lambda r: r.units["b"].restarts_count == 1 and r.units["b"].process is not None)
    second = record.units["b"].process
    assert second is not None
    assert second.pid != first.pid
    assert "signal 9" in record.units["b"].reason
    assert record.units["a"].process == other, "the other one was left alone"
    supervisor.stop()
    await task
    assert not psutil.pid_exists(second.pid)
    assert not psutil.pid_exists(other.pid)
    assert not home.run_file.exists()


async def test_a_process_that_keeps_ending_is_told_with_its_status_and_does_not_hold_up_the_end(tmp_path: Path) -> None:
    home = make_home(tmp_path)
    supervisor = Supervisor(home, [unit(home, "a", "raise SystemExit(7)")], nats_url="", redis_url="")
    task = asyncio.create_task(supervisor.run())
    record = await until(home, lambda r: r.units["a"].restarts_count >= 2 and r.units["a"].state == "backing off")
    assert record.units["a"].reason == "ended with status 7"
    supervisor.stop()
    await task


async def test_a_command_that_is_not_there_is_told(tmp_path: Path) -> None:
    home = make_home(tmp_path)
    gone = CommandUnit("a", "service", "", home.logs / "a.log", ("/nowhere/at/all",))
    supervisor = Supervisor(home, [gone], nats_url="", redis_url="")
    task = asyncio.create_task(supervisor.run())
    record = await until(home, lambda r: r.units["a"].restarts_count >= 1)
    assert "could not be started" in record.units["a"].reason
    supervisor.stop()
    await task


async def test_ranks_wait_for_those_before(tmp_path: Path) -> None:
    home = make_home(tmp_path)
    broken = CommandUnit("broker", "broker", "", home.logs / "a.log", ("/nowhere/at/all",), rank=0)
    supervisor = Supervisor(home, [unit(home, "late", WAIT), broken], nats_url="", redis_url="")
    task = asyncio.create_task(supervisor.run())
    record = await until(home, lambda r: r.units["broker"].restarts_count >= 2)
    assert record.units["late"].state == "waiting"
    supervisor.stop()
    await task


async def test_who_ignores_the_request_to_end_is_killed(tmp_path: Path) -> None:
    home = make_home(tmp_path)
    stubborn = unit(home, "deaf", STUBBORN, grace_s=0.1)
    supervisor = Supervisor(home, [stubborn], nats_url="", redis_url="")
    task = asyncio.create_task(supervisor.run())
    record = await until(home, lambda r: all_running(r) and "deaf" in stubborn.log.read_text())
    process = record.units["deaf"].process
    assert process is not None
    supervisor.stop()
    await task
    assert process.find() is None


def test_leftovers_are_found_by_their_home_and_no_one_elses(tmp_path: Path) -> None:
    mine, others = tmp_path / "mine", tmp_path / "others"
    (tmp_path / "hasgpu_waiting.py").write_text(WAIT)

    def start(home: Path) -> psutil.Popen:
        env = {"PYTHONPATH": str(tmp_path), "HASGPU_HOME": str(home)}
        return psutil.Popen([sys.executable, "-m", "hasgpu_waiting"], env=env)

    processes = [start(mine), start(others)]
    try:
        assert [process.pid for process in find_leftovers(mine)] == [processes[0].pid]
        stop_processes(find_leftovers(mine), grace_s=10)
        assert not processes[0].is_running()
        assert processes[1].is_running()
        assert find_leftovers(mine) == []
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
            process.wait()


def test_a_pid_used_again_is_not_taken_for_the_old_process() -> None:
    me = ProcessId.of(os.getpid())
    assert me is not None
    assert me.find() is not None
    assert ProcessId(me.pid, me.started_unix_s - 100).find() is None
    assert ProcessId.of(2**22 + 1) is None
