from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from hasgpu_core.errors import UnsupportedError
from hasgpu_device import backends
from hasgpu_device.backends import cpu
from hasgpu_device.backends.cpu import CpuBackend
from hasgpu_device.backends.fake import FakeBackend
from hasgpu_device.control import ControlBlock, Shares
from hasgpu_device.errors import GateTimeoutError
from hasgpu_device.gate import GateMember, RowGate
from hasgpu_device.segments import SegmentRunner
from hasgpu_device.worker_config import WorkerConfig

MS = 1_000_000


@dataclass
class Rig:
    backend: FakeBackend
    control: ControlBlock
    gate: RowGate
    runner: SegmentRunner


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    backend = FakeBackend()
    with (
        ControlBlock.create(tmp_path / "control", Shares(1000, 1000)) as control,
        RowGate.create(tmp_path / "gate") as gate,
        GateMember(tmp_path / "gate", control.read_shares()) as member,
    ):
        yield Rig(backend, control, gate, SegmentRunner(backend, member, control))


def layers(rig: Rig, count: int, layer_ns: int) -> str:
    for _ in range(count):
        rig.runner.boundary()
        rig.backend.work(layer_ns)
    return "done"


def test_a_batch_is_cut_into_segments_of_five_milliseconds(rig: Rig) -> None:
    answer, run = rig.runner.run(lambda: layers(rig, 10, 2 * MS))
    assert answer == "done"
    assert rig.backend.segments_ns == [6 * MS, 6 * MS, 6 * MS, 2 * MS]
    assert (run.segments_count, run.device_ns, run.longest_segment_ns) == (4, 20 * MS, 6 * MS)
    assert [segment.device_ns for segment in run.segments] == rig.backend.segments_ns
    counters = rig.control.read_counters()
    assert (counters.used_ns, counters.segments_count, counters.batches_count) == (20 * MS, 4, 1)
    assert counters.longest_segment_ns == 6 * MS
    assert [view.holding for view in rig.gate.members()] == [False]


def test_a_batch_that_raises_is_charged_and_gives_the_device_up(rig: Rig) -> None:
    def work() -> None:
        rig.backend.work(3 * MS)
        raise ValueError("no luck")

    with pytest.raises(ValueError, match="no luck"):
        rig.runner.run(work)
    assert rig.control.read_counters().used_ns == 3 * MS
    assert [view.holding for view in rig.gate.members()] == [False]


def test_a_changed_sm_share_holds_from_the_next_segment(rig: Rig) -> None:
    epochs = []

    def work() -> None:
        rig.backend.work(5 * MS)
        epoch = rig.control.write_shares(Shares(800, 900, 50))
        rig.backend.work(1 * MS)
        assert rig.backend.sm_pct == 100
        assert rig.control.read_counters().applied_epoch < epoch
        rig.runner.boundary()
        assert rig.backend.sm_pct == 50
        assert rig.control.read_counters().applied_epoch == epoch
        rig.backend.work(2 * MS)
        epochs.append(epoch)

    _, run = rig.runner.run(work)
    assert epochs == [2]
    assert rig.backend.segments_ns == [6 * MS, 4 * MS]
    assert (run.sm_pct, run.request_permille) == (100, 1000)


def test_an_idle_instance_acknowledges_when_polled(rig: Rig) -> None:
    epoch = rig.control.write_shares(Shares(200, 300, 25))
    rig.runner.poll()
    assert rig.control.read_counters().applied_epoch == epoch
    assert rig.backend.sm_pct == 25
    assert rig.gate.members()[0].request_permille == 200


def test_boundaries_outside_a_batch_or_in_other_threads_do_nothing(rig: Rig) -> None:
    rig.runner.boundary()

    def work() -> None:
        rig.backend.work(50 * MS)
        thread = threading.Thread(target=rig.runner.boundary)
        thread.start()
        thread.join()

    rig.runner.run(work)
    assert rig.backend.segments_ns == [50 * MS]


def test_debt_shows_in_the_counters(rig: Rig) -> None:
    rig.control.write_shares(Shares(100, 100))
    rig.runner.run(lambda: rig.backend.work(80 * MS))
    assert rig.control.read_counters().debt_ns >= 60 * MS
    with pytest.raises(GateTimeoutError):
        rig.runner.run(lambda: None, deadline_ns=time.monotonic_ns() + 10 * MS)


def test_held_time_is_seen_from_outside(rig: Rig) -> None:
    seen = []

    def work() -> None:
        time.sleep(0.01)
        seen.append(rig.runner.held_ns())

    assert rig.runner.held_ns() == 0
    rig.runner.run(work)
    assert seen[0] >= 10 * MS
    assert rig.runner.held_ns() == 0


@pytest.mark.parametrize(
    ("cores", "sm_pct", "threads", "stretch"),
    [(2, 100, 2, 1), (2, 75, 2, 4 / 3), (2, 50, 1, 1), (2, 25, 1, 2), (8, 10, 1, 1.25), (1.5, 100, 2, 4 / 3)],
)
def test_sm_share_of_a_cpu_is_threads_and_pacing(cores: float, sm_pct: int, threads: int, stretch: float) -> None:
    backend = CpuBackend(cores)
    backend.apply_sm(sm_pct)
    assert backend.threads_count == threads
    backend.start_segment()
    start_ns = time.thread_time_ns()
    while time.thread_time_ns() - start_ns < 5 * MS:
        pass
    assert backend.running_ns() >= 5 * MS * stretch
    assert backend.stop_segment() >= 5 * MS * stretch


def test_pacing_holds_the_device_without_using_it() -> None:
    backend = CpuBackend(1)
    backend.apply_sm(10)
    wall_ns, cpu_ns = time.monotonic_ns(), time.thread_time_ns()
    backend.start_segment()
    while time.thread_time_ns() - cpu_ns < 3 * MS:
        pass
    device_ns = backend.stop_segment()
    assert device_ns >= 29 * MS
    assert time.monotonic_ns() - wall_ns >= device_ns - MS
    assert time.thread_time_ns() - cpu_ns < device_ns // 2


def test_the_probe_describes_the_host(tmp_path: Path) -> None:
    info = cpu.probe("node-a", "cpu1", cores=2)
    assert (info.node, info.gpu, info.model, info.backend) == ("node-a", "cpu1", "cpu-2c", "cpu")
    assert info.sm_rungs_pct == (25, 50, 75, 100)
    assert info.memory_bytes > 0
    assert "time: token gate on thread CPU time" in info.capabilities
    assert cpu.probe("n").model == f"cpu-{cpu.usable_cores()}c"
    (tmp_path / "meminfo").write_text("MemTotal:  2048 kB\nMemFree: 1 kB\n")
    (tmp_path / "max").write_text("1048576\n")
    assert cpu.memory_bytes(tmp_path / "meminfo", tmp_path / "max") == 1048576
    (tmp_path / "max").write_text("max\n")
    assert cpu.memory_bytes(tmp_path / "meminfo", tmp_path / "max") == 2048 * 1024
    assert cpu.memory_bytes(tmp_path / "nothing", tmp_path / "max") == 0


def test_an_unknown_backend_is_told(make_config: Callable[..., WorkerConfig]) -> None:
    with pytest.raises(UnsupportedError, match="'tpu'"):
        backends.create(make_config(backend="tpu"))
