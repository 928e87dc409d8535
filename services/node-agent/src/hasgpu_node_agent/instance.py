"""An instance of the plan and the workers that it has, as the agent sees them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from hasgpu_core.events import BatchObservation, InstanceEvent, PlannedInstance, VerticalScaleEvent
from hasgpu_core.resources import Allocation, DeviceInfo, InstanceState

from hasgpu_node_agent.backoff import Backoff
from hasgpu_node_agent.plan import ShareTarget
from hasgpu_node_agent.ports import WorkerProcess
from hasgpu_node_agent.pulse import Pulse
from hasgpu_node_agent.row_guard import WorkerKey


@dataclass(frozen=True, slots=True)
class PendingShare:
    """A share written into a control block and not confirmed yet."""

    target: ShareTarget
    epoch: int
    written_at_s: float
    deadline_s: float
    """After it the change counts as made: the worker reads the block before its next segment anyway."""


@dataclass(slots=True)
class Worker:
    """One worker process of an instance."""

    key: WorkerKey
    process: WorkerProcess
    function: str
    function_revision: int
    load_digest: str
    artifact_sha256: str
    execution_timeout_ms: int
    device: DeviceInfo
    row: int
    share: ShareTarget
    """In force."""
    started_at_s: float
    state: InstanceState = InstanceState.LOADING
    address: str = ""
    pending: PendingShare | None = None
    note: str = ""
    """What was odd when it became ready, in its own words."""
    pulse: Pulse = field(default_factory=Pulse)
    killed_because: str = ""
    """Why the agent killed it; empty: it did not."""
    reported_batches_count: int = 0
    """Batches at the last telemetry report."""


@dataclass(slots=True)
class Instance:
    """One instance: what is wanted of it and what is there."""

    instance: str
    function: str
    planned: PlannedInstance | None = None
    """None: the plan does not have it (any more)."""
    vertical: VerticalScaleEvent | None = None
    vertical_headers: Mapping[str, str] = field(default_factory=dict)
    """Trace context of the vertical change."""
    current: Worker | None = None
    """The one that serves, or will."""
    successor: Worker | None = None
    """Takes over once it is ready."""
    leaving: list[Worker] = field(default_factory=list)
    """Drained and stopped in the background."""
    last_share: ShareTarget | None = None
    """In force with the last worker that went; the next begins with it unless something newer came."""
    backoff: Backoff = field(default_factory=Backoff)
    generation: int = 0
    failure: str = ""
    """Why the last worker ended; empty once the next is ready."""
    refusal: str = ""
    """Why no worker can be started now."""
    share_refusal: str = ""
    """Why the share can't be changed as asked now."""
    restarts_count: int = 0
    fetching: bool = False
    observations: tuple[BatchObservation, ...] = ()
    """Not yet published."""

    def workers(self) -> Iterator[Worker]:
        """Yields the workers that are meant to stay."""
        if self.current is not None:
            yield self.current
        if self.successor is not None:
            yield self.successor

    @property
    def shown(self) -> Worker | None:
        """The worker that others should know of."""
        return self.current or self.successor or (self.leaving[-1] if self.leaving else None)

    @property
    def reason(self) -> str:
        """What stands in the way, in words; empty: nothing."""
        note = self.current.note if self.current is not None else ""
        return "; ".join(dict.fromkeys(r for r in (self.failure, self.refusal, self.share_refusal, note) if r))

    def event(self, *, node: str, device_model: str, plan_revision: int, unix_ns: int) -> InstanceEvent:
        """Returns what the instance's subject should say. `device_model` is used while there is no worker."""
        worker = self.shown
        planned = self.planned
        if worker is None:
            return InstanceEvent(
                function=self.function,
                instance=self.instance,
                node=node,
                gpu=planned.gpu if planned else "",
                row=planned.row if planned else 0,
                state=InstanceState.FAILED if self.failure else InstanceState.PENDING,
                reason=self.reason,
                address="",
                allocation=planned.allocation if planned else Allocation(1, 1, 1, 0),
                allocation_revision=planned.allocation_revision if planned else 0,
                function_revision=0,
                device_model=device_model,
                plan_revision=plan_revision,
                restarts_count=self.restarts_count,
                observed_unix_ns=unix_ns,
            )
        counters = worker.process.counters()
        return InstanceEvent(
            function=self.function,
            instance=self.instance,
            node=node,
            gpu=worker.device.gpu,
            row=worker.row,
            state=worker.state,
            reason=self.reason,
            address=worker.address,
            allocation=worker.share.allocation,
            allocation_revision=worker.share.revision,
            function_revision=worker.function_revision,
            device_model=worker.device.model,
            plan_revision=plan_revision,
            device_time_ns=counters.device_time_ns,
            debt_ns=counters.debt_ns,
            batches_count=counters.batches_count,
            restarts_count=self.restarts_count,
            observed_unix_ns=unix_ns,
            observations=self.observations,
            pid=worker.process.pid,
        )
