"""Processes that outlive their parent: in a session of their own, watched by pidfd, found again by command line."""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

import psutil

WORKER_MODULE = "hasgpu_node_agent.worker"
POLL_S = 0.05
"""How often a process is looked at where the kernel has no pidfd."""


class Process:
    """One process, a child of this one or not. Lives in one event loop.

    What it started itself (a handler may start programs) ends with it.
    """

    def __init__(self, pid: int, child: subprocess.Popen[bytes] | None, on_exit: Callable[[], None]) -> None:
        self.pid = pid
        self._child = child
        self._on_exit = on_exit
        self._loop = asyncio.get_running_loop()
        self._ended: asyncio.Future[str] = self._loop.create_future()
        self.exit_code: int | None = None
        """None: it runs, or it was no child of this process."""
        self._pidfd = -1
        self._released = False
        self._watch()

    @classmethod
    def start(
        cls,
        argv: Sequence[str],
        output: IO[bytes],
        on_exit: Callable[[], None],
        environment: Mapping[str, str] | None = None,
    ) -> Process:
        """Starts a process in a session of its own, so that it outlives this one; without an environment of its own it
        inherits this one's. Raises OSError."""
        child = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=environment,
        )
        return cls(child.pid, child, on_exit)

    @classmethod
    def adopt(cls, pid: int, on_exit: Callable[[], None]) -> Process:
        """Watches a process that another one started."""
        return cls(pid, None, on_exit)

    @property
    def exit_reason(self) -> str | None:
        """None while it runs; else how it ended, in words."""
        return self._ended.result() if self._ended.done() else None

    async def wait(self) -> str:
        """Returns how it ended, once it has."""
        return await asyncio.shield(self._ended)

    def send(self, number: signal.Signals) -> None:
        """Sends a signal; a process that has ended is ignored."""
        if self._ended.done():
            return
        try:
            if self._pidfd >= 0:
                signal.pidfd_send_signal(self._pidfd, number)
            else:
                os.kill(self.pid, number)
        except ProcessLookupError:
            pass

    def let_go(self) -> None:
        """Stops watching it; it runs on."""
        if self._pidfd >= 0:
            self._loop.remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = -1
        self._released = True
        if self._child is not None and self._child.returncode is None:
            # Popen would complain, when it is collected, that nobody waited for a process that is meant to run on.
            self._child.returncode = 0

    def _watch(self) -> None:
        try:
            self._pidfd = os.pidfd_open(self.pid)
        except ProcessLookupError:
            self._end()
        except (AttributeError, OSError):
            self._loop.call_later(POLL_S, self._poll)
        else:
            self._loop.add_reader(self._pidfd, self._end)

    def _poll(self) -> None:
        if self._released:
            return
        if self._alive():
            self._loop.call_later(POLL_S, self._poll)
        else:
            self._end()

    def _alive(self) -> bool:
        if self._child is not None:
            return self._child.poll() is None
        try:
            return psutil.Process(self.pid).status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False

    def _end(self) -> None:
        if self._pidfd >= 0:
            self._loop.remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = -1
        self._kill_group()
        self.exit_code = code = self._child.wait() if self._child is not None else None
        if not self._ended.done():
            self._ended.set_result(exit_in_words(code))
            self._on_exit()

    def _kill_group(self) -> None:
        """Kills what the process left behind in its own group.

        A child that nobody waited for yet still holds its pid, and a group that has members holds its number, so no
        stranger is hit.
        """
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)


def exit_in_words(code: int | None) -> str:
    """Returns how a process ended: `subprocess`'s return code in words; None: it was no child of this process."""
    if code is None:
        return "ended while another agent's child (its exit code is not known)"
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"was killed by signal {-code}"


def worker_argv(config: Path) -> list[str]:
    """Returns the command line of a worker."""
    return [sys.executable, "-m", WORKER_MODULE, "--config", str(config)]


def running_workers(under: Path) -> Iterator[tuple[int, Path]]:
    """Yields pid and configuration of each worker process whose configuration lies under a folder."""
    for process in psutil.process_iter():
        try:
            argv = process.cmdline()
            alive = process.status() != psutil.STATUS_ZOMBIE
        except psutil.Error:
            continue
        if alive and WORKER_MODULE in argv and "--config" in argv[:-1]:
            config = Path(argv[argv.index("--config") + 1])
            if config.is_relative_to(under):
                yield process.pid, config


def wait_until_ended(pids: Iterable[int], timeout_s: float) -> bool:
    """Waits for processes that were killed, so long for each; returns whether all have ended. Blocks.

    One that has ended and whose exit code nobody has taken yet counts as ended; it is not taken here either.
    """
    for pid in pids:
        try:
            pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        except (AttributeError, OSError):
            return False  # not known without pidfds
        try:
            poll = select.poll()
            poll.register(pidfd, select.POLLIN)
            if not poll.poll(timeout_s * 1e3):
                return False
        finally:
            os.close(pidfd)
    return True
