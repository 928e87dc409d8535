"""Faults of a GPU: contained, named, mended in the right order; other GPUs go on."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hasgpu_core.resources import DeviceHealth, InstanceState
from hasgpu_device.backends.cuda.fault_policy import FaultLimits
from hasgpu_device.backends.cuda.mps import MpsHealth, MpsState
from hasgpu_device.backends.cuda.nvml import Health, Telemetry
from hasgpu_device.errors import MpsError
from hasgpu_node_agent.gpu_watch import GpuWatch

ILLEGAL = "CUDA_ERROR_ILLEGAL_ADDRESS (700): an illegal memory access was encountered, while running a batch"


class FakeGpu:
    """A GPU whose MPS is in the state that the test says."""

    def __init__(self, info: Any, log: list[str]) -> None:
        self.info = info
        self.log = log
        self.state: MpsState | None = MpsState.ACTIVE
        self.error: MpsError | None = None
        self.starts_as = MpsState.ACTIVE
        self.prepared: set[tuple[int, int]] | None = None
        """None: nothing has to be."""

    def look(self) -> MpsHealth | None:
        return MpsHealth(self.state, f"it is {self.state}") if self.state is not None else None

    def start_daemon(self, timeout_s: float) -> None:
        self.log.append(f"start {self.info.gpu}")
        if self.error is not None:
            raise self.error
        self.state = self.starts_as

    def quit_daemon(self, timeout_s: float) -> None:
        self.log.append(f"quit {self.info.gpu}")
        self.state = MpsState.GONE

    def let_go(self) -> None:
        self.log.append(f"let go {self.info.gpu}")

    def terminate_client(self, pid: int, timeout_s: float) -> bool:
        self.log.append(f"terminate {pid}")
        return True

    def prepare(self, row: int, width_pct: int) -> None:
        if self.error is not None:
            raise self.error
        assert self.prepared is not None
        self.prepared.add((row, width_pct))

    def is_prepared(self, row: int, width_pct: int) -> bool:
        return self.prepared is None or (row, width_pct) in self.prepared


class FakeGauges:
    def __init__(self) -> None:
        self.readings: dict[str, Telemetry] = {}

    def latest(self, uuid: str) -> Telemetry | None:
        return self.readings.get(uuid)

    async def refresh(self) -> None:
        pass


class Bench:
    """Two GPUs with workers on them."""

    def __init__(self, make: Any, mode: str = "mps+green") -> None:
        self.make = make
        self.log: list[str] = []
        infos = [make.gpu(mode, gpu="gpu0"), make.gpu(mode, gpu="gpu1")]
        self.gpus = {info.gpu: FakeGpu(info, self.log) for info in infos}
        self.gauges = FakeGauges()
        self.world = make.world(infos, self._watch)
        self.watch: GpuWatch = self.world.sites

    def _watch(self, world: Any) -> GpuWatch:
        return GpuWatch(
            self.gpus,
            self.gauges,
            guard=world.guard,
            clock=world.clock,
            spawn=world.spawn,
            changed=world.poke,
            limits=FaultLimits(),
        )

    async def ready(self) -> Bench:
        await self.watch.start()
        self.log.clear()
        self.world.reconciler.set_function(self.make.function())
        share = self.make.share(300, sm=50)
        plan = [
            self.make.planned("f-0", share, gpu="gpu0"),
            self.make.planned("f-1", share, gpu="gpu0"),
            self.make.planned("f-2", share, gpu="gpu1"),
        ]
        self.world.plan(1, *plan)
        await self.world.step(2)
        self.all_ready()
        await self.world.step()
        for process in self.world.launcher.live:
            self.record(process)
        return self

    def record(self, process: Any) -> None:
        name, kill, terminate = process.request.key.instance, process.kill, process.terminate
        process.kill = lambda: (self.log.append(f"kill {name}"), kill())[1]
        process.terminate = lambda: (self.log.append(f"ask {name}"), terminate())[1]

    def all_ready(self) -> None:
        for process in self.world.launcher.live:
            process.ready()

    async def look(self, gpu: str = "gpu0") -> float:
        again_s = await self.watch.look(gpu, self.world.reconciler)
        await self.world.step(2)
        return again_s

    def health(self, gpu: str = "gpu0") -> DeviceHealth:
        return self.world.guard.device(gpu).health

    def states(self) -> list[str]:
        return [self.world.event(f"f-{n}").state.value for n in range(3)]


@pytest.fixture
async def bench(make: Any) -> Bench:
    return await Bench(make).ready()


async def test_no_worker_is_started_before_its_daemon_is_there(make: Any) -> None:
    bench = Bench(make)
    bench.world.reconciler.set_function(make.function())
    bench.world.plan(1, make.planned("f-0", gpu="gpu0"))
    await bench.world.step(3)
    assert bench.world.launcher.started == []
    assert "gpu0 is not ready yet" in bench.world.event("f-0").reason
    await bench.watch.start()
    assert sorted(bench.log) == ["start gpu0", "start gpu1"]
    await bench.world.step()
    assert len(bench.world.launcher.live) == 1


async def test_a_daemon_that_cannot_be_started_is_told_and_tried_again(make: Any) -> None:
    bench = Bench(make)
    bench.world.plan(1)
    bench.gpus["gpu0"].error = MpsError("start", "nvidia-cuda-mps-control can't be run: No such file or directory")
    bench.gpus["gpu0"].state = MpsState.GONE
    await bench.watch.start()
    hindrance = bench.watch.hindrance("gpu0", 0, 50)
    assert hindrance is not None
    assert "No such file" in hindrance.reason
    assert bench.watch.hindrance("gpu1", 0, 50) is None
    bench.gpus["gpu0"].error = None
    await bench.look()
    assert bench.watch.hindrance("gpu0", 0, 50) is None


async def test_all_is_well_changes_nothing(bench: Bench) -> None:
    await bench.look()
    assert bench.log == []
    assert bench.states() == ["ready"] * 3
    assert bench.health() is DeviceHealth.OK


async def test_a_server_in_fault_loses_all_its_clients_in_order_and_comes_back_by_itself(bench: Bench) -> None:
    bench.gpus["gpu0"].state = MpsState.FAULT
    for process in bench.world.launcher.live:
        process.heeds_terminate = False
    await bench.look()
    pids = [p.pid for p in bench.world.launcher.started[:2]]
    asked, ended = bench.log[:2], bench.log[2:]
    assert sorted(asked) == ["ask f-0", "ask f-1"]
    assert ended == [f"terminate {pids[0]}", f"terminate {pids[1]}", "kill f-0", "kill f-1"]
    assert bench.world.client.drained == [f"worker:{pids[0]}", f"worker:{pids[1]}"], "drained before they are killed"
    assert bench.states() == ["failed", "failed", "ready"], "the other GPU goes on"
    assert "FAULT" in bench.world.event("f-0").reason
    assert bench.health() is DeviceHealth.DEGRADED
    assert len(bench.world.launcher.live) == 1, "none is started while the server is in FAULT"
    bench.gpus["gpu0"].state = MpsState.ACTIVE
    await bench.look()
    bench.all_ready()
    await bench.world.step()
    assert bench.states() == ["ready"] * 3
    bench.world.clock.advance(11)
    await bench.look()
    assert bench.health() is DeviceHealth.OK


async def test_a_server_that_stays_in_fault_is_replaced_and_the_workers_follow_in_the_plans_order(bench: Bench) -> None:
    bench.gpus["gpu0"].state = MpsState.FAULT
    await bench.look()
    bench.log.clear()
    bench.world.clock.advance(11)
    await bench.look()
    assert bench.log == ["quit gpu0", "start gpu0"]
    started = [p.request.key.instance for p in bench.world.launcher.started[3:]]
    assert started == ["f-0", "f-1"]


async def test_a_workers_fault_that_reaches_all_clients_restarts_them_and_is_named(bench: Bench) -> None:
    bench.world.process("f-0").fault(ILLEGAL)
    await bench.world.step(3)
    bench.world.clock.advance(1)
    await bench.world.step(2)
    assert len(bench.world.launcher.live) == 2, "it is not started again before the fault was looked at"
    assert bench.world.event("f-0").reason == ILLEGAL
    await bench.look()
    assert "ask f-1" in bench.log
    assert "CUDA_ERROR_ILLEGAL_ADDRESS" in bench.world.event("f-1").reason
    info = bench.world.guard.device("gpu0")
    assert info.health is DeviceHealth.DEGRADED
    assert "f-0 met CUDA_ERROR_ILLEGAL_ADDRESS" in info.health_reason
    bench.world.clock.advance(1)
    await bench.world.step(2)
    bench.all_ready()
    await bench.world.step()
    assert bench.states() == ["ready"] * 3
    bench.log.clear()
    await bench.look()
    assert bench.log == [], "a fault is mended once"


@pytest.mark.parametrize("is_moved_before", [True, False])
async def test_a_fault_stays_with_its_device_when_the_instance_is_moved(bench: Bench, is_moved_before: bool) -> None:
    share = bench.make.share(300, sm=50)
    moved = [bench.make.planned(f"f-{n}", share, gpu="gpu0" if n == 1 else "gpu1") for n in range(3)]
    if is_moved_before:
        bench.world.plan(2, *moved)
    bench.world.process("f-0").fault("CUDA_ERROR_ECC_UNCORRECTABLE (214): uncorrectable ECC error, while loading")
    await bench.world.step()
    assert "CUDA_ERROR_ECC_UNCORRECTABLE" in bench.world.event("f-0").reason
    if not is_moved_before:
        await bench.look()
        assert bench.health() is DeviceHealth.LOST
        bench.world.plan(2, *moved)
    await bench.world.step()
    await bench.look("gpu1")
    assert bench.health("gpu1") is DeviceHealth.OK, "the device that it was moved to has not failed"
    bench.world.clock.advance(1)
    await bench.world.step(2)
    bench.all_ready()
    await bench.world.step()
    assert bench.states()[0] == bench.states()[2] == "ready"
    assert bench.world.event("f-0").gpu == "gpu1"


async def test_a_fault_of_one_worker_alone_restarts_it_alone(bench: Bench) -> None:
    bench.world.process("f-0").fault("CUDA_ERROR_OUT_OF_MEMORY (2): while loading")
    await bench.world.step()
    await bench.look()
    bench.world.clock.advance(1)
    await bench.world.step(2)
    assert bench.log == []
    assert len(bench.world.launcher.live) == 3


async def test_a_worker_outside_mps_is_not_started_again(bench: Bench) -> None:
    bench.world.process("f-0").fault("MPS_NOT_IN_USE: mode mps+green needs MPS, but this process runs outside it")
    await bench.world.step()
    for _ in range(3):
        await bench.look()
        bench.world.clock.advance(20)
        await bench.world.step(2)
    assert bench.states() == ["failed", "ready", "ready"]
    assert "MPS_NOT_IN_USE" in bench.world.event("f-0").reason


async def test_a_daemon_that_died_is_started_again_with_its_workers(bench: Bench) -> None:
    bench.gpus["gpu0"].state = MpsState.GONE
    await bench.look()
    assert bench.log[-1] == "start gpu0"
    assert sorted(bench.log[:-1]) == ["ask f-0", "ask f-1"]
    assert [p.request.key.instance for p in bench.world.launcher.live] == ["f-2", "f-0", "f-1"]


async def test_a_lost_gpu_fails_its_instances_with_the_reason_and_the_others_go_on(bench: Bench) -> None:
    uuid = bench.gpus["gpu0"].info.uuid
    bench.gauges.readings[uuid] = Telemetry(uuid, Health.LOST, "card (GPU-0000-gpu0): GPU is lost")
    await bench.look()
    assert bench.log == ["kill f-0", "kill f-1"], "there is nothing to drain or to terminate there"
    assert bench.states() == ["failed", "failed", "ready"]
    assert "GPU is lost" in bench.world.event("f-0").reason
    info = bench.world.guard.device("gpu0")
    assert info.health is DeviceHealth.LOST
    assert "GPU is lost" in info.health_reason
    bench.world.clock.advance(30)
    await bench.world.step(3)
    assert len(bench.world.launcher.live) == 1
    bench.world.plan(
        2, *(bench.make.planned(f"f-{n}", bench.make.share(300, sm=50), gpu=f"gpu{n // 2}") for n in range(4))
    )
    await bench.world.step(3)
    assert bench.world.event("f-3").state is not InstanceState.FAILED
    await bench.look("gpu1")
    assert bench.health("gpu1") is DeviceHealth.OK
    bench.gauges.readings[uuid] = Telemetry(uuid, Health.OK, "")
    await bench.look()
    await bench.world.step(2)
    assert bench.health() is not DeviceHealth.LOST
    assert len(bench.world.launcher.live) == 4


async def test_too_many_recoveries_make_a_gpu_unusable(bench: Bench) -> None:
    for _ in range(3):
        bench.gpus["gpu0"].state = MpsState.GONE
        await bench.look()
        bench.world.clock.advance(61)
    bench.gpus["gpu0"].state = MpsState.GONE
    await bench.look()
    assert bench.health() is DeviceHealth.LOST
    assert "3 recoveries within 600 s did not help" in bench.world.guard.device("gpu0").health_reason
    assert bench.states()[:2] == ["failed", "failed"]


async def test_a_silent_worker_is_terminated_before_it_is_killed(bench: Bench) -> None:
    worker = bench.world.reconciler.instances["f-0"].current
    worker.process.heartbeat_ns = 7
    for _ in range(20):
        await bench.world.step()
        bench.world.clock.advance(2.4)
    assert worker.process.ended is None, "the reconciler alone does not kill a client with work on the GPU"
    await bench.look()
    assert bench.log == [f"terminate {worker.process.pid}", "kill f-0"]
    assert "no sign of life" in bench.world.event("f-0").reason


async def test_nvml_that_does_not_answer_degrades_a_gpu_and_stops_nothing(bench: Bench) -> None:
    uuid = bench.gpus["gpu0"].info.uuid
    bench.gauges.readings[uuid] = Telemetry(uuid, Health.UNKNOWN, "NVML has not answered for 7 s")
    await bench.look()
    assert bench.health() is DeviceHealth.DEGRADED
    assert bench.world.guard.device("gpu0").health_reason == "NVML has not answered for 7 s"
    assert bench.states() == ["ready"] * 3


async def test_a_static_partition_is_made_before_its_worker_starts(make: Any) -> None:
    bench = Bench(make, "mps+static")
    bench.gpus["gpu0"].prepared = set()
    await bench.watch.start()
    bench.world.reconciler.set_function(make.function())
    bench.world.plan(1, make.planned("f-0", make.share(300, sm=30), gpu="gpu0"))
    for _ in range(20):
        await bench.world.step()
        await asyncio.sleep(0.005)
        if bench.world.launcher.live:
            break
    assert bench.gpus["gpu0"].prepared == {(0, 50)}
    assert bench.world.process("f-0").request.lease.width_pct == 50


async def test_a_static_partition_that_cannot_be_made_is_the_instances_reason(make: Any) -> None:
    bench = Bench(make, "mps+static")
    bench.gpus["gpu0"].prepared = set()
    await bench.watch.start()
    bench.gpus["gpu0"].error = MpsError("sm_partition add", "not enough chunks")
    bench.world.reconciler.set_function(make.function())
    bench.world.plan(1, make.planned("f-0", make.share(300, sm=30), gpu="gpu0"))
    for _ in range(20):
        await bench.world.step()
        await asyncio.sleep(0.005)
    assert "an SM partition of 50 % can't be made on gpu0" in bench.world.event("f-0").reason
    assert bench.world.launcher.started == []


async def test_the_end_quits_the_daemons_or_leaves_them(bench: Bench) -> None:
    await bench.watch.stop()
    assert sorted(bench.log) == ["quit gpu0", "quit gpu1"]
    bench.log.clear()
    bench.watch.let_go()
    assert sorted(bench.log) == ["let go gpu0", "let go gpu1"]
