"""Real GPUs: each with its MPS daemon and what the environment of its workers must say; what NVML measures."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from hasgpu_core.resources import DeviceInfo
from hasgpu_device.backends.cuda.mps import (
    MpsDaemon,
    MpsHealth,
    MpsState,
    replace_cuda_variables,
    timeshare_environment,
)
from hasgpu_device.backends.cuda.nvml import Health, Nvml, Telemetry
from hasgpu_device.errors import MpsError

from hasgpu_node_agent.adapters.side_thread import SideThread
from hasgpu_node_agent.ports import LaunchRequest

log = logging.getLogger(__name__)

SILENCE_S = 5.0
"""NVML answers in milliseconds; one that has not for so long hangs."""
STATIC = "mps+static"
PERCENTAGE = "mps+pct"


class CudaGpu:
    """Implements `hasgpu_node_agent.ports.Gpu`.

    Args:
        info: The device in the mode that it is shared in.
        folder: Private, for its daemon.
        environment: What daemon and workers inherit.
    """

    def __init__(self, info: DeviceInfo, folder: Path, environment: Mapping[str, str]) -> None:
        self.info = info
        self._folder = folder
        self._inherited = environment
        self._daemon = MpsDaemon(info.uuid, folder, environment=environment) if info.mode.startswith("mps") else None
        self._chunks_count = 0
        self._partitions: dict[tuple[int, int], str] = {}
        """IDs of static partitions, by row and width in per cent."""

    def look(self) -> MpsHealth | None:
        """Returns how the daemon is; None: the GPU is shared without one."""
        return self._daemon.health() if self._daemon is not None else None

    def start_daemon(self, timeout_s: float) -> None:
        """Starts the daemon and its server, or adopts the one that an earlier agent left. Raises MpsError."""
        daemon = self._daemon
        if daemon is None:
            return
        static = self.info.mode == STATIC
        if daemon.adopt() and daemon.is_static != static and not daemon.clients():
            log.info("MPS daemon %s of %s is quit: it was started for another mode", daemon.pid, self.info.gpu)
            daemon.quit()
        adopted = daemon.pid is not None
        # With static partitions no server is started ahead: partitions are made before there are clients.
        daemon.start(static=static, server_uid=None if static else os.geteuid(), timeout_s=timeout_s)
        if not adopted:
            self._partitions.clear()
        if static:
            found = daemon.partitions()
            self._chunks_count = found.free_chunks_count + found.used_chunks_count
        log.info("MPS daemon %s of %s %s", daemon.pid, self.info.gpu, "adopted" if adopted else "started")

    def quit_daemon(self, timeout_s: float) -> None:
        """Ends the daemon, if there is one; after its clients."""
        if self._daemon is not None:
            self._daemon.quit(timeout_s=timeout_s)
            self._partitions.clear()

    def let_go(self) -> None:
        """Leaves the daemon running for the next agent."""
        if self._daemon is not None:
            self._daemon.let_go()

    def terminate_client(self, pid: int, timeout_s: float) -> bool:
        """Ends a worker's work on the GPU, so that it may be killed; False: it has none there. Raises MpsError."""
        return self._daemon is not None and self._daemon.terminate_client(pid, timeout_s=timeout_s)

    def prepare(self, row: int, width_pct: int) -> None:
        """Makes what a worker in a row needs ahead: its static partition, by the row's width. Raises MpsError."""
        daemon = self._daemon
        if daemon is None or self.info.mode != STATIC or (row, width_pct) in self._partitions:
            return
        for key, partition in list(self._partitions.items()):
            try:
                daemon.remove_partition(partition)
            except MpsError as error:
                log.debug("partition %s of row %d stays: %s", partition, key[0], error)  # in use
            else:
                del self._partitions[key]
        chunks_count = max(1, width_pct * self._chunks_count // 100)
        self._partitions[row, width_pct] = daemon.add_partition(chunks_count)

    def is_prepared(self, row: int, width_pct: int) -> bool:
        """Whether `prepare` has nothing left to do; does not block."""
        return self.info.mode != STATIC or (row, width_pct) in self._partitions

    def environment(self, request: LaunchRequest) -> Mapping[str, str]:
        """Returns a worker's environment; does not block. Raises InvalidError, MpsError."""
        if self._daemon is None:
            nowhere = self._folder / "none"
            nowhere.mkdir(parents=True, exist_ok=True)
            return replace_cuda_variables(self._inherited, timeshare_environment(self.info.uuid, nowhere))
        width_pct = request.lease.width_pct
        partition = ""
        if self.info.mode == STATIC:
            partition = self._partitions.get((request.row, width_pct), "")
            if not partition or request.profiling:
                raise MpsError("sm_partition add", f"there is no static partition of {width_pct} % for this worker")
        variables = self._daemon.client_environment(
            self.info.mode,
            sm_pct=width_pct if self.info.mode == PERCENTAGE else None,
            pinned_limit_bytes=request.allocation.memory_bytes,
            partition=partition,
        )
        return replace_cuda_variables(self._inherited, variables)


class NvmlGauges:
    """Implements `hasgpu_node_agent.ports.Gauges`: reads NVML in a thread, so that one that hangs holds nobody up.

    Args:
        uuids: Of the GPUs that are read.
        now_s: Monotonic time.
    """

    def __init__(self, uuids: Sequence[str], now_s: Callable[[], float], open_nvml: Callable[[], Nvml]) -> None:
        self._uuids = tuple(uuids)
        self._now_s = now_s
        self._open = open_nvml
        self._nvml: Nvml | None = None
        self._thread = SideThread("nvml")
        self._latest: dict[str, Telemetry] = {}
        self._answered_at_s = now_s()

    def latest(self, uuid: str) -> Telemetry | None:
        """Returns the last reading; None: there is none yet. When NVML hangs its health is UNKNOWN, with the reason."""
        silent_s = self._now_s() - self._answered_at_s
        if silent_s > SILENCE_S:
            return Telemetry(uuid, Health.UNKNOWN, f"NVML has not answered for {silent_s:.0f} s")
        return self._latest.get(uuid)

    async def refresh(self) -> None:
        """Reads all GPUs; returns at once while an earlier reading has not come back."""
        if self._thread.is_busy or not self._uuids:
            return
        self._latest = await self._thread.run(self._read)
        self._answered_at_s = self._now_s()

    def _read(self) -> dict[str, Telemetry]:
        if self._nvml is None:
            self._nvml = self._open()
        return {uuid: self._nvml.telemetry(uuid) for uuid in self._uuids}

    def close(self) -> None:
        """Ends the thread."""
        self._thread.close()


__all__ = ["CudaGpu", "MpsState", "NvmlGauges"]
