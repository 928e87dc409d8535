"""Starts worker processes with their folders and control blocks, and finds those that an earlier agent left running."""

from __future__ import annotations

import contextlib
import logging
import re
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from hasgpu_core.errors import HasgpuError
from hasgpu_core.resources import Allocation, InstanceState
from hasgpu_device import ledger, status
from hasgpu_device.control import ControlBlock, Shares
from hasgpu_device.gate import RowGate
from hasgpu_device.worker_config import WorkerConfig

from hasgpu_node_agent.adapters.folders import NodeFolders, WorkerFolder
from hasgpu_node_agent.adapters.process import Process, running_workers, wait_until_ended, worker_argv
from hasgpu_node_agent.plan import load_digest
from hasgpu_node_agent.ports import Adopted, Counters, LaunchRequest, WorkerRecord, WorkerStatus
from hasgpu_node_agent.row_layout import Lease, has_places

log = logging.getLogger(__name__)

KILL_TIMEOUT_S = 5.0
"""How long an agent that begins waits for the workers that it can't adopt; SIGKILL takes some milliseconds."""
FAULT = re.compile(r"(CUDA|MPS|SM)_[A-Z0-9_]+[ :]")
"""How the status of a worker that met a fault of its device begins."""


class ProcessLauncher:
    """Implements `hasgpu_node_agent.ports.Launcher`.

    Args:
        folders: Of the node.
        cores: Cores of each CPU device, by its name.
        profiles: Profile file of each emulated device, by its name.
        environment: Returns that of a worker; None: it inherits the agent's. Raises HasgpuError.
        listen_host: Where workers listen.
        advertise_host: What gateways dial.
    """

    def __init__(
        self,
        folders: NodeFolders,
        cores: Mapping[str, float],
        *,
        profiles: Mapping[str, str] | None = None,
        environment: Callable[[LaunchRequest], Mapping[str, str] | None] = lambda request: None,
        listen_host: str,
        advertise_host: str,
    ) -> None:
        self._folders = folders
        self._cores = cores
        self._profiles = profiles or {}
        self._environment = environment
        self._listen_host = listen_host
        self._advertise_host = advertise_host

    def launch(self, request: LaunchRequest, on_exit: Callable[[], None]) -> RealWorker:
        """Makes folder, control block and gate, and starts the process.

        Raises:
            OSError: the process can't be started, or a file can't be written.
        """
        folder = self._folders.worker(request.key, profiling=request.profiling)
        folder.remove()
        folder.path.mkdir(parents=True)
        gate = folder.gate if request.profiling else self._folders.gate(request.device.gpu, request.row)
        with contextlib.ExitStack() as opened:
            try:
                environment = self._environment(request)
                if has_places(request.device):
                    ledger.create(self._folders.ledger(request.device.gpu))
                row_gate = opened.enter_context(RowGate.create(gate))
                shares = _shares(request.allocation, request.lease)
                control = opened.enter_context(ControlBlock.create(folder.control, shares))
            except HasgpuError as error:
                raise OSError(str(error)) from error
            self._config(request, folder, gate).save(folder.config)
            record = _record(request)
            folder.write_record(record)
            with folder.open_log() as output:
                process = Process.start(worker_argv(folder.config), output, on_exit, environment)
            # The worker has them now; until here a failure closes them, as a full disk may make many tries fail.
            opened.pop_all()
        return RealWorker(process, control, row_gate, folder, record)

    def adopt(self, on_exit: Callable[[], None]) -> Sequence[Adopted]:
        """Returns the workers that run under this node's folder; kills those that can't be adopted, clears up.

        A worker is known by its command line, which names its configuration: a pid that another process has got since
        is not taken for it.
        """
        adopted: list[Adopted] = []
        killed: list[int] = []
        for pid, config in running_workers(self._folders.root):
            folder = self._folders.at(config.parent)
            process = Process.adopt(pid, on_exit)
            record = folder.read_record()
            try:
                if record is None or folder.path.is_relative_to(self._folders.profiles):
                    raise FileNotFoundError(f"{folder.record} can't be used")
                control = ControlBlock.open(folder.control)
                gate = RowGate.open(self._folders.gate(record.gpu, record.row))
                worker = RealWorker(process, control, gate, folder, record)
            except (HasgpuError, OSError) as error:
                log.warning("worker %d is ended: %s", pid, error)
                process.send(signal.SIGKILL)
                killed.append(pid)
                continue
            adopted.append(Adopted(record, worker))
        live = {self._folders.worker(found.record.key).path for found in adopted}
        for path in self._folders.stale(live):
            log.info("clearing %s away", path)
            self._folders.at(path).remove()
        self._folders.drop_empty()
        if not adopted and wait_until_ended(killed, KILL_TIMEOUT_S):
            self._folders.clear_pages()
        return adopted

    def forget(self, instance: str, *, profiling: bool = False) -> None:
        """Deletes what is left of an instance (or a profiling run) that has gone for good."""
        self._folders.forget(instance, profiling=profiling)

    def tidy(self) -> None:
        """Deletes the shared pages when no worker of this node runs any more."""
        if not any(True for _ in running_workers(self._folders.root)):
            self._folders.drop_pages()

    def _config(self, request: LaunchRequest, folder: WorkerFolder, gate: Path) -> WorkerConfig:
        spec = request.function.spec
        return WorkerConfig(
            instance=request.key.instance,
            function=spec.name,
            function_revision=request.function.revision,
            format=spec.format,
            entry=spec.entry,
            artifact_dir=str(request.artifact),
            inputs=spec.inputs,
            outputs=spec.outputs,
            max_batch=spec.max_batch,
            control_path=str(folder.control),
            gate_path=str(gate),
            status_path=str(folder.status),
            device_model=request.device.model,
            gpu=request.device.gpu,
            device_cores=self._cores[request.device.gpu],
            backend=request.device.backend,
            mode=request.device.mode,
            gpu_uuid=request.device.uuid,
            sm_rungs_pct=request.device.sm_rungs_pct,
            ledger_path=str(self._folders.ledger(request.device.gpu)) if has_places(request.device) else "",
            profile_path=self._profiles.get(request.device.gpu, ""),
            parameters=spec.parameters,
            execution_timeout_ms=spec.execution_timeout_ms,
            memory_bytes=request.allocation.memory_bytes,
            listen_host=self._listen_host,
            advertise_host=self._advertise_host,
        )


class RealWorker:
    """Implements `hasgpu_node_agent.ports.WorkerProcess`."""

    def __init__(
        self, process: Process, control: ControlBlock, gate: RowGate, folder: WorkerFolder, record: WorkerRecord
    ) -> None:
        self._process = process
        self._control = control
        self._gate = gate
        self._folder = folder
        self._record = record
        self._last: Counters | None = None

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    @property
    def exit_reason(self) -> str | None:
        """None while it runs; else how it ended, in words."""
        return self._process.exit_reason

    def status(self) -> WorkerStatus | None:
        """Returns what it last said; None: nothing yet."""
        said = status.WorkerStatus.load(self._folder.status)
        return WorkerStatus(said.state, said.reason, said.address) if said is not None else None

    @property
    def has_device_fault(self) -> bool:
        """Whether it ended because the device failed under it; of one that an earlier agent started, by its status."""
        if self._process.exit_code is not None or self._process.exit_reason is None:
            return self._process.exit_code == status.EXIT_DEVICE_FAULT
        said = self.status()
        return said is not None and said.state is InstanceState.FAILED and FAULT.match(said.reason) is not None

    def write_share(self, allocation: Allocation, lease: Lease) -> int:
        """Writes a share and its SMs into the control block; a worker that waits at the gate is woken for it.

        Returns:
            The epoch that it will confirm.
        """
        epoch = self._control.write_shares(_shares(allocation, lease))
        self._gate.poke(self.pid)
        return epoch

    def written_lease(self) -> tuple[Lease, int]:
        """Returns the SMs last written and their epoch; raises HasgpuError when the block is damaged."""
        shares = self._control.read_shares()
        return Lease(shares.first_pct, shares.sm_pct, shares.exclusive), shares.epoch

    def note_share(self, allocation: Allocation, revision: int) -> None:
        """Notes the share in force in the worker's record."""
        self._record = replace(self._record, allocation=allocation, allocation_revision=revision)
        try:
            self._folder.write_record(self._record)
        except OSError as error:
            # A successor would begin with an older share, and be brought to the newest by the plan.
            log.warning("%s can't be written: %s", self._folder.record, error)

    def applied_epoch(self) -> int:
        """Returns the newest epoch that the worker has confirmed."""
        return self._control.read_counters().applied_epoch

    def beat(self) -> None:
        """Touches the control block."""
        self._control.beat_agent()

    def counters(self) -> Counters:
        """Returns the worker's counters; of one that was removed, the last."""
        if self._last is not None:
            return self._last
        read = self._control.read_counters()
        return Counters(
            device_time_ns=read.used_ns,
            debt_ns=read.debt_ns,
            batches_count=read.batches_count,
            heartbeat_ns=read.heartbeat_monotonic_ns,
        )

    def terminate(self) -> None:
        """Asks it to end."""
        self._process.send(signal.SIGTERM)

    def kill(self) -> None:
        """Ends it."""
        self._process.send(signal.SIGKILL)

    async def wait(self) -> str:
        """Returns how it ended, in words, once it has."""
        return await self._process.wait()

    def let_go(self) -> None:
        """Stops looking at it; it runs on."""
        self._process.let_go()

    def remove(self) -> None:
        """Lets go of the control block and deletes the worker's folder."""
        if self._last is None:
            with contextlib.suppress(HasgpuError):
                self._last = self.counters()
            self._last = self._last or Counters(0, 0, 0)
            self._control.close()
            self._gate.close()
        self._folder.remove()


def _shares(allocation: Allocation, lease: Lease) -> Shares:
    return Shares(
        request_permille=allocation.request_permille,
        limit_permille=allocation.limit_permille,
        sm_pct=lease.width_pct,
        first_pct=lease.first_pct,
        exclusive=lease.exclusive,
    )


def _record(request: LaunchRequest) -> WorkerRecord:
    return WorkerRecord(
        key=request.key,
        function=request.function.spec.name,
        function_revision=request.function.revision,
        load_digest=load_digest(request.function.spec),
        artifact_sha256=request.function.spec.artifact.sha256,
        execution_timeout_ms=request.function.spec.execution_timeout_ms,
        gpu=request.device.gpu,
        row=request.row,
        allocation=request.allocation,
        allocation_revision=request.allocation_revision,
    )
