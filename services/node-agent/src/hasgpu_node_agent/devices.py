"""The node's devices: what the settings name, as the device layer's probe finds it (without loading torch)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from hasgpu_core.errors import UnsupportedError
from hasgpu_core.resources import DeviceInfo
from hasgpu_device import profiles
from hasgpu_device.backends import emulated
from hasgpu_device.backends.cpu import probe, usable_cores

from hasgpu_node_agent.cuda_devices import CudaHost
from hasgpu_node_agent.settings import DeviceSetting


@dataclass(frozen=True, slots=True)
class NodeDevice:
    """A device and what its workers must be told of it."""

    info: DeviceInfo
    cores: float = 1.0
    """Of a CPU device."""
    profile_path: str = ""
    """Of an emulated device."""


def probe_devices(node: str, settings: Sequence[DeviceSetting], cuda: CudaHost | None = None) -> tuple[NodeDevice, ...]:
    """Returns the devices in the order of the settings.

    CPU devices are named cpu0, cpu1, ... and split the host's memory evenly; NVIDIA GPUs gpu0, gpu1, ... by NVML's
    index; emulated ones likewise, above those.

    Args:
        node: Its name.
        settings: What to look for.
        cuda: Finds the GPUs, if the settings name any.

    Raises:
        HasgpuError: A device can't be had; says which and why, e.g. an emulated one's profile is missing or is none.
    """
    devices: list[NodeDevice] = []
    cpus_count = sum(setting.kind == "cpu" for setting in settings)
    wanted = [setting for setting in settings if setting.kind == "cuda"]
    if wanted and cuda is None:
        raise UnsupportedError("HASGPU_DEVICES: cuda is not offered here")
    found = cuda.devices(node, wanted) if cuda is not None else ()
    devices.extend(NodeDevice(info) for info in found)
    gpus_count = max((int(info.gpu.removeprefix("gpu")) + 1 for info in found), default=0)
    for setting in settings:
        if setting.kind == "cuda":
            continue
        if setting.kind == "emulated":
            devices.extend(_emulated(node, setting, first=gpus_count))
            gpus_count += setting.gpus
            continue
        cores = float(setting.cores if setting.cores is not None else usable_cores())
        index = sum(device.info.backend == "cpu" for device in devices)
        info = probe(node, f"cpu{index}", cores=cores)
        devices.append(NodeDevice(replace(info, memory_bytes=info.memory_bytes // cpus_count), cores))
    return tuple(devices)


def _emulated(node: str, setting: DeviceSetting, *, first: int) -> Iterator[NodeDevice]:
    path = Path(setting.profile).expanduser().resolve() if setting.profile else profiles.shipped_path()
    profile = emulated.read_profile(path)
    for index in range(first, first + setting.gpus):
        info = emulated.probe(node, f"gpu{index}", profile, source=path.name)
        yield NodeDevice(info, profile_path=str(path))
