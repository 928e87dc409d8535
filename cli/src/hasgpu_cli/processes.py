"""Processes by pid and start time, so that a pid used again is never taken for the old process."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import psutil

START_TOLERANCE_S = 1.0
"""psutil derives the start from the boot time, which may differ a little between two reads."""
COMMAND_MODULE = "hasgpu_cli"
SUPERVISOR_MODULE = "hasgpu_cli.supervise"
BROKER_NAMES = frozenset({"nats-server", "redis-server"})


@dataclass(frozen=True, slots=True)
class ProcessId:
    """A process, for good."""

    pid: int
    started_unix_s: float

    @staticmethod
    def of(pid: int) -> ProcessId | None:
        """Reads the start time of a pid; None when it is gone."""
        try:
            return ProcessId(pid, psutil.Process(pid).create_time())
        except psutil.Error:
            return None

    def find(self) -> psutil.Process | None:
        """Returns the process while it runs; None when it is gone, a zombie, or another process has its pid."""
        try:
            process = psutil.Process(self.pid)
            if abs(process.create_time() - self.started_unix_s) > START_TOLERANCE_S:
                return None
            return None if process.status() == psutil.STATUS_ZOMBIE else process
        except psutil.Error:
            return None


def stop_processes(processes: Iterable[psutil.Process], *, grace_s: float) -> int:
    """Asks each to end, kills those that have not after the grace; returns how many had to be killed.

    Blocks. psutil checks the start time before it signals, so a reused pid is safe.
    """
    asked = list(processes)
    for process in asked:
        _signal(process, signal.SIGTERM)
        _signal(process, signal.SIGCONT)  # a stopped process hears nothing else but SIGKILL
    _, alive = psutil.wait_procs(asked, timeout=grace_s)
    for process in alive:
        _signal(process, signal.SIGKILL)
    psutil.wait_procs(alive, timeout=grace_s)
    return len(alive)


def find_leftovers(home: Path) -> list[psutil.Process]:
    """Finds processes of a home that nobody lists any more: workers whose agent is gone, services without a supervisor.

    A process counts when it is a broker or runs one of hasgpu's modules (but for the command itself), and either its
    command line names a path inside the home or its environment holds HASGPU_HOME with this home. The calling process
    and its parents do not count.
    """
    spared = {os.getpid(), *(parent.pid for parent in psutil.Process().parents())}
    found = []
    for process in psutil.process_iter():
        if process.pid in spared:
            continue
        try:
            words = process.cmdline()
            if process.name() not in BROKER_NAMES and not _runs_service(words):
                continue
            inside = any(word.startswith(f"{home}{os.sep}") for word in words)
            if inside or process.environ().get("HASGPU_HOME") == str(home):
                found.append(process)
        except psutil.Error:
            continue
    return found


def _runs_service(words: Sequence[str]) -> bool:
    modules = [word for flag, word in pairwise(words) if flag == "-m"]
    return any(word.startswith("hasgpu_") and word != COMMAND_MODULE for word in modules)


def _signal(process: psutil.Process, number: signal.Signals) -> None:
    try:
        process.send_signal(number)
    except psutil.Error:
        return
