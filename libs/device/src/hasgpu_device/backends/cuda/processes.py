"""Processes known by more than a number: a pid is used again, the time at which its process started is not."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class ProcessMark:
    """Tells one process from every other of this host."""

    pid: int
    started_ticks: int
    """Since the boot, field 22 of /proc/PID/stat (proc(5))."""
    boot_id: str


def mark(pid: int) -> ProcessMark | None:
    """Returns a process's mark; None: there is none, or it has ended and nobody has waited for it yet."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
        boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return None
    # The name, in brackets, may hold anything.
    fields = text[text.rindex(")") + 2 :].split()
    return None if fields[0] in "ZX" else ProcessMark(pid, int(fields[19]), boot_id)


def is_running(known: ProcessMark, binary: str) -> bool:
    """Returns whether the very process still runs this program."""
    return mark(known.pid) == known and is_named(known.pid, binary)


def is_named(pid: int, binary: str) -> bool:
    """Returns whether a process's command line begins with a program of this name (its interpreter before it)."""
    try:
        argv = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[:3]
    except OSError:
        return False
    name = os.fsencode(Path(binary).name)
    return any(os.path.basename(word) == name for word in argv) and mark(pid) is not None


def send(pid: int, number: signal.Signals) -> None:
    """Sends a signal; a process that has ended is ignored."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


def end_by_name(pid: int, binary: str) -> None:
    """Kills a process if it runs this program."""
    if is_named(pid, binary):
        send(pid, signal.SIGKILL)
