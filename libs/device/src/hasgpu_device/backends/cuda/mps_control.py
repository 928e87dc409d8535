"""The MPS control program: one command at a time, each with a time-out; what it answers, parsed.

Commands and answers are those of NVIDIA's MPS guide, "Legacy MPS v2 Interface", and of the program's manual page.
The program finds its daemon by `CUDA_MPS_PIPE_DIRECTORY` alone.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from hasgpu_device.errors import MpsError, MpsTimeoutError

BINARY = "nvidia-cuda-mps-control"
SERVER_BINARY = "nvidia-cuda-mps-server"
COMMAND_TIMEOUT_S = 10.0
"""An idle daemon answers in milliseconds; one that starts a server may take seconds."""
NO_DAEMON = "Cannot find MPS control daemon process"
"""What the program prints (exit code 1) when no daemon listens in its pipe directory."""
STATIC_SINCE = 13_010
"""First version of the control program with static SM partitions (`-v`), as Isaac ROS documents it."""

_REFUSED = re.compile(
    r"\b(fail(ed|ure)?|error|invalid|cannot|could not|not found|no such|unknown|unrecogni[sz]ed|not supported|"
    r"unsupported|denied|refused|usage)\b",
    re.IGNORECASE,
)
_PARTITION = re.compile(r"(GPU-[0-9A-Za-z-]+/[0-9A-Za-z+/=_-]+)")


class ServerState(StrEnum):
    """What `get_server_status` tells of a server."""

    INITIALIZING = "INITIALIZING"
    ACTIVE = "ACTIVE"
    FAULT = "FAULT"


@dataclass(frozen=True, slots=True)
class MpsVersion:
    """What `nvidia-cuda-mps-control -v` prints."""

    text: str
    number: int | None
    """13010 for CUDA 13.1; None: the text has no such number."""

    @property
    def may_partition(self) -> bool:
        """Whether this version is said to know static SM partitions; only starting a daemon with `-S` proves it."""
        return self.number is not None and self.number >= STATIC_SINCE


@dataclass(frozen=True, slots=True)
class Partition:
    """A static SM partition, as `lspart` lists it."""

    name: str
    """The part of its ID after the GPU."""
    chunks_count: int
    sms_count: int
    has_clients: bool


@dataclass(frozen=True, slots=True)
class Partitions:
    """A device's row of `lspart` and its partitions."""

    free_chunks_count: int
    used_chunks_count: int
    free_sms_count: int
    used_sms_count: int
    partitions: tuple[Partition, ...] = ()


class MpsControl:
    """Runs the control program against the daemon of one pipe directory.

    Args:
        environment: Of the program; names the pipe directory.
        binary: The program, looked up on the environment's PATH.
        timeout_s: Of a command that names none.
    """

    def __init__(
        self, environment: Mapping[str, str], *, binary: str = BINARY, timeout_s: float = COMMAND_TIMEOUT_S
    ) -> None:
        self._environment = dict(environment)
        self._binary = binary
        self._timeout_s = timeout_s

    def ask(self, command: str, *, timeout_s: float | None = None) -> str:
        """Gives one command and returns the answer.

        Raises:
            MpsTimeoutError: No answer in time; the program was ended, the daemon may still carry the command out.
            MpsError: There is no such program or no daemon, or the command was refused.
        """
        done = self._run([self._binary], command, f"{command}\n", timeout_s)
        answer = done.stdout.strip()
        complaint = "\n".join(part for part in (answer, done.stderr.strip()) if part)
        if done.returncode:
            reason = "no daemon runs there" if NO_DAEMON in complaint else "the control program failed"
            raise MpsError(command, reason, answer=complaint, exit_code=done.returncode)
        # The daemon's refusals come with exit code 0.
        if _REFUSED.search(complaint):
            raise MpsError(command, "the daemon refused it", answer=complaint, exit_code=done.returncode)
        return answer

    def default_active_thread_pct(self, *, timeout_s: float | None = None) -> float:
        """Returns the default share of the SMs; asked to learn whether the daemon answers at all."""
        command = "get_default_active_thread_percentage"
        answer = self.ask(command, timeout_s=timeout_s)
        try:
            return float(answer.split()[-1])
        except (IndexError, ValueError):
            raise MpsError(command, "expected a number", answer=answer, exit_code=0) from None

    def servers(self) -> tuple[int, ...]:
        """Returns the pids of the daemon's servers."""
        return self._pids("get_server_list")

    def server_state(self, server: int) -> ServerState:
        """Returns a server's state. Raises MpsError also when it is a word that NVIDIA does not document."""
        command = f"get_server_status {server}"
        answer = self.ask(command)
        for state in ServerState:
            if re.search(rf"\b{state.value}\b", answer, re.IGNORECASE):
                return state
        expected = ", ".join(ServerState)
        raise MpsError(command, f"expected one of {expected}", answer=answer, exit_code=0)

    def clients(self, server: int) -> tuple[int, ...]:
        """Returns the pids of a server's clients, in the daemon's PID namespace."""
        return self._pids(f"get_client_list {server}")

    def start_server(self, uid: int, *, timeout_s: float | None = None) -> None:
        """Starts a server for a user; without it the first client pays for that."""
        self.ask(f"start_server -uid {uid}", timeout_s=timeout_s)

    def terminate_client(self, server: int, client: int, *, timeout_s: float | None = None) -> None:
        """Ends a client's GPU work; its CUDA calls then fail with error 810, and SIGKILL is safe."""
        self.ask(f"terminate_client {server} {client}", timeout_s=timeout_s)

    def add_partition(self, gpu_uuid: str, chunks_count: int) -> str:
        """Makes a static SM partition; returns its ID, the value of `CUDA_MPS_SM_PARTITION`."""
        command = f"sm_partition add {gpu_uuid} {chunks_count}"
        answer = self.ask(command)
        if (found := _PARTITION.search(answer)) is None:
            raise MpsError(command, "expected the ID of a partition", answer=answer, exit_code=0)
        return found.group(1)

    def remove_partition(self, partition: str) -> None:
        """Removes a static SM partition that no client uses; takes the ID that `add_partition` returned."""
        gpu_uuid, _, name = partition.partition("/")
        self.ask(f"sm_partition rm {gpu_uuid} {name}")

    def partitions(self, gpu_uuid: str) -> Partitions:
        """Returns a device's static SM partitions; needs a daemon started with `-S`."""
        answer = self.ask("lspart")
        found = parse_lspart(answer, gpu_uuid)
        if found is None:
            raise MpsError("lspart", f"expected a row of {gpu_uuid}", answer=answer, exit_code=0)
        return found

    def version(self) -> MpsVersion:
        """Returns what the installed control program says of itself; needs no daemon."""
        done = self._run([self._binary, "-v"], "-v", "", None)
        text = (done.stdout.strip() or done.stderr.strip()).strip()
        if done.returncode:
            raise MpsError("-v", "the control program failed", answer=text, exit_code=done.returncode)
        number = re.search(r"\b(\d{5,6})\b", text)
        dotted = re.search(r"\b(\d{2})\.(\d{1,2})\b", text)
        if number is not None:
            return MpsVersion(text, int(number.group(1)))
        return MpsVersion(text, int(dotted.group(1)) * 1000 + int(dotted.group(2)) * 10 if dotted else None)

    def _pids(self, command: str) -> tuple[int, ...]:
        answer = self.ask(command)
        try:
            return tuple(int(word) for word in answer.split())
        except ValueError:
            raise MpsError(command, "expected a list of pids", answer=answer, exit_code=0) from None

    def _run(
        self, argv: Sequence[str], command: str, text: str, timeout_s: float | None
    ) -> subprocess.CompletedProcess[str]:
        timeout_s = self._timeout_s if timeout_s is None else timeout_s
        try:
            return subprocess.run(
                argv,
                input=text,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=timeout_s,
                env=self._environment,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            said = error.stdout.decode(errors="replace") if isinstance(error.stdout, bytes) else error.stdout or ""
            raise MpsTimeoutError(command, f"no answer within {timeout_s:g} s", answer=said) from error
        except OSError as error:
            raise MpsError(command, f"{argv[0]} can't be run: {error.strerror or error}") from error


def parse_lspart(text: str, gpu_uuid: str) -> Partitions | None:
    """Returns a device's part of `lspart`'s table; None: it has no row of the device.

    The table abbreviates the UUID. A device's row tells free and used chunks, free and used SMs; a partition's row its
    name, used chunks, used SMs and whether it has clients; what does not apply is blank or "-".
    """
    device: Partitions | None = None
    partitions = []
    for line in text.splitlines():
        words = [word for word in line.split() if word != "-"]
        if not words or not words[0].startswith("GPU-") or not gpu_uuid.startswith(words[0].split("/")[0]):
            continue
        numbers = [int(word) for word in words[1:] if word.isdecimal()]
        if words[-1] in ("Yes", "No") and len(words) >= 5 and len(numbers) >= 2:
            partitions.append(Partition(words[1], numbers[-2], numbers[-1], words[-1] == "Yes"))
        elif len(words) == 5 and len(numbers) == 4:
            device = Partitions(numbers[0], numbers[1], numbers[2], numbers[3])
    return replace(device, partitions=tuple(partitions)) if device is not None else None
