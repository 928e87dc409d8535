"""Doubles: a node whose processes are objects, and functions to build values."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable, Coroutine, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hasgpu_core.clock import ManualClock
from hasgpu_core.errors import HasgpuError
from hasgpu_core.events import FunctionEvent, PlanEvent, PlannedInstance, VerticalScaleEvent
from hasgpu_core.function import MIB, Artifact, FunctionSpec, ModelFormat, TensorSpec
from hasgpu_core.resources import Allocation, DeviceInfo, InstanceState
from hasgpu_node_agent.adapters import folders
from hasgpu_node_agent.adapters.gpus import CudaGpu
from hasgpu_node_agent.instance import Instance
from hasgpu_node_agent.ports import (
    Adopted,
    Counters,
    Hindrance,
    LaunchRequest,
    Measurement,
    OperatorRow,
    OperatorTable,
    WorkerReport,
    WorkerStatus,
)
from hasgpu_node_agent.reconciler import Reconciler
from hasgpu_node_agent.row_guard import RowGuard
from hasgpu_node_agent.row_layout import Lease
from hasgpu_node_agent.shares import ShareApplier


class FakeProcess:
    """A worker process that does what the test says."""

    def __init__(self, request: LaunchRequest, pid: int, on_exit: Callable[[], None]) -> None:
        self.request = request
        self.pid = pid
        self.on_exit = on_exit
        self.said: WorkerStatus | None = None
        self.ended: str | None = None
        self.written = request.allocation
        self.applied = request.allocation
        self.unconfirmed: list[tuple[float, Allocation]] = []
        """What may still be in force, and since when it was replaced."""
        self.now_s: Callable[[], float] = lambda: 0.0
        self.epoch = 1
        self.confirmed_epoch = 1
        self.instantly = True
        """Confirms a share as soon as it is written."""
        self.heeds_terminate = True
        self.lease = request.lease
        self.possible = [request.lease]
        """All leases that may be in force."""
        self.faulted = False
        self.signals: list[str] = []
        self.removed = False
        self.noted: tuple[Allocation, int] | None = None
        self.beats = 0
        self.used_ns = 0
        self.batches_count = 0
        self.heartbeat_ns = 0

    @property
    def exit_reason(self) -> str | None:
        return self.ended

    def status(self) -> WorkerStatus | None:
        return self.said

    @property
    def has_device_fault(self) -> bool:
        return self.faulted

    def written_lease(self) -> tuple[Lease, int]:
        return self.lease, self.epoch

    def write_share(self, allocation: Allocation, lease: Lease) -> int:
        assert self.ended is None
        self.possible.append(lease)
        self.lease = lease
        self.unconfirmed.append((self.now_s(), self.written))
        self.written = allocation
        self.epoch += 1
        if self.instantly:
            self.confirm()
        return self.epoch

    def confirm(self) -> None:
        self.confirmed_epoch = self.epoch
        self.possible = [self.lease]
        self.applied = self.written
        self.unconfirmed = []

    def note_share(self, allocation: Allocation, revision: int) -> None:
        self.noted = (allocation, revision)

    def applied_epoch(self) -> int:
        return self.confirmed_epoch

    def beat(self) -> None:
        self.beats += 1

    def counters(self) -> Counters:
        return Counters(self.used_ns, 0, self.batches_count, self.heartbeat_ns)

    def terminate(self) -> None:
        self.signals.append("TERM")
        if self.heeds_terminate:
            self.end("ended with exit code 0")

    def kill(self) -> None:
        self.signals.append("KILL")
        self.end("was killed by SIGKILL")

    def end(self, reason: str) -> None:
        if self.ended is None:
            self.ended = reason
            self.on_exit()

    async def wait(self) -> str:
        while self.ended is None:  # noqa: ASYNC110  an Event would have to be made inside the loop
            await asyncio.sleep(0)
        return self.ended

    def remove(self) -> None:
        assert self.ended is not None, "a running worker's folder is not removed"
        self.removed = True

    def ready(self, address: str = "") -> None:
        self.said = WorkerStatus(InstanceState.READY, "", address or f"worker:{self.pid}")

    def fail(self, reason: str) -> None:
        self.said = WorkerStatus(InstanceState.FAILED, reason, "")
        self.end("ended with exit code 1")

    def fault(self, reason: str) -> None:
        self.said = WorkerStatus(InstanceState.FAILED, reason, "")
        self.faulted = True
        self.end("ended with exit code 71")


class FakeSites:
    """Devices on which workers can be started, unless the test says otherwise."""

    def __init__(self) -> None:
        self.in_the_way: Hindrance | None = None
        self.looked_at: list[str] = []

    def hindrance(self, gpu: str, row: int, width_pct: int) -> Hindrance | None:
        return self.in_the_way

    def ended(self, gpu: str) -> None:
        self.looked_at.append(gpu)

    async def before_kill(self, gpu: str, pid: int) -> None:
        pass


class FakeLauncher:
    def __init__(self, now_s: Callable[[], float]) -> None:
        self.now_s = now_s
        self.started: list[FakeProcess] = []
        self.found: list[Adopted] = []
        self.forgotten: list[str] = []
        self.error: OSError | None = None

    def launch(self, request: LaunchRequest, on_exit: Callable[[], None]) -> FakeProcess:
        if self.error is not None:
            raise self.error
        process = FakeProcess(request, 1_000 + len(self.started), on_exit)
        process.now_s = self.now_s
        self.started.append(process)
        return process

    def adopt(self, on_exit: Callable[[], None]) -> Sequence[Adopted]:
        return self.found

    def forget(self, instance: str, *, profiling: bool = False) -> None:
        self.forgotten.append(instance)

    @property
    def live(self) -> list[FakeProcess]:
        return [p for p in self.started if p.ended is None]


class FakeArtifacts:
    def __init__(self) -> None:
        self.here: set[str] = set()
        self.error: HasgpuError | None = None

    def unpacked(self, spec: FunctionSpec) -> Path | None:
        return Path("/artifacts") / spec.artifact.sha256 if spec.artifact.sha256 in self.here else None

    async def fetch(self, spec: FunctionSpec) -> Path:
        if self.error is not None:
            raise self.error
        self.here.add(spec.artifact.sha256)
        return Path("/artifacts") / spec.artifact.sha256


class FakeClient:
    def __init__(self) -> None:
        self.drained: list[str] = []
        self.measured: list[tuple[int, float]] = []
        self.on_measure: Callable[[int], None] = lambda batch: None
        self.closed: list[str] = []
        self.operators: OperatorTable | HasgpuError = OperatorTable((OperatorRow("relu", 4, 16, 0, 16, 1, (1, 4)),))

    async def report(self, address: str) -> WorkerReport:
        return WorkerReport(in_flight_count=0, observations=())

    async def drain(self, address: str, timeout_s: float) -> int:
        self.drained.append(address)
        return 0

    async def measure(self, address: str, *, batch: int, repetitions_count: int, budget_s: float) -> Measurement:
        self.measured.append((batch, budget_s))
        self.on_measure(batch)
        return Measurement(batch * 1_000, batch * 500, 100, repetitions_count)

    async def list_operators(self, address: str, timeout_s: float) -> OperatorTable:
        if isinstance(self.operators, HasgpuError):
            raise self.operators
        return self.operators

    async def forget(self, address: str) -> None:
        self.closed.append(address)


class RecordingPublisher:
    """Keeps (instance, state, address) of what others would have read, in order."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.dirty: list[str] = []
        self.told: list[tuple[str, InstanceState]] = []
        self.deleted: list[str] = []

    def mark(self, instance: str) -> None:
        self.dirty.append(instance)

    async def flush(self, instance: str) -> None:
        event = self._world.event(instance)
        self.told.append((instance, event.state))

    def gone(self, function: str, instance: str) -> None:
        self.deleted.append(instance)


class YieldingClock(ManualClock):
    """Lets others run while it sleeps."""

    async def sleep(self, delay_s: float) -> None:
        await super().sleep(delay_s)
        await asyncio.sleep(0)


class World:
    """A node with doubles for all that touches the world; call `step` inside its event loop."""

    def __init__(
        self, devices: Sequence[DeviceInfo] = (), make_sites: Callable[[World], Any] = lambda world: FakeSites()
    ) -> None:
        self.clock = YieldingClock()
        self.guard = RowGuard(devices or (cpu_device(),))
        self.launcher = FakeLauncher(self.clock.now_s)
        self.artifacts = FakeArtifacts()
        self.client = FakeClient()
        self.publisher = RecordingPublisher(self)
        self.shares_applied: list[tuple[str, int, bool]] = []
        self.refusals: list[tuple[str, str]] = []
        self.tasks: set[asyncio.Task[None]] = set()
        self.pokes = 0
        self.sites = make_sites(self)
        self.shares = ShareApplier(self.guard, self, self.clock.now_s)
        self.reconciler = Reconciler(
            guard=self.guard,
            launcher=self.launcher,
            artifacts=self.artifacts,
            client=self.client,
            publisher=self.publisher,
            shares=self.shares,
            sites=self.sites,
            clock=self.clock,
            spawn=self.spawn,
            poke=self.poke,
        )

    def spawn(self, coroutine: Coroutine[object, object, None]) -> asyncio.Task[None]:
        task: asyncio.Task[None] = asyncio.get_running_loop().create_task(coroutine)  # type: ignore[arg-type]
        self.tasks.add(task)
        return task

    def poke(self) -> None:
        self.pokes += 1

    def written(self, instance: Instance, worker: Any, target: Any) -> None:
        pass

    def applied(self, instance: Instance, worker: Any, target: Any, *, confirmed: bool) -> None:
        self.shares_applied.append((instance.instance, target.revision, confirmed))

    def refused(self, instance: Instance, reason: str) -> None:
        self.refusals.append((instance.instance, reason))

    async def step(self, times: int = 1) -> None:
        """Makes passes, each followed by what it began in the background."""
        for _ in range(times):
            self.reconciler.reconcile()
            for _ in range(50):
                await asyncio.sleep(0)
            for task in [t for t in self.tasks if t.done()]:
                task.result()
                self.tasks.discard(task)

    def event(self, instance: str) -> Any:
        return self.reconciler.instances[instance].event(
            node="n", device_model="cpu-2c", plan_revision=self.reconciler.plan_revision, unix_ns=self.clock.unix_ns()
        )

    def plan(self, revision: int, *instances: PlannedInstance, token: int = 1) -> None:
        self.reconciler.set_plan(PlanEvent(node="n", revision=revision, instances=instances, fencing_token=token))

    def process(self, instance: str) -> FakeProcess:
        """The newest process of an instance."""
        return [p for p in self.launcher.started if p.request.key.instance == instance][-1]


def cpu_device(gpu: str = "cpu0", memory_bytes: int = 8_192 * MIB, backend: str = "cpu") -> DeviceInfo:
    return DeviceInfo("n", gpu, "cpu-2c", backend, memory_bytes, (25, 50, 75, 100))


def gpu_device(mode: str = "mps+green", *, gpu: str = "gpu0", rungs: tuple[int, ...] = (25, 50, 75, 100)) -> DeviceInfo:
    return DeviceInfo(
        *("n", gpu, "card", "cuda", 8_192 * MIB, rungs),
        mode=mode,
        uuid=f"GPU-0000-{gpu}",
        sm_count=132,
        sm_granule_pct=min(rungs),
    )


def share(request: int = 300, *, sm: int = 100, limit: int = 0, memory_bytes: int = 512 * MIB) -> Allocation:
    return Allocation(sm, request, limit or request, memory_bytes)


def planned(
    instance: str = "f-0",
    allocation: Allocation | None = None,
    *,
    row: int = 0,
    gpu: str = "cpu0",
    revision: int = 1,
) -> PlannedInstance:
    return PlannedInstance(
        function=instance.rpartition("-")[0],
        instance=instance,
        gpu=gpu,
        row=row,
        allocation=allocation or share(),
        allocation_revision=revision,
    )


def function(name: str = "f", *, revision: int = 1, content: int = 0, slo_ms: int = 100) -> FunctionEvent:
    spec = FunctionSpec(
        name=name,
        format=ModelFormat.PYTHON,
        artifact=Artifact(f"{content:064x}", 10),
        entry="handler.py",
        inputs=(TensorSpec("x", "FP32", (-1, 2)),),
        outputs=(TensorSpec("y", "FP32", (-1, 2)),),
        slo_ms=slo_ms,
        max_batch=8,
    )
    return FunctionEvent(spec, revision, 0)


def vertical(instance: str = "f-0", allocation: Allocation | None = None, *, revision: int = 2) -> VerticalScaleEvent:
    name = instance.rpartition("-")[0]
    return VerticalScaleEvent(name, instance, "n", allocation or share(), revision, "test", 0)


FAKE_MPS = Path(__file__).parents[3] / "libs" / "device" / "tests" / "fake_mps" / "nvidia_cuda_mps_control.py"


class MpsHost:
    """A host with a stand-in for MPS's control program, in a folder whose path is short enough for sockets."""

    def __init__(self, folder: Path) -> None:
        binary = folder / "bin" / "nvidia-cuda-mps-control"
        binary.parent.mkdir()
        binary.write_text(f"#!{sys.executable}\n" + FAKE_MPS.read_text())
        binary.chmod(binary.stat().st_mode | stat.S_IXUSR)
        self.folder = folder
        self.scenario = folder / "scenario.json"
        self.record = folder / "record"
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("CUDA")},
            "PATH": f"{binary.parent}:{os.environ['PATH']}",
            "CUDA_VISIBLE_DEVICES": "7",
            "FAKE_MPS_SCENARIO": str(self.scenario),
            "FAKE_MPS_RECORD": str(self.record),
        }
        self.gpus: list[CudaGpu] = []

    def says(self, **scenario: Any) -> None:
        self.scenario.write_text(json.dumps(scenario))

    def daemon_pid(self, gpu: str) -> int:
        return int(json.loads((self.folder / "mps" / gpu / "daemon.json").read_text())["pid"])

    def gpu(self, info: Any) -> CudaGpu:
        gpu = CudaGpu(info, self.folder / "mps" / info.gpu, self.environment)
        self.gpus.append(gpu)
        return gpu


@pytest.fixture
def host() -> Iterator[MpsHost]:
    if not FAKE_MPS.exists():
        pytest.skip(f"there is no {FAKE_MPS.name}")
    folder = Path(tempfile.mkdtemp(prefix="hg"))
    made = MpsHost(folder)
    try:
        yield made
    finally:
        made.scenario.unlink(missing_ok=True)
        for gpu in made.gpus:
            gpu.quit_daemon(20)
        shutil.rmtree(folder)


class Make:
    """How tests get at the functions of this file."""

    device = staticmethod(cpu_device)
    gpu = staticmethod(gpu_device)
    share = staticmethod(share)
    planned = staticmethod(planned)
    function = staticmethod(function)
    vertical = staticmethod(vertical)
    world = World
    process = FakeProcess


@pytest.fixture(autouse=True)
def shared_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shared pages go with the test, also where it kills what would have cleared them away."""
    monkeypatch.setattr(folders, "SHARED_MEMORY", tmp_path)


@pytest.fixture(scope="session")
def make() -> type[Make]:
    return Make


@pytest.fixture
def world() -> World:
    return World()
