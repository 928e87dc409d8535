"""GPUs for real: the daemon by a stand-in control program, NVML's inventory and telemetry by doubles."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import pytest
from hasgpu_core.errors import InvalidError, UnavailableError
from hasgpu_device.backends.cuda.mps import MpsState
from hasgpu_device.backends.cuda.nvml import GpuFacts, Health, Inventory, RefusedGpu, Telemetry
from hasgpu_device.backends.cuda.probe_findings import Finding, Findings
from hasgpu_device.errors import MpsError
from hasgpu_node_agent.adapters.gpus import NvmlGauges
from hasgpu_node_agent.adapters.side_thread import SideThread
from hasgpu_node_agent.cuda_devices import CudaHost
from hasgpu_node_agent.ports import LaunchRequest
from hasgpu_node_agent.row_guard import WorkerKey
from hasgpu_node_agent.row_layout import Lease
from hasgpu_node_agent.settings import DeviceSetting, parse_devices

UUIDS = [f"GPU-0000000{n}-aaaa-bbbb-cccc-000000000000" for n in range(3)]


def request(make: Any, info: Any, lease: Lease, *, row: int = 0, profiling: bool = False) -> LaunchRequest:
    return LaunchRequest(
        key=WorkerKey("f-0", 1),
        function=make.function(),
        device=info,
        row=row,
        allocation=make.share(300, sm=lease.width_pct),
        lease=lease,
        allocation_revision=1,
        artifact=Path("/a"),
        profiling=profiling,
    )


def test_a_daemon_is_started_adopted_by_the_next_agent_and_quit(host: Any, make: Any) -> None:
    info = make.gpu()
    gpu = host.gpu(info)
    gpu.start_daemon(30)
    assert gpu.look().state is MpsState.ACTIVE  # type: ignore[union-attr]
    gpu.let_go()
    successor = host.gpu(info)
    successor.start_daemon(30)
    starts = [line for line in host.record.read_text().splitlines() if '"-f"' in line]
    assert len(starts) == 1, "the daemon of the earlier agent goes on"
    successor.quit_daemon(20)
    assert successor.look().state is MpsState.GONE  # type: ignore[union-attr]


def test_what_a_workers_environment_says(host: Any, make: Any) -> None:
    green = host.gpu(make.gpu()).environment(request(make, make.gpu(), Lease(0, 25)))
    assert "CUDA_VISIBLE_DEVICES" not in green, "the daemon's GPU is device 0, whatever the agent was given"
    assert "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE" not in green
    assert green["CUDA_MPS_PIPE_DIRECTORY"] == str(host.folder / "mps" / "gpu0" / "p")
    assert green["CUDA_MPS_PINNED_DEVICE_MEM_LIMIT"] == "0=512M"
    assert green["PATH"] == host.environment["PATH"]
    info = make.gpu("mps+pct")
    assert host.gpu(info).environment(request(make, info, Lease(0, 50)))["CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"] == "50"
    info = make.gpu("timeshare", rungs=(100,))
    shared = host.gpu(info).environment(request(make, info, Lease(0, 100)))
    assert shared["CUDA_VISIBLE_DEVICES"] == info.uuid
    assert not any(Path(shared["CUDA_MPS_PIPE_DIRECTORY"]).iterdir()), "no daemon of anybody's is joined"
    assert host.gpu(info).look() is None


def test_a_static_partition_is_made_for_a_row_and_taken_away_when_unused(host: Any, make: Any) -> None:
    info = make.gpu("mps+static", rungs=(25, 50, 75, 100))
    gpu = host.gpu(info)
    gpu.start_daemon(30)
    assert not gpu.is_prepared(0, 25)
    with pytest.raises(MpsError, match="no static partition of 25 %"):
        gpu.environment(request(make, info, Lease(0, 25)))
    gpu.prepare(0, 25)
    assert gpu.is_prepared(0, 25)
    partition = gpu.environment(request(make, info, Lease(0, 25)))["CUDA_MPS_SM_PARTITION"]
    assert partition.startswith("GPU-")
    commands = host.record.read_text()
    assert f"sm_partition add {info.uuid} 4" in commands, "4 of 16 chunks are 25 %"
    gpu.prepare(1, 50)
    assert not gpu.is_prepared(0, 25), "nobody used it"


def test_a_daemon_of_another_mode_without_clients_is_replaced(host: Any, make: Any) -> None:
    first = host.gpu(make.gpu())
    first.start_daemon(30)
    first.let_go()
    static = host.gpu(make.gpu("mps+static"))
    static.start_daemon(30)
    assert '"-S"' in host.record.read_text()


# Inventory


class FakeNvml:
    def __init__(self, inventory: Inventory) -> None:
        self._inventory = inventory

    def inventory(self) -> Inventory:
        return self._inventory

    def close(self) -> None:
        pass


def facts(index: int) -> GpuFacts:
    return GpuFacts(index, UUIDS[index], "NVIDIA H100 80GB HBM3", 80 << 30, (9, 0), 132, "DEFAULT")


MIG = RefusedGpu(
    2, UUIDS[2], "NVIDIA H100 80GB HBM3", "MIG mode is enabled; hasgpu shares whole GPUs: nvidia-smi -mig 0"
)


def findings(uuid: str, mode: str, pipe_dir: Path | None) -> Findings:
    rungs = [{"sm_pct": width, "is_accepted": width != 25, "bite": 0.9, "why": "x"} for width in (25, 50, 75)]
    steps = {
        "driver": Finding("driver", True, "580", {"cuda": [13, 0]}),
        "mps_start": Finding("mps_start", True, "started"),
        "mps_in_use": Finding("mps_in_use", True, "in use"),
        "bite_pct": Finding("bite_pct", True, "bites", {"rungs": rungs}),
    }
    return Findings(uuid, "580.65.06", "2.11", (25, 50, 75, 100), steps)


def cuda_host(tmp_path: Path, inventory: Inventory, probe: Any = findings) -> CudaHost:
    return CudaHost(
        environment={},
        mps_folder=lambda gpu: Path("/tmp/hasgpu-none") / gpu,
        cache=tmp_path / "probes.json",
        open_nvml=lambda: FakeNvml(inventory),  # type: ignore[arg-type, return-value]
        probe=probe,
    )


def test_cuda_means_every_gpu_but_those_that_are_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    host = cuda_host(tmp_path, Inventory((facts(0), facts(1)), (MIG,)))
    devices = host.devices("n", parse_devices("cuda"))
    assert [d.gpu for d in devices] == ["gpu0", "gpu1"]
    one = devices[0]
    assert (one.model, one.backend, one.uuid) == ("NVIDIA-H100-80GB-HBM3", "cuda", UUIDS[0])
    assert (one.mode, one.sm_rungs_pct, one.sm_granule_pct, one.sm_count) == ("mps+pct", (50, 75, 100), 50, 132)
    assert any("not proven: SM limit of 25 %" in told for told in one.capabilities)
    assert "MIG mode is enabled" in caplog.text


@pytest.mark.parametrize(
    ("setting", "error", "match"),
    [
        ("cuda:gpu=2", InvalidError, "MIG mode is enabled"),
        ("cuda:gpu=5", InvalidError, f"expected one of 0 .{UUIDS[0]}., 1 .*got 5"),
        (f"cuda;cuda:gpu={UUIDS[1]}", InvalidError, "each GPU once"),
    ],
)
def test_a_gpu_that_cannot_be_had_is_refused_with_the_reason(
    tmp_path: Path, setting: str, error: type[Exception], match: str
) -> None:
    host = cuda_host(tmp_path, Inventory((facts(0), facts(1)), (MIG,)))
    with pytest.raises(error, match=match):
        host.devices("n", parse_devices(setting))


@pytest.mark.parametrize("setting", ["cuda", "cuda:gpu=0"])
def test_without_a_gpu_it_says_what_nvml_said(tmp_path: Path, setting: str) -> None:
    host = cuda_host(tmp_path, Inventory(reason="no NVIDIA GPU: the NVIDIA kernel driver is not loaded"))
    with pytest.raises(UnavailableError, match="the NVIDIA kernel driver is not loaded"):
        host.devices("n", parse_devices(setting))


def test_a_gpu_that_can_do_nothing_fails_the_start_only_if_it_was_named(tmp_path: Path) -> None:
    def probe(uuid: str, mode: str, pipe_dir: Path | None) -> Findings:
        return findings(uuid, mode, pipe_dir) if uuid == UUIDS[0] else Findings(uuid, "", "", (100,), {})

    host = cuda_host(tmp_path, Inventory((facts(0), facts(1))), probe)
    assert [d.gpu for d in host.devices("n", [DeviceSetting("cuda")])] == ["gpu0"]
    with pytest.raises(UnavailableError, match="can't be used"):
        host.devices("n", [DeviceSetting("cuda", gpu="1")])


@pytest.mark.parametrize(
    "text",
    ["cuda:gpu=-1", "cuda:gpu=64", "cuda:gpu=GPU-", "cuda:gpu=GPU-xyz!", "cuda:mode=mps", "cuda:cores=2", "cuda:gpu"],
)
def test_settings_of_gpus_that_cannot_be_are_refused(text: str) -> None:
    with pytest.raises(InvalidError, match=r"HASGPU_DEVICES: expected gpu=0\.\.63, gpu=GPU-<uuid> or mode=mps\+green"):
        parse_devices(text)


def test_settings_of_gpus() -> None:
    assert parse_devices(f"cuda:gpu=00,mode=mps+pct;cuda:gpu={UUIDS[1]}") == (
        DeviceSetting("cuda", gpu="0", mode="mps+pct"),
        DeviceSetting("cuda", gpu=UUIDS[1]),
    )


# NVML that hangs


class HangingNvml:
    def __init__(self) -> None:
        self.go_on = threading.Event()
        self.readings = 0

    def telemetry(self, uuid: str) -> Telemetry:
        self.readings += 1
        self.go_on.wait(60)
        return Telemetry(uuid, Health.OK, "", memory_used_bytes=5, power_mw=70_000)


async def test_nvml_that_hangs_holds_nobody_up_and_is_told(make: Any) -> None:
    world = make.world()
    nvml = HangingNvml()
    gauges = NvmlGauges(["GPU-a"], world.clock.now_s, lambda: nvml)  # type: ignore[arg-type, return-value]
    reading = asyncio.ensure_future(gauges.refresh())
    await asyncio.sleep(0.05)
    await gauges.refresh()
    assert gauges.latest("GPU-a") is None
    world.clock.advance(7)
    silent = gauges.latest("GPU-a")
    assert silent is not None
    assert (silent.health, silent.reason) == (Health.UNKNOWN, "NVML has not answered for 7 s")
    assert silent.power_mw is None
    nvml.go_on.set()
    await reading
    assert gauges.latest("GPU-a") == Telemetry("GPU-a", Health.OK, "", memory_used_bytes=5, power_mw=70_000)
    assert nvml.readings == 1, "a second reading is not begun while the first hangs"
    gauges.close()


async def test_a_side_thread_hands_errors_to_the_caller_and_goes_on() -> None:
    thread = SideThread("t")

    def fail() -> None:
        raise MpsError("x", "y")

    with pytest.raises(MpsError):
        await thread.run(fail)
    assert await thread.run(lambda: 7) == 7
    assert not thread.is_busy
    thread.close()
