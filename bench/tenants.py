"""Tenants for `quota.py` and `resize.py`: processes that always have work and pass the gate as a worker does.

A tenant runs segments of a fixed length on the device's own backend: matrix products on a CPU or a GPU, waiting on an
emulated device. It is told what to do on standard input, a JSON object a line, and answers likewise.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hasgpu_core.function import ModelFormat, TensorSpec
from hasgpu_device import backends, ledger
from hasgpu_device.backends import DeviceBackend
from hasgpu_device.backends.cpu import CpuBackend, usable_cores
from hasgpu_device.control import ControlBlock, Shares
from hasgpu_device.gate import GateMember, RowGate
from hasgpu_device.ledger import SmLedger
from hasgpu_device.segments import SegmentRunner
from hasgpu_device.worker_config import WorkerConfig

DEVICES = ("cpu", "emulated", "cuda")
BATCH_SEGMENTS = 20
WAITS = 100_000
SEGMENTS = 4_096


def worker_config(device: str, folder: Path, name: str, gate: Path, mode: str) -> WorkerConfig:
    """Returns what a worker of that device would be told."""
    spec = (TensorSpec("x", "FP32", (-1, 1)),)
    return WorkerConfig(
        instance=name,
        function="tenant",
        function_revision=1,
        format=ModelFormat.PYTHON,
        entry="none",
        artifact_dir=str(folder),
        inputs=spec,
        outputs=spec,
        max_batch=1,
        control_path=str(folder / f"{name}.control"),
        gate_path=str(gate),
        status_path=str(folder / f"{name}.status"),
        ledger_path=str(folder / "device.ledger"),
        device_cores=float(usable_cores()),
        backend=device,
        mode=mode,
        sm_rungs_pct=(25, 50, 75, 100),
    )


def make_backend(config: WorkerConfig) -> DeviceBackend:
    """Returns the backend, without a CPU worker's giving way: here nothing stands in front of the tenants."""
    if config.backend == "cpu":
        return CpuBackend(config.device_cores, nice=0)
    return backends.create(config)


def make_work(backend: DeviceBackend) -> Callable[[int], None]:
    """Returns a function that runs about so many nanoseconds of device time."""
    if backend.name == "emulated":
        occupy: Callable[[int], None] = backend.occupy  # type: ignore[attr-defined]  # of this backend alone
        return occupy
    import torch

    on_gpu = backend.name == "cuda"
    side = 1_024 if on_gpu else 128
    matrix = torch.randn(side, side, device="cuda" if on_gpu else "cpu")
    out = torch.empty_like(matrix)
    if not on_gpu:

        def until(device_ns: int) -> None:
            while backend.running_ns() < device_ns:
                torch.mm(matrix, matrix, out=out)

        return until

    def measured(count: int) -> float:
        backend.start_segment()
        for _ in range(count):
            torch.mm(matrix, matrix, out=out)
        return backend.stop_segment() / count

    measured(50)
    each_ns = statistics.median(measured(50) for _ in range(5))

    def counted(device_ns: int) -> None:
        for _ in range(max(1, round(device_ns / each_ns))):
            torch.mm(matrix, matrix, out=out)

    return counted


class TenantLoop:
    """The tenant's side: runs, idles and reports as told."""

    def __init__(self, runner: SegmentRunner, member: GateMember, control: ControlBlock) -> None:
        self.runner, self.member, self.control = runner, member, control
        self.commands: deque[dict[str, Any]] = deque()
        self.running = False
        self.segment_ns = 5_000_000
        self.work = make_work(runner.backend)
        self.changes: list[tuple[int, int]] = []
        self.clear()
        acknowledge = member.on_change

        def noted() -> None:
            assert acknowledge is not None
            acknowledge()
            self._note()

        member.on_change = noted

    def clear(self) -> None:
        """Begins to count anew."""
        self.used_ns = self.segments = self.withheld_ns = 0
        self.longest_wait_ns = self.longest_entitled_ns = 0
        self.boundaries_ns: deque[int] = deque(maxlen=WAITS)
        self.log: deque[tuple[int, int, int, bool]] = deque(maxlen=SEGMENTS)
        self.cpu_from_ns = time.thread_time_ns()
        self.changes = []

    def listen(self) -> None:
        """Takes commands from standard input, in a thread of its own."""
        for line in sys.stdin:
            self.commands.append(json.loads(line))
        self.commands.append({"do": "end"})

    def _note(self) -> None:
        epoch = self.control.read_counters().applied_epoch
        if not self.changes or self.changes[-1][0] != epoch:
            self.changes.append((epoch, time.monotonic_ns()))

    def _batch(self) -> None:
        for index in range(BATCH_SEGMENTS):
            self.work(self.segment_ns)
            if self.commands:
                return
            if index + 1 < BATCH_SEGMENTS:
                began_ns = time.perf_counter_ns()
                waited_ns = self.runner.gate_wait_ns
                self.runner.boundary()
                waited_ns = self.runner.gate_wait_ns - waited_ns
                self._waited(waited_ns)
                if not waited_ns:
                    self.boundaries_ns.append(time.perf_counter_ns() - began_ns)
                self._note()

    def _waited(self, wait_ns: int) -> None:
        self.longest_wait_ns = max(self.longest_wait_ns, wait_ns)
        self.longest_entitled_ns = max(self.longest_entitled_ns, min(wait_ns, self.member.entitled_ns))

    def _run(self) -> None:
        waited_ns = self.runner.gate_wait_ns
        _, run = self.runner.run(self._batch, linger=lambda: not self.commands)
        self._note()
        self._waited(run.segments[0].wait_ns if run.segments else self.runner.gate_wait_ns - waited_ns)
        self.used_ns += run.device_ns
        self.segments += run.segments_count
        for segment in run.segments:
            self.withheld_ns += max(0, segment.end_unix_ns - segment.start_unix_ns - segment.device_ns)
            self.log.append((segment.start_unix_ns, segment.end_unix_ns, segment.device_ns, segment.borrowed))

    def _plain(self, seconds: float) -> float:
        """Runs the same segments without a gate; returns the device time used a second."""
        used_ns = 0
        began_ns = time.monotonic_ns()
        while (elapsed_ns := time.monotonic_ns() - began_ns) < seconds * 1e9:
            self.runner.backend.start_segment()
            self.work(self.segment_ns)
            used_ns += self.runner.backend.stop_segment()
        return used_ns / elapsed_ns

    def _report(self) -> dict[str, Any]:
        overhead_ns = time.thread_time_ns() - self.cpu_from_ns - self.used_ns
        return {
            "used_ns": self.used_ns,
            "segments": self.segments,
            "withheld_ns": self.withheld_ns,
            "longest_wait_ns": self.longest_wait_ns,
            "longest_entitled_ns": self.longest_entitled_ns,
            "boundary_us": statistics.median(self.boundaries_ns) / 1e3 if self.boundaries_ns else 0.0,
            "overhead": max(0.0, overhead_ns / max(1, self.used_ns)),
            "log": list(self.log),
            "changes": self.changes,
        }

    def loop(self) -> None:
        """Until told to end."""
        while True:
            while self.commands:
                command = self.commands.popleft()
                what = command["do"]
                if what == "end":
                    return
                if what == "report":
                    print(json.dumps(self._report()), flush=True)
                    self.clear()
                elif what == "plain":
                    print(json.dumps(self._plain(command["seconds"])), flush=True)
                else:
                    self.running = what == "run"
                    self.segment_ns = command.get("segment_ns", self.segment_ns)
            if self.running:
                self._run()
                continue
            if self.runner.lingers:
                self.runner.withdraw()
            self.runner.poll()
            self._note()
            time.sleep(0.002)


def main() -> None:
    """A tenant process."""
    parser = argparse.ArgumentParser()
    for name in ("device", "folder", "name", "gate", "mode"):
        parser.add_argument(f"--{name}", required=True)
    options = parser.parse_args()
    folder = Path(options.folder)
    config = worker_config(options.device, folder, options.name, Path(options.gate), options.mode)
    backend = make_backend(config)
    backend.setup_loader()
    backend.setup()
    with (
        ControlBlock.open(config.control_path) as control,
        SmLedger(config.ledger_path) as book,
        GateMember(config.gate_path, control.read_shares()) as member,
    ):
        # Each call of `boundary` ends a segment: the tenant decides how long one is.
        runner = SegmentRunner(backend, member, control, ledger=book, segment_ns=0)
        tenant = TenantLoop(runner, member, control)
        threading.Thread(target=tenant.listen, daemon=True).start()
        print(json.dumps("ready"), flush=True)
        tenant.loop()


class Tenant:
    """A tenant process and its control block, as the agent would hold them."""

    def __init__(self, device: str, folder: Path, name: str, gate: Path, *, mode: str = "") -> None:
        config = worker_config(device, folder, name, gate, mode)
        self.control = ControlBlock.create(config.control_path, Shares(10, 10))
        self.gate = RowGate.open(gate)
        self.process = subprocess.Popen(
            [
                sys.executable,
                __file__,
                f"--device={device}",
                f"--folder={folder}",
                f"--name={name}",
                f"--gate={gate}",
                f"--mode={mode}",
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def say(self, what: str, **more: object) -> None:
        """Sends a command."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"do": what} | more) + "\n")
        self.process.stdin.flush()

    def hear(self) -> Any:
        """Reads an answer; SystemExit when the process has died."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"a tenant ended with code {self.process.wait()}")
        return json.loads(line)

    def report(self) -> dict[str, Any]:
        """Returns what happened since the last report."""
        self.say("report")
        found: dict[str, Any] = self.hear()
        return found

    def write_shares(self, shares: Shares) -> int:
        """Changes the shares as the agent does; returns the epoch."""
        epoch = self.control.write_shares(shares)
        self.gate.poke(self.process.pid)
        return epoch

    def set_shares(self, shares: Shares) -> None:
        """Changes the shares and waits until they are in force."""
        epoch = self.write_shares(shares)
        while self.control.read_counters().applied_epoch < epoch:
            if self.process.poll() is not None:
                raise SystemExit(f"a tenant ended with code {self.process.returncode}")
            time.sleep(0.001)

    def used_ns(self) -> int:
        """Returns its device time so far, as it last told."""
        return self.control.read_counters().used_ns

    def close(self) -> None:
        """Ends the process."""
        self.process.kill()
        self.process.communicate()
        self.control.close()
        self.gate.close()


class House:
    """Tenants in the rows of one device, in a folder of shared memory. A context manager.

    Args:
        device: Its kind.
        rows: Tenants of each row.
        mode: Of a CUDA device.

    Attributes:
        whole_pct: SM share of a single row: of a CPU one half, so that the host's other work has cores to run on.
    """

    def __init__(self, device: str, rows: Sequence[int], *, mode: str = "") -> None:
        shared_memory = Path("/dev/shm")
        self.whole_pct = 50 if device == "cpu" and usable_cores() > 1 else 100
        self._folder = tempfile.TemporaryDirectory(dir=shared_memory if shared_memory.is_dir() else None)
        folder = Path(self._folder.name)
        ledger.create(folder / "device.ledger")
        self.rows: list[list[Tenant]] = []
        for row, count in enumerate(rows):
            gate = folder / f"row{row}.gate"
            RowGate.create(gate).close()
            self.rows.append([Tenant(device, folder, f"t{row}-{n}", gate, mode=mode) for n in range(count)])
        self.tenants = [tenant for row in self.rows for tenant in row]

    def __enter__(self) -> House:
        for tenant in self.tenants:
            tenant.hear()
        return self

    def __exit__(self, *exc: object) -> None:
        for tenant in self.tenants:
            tenant.close()
        self._folder.cleanup()


def describe(device: str) -> str:
    """Returns the device's model, for the result's name and the reader."""
    if device == "cpu":
        return f"cpu-{usable_cores()}c"
    if device == "emulated":
        return "emulated"
    import torch

    return str(torch.cuda.get_device_name(0)).replace(" ", "-")


def write(path: Path, document: dict[str, Any]) -> None:
    """Writes a result."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n")
    print(f"written to {path}")


def as_row(result: Any) -> dict[str, Any]:
    """Returns a result's fields, floats rounded to what they mean."""
    return {
        key: round(value, 3) if isinstance(value, float) else value for key, value in dataclasses.asdict(result).items()
    }


if __name__ == "__main__":
    main()
