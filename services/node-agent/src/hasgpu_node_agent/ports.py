"""What the agent's logic needs of worker processes; `adapters` has the real ones, the tests doubles."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from hasgpu_core.events import BatchObservation, FunctionEvent
from hasgpu_core.function import FunctionSpec
from hasgpu_core.resources import Allocation, DeviceInfo, InstanceState
from hasgpu_device.backends.cuda.mps import MpsHealth
from hasgpu_device.backends.cuda.nvml import Telemetry

from hasgpu_node_agent.row_guard import WorkerKey
from hasgpu_node_agent.row_layout import Lease


@dataclass(frozen=True, slots=True)
class LaunchRequest:
    """All that a worker process is started from."""

    key: WorkerKey
    function: FunctionEvent
    device: DeviceInfo
    row: int
    allocation: Allocation
    lease: Lease
    """The SMs that it begins with."""
    allocation_revision: int
    artifact: Path
    """The folder of the unpacked artifact."""
    profiling: bool = False
    """With a row of its own that no instance shares."""


@dataclass(frozen=True, slots=True)
class WorkerRecord:
    """What the agent notes of a worker in its folder, so that its successor can adopt it."""

    key: WorkerKey
    function: str
    function_revision: int
    load_digest: str
    """Of what it loaded (`plan.load_digest`)."""
    artifact_sha256: str
    execution_timeout_ms: int
    gpu: str
    row: int
    allocation: Allocation
    allocation_revision: int


@dataclass(frozen=True, slots=True)
class WorkerStatus:
    """What the worker says of itself in `status.json`."""

    state: InstanceState
    reason: str
    address: str
    """Empty until it listens."""


@dataclass(frozen=True, slots=True)
class Counters:
    """Of the worker's control block, since the worker began."""

    device_time_ns: int
    debt_ns: int
    batches_count: int
    heartbeat_ns: int = 0
    """Its last sign of life, by the host's monotonic clock; 0: none yet."""


class WorkerProcess(Protocol):
    """A worker process with its control block and folder."""

    @property
    def pid(self) -> int:
        """Of the process."""
        ...

    @property
    def exit_reason(self) -> str | None:
        """None while it runs; else how it ended, in words."""
        ...

    @property
    def has_device_fault(self) -> bool:
        """Whether it ended because the device failed under it (`hasgpu_device.status.EXIT_DEVICE_FAULT`)."""
        ...

    def status(self) -> WorkerStatus | None:
        """Returns what it last said; None: nothing yet."""
        ...

    def write_share(self, allocation: Allocation, lease: Lease) -> int:
        """Writes a share and its SMs into the control block; returns the epoch that the worker will confirm."""
        ...

    def written_lease(self) -> tuple[Lease, int]:
        """Returns the SMs last written and their epoch; for a worker that an earlier agent started."""
        ...

    def note_share(self, allocation: Allocation, revision: int) -> None:
        """Notes the share in force in the worker's record."""
        ...

    def applied_epoch(self) -> int:
        """Returns the newest epoch that the worker has confirmed."""
        ...

    def beat(self) -> None:
        """Touches the control block, so that the worker knows that it is looked after."""
        ...

    def counters(self) -> Counters:
        """Returns the worker's own counters."""
        ...

    def terminate(self) -> None:
        """Asks it to end; one that has ended is ignored."""
        ...

    def kill(self) -> None:
        """Ends it; one that has ended is ignored."""
        ...

    async def wait(self) -> str:
        """Returns how it ended, in words, once it has."""
        ...

    def let_go(self) -> None:
        """Stops looking at it; it runs on."""
        ...

    def remove(self) -> None:
        """Lets go of the control block and deletes the worker's folder; only after its end."""
        ...


@dataclass(frozen=True, slots=True)
class Adopted:
    """A worker that an earlier agent started and that still runs."""

    record: WorkerRecord
    process: WorkerProcess


class Launcher(Protocol):
    """Starts workers and finds those that run already."""

    def launch(self, request: LaunchRequest, on_exit: Callable[[], None]) -> WorkerProcess:
        """Starts a worker; `on_exit` is called in the event loop as soon as it has ended. Raises OSError."""
        ...

    def adopt(self, on_exit: Callable[[], None]) -> Sequence[Adopted]:
        """Returns the workers that run under this node's folder and clears away what is left of others."""
        ...

    def forget(self, instance: str, *, profiling: bool = False) -> None:
        """Deletes what is left of an instance (or a profiling run) that has gone for good."""
        ...


@dataclass(frozen=True, slots=True)
class WorkerReport:
    """What a worker answers about itself."""

    in_flight_count: int
    observations: tuple[BatchObservation, ...]
    """Of the batches since the last report."""


@dataclass(frozen=True, slots=True)
class Measurement:
    """One measured configuration; of three repetitions or more the first does not count."""

    latency_ns: int
    """Median: gate wait and execution."""
    device_time_ns: int
    """Median."""
    longest_segment_ns: int
    repetitions_count: int
    """Made, the first included."""


@dataclass(frozen=True, slots=True)
class OperatorRow:
    """One operator of a model's graph at batch 1; as `hasgpu_predictor.operators.Operator`."""

    op: str
    flops: int
    input_bytes: int
    weight_bytes: int
    output_bytes: int
    groups: int
    output_shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class OperatorTable:
    """A model's operators in order of execution."""

    rows: tuple[OperatorRow, ...] = ()
    reason: str = ""
    """Why there are none."""


class WorkerClient(Protocol):
    """Calls a worker's service. Raises HasgpuError."""

    async def report(self, address: str) -> WorkerReport:
        """Returns counters and new observations."""
        ...

    async def drain(self, address: str, timeout_s: float) -> int:
        """Waits for the batches in flight; returns how many were cut off by the time-out."""
        ...

    async def measure(self, address: str, *, batch: int, repetitions_count: int, budget_s: float) -> Measurement:
        """Runs random inputs back to back under the share in force."""
        ...

    async def list_operators(self, address: str, timeout_s: float) -> OperatorTable:
        """Exports the model's graph."""
        ...

    async def forget(self, address: str) -> None:
        """Closes the channel to a worker that has gone."""
        ...


class Artifacts(Protocol):
    """Unpacked artifacts on this node."""

    def unpacked(self, spec: FunctionSpec) -> Path | None:
        """Returns the folder of an artifact that is here already."""
        ...

    async def fetch(self, spec: FunctionSpec) -> Path:
        """Fetches, verifies and unpacks; raises NotFoundError, IntegrityError, UnavailableError, InvalidError."""
        ...

    def prune(self, keep: Collection[str]) -> Sequence[str]:
        """Takes away, at once, all artifacts but those of the given digests; returns the digests taken away."""
        ...

    async def sweep(self) -> None:
        """Deletes what `prune` took away."""
        ...


class Gpu(Protocol):
    """A GPU and the daemon by which it is shared.

    Methods block, if not said otherwise: they are called in a thread of the GPU's own, one at a time.
    """

    info: DeviceInfo

    def look(self) -> MpsHealth | None:
        """Returns how the daemon is; None: the GPU is shared without one."""
        ...

    def start_daemon(self, timeout_s: float) -> None:
        """Starts the daemon and its server, or adopts the one that runs. Raises MpsError."""
        ...

    def quit_daemon(self, timeout_s: float) -> None:
        """Ends the daemon, if there is one; after its clients."""
        ...

    def let_go(self) -> None:
        """Leaves the daemon running for the next agent; does not block."""
        ...

    def terminate_client(self, pid: int, timeout_s: float) -> bool:
        """Ends a worker's work on the GPU, so that it may be killed; False: it has none there. Raises MpsError."""
        ...

    def prepare(self, row: int, width_pct: int) -> None:
        """Makes what a worker in a row needs ahead. Raises MpsError."""
        ...

    def is_prepared(self, row: int, width_pct: int) -> bool:
        """Whether `prepare` has nothing left to do; does not block."""
        ...


class Gauges(Protocol):
    """What the driver measures of the node's GPUs."""

    def latest(self, uuid: str) -> Telemetry | None:
        """Returns the last reading; None: there is none. One whose health is UNKNOWN: the driver does not answer."""
        ...

    async def refresh(self) -> None:
        """Reads all GPUs anew; returns at once while an earlier reading has not come back."""
        ...


class Sites(Protocol):
    """Whether workers can be started on a device now."""

    def hindrance(self, gpu: str, row: int, width_pct: int) -> Hindrance | None:
        """Returns what stands in the way of a worker there; None: nothing. May begin to clear it away."""
        ...

    def ended(self, gpu: str) -> None:
        """A worker on the device has ended by itself, or gives no sign of life: the device is worth a look."""
        ...

    async def before_kill(self, gpu: str, pid: int) -> None:
        """Ends a worker's work on the device, without which it must not be killed; nothing to do on most devices."""
        ...


@dataclass(frozen=True, slots=True)
class Hindrance:
    """Why no worker can be started on a device now."""

    reason: str
    """In words."""
    is_failure: bool = False
    """The device has failed, and what was to run there with it."""
    lacks_room: bool = False
    """Only the end of another worker can help; otherwise it is a matter of waiting."""
