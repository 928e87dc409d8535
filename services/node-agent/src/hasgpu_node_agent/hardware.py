"""What a node runs on: its devices, and the means to look after its GPUs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from hasgpu_device.backends.cuda.nvml import Nvml

from hasgpu_node_agent.adapters.folders import NodeFolders
from hasgpu_node_agent.adapters.gpus import CudaGpu, NvmlGauges
from hasgpu_node_agent.cuda_devices import CudaHost
from hasgpu_node_agent.devices import NodeDevice, probe_devices
from hasgpu_node_agent.ports import Gauges, Gpu, LaunchRequest
from hasgpu_node_agent.settings import AgentSettings


@dataclass(frozen=True, slots=True)
class Hardware:
    """The devices of a node."""

    devices: Sequence[NodeDevice]
    gpus: Mapping[str, Gpu]
    """Those that are shared by a daemon, or need an environment of their own, by name."""
    gauges: Gauges
    environment: Callable[[LaunchRequest], Mapping[str, str] | None]
    """Returns that of a worker; None: it inherits the agent's. Raises HasgpuError."""


def find_hardware(
    settings: AgentSettings, folders: NodeFolders, environment: Mapping[str, str], now_s: Callable[[], float]
) -> Hardware:
    """Returns what the settings name; blocks while GPUs are probed.

    Args:
        settings: Of the agent.
        folders: Of the node.
        environment: The process's.
        now_s: Monotonic time.

    Raises:
        HasgpuError: A device can't be had; says which and why.
    """
    host = CudaHost(environment=environment, mps_folder=folders.mps, cache=folders.root / "probes.json")
    devices = probe_devices(settings.node, settings.devices, host)
    gpus = {
        d.info.gpu: CudaGpu(d.info, folders.mps(d.info.gpu), environment) for d in devices if d.info.backend == "cuda"
    }

    def of_worker(request: LaunchRequest) -> Mapping[str, str] | None:
        gpu = gpus.get(request.device.gpu)
        return gpu.environment(request) if gpu is not None else None

    uuids = [gpu.info.uuid for gpu in gpus.values()]
    return Hardware(devices, gpus, NvmlGauges(uuids, now_s, Nvml.open), of_worker)
