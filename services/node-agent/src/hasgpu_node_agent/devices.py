"""The node's devices: what the settings name, as the device layer's probe finds it (without loading torch)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from hasgpu_core.resources import DeviceInfo
from hasgpu_device.backends.cpu import probe, usable_cores

from hasgpu_node_agent.settings import DeviceSetting


@dataclass(frozen=True, slots=True)
class NodeDevice:
    """A device and what its workers must be told of it."""

    info: DeviceInfo
    cores: float
    """Of a CPU device."""


def probe_devices(node: str, settings: Sequence[DeviceSetting]) -> tuple[NodeDevice, ...]:
    """Returns the devices, named cpu0, cpu1, ... in the order of the settings; they split the host's memory evenly."""
    devices = []
    for index, setting in enumerate(settings):
        cores = float(setting.cores if setting.cores is not None else usable_cores())
        info = probe(node, f"{setting.kind}{index}", cores=cores)
        devices.append(NodeDevice(replace(info, memory_bytes=info.memory_bytes // len(settings)), cores))
    return tuple(devices)
