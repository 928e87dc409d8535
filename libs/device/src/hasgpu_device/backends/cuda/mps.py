"""One MPS daemon per GPU, in a private folder: started, watched, adopted again, quit; and what its clients' environment
must say.

The daemon is started in the foreground (`-f`), as a child in a session of its own, not with `-d`: its pid and exit code
are known from the first moment, its messages are caught in a file, and there is no time between a fork and a pid file
in which nobody knows it. The session of its own lets it outlive the agent, as the workers do; the next agent finds it
by `daemon.json` (pid and the time at which that process started, so that a pid used again is not taken for it).

All methods block, each for a bounded time: call them in a thread. They are not to be called by two threads at once.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import stat
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from hasgpu_core.errors import InvalidError

from hasgpu_device.backends.cuda import processes
from hasgpu_device.backends.cuda.mps_control import (
    BINARY,
    COMMAND_TIMEOUT_S,
    NO_DAEMON,
    SERVER_BINARY,
    MpsControl,
    MpsVersion,
    Partitions,
    ServerState,
)
from hasgpu_device.errors import MpsError, MpsTimeoutError
from hasgpu_device.worker_config import write_json

SOCKET_PATH_LIMIT_BYTES = 107
"""Longest path of a Unix socket; the daemon's longest is PIPE/control_privileged. Beyond it the daemon ends without
saying why."""
START_TIMEOUT_S = 30.0
QUIT_TIMEOUT_S = 20.0
SERVER_QUIT_S = 5
"""What `quit -t` grants clients that are still connected before the server is ended."""
POLL_S = 0.05
MIB = 1 << 20
PIPE_FILES = ("control", "control_privileged", "control_lock", "log", "nvidia-cuda-mps-control.pid")

log = logging.getLogger(__name__)


class MpsState(StrEnum):
    """How a GPU's MPS is."""

    INITIALIZING = "initializing"
    """A server starts; clients get error 807 until it is active."""
    ACTIVE = "active"
    FAULT = "fault"
    """A client's fatal fault hit the server: it stays so until all clients it affected have ended."""
    IDLE = "idle"
    """The daemon runs, no server does: the first client starts one."""
    UNRESPONSIVE = "unresponsive"
    """The daemon's process lives, but it does not answer, or not in words that are documented."""
    GONE = "gone"
    """The daemon does not run."""


@dataclass(frozen=True, slots=True)
class MpsHealth:
    """What a look at the daemon found."""

    state: MpsState
    reason: str
    """In words; names what was wrong."""
    servers: tuple[int, ...] = ()


class MpsDaemon:
    """The MPS daemon of one GPU.

    Args:
        gpu_uuid: "GPU-...", as NVML tells it.
        folder: Private to this daemon; made with mode 0700. Short: the daemon's sockets lie in `folder/p`.
        environment: What the daemon inherits, PATH included; its CUDA variables are replaced.
        binary: The control program.
        timeout_s: Of each command.

    Raises:
        InvalidError: The UUID is not one, or the folder's path is too long for the daemon's sockets.
    """

    def __init__(
        self,
        gpu_uuid: str,
        folder: Path,
        *,
        environment: Mapping[str, str],
        binary: str = BINARY,
        timeout_s: float = COMMAND_TIMEOUT_S,
    ) -> None:
        if not gpu_uuid.startswith("GPU-"):
            raise InvalidError("UUID of a GPU", expected='"GPU-..."', got=repr(gpu_uuid))
        folder = folder.absolute()
        longest_bytes = len(os.fsencode(folder / "p" / "control_privileged"))
        if longest_bytes > SOCKET_PATH_LIMIT_BYTES:
            raise InvalidError(
                f"folder of the MPS daemon {folder}",
                expected=f"a path of its sockets of at most {SOCKET_PATH_LIMIT_BYTES} bytes",
                got=f"{longest_bytes} bytes",
            )
        self.gpu_uuid = gpu_uuid
        self.pipe_dir = folder / "p"
        self.log_dir = folder / "log"
        self.is_static = False
        """Whether the running daemon was started for static partitions."""
        self._folder = folder
        self._record = folder / "daemon.json"
        self._binary = binary
        self._child: subprocess.Popen[bytes] | None = None
        self._process: processes.ProcessMark | None = None
        self._environment = replace_cuda_variables(
            environment,
            {
                "CUDA_VISIBLE_DEVICES": gpu_uuid,
                "CUDA_MPS_PIPE_DIRECTORY": str(self.pipe_dir),
                "CUDA_MPS_LOG_DIRECTORY": str(self.log_dir),
            },
        )
        self.control = MpsControl(self._environment, binary=binary, timeout_s=timeout_s)

    @property
    def pid(self) -> int | None:
        """Of the running daemon that this object started or adopted."""
        return self._process.pid if self._process is not None and self._is_alive() else None

    def adopt(self) -> bool:
        """Takes over the daemon that an earlier process with this folder started; False: none of ours runs.

        May be repeated.
        """
        if self.pid is not None:
            return True
        try:
            record = json.loads(self._record.read_bytes())
            mark = processes.ProcessMark(int(record["pid"]), int(record["started_ticks"]), str(record["boot_id"]))
            matches = record["gpu_uuid"] == self.gpu_uuid
            is_static = bool(record["is_static"])
        except (OSError, ValueError, KeyError, TypeError):
            return False
        if not matches or not processes.is_running(mark, self._binary):
            return False
        self._process, self._child, self.is_static = mark, None, is_static
        return True

    def start(self, *, static: bool = False, server_uid: int | None = None, timeout_s: float = START_TIMEOUT_S) -> None:
        """Starts the daemon and waits until it answers; one of ours that runs already is adopted.

        Args:
            static: With static SM partitions (`-S`).
            server_uid: Start the server for this user too, and await ACTIVE; None: the first client starts it.
            timeout_s: Until it must answer (and its server be active).

        Raises:
            MpsError: The folder is not private, somebody else's daemon uses it (it is left alone), a daemon of ours
                runs in the other mode, the program is missing or ended, or the server met a fault.
            MpsTimeoutError: It did not answer in time; if it was started here, it has been ended.
        """
        command = f"{Path(self._binary).name} -f{' -S' if static else ''}"
        deadline_s = time.monotonic() + timeout_s
        adopted = self.adopt()
        if adopted:
            if self.is_static != static:
                raise MpsError(command, f"daemon {self.pid} runs {'with' if self.is_static else 'without'} -S: quit it")
        else:
            self._prepare_folder(command)
            self._spawn(command, static)
        try:
            self._await_answer(command, deadline_s)
            if server_uid is not None:
                self._start_server(server_uid, deadline_s)
        except MpsError:
            # One that was adopted may still serve workers: the fault table says when it is to be ended.
            if not adopted:
                self._end_process()
            raise

    def health(self) -> MpsHealth:
        """Looks at the daemon and its server. Never raises MpsError: what is wrong is the answer."""
        if self.pid is None:
            return MpsHealth(MpsState.GONE, "the daemon does not run" + self._exit_in_words())
        try:
            servers = self.control.servers()
            states = [self.control.server_state(server) for server in servers]
        except MpsError as error:
            if not self._is_alive():
                return MpsHealth(MpsState.GONE, "the daemon ended" + self._exit_in_words())
            return MpsHealth(MpsState.UNRESPONSIVE, str(error))
        if not servers:
            return MpsHealth(MpsState.IDLE, "no server runs; the first client starts one")
        for state, told in (
            (ServerState.FAULT, MpsState.FAULT),
            (ServerState.INITIALIZING, MpsState.INITIALIZING),
        ):
            if state in states:
                return MpsHealth(told, f"server {servers[states.index(state)]} is in {state}", servers)
        return MpsHealth(MpsState.ACTIVE, f"server {', '.join(map(str, servers))} is active", servers)

    def clients(self) -> tuple[int, ...]:
        """Returns the pids of all clients. Raises MpsError."""
        return tuple(client for server in self.control.servers() for client in self.control.clients(server))

    def terminate_client(self, pid: int, *, timeout_s: float | None = None) -> bool:
        """Ends a client's work on the GPU, so that SIGKILL is safe; False: no server has such a client.

        Raises MpsError when the daemon refuses or does not answer.
        """
        for server in self.control.servers():
            if pid in self.control.clients(server):
                self.control.terminate_client(server, pid, timeout_s=timeout_s)
                return True
        return False

    def add_partition(self, chunks_count: int) -> str:
        """Makes a static SM partition; returns its ID for `client_environment`.

        Raises:
            InvalidError: Not at least one chunk.
            MpsError: The daemon was not started with `-S`, or refuses: not enough chunks are free, or clients run.
        """
        if chunks_count < 1:
            raise InvalidError("chunks of a partition", expected="at least 1", got=str(chunks_count))
        self._need_static(f"sm_partition add {self.gpu_uuid} {chunks_count}")
        return self.control.add_partition(self.gpu_uuid, chunks_count)

    def remove_partition(self, partition: str) -> None:
        """Removes a static SM partition that no client uses. Raises MpsError."""
        self._need_static(f"sm_partition rm {partition}")
        self.control.remove_partition(partition)

    def partitions(self) -> Partitions:
        """Returns the device's static SM partitions. Raises MpsError."""
        self._need_static("lspart")
        return self.control.partitions(self.gpu_uuid)

    def version(self) -> MpsVersion:
        """Returns the control program's version. Raises MpsError."""
        return self.control.version()

    def client_environment(
        self, mode: str, *, sm_pct: int | None = None, pinned_limit_bytes: int = 0, partition: str = ""
    ) -> dict[str, str]:
        """Returns the variables of a worker of this daemon (see the function of that name)."""
        return client_environment(
            self.pipe_dir, mode, sm_pct=sm_pct, pinned_limit_bytes=pinned_limit_bytes, partition=partition
        )

    def quit(self, *, timeout_s: float = QUIT_TIMEOUT_S) -> bool:
        """Ends the daemon and its servers, if it was started from this folder; False: none of ours runs.

        Stop the clients before: those still connected are granted SERVER_QUIT_S. A daemon that does not end is killed,
        and then the servers it had.
        """
        if not self.adopt():
            return False
        servers: tuple[int, ...] = ()
        try:
            servers = self.control.servers()
            busy = any(self.control.clients(server) for server in servers)
            self.control.ask(f"quit -t {SERVER_QUIT_S}" if busy else "quit", timeout_s=timeout_s)
        except MpsError as error:
            log.warning("daemon %s of %s is ended by signal: %s", self.pid, self.gpu_uuid, error)
        else:
            self._await_end(timeout_s)
        self._end_process()
        for server in servers:
            processes.end_by_name(server, SERVER_BINARY)
        shutil.rmtree(self.pipe_dir, ignore_errors=True)
        return True

    def let_go(self) -> None:
        """Forgets the daemon, which runs on: the next process with this folder adopts it."""
        if self._child is not None and self._child.returncode is None:
            # Popen would complain, when it is collected, that nobody waited for a process that is meant to run on.
            self._child.returncode = 0
        self._child = self._process = None

    def _need_static(self, command: str) -> None:
        if self.pid is None:
            raise MpsError(command, "no daemon of ours runs")
        if not self.is_static:
            raise MpsError(command, "the daemon was not started for static partitions (-S)")

    def _prepare_folder(self, command: str) -> None:
        """Makes the private folders, clears what a dead daemon left; a living one that is not ours is an error."""
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            about = self._folder.stat()
            if about.st_uid != os.geteuid() or stat.S_IMODE(about.st_mode) & 0o077:
                raise MpsError(command, f"{self._folder} must belong to user {os.geteuid()} with mode 0700")
            if self.pipe_dir.exists():
                self._refuse_foreign(command)
                shutil.rmtree(self.pipe_dir)
            for path in (self.pipe_dir, self.log_dir):
                path.mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise MpsError(command, f"{error.filename}: {error.strerror}") from error

    def _refuse_foreign(self, command: str) -> None:
        """Raises MpsError when a daemon that was not started from this folder lives in the pipe directory."""
        try:
            pid = int((self.pipe_dir / "nvidia-cuda-mps-control.pid").read_text())
        except (OSError, ValueError):
            pid = 0
        if pid > 0 and processes.is_named(pid, self._binary):
            raise MpsError(command, f"daemon {pid}, which was not started here, uses {self.pipe_dir}: left alone")
        if not any((self.pipe_dir / name).exists() for name in PIPE_FILES):
            return
        try:
            # A daemon of another container has a pid that means nothing here, but it answers.
            self.control.default_active_thread_pct()
        except MpsError as error:
            if NO_DAEMON in error.answer:
                return
            raise MpsError(command, f"what lives in {self.pipe_dir} can't be told, left alone: {error}") from error
        raise MpsError(command, f"a daemon that was not started here answers in {self.pipe_dir}: left alone")

    def _spawn(self, command: str, static: bool) -> None:
        try:
            with open(self.log_dir / "daemon.out", "ab") as output:
                self._child = subprocess.Popen(
                    [self._binary, "-f", *(["-S"] if static else [])],
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env=self._environment,
                    start_new_session=True,
                )
        except OSError as error:
            raise MpsError(command, f"{self._binary} can't be run: {error.strerror or error}") from error
        self._process = processes.mark(self._child.pid)
        self.is_static = static
        if self._process is not None:
            write_json(
                self._record,
                {
                    "pid": self._process.pid,
                    "started_ticks": self._process.started_ticks,
                    "boot_id": self._process.boot_id,
                    "gpu_uuid": self.gpu_uuid,
                    "is_static": static,
                },
            )

    def _await_answer(self, command: str, deadline_s: float) -> None:
        last = ""
        while True:
            if not self._is_alive():
                raise MpsError(command, "the daemon ended" + self._exit_in_words(), answer=self._tail())
            left_s = deadline_s - time.monotonic()
            if left_s <= 0:
                raise MpsTimeoutError(command, f"the daemon does not answer: {last}", answer=self._tail())
            try:
                self.control.default_active_thread_pct(timeout_s=min(left_s, COMMAND_TIMEOUT_S))
            except MpsError as error:
                last = str(error)
                time.sleep(POLL_S)
            else:
                return

    def _start_server(self, uid: int, deadline_s: float) -> None:
        command = f"start_server -uid {uid}"
        if not self.control.servers():
            self.control.start_server(uid, timeout_s=max(deadline_s - time.monotonic(), POLL_S))
        while True:
            health = self.health()
            if health.state is MpsState.ACTIVE:
                return
            if health.state in (MpsState.FAULT, MpsState.GONE):
                raise MpsError(command, health.reason, answer=self._tail())
            if time.monotonic() > deadline_s:
                raise MpsTimeoutError(command, f"the server is not active: {health.reason}", answer=self._tail())
            time.sleep(POLL_S)

    def _is_alive(self) -> bool:
        if self._child is not None:
            return self._child.poll() is None
        return self._process is not None and processes.is_running(self._process, self._binary)

    def _await_end(self, timeout_s: float) -> bool:
        deadline_s = time.monotonic() + timeout_s
        while self._is_alive():
            if time.monotonic() > deadline_s:
                return False
            time.sleep(POLL_S)
        return True

    def _end_process(self) -> None:
        """Ends the daemon's process, first kindly; only ever one that was started from this folder."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            if self._process is None or not self._is_alive():
                break
            log.info("%s to MPS daemon %d of %s", number.name, self._process.pid, self.gpu_uuid)
            processes.send(self._process.pid, number)
            self._await_end(2.0)
        self._child = self._process = None
        self._record.unlink(missing_ok=True)

    def _exit_in_words(self) -> str:
        code = self._child.poll() if self._child is not None else None
        if code is None:
            return ""
        return f", exit code {code}" if code >= 0 else f", killed by signal {-code}"

    def _tail(self) -> str:
        parts = []
        for name in ("daemon.out", "control.log"):
            try:
                parts.append((self.log_dir / name).read_text(errors="replace")[-300:].strip())
            except OSError:
                continue
        return "\n".join(part for part in parts if part)


def client_environment(
    pipe_dir: Path, mode: str, *, sm_pct: int | None = None, pinned_limit_bytes: int = 0, partition: str = ""
) -> dict[str, str]:
    """Returns the variables that make a process a client of the daemon of a pipe directory.

    The client must not set `CUDA_VISIBLE_DEVICES`: it sees the daemon's GPU as device 0. Add the variables with
    `replace_cuda_variables`, which also takes away inherited ones.

    Args:
        pipe_dir: The daemon's.
        mode: "mps+green", "mps+pct" or "mps+static".
        sm_pct: Share of the SMs at start, only in "mps+pct": under a percentage a green context may grow up to the
            client's share (CUDA driver API), and with static partitions it is ignored. Rounded down by the driver.
        pinned_limit_bytes: Most device memory, CUDA's own included; rounded down to MiB; 0: no limit.
        partition: The ID of a static SM partition, needed in "mps+static".

    Raises:
        InvalidError: A value that is out of bounds or does not belong to the mode.
    """
    if mode not in ("mps+green", "mps+pct", "mps+static"):
        raise InvalidError("mode of an MPS client", expected="mps+green, mps+pct or mps+static", got=repr(mode))
    variables = {"CUDA_MPS_PIPE_DIRECTORY": str(pipe_dir)}
    if sm_pct is not None:
        if mode != "mps+pct":
            raise InvalidError(f"active thread percentage in mode {mode}", expected="none", got=str(sm_pct))
        if not 1 <= sm_pct <= 100:
            raise InvalidError("active thread percentage", expected="1..100", got=str(sm_pct))
        variables["CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"] = str(sm_pct)
    if (mode == "mps+static") != bool(partition):
        expected = "the ID of a partition" if mode == "mps+static" else "none"
        raise InvalidError(f"static SM partition in mode {mode}", expected=expected, got=repr(partition))
    if partition:
        variables["CUDA_MPS_SM_PARTITION"] = partition
    if pinned_limit_bytes:
        if pinned_limit_bytes < MIB:
            raise InvalidError("pinned memory limit", expected=f"at least {MIB} bytes", got=str(pinned_limit_bytes))
        variables["CUDA_MPS_PINNED_DEVICE_MEM_LIMIT"] = f"0={pinned_limit_bytes // MIB}M"
    return variables


def timeshare_environment(gpu_uuid: str, no_mps_dir: Path) -> dict[str, str]:
    """Returns the variables of a worker that shares a GPU without MPS.

    CUDA looks for a daemon in /tmp/nvidia-mps by itself, and would join whoever runs one there: the pipe directory
    named here is an empty one.
    """
    return {"CUDA_VISIBLE_DEVICES": gpu_uuid, "CUDA_MPS_PIPE_DIRECTORY": str(no_mps_dir)}


def replace_cuda_variables(inherited: Mapping[str, str], variables: Mapping[str, str]) -> dict[str, str]:
    """Returns an environment in which these variables stand, and no other that chooses a GPU or steers MPS."""
    kept = {
        name: value
        for name, value in inherited.items()
        if name != "CUDA_VISIBLE_DEVICES" and not name.startswith("CUDA_MPS_")
    }
    return kept | dict(variables)
