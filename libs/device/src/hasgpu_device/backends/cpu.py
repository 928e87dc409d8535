"""The CPU device: a share of the host's cores stands for a share of the SMs, thread CPU time for device time.

`sm_pct` of a device with C cores is `C * sm_pct / 100` cores: `ceil` of it torch threads and the rest by pacing. A
segment that took d of the executor thread's CPU time holds the device for `d * threads / cores`. The executor thread
takes part in all its parallel regions, so its CPU time stands for that of each thread. Threads that a handler starts
itself are not counted.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from pathlib import Path

from hasgpu_core.resources import DeviceInfo

from hasgpu_device import futex, models, native
from hasgpu_device.worker_config import WorkerConfig

NICE = 5
"""Workers give way to the services in front of them, so that those answer in time on a small machine."""
LOADER_NICE = 10
"""Loading gives way to serving: a new instance must not make those late that it is to help."""
RUNGS_PCT = (25, 50, 75, 100)
MAX_THREADS = 256


class CpuBackend:
    """A share of the host's cores.

    Args:
        device_cores: Cores of the whole device.
        nice: Added by `setup` to the niceness of the executor thread and those it starts. (On Linux it belongs to a
            thread, so the thread that talks to the gateways is not slowed down.)
        loader_nice: The same for the thread that loads the model.
    """

    name = "cpu"

    def __init__(self, device_cores: float, *, nice: int = NICE, loader_nice: int = LOADER_NICE) -> None:
        self.device_cores = device_cores
        self.threads_count = 1
        self._nice = nice
        self._loader_nice = loader_nice
        self._stretch = 1.0
        self._start_ns = 0
        self._slept_too_long_ns = 0
        self._is_set_up = False
        self._sm_pct = 100

    def setup_loader(self) -> None:
        """Makes the calling thread give way, and imports torch in it."""
        if self._loader_nice:
            os.nice(self._loader_nice)
        import torch  # noqa: F401  the slow part of a worker's start

    def load(self, config: WorkerConfig, boundary: Callable[[], None]) -> models.Model:
        """Loads the model into this process; raises LoadError."""
        return models.load(config, boundary)

    def setup(self) -> None:
        """Sets niceness and inter-op threads, then the threads of the share given so far."""
        import torch

        if self._nice:
            os.nice(self._nice)
        if torch.get_num_interop_threads() != 1:
            torch.set_num_interop_threads(1)
        self._is_set_up = True
        self.apply_sm(self._sm_pct)

    def apply_sm(self, sm_pct: int, first_pct: int = 0) -> None:
        """Sets torch's threads and the pacing; which cores they run on is the host's business."""
        del first_pct
        self._sm_pct = sm_pct
        cores = self.device_cores * sm_pct / 100
        self.threads_count = min(MAX_THREADS, max(1, math.ceil(cores - 1e-9)))
        self._stretch = self.threads_count / cores
        if self._is_set_up:
            import torch

            # Holds for the calling thread only where torch is built on OpenMP: hence "called in the executor thread".
            torch.set_num_threads(self.threads_count)

    def start_segment(self) -> None:
        """Starts timing."""
        self._start_ns = time.thread_time_ns()

    def running_ns(self) -> int:
        """Returns the CPU time since the segment began, stretched by pacing."""
        return round((time.thread_time_ns() - self._start_ns) * self._stretch)

    def stop_segment(self) -> int:
        """Sleeps out the pacing, still holding the device, and returns the stretched CPU time."""
        spent_ns = time.thread_time_ns() - self._start_ns
        device_ns = round(spent_ns * self._stretch)
        # A sleep wakes late; what was slept too much is taken off the next one.
        pause_ns = device_ns - spent_ns - self._slept_too_long_ns
        if pause_ns > 0:
            began_ns = time.monotonic_ns()
            time.sleep(pause_ns / 1e9)
            pause_ns -= time.monotonic_ns() - began_ns
        self._slept_too_long_ns = max(0, min(-pause_ns, 5_000_000))
        return device_ns


def usable_cores() -> int:
    """Returns how many cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_bytes(meminfo: Path = Path("/proc/meminfo"), cgroup: Path = Path("/sys/fs/cgroup/memory.max")) -> int:
    """Returns the host's memory, or the control group's bound on it; 0 when neither can be read."""
    total = 0
    try:
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemTotal:"):
                total = int(line.split()[1]) * 1024
        bound = cgroup.read_text().strip()
    except OSError:
        return total
    return min(total, int(bound)) if bound.isdigit() and total else total


def probe(node: str, gpu: str = "cpu0", *, cores: float | None = None) -> DeviceInfo:
    """Describes the CPU device and finds out what it can enforce.

    Args:
        node: Name of the node.
        gpu: Name of the device within the node.
        cores: Cores that the device shall have; None: all that this process may use.
    """
    cores = float(usable_cores()) if cores is None else cores
    capabilities = [f"sm: {cores:g} cores by threads and pacing", "live sm change: yes, at the next segment"]
    if _thread_time_moves():
        capabilities.append("time: token gate on thread CPU time")
        capabilities.append("live quota change: yes, at the next segment")
    capabilities.append(f"gate: {'python' if native.load() is None else 'native'}")
    capabilities.append("gate wait: futex" if futex.AVAILABLE else "gate wait: poll")
    capabilities.append("memory: not enforced")
    return DeviceInfo(node, gpu, f"cpu-{cores:g}c", "cpu", memory_bytes(), RUNGS_PCT, tuple(capabilities))


def _thread_time_moves() -> bool:
    """A quota can be enforced only where thread CPU time is measured finely: proves a step of at most 1 ms."""
    began_ns = time.thread_time_ns()
    give_up_ns = time.monotonic_ns() + 200_000_000
    while (step_ns := time.thread_time_ns() - began_ns) == 0:
        if time.monotonic_ns() > give_up_ns:
            return False
    return step_ns <= 1_000_000
