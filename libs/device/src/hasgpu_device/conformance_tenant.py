"""What the conformance suite runs on a device: one instance in this process, or tenants in processes of their own.

A tenant always has work, passes the gate as a worker does, and appends a record of each segment to its log. It ends
when its shares say that it drains.
"""

from __future__ import annotations

import argparse
import os
import statistics
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Self

from hasgpu_core.function import ModelFormat, TensorSpec
from hasgpu_core.profile import Basis, Profile, ProfileHeader, ProfileModel, ProfileRow

from hasgpu_device import backends, models
from hasgpu_device.backends import DeviceBackend
from hasgpu_device.backends.cpu import CpuBackend, usable_cores
from hasgpu_device.backends.emulated import EmulatedBackend
from hasgpu_device.backends.fake import FakeBackend
from hasgpu_device.control import ControlBlock, Shares
from hasgpu_device.gate import GateMember, RowGate
from hasgpu_device.segments import SegmentRunner
from hasgpu_device.worker_config import WorkerConfig

CORES = 2.0
"""Of a CPU device: half of it is one thread, whose CPU time has no waiting for other threads in it."""
HANG_S = 60.0
"""Bound of every wait; it only stops a hang."""
SEGMENT_NS = 2_000_000
BATCH_SEGMENTS = 10
_RECORD = struct.Struct("<qqqIIQ")
_FIXED_NS = 12_000_000
_RUNGS_PCT = (25, 50, 75, 100)
_ARRAY = (TensorSpec("x", "FP32", (-1, 4)),)


@dataclass(frozen=True, slots=True)
class Segment:
    """One segment as its tenant saw it."""

    began_ns: int
    """On the host's monotonic clock, after the gate was passed."""
    ended_ns: int
    """Before the device was given up."""
    device_ns: int
    sm_pct: int
    """Share that the backend was given last."""
    request_permille: int
    """In force when it began."""
    epoch: int
    """Likewise."""


_POLL_S = 0.002


def wait_until(what: str, done: Callable[[], bool]) -> None:
    """Waits; AssertionError when it takes longer than a hang's bound."""
    give_up_ns = time.monotonic_ns() + round(HANG_S * 1e9)
    while not done():
        assert time.monotonic_ns() < give_up_ns, f"not within {HANG_S:g} s: {what}"
        time.sleep(_POLL_S)


def make_config(device: str, folder: Path, name: str, gate: Path, *, mode: str = "") -> WorkerConfig:
    """Returns what a worker of that device would be told."""
    return WorkerConfig(
        instance=name,
        function="conformance",
        function_revision=1,
        format=ModelFormat.PYTHON,
        entry="handler.py",
        artifact_dir=str(folder),
        inputs=_ARRAY,
        outputs=(replace(_ARRAY[0], name="y"),),
        max_batch=4,
        control_path=str(folder / f"{name}.control"),
        gate_path=str(gate),
        status_path=str(folder / f"{name}.status"),
        device_cores=min(CORES, float(usable_cores())),
        backend=device,
        mode=mode,
        sm_rungs_pct=_RUNGS_PCT,
        profile_path=str(_write_profile(folder)) if device == "emulated" else "",
    )


def _write_profile(folder: Path) -> Path:
    """A device on which the fixed work takes 1 / share of its time on the whole."""
    header = ProfileHeader(
        device_model="conformance",
        backend="emulated",
        basis=Basis.MODELLED,
        memory_bytes=1 << 30,
        sm_rungs_pct=_RUNGS_PCT,
        driver="",
        versions={},
        created_unix_s=0,
        source="the conformance suite",
        models={"conformance": ProfileModel("", 0)},
    )
    times_us = [(rung, _FIXED_NS / 1e3 * 100 / rung) for rung in _RUNGS_PCT]
    rows = tuple(ProfileRow("conformance", 4, rung, 1_000, us, us, us, 1) for rung, us in times_us)
    path = folder / "conformance.csv"
    path.write_text(Profile(header, rows).format(), encoding="utf-8")
    return path


def make_backend(config: WorkerConfig) -> DeviceBackend:
    """Makes a worker's backend, or the fake one; no thread is made to give way."""
    if config.backend == "fake":
        return FakeBackend()
    if config.backend == "cpu":
        return CpuBackend(config.device_cores, nice=0, loader_nice=0)
    return backends.create(config)


def make_work(backend: DeviceBackend) -> Callable[[int], None]:
    """Returns a function that runs about so many nanoseconds of device time, on whatever share is in force."""
    if isinstance(backend, EmulatedBackend):
        return backend.occupy
    if isinstance(backend, FakeBackend):

        def moved(device_ns: int) -> None:
            backend.work(device_ns * backend.sm_pct // 100)
            time.sleep(device_ns / 1e9)  # the gate lives in the host's time

        return moved
    multiply = _multiplication(backend)
    if backend.name == "cpu":

        def until(device_ns: int) -> None:
            while backend.running_ns() < device_ns:
                multiply()

        return until

    def counted(device_ns: int) -> None:
        for _ in range(max(1, round(device_ns / each_ns))):
            multiply()

    each_ns = _cost_ns(backend, multiply)
    return counted


def make_fixed_work(backend: DeviceBackend, config: WorkerConfig) -> Callable[[], object]:
    """Returns a function that always does the same work: more device time on a smaller share, if any."""
    if isinstance(backend, FakeBackend):
        return lambda: backend.work(_FIXED_NS)
    if isinstance(backend, EmulatedBackend):
        import numpy as np

        model = backend.load(config, lambda: None)
        return lambda: model.infer({"x": np.ones((4, 4), dtype="f4")}, 4)
    multiply = _multiplication(backend)
    count = max(1, round(_FIXED_NS / _cost_ns(backend, multiply)))

    def fixed() -> None:
        for _ in range(count):
            multiply()

    return fixed


def _multiplication(backend: DeviceBackend) -> Callable[[], object]:
    import torch

    on_gpu = backend.name == "cuda"
    side = 2_048 if on_gpu else 128
    matrix = torch.randn(side, side, device="cuda" if on_gpu else "cpu")
    out = torch.empty_like(matrix)
    return lambda: torch.mm(matrix, matrix, out=out)


def _cost_ns(backend: DeviceBackend, multiply: Callable[[], object]) -> float:
    def measured(count: int) -> float:
        backend.start_segment()
        for _ in range(count):
            multiply()
        return backend.stop_segment() / count

    measured(20)
    return max(1.0, statistics.median(measured(20) for _ in range(5)))


class Tenant:
    """A tenant process, held as the agent holds a worker. A context manager: it is killed in the end."""

    def __init__(self, device: str, folder: Path, name: str, gate: Path, shares: Shares, *, mode: str = "") -> None:
        self.config = make_config(device, folder, name, gate, mode=mode)
        self.name = name
        self.log_path = folder / f"{name}.log"
        # What an earlier tenant of this name left would be taken for this one's.
        for path in (Path(self.config.control_path), self.log_path):
            path.unlink(missing_ok=True)
        self.control = ControlBlock.create(self.config.control_path, shares)
        self.hold_path = folder / f"{name}.hold"
        self._gate = RowGate.create(gate)
        config_path = folder / f"{name}.json"
        self.config.save(config_path)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "hasgpu_device.conformance_tenant", "--config", str(config_path)]
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self.control.close()
        self._gate.close()

    def write_shares(self, shares: Shares) -> int:
        """Changes the shares as the agent does; returns the epoch."""
        epoch = self.control.write_shares(shares)
        self._gate.poke(self.process.pid)
        return epoch

    def segments(self) -> list[Segment]:
        """Returns the segments that it has ended so far."""
        if not self.log_path.exists():
            return []
        raw = self.log_path.read_bytes()
        whole = len(raw) - len(raw) % _RECORD.size
        return [Segment(*values) for values in _RECORD.iter_unpack(raw[:whole])]

    def holds(self) -> bool:
        """Whether it has the device now."""
        return any(view.holding and view.pid == self.process.pid for view in self._gate.members())

    def waits(self) -> bool:
        """Whether it waits for the device now."""
        return any(view.waiting and view.pid == self.process.pid for view in self._gate.members())


class LoggingBackend:
    """A backend that calls another and notes what was asked of it, in order.

    Args:
        inner: The backend.
        on_segment: Called after each segment with its begin and end (monotonic, ns) and its device time (ns).

    Attributes:
        calls: ("start", 0), ("stop", device time in ns) and ("apply", SM share in per cent).
        sm_pct: Given last.
    """

    def __init__(self, inner: DeviceBackend, on_segment: Callable[[int, int, int], None] | None = None) -> None:
        self.inner = inner
        self.name = inner.name
        self.calls: list[tuple[str, int]] = []
        self.sm_pct = 0
        self._on_segment = on_segment
        self._began_ns = 0

    def apply_sm(self, sm_pct: int, first_pct: int = 0) -> None:
        """Notes and passes on."""
        self.sm_pct = sm_pct
        self._note("apply", sm_pct)
        self.inner.apply_sm(sm_pct, first_pct)

    def start_segment(self) -> None:
        """Notes and passes on."""
        self._note("start", 0)
        self._began_ns = time.monotonic_ns()
        self.inner.start_segment()

    def running_ns(self) -> int:
        """Passes on."""
        return self.inner.running_ns()

    def stop_segment(self) -> int:
        """Notes and passes on."""
        device_ns = self.inner.stop_segment()
        self._note("stop", device_ns)
        if self._on_segment is not None:
            self._on_segment(self._began_ns, time.monotonic_ns(), device_ns)
        return device_ns

    def _note(self, call: str, value: int) -> None:
        if self._on_segment is None:
            self.calls.append((call, value))

    def setup_loader(self) -> None:
        """Passes on."""
        self.inner.setup_loader()

    def setup(self) -> None:
        """Passes on."""
        self.inner.setup()

    def load(self, config: WorkerConfig, boundary: Callable[[], None]) -> models.Model:
        """Passes on."""
        return self.inner.load(config, boundary)


class Instance:
    """One instance in this process. A context manager."""

    def __init__(self, device: str, folder: Path, name: str, shares: Shares, *, mode: str = "") -> None:
        self.config = make_config(device, folder, name, folder / f"{name}.gate", mode=mode)
        self.control = ControlBlock.create(self.config.control_path, shares)
        self.gate = RowGate.create(self.config.gate_path)
        self.backend = LoggingBackend(make_backend(self.config))
        self.backend.setup_loader()
        self.backend.setup()
        self.member = GateMember(self.config.gate_path, self.control.read_shares())
        # Each call of `boundary` ends a segment.
        self.runner = SegmentRunner(self.backend, self.member, self.control, segment_ns=0)
        self.runner.poll()
        self.work = make_work(self.backend.inner)
        self.fixed_work = make_fixed_work(self.backend.inner, self.config)
        self.backend.calls.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.member.close()
        self.gate.close()
        self.control.close()

    @property
    def applied_epoch(self) -> int:
        """As the agent reads it."""
        return self.control.read_counters().applied_epoch


def serve(config: WorkerConfig) -> None:
    """The tenant process: runs batches until its shares say that it drains."""
    folder = Path(config.artifact_dir)
    hold_path = folder / f"{config.instance}.hold"
    log = os.open(folder / f"{config.instance}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    inner = make_backend(config)
    inner.setup_loader()
    inner.setup()
    work = make_work(inner)
    with (
        ControlBlock.open(config.control_path) as control,
        GateMember(config.gate_path, control.read_shares()) as member,
    ):

        def note(began_ns: int, ended_ns: int, device_ns: int) -> None:
            # As nothing but the gate puts shares into force, they are still those that the segment began with.
            shares = member.shares
            os.write(
                log, _RECORD.pack(began_ns, ended_ns, device_ns, backend.sm_pct, shares.request_permille, shares.epoch)
            )

        def batch() -> None:
            for index in range(BATCH_SEGMENTS):
                if index:
                    runner.boundary()
                work(SEGMENT_NS)
                if hold_path.exists():
                    time.sleep(HANG_S)  # keeps the device, as a kernel that does not end would

        backend = LoggingBackend(inner, note)
        # Each call of `boundary` ends a segment.
        runner = SegmentRunner(backend, member, control, segment_ns=0)
        while not control.read_shares().draining:
            runner.run(batch, linger=lambda: not control.read_shares().draining)
        if runner.lingers:
            runner.withdraw()
    os.close(log)


def main() -> None:
    """Runs a tenant."""
    parser = argparse.ArgumentParser(description="A tenant of the conformance suite.")
    parser.add_argument("--config", required=True)
    serve(WorkerConfig.load(parser.parse_args().config))


if __name__ == "__main__":
    main()
