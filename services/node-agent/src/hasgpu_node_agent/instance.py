"""An instance of the plan and the workers that it has, as the agent sees them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from hasgpu_core.events import BatchObservation, InstanceEvent, PlannedInstance, VerticalScaleEvent
from hasgpu_core.resources import Allocation, DeviceInfo, InstanceState
from hasgpu_runtime.logs import about

from hasgpu_node_agent.backoff import Backoff
from hasgpu_node_agent.plan import ShareTarget
from hasgpu_node_agent.ports import WorkerProcess
from hasgpu_node_agent.pulse import Pulse
from hasgpu_node_agent.row_guard import WorkerKey
from hasgpu_node_agent.row_layout import Lease


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
    lease: Lease
    """The SMs that it has confirmed to be bound by."""
    started_at_s: float
    state: InstanceState = InstanceState.LOADING
    address: str = ""
    pending: PendingShare | None = None
    moves: list[tuple[int, Lease]] = field(default_factory=list)
    """Epochs and SMs written since and not confirmed."""
    note: str = ""
    """What was odd when it became ready, in its own words."""
    pulse: Pulse = field(default_factory=Pulse)
    killed_because: str = ""
    """Why the agent killed it; empty: it did not."""
    reported_batches_count: int = 0
    """Batches at the last telemetry report."""

    @property
    def newest_lease(self) -> Lease:
        """As last written."""
        return self.moves[-1][1] if self.moves else self.lease

    @property
    def written(self) -> Allocation:
        """The share last written."""
        return self.pending.target.allocation if self.pending is not None else self.share.allocation

    def possible_leases(self) -> tuple[Lease, ...]:
        """Returns all that it may be bound by now, the newest last; to be asked after `settle_lease`."""
        if self.process.applied_epoch() == 0:
            # It has run nothing yet, and reads the newest share before it does.
            return (self.newest_lease,)
        return (self.lease, *(lease for _, lease in self.moves))

    def settle_lease(self) -> None:
        """Takes note of what the worker has confirmed."""
        applied_epoch = self.process.applied_epoch() if self.moves else 0
        while self.moves and self.moves[0][0] <= applied_epoch:
            self.lease = self.moves.pop(0)[1]

    @property
    def told(self) -> str:
        """What the device gives in place of what was asked for, in words; empty: it gives just that."""
        asked_pct = self.share.allocation.sm_pct
        given_pct = self.device.given_sm_pct(asked_pct)
        return "" if given_pct == asked_pct else f"asked for {asked_pct} % of the SMs, the device gives {given_pct} %"


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
    fault: str = ""
    """Name of the fault of its device by which the last worker ended; empty: none, or it was dealt with."""
    is_held: bool = False
    """Not started again before that was."""
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
    def about(self) -> dict[str, dict[str, str]]:
        """What a log record about it has beside its message."""
        return about(function=self.function, instance=self.instance)

    @property
    def shown(self) -> Worker | None:
        """The worker that others should know of."""
        return self.current or self.successor or (self.leaving[-1] if self.leaving else None)

    @property
    def reason(self) -> str:
        """What stands in the way, in words; empty: nothing."""
        worker = self.current
        of_worker = (worker.note, worker.told) if worker is not None else ()
        return "; ".join(dict.fromkeys(r for r in (self.failure, self.refusal, self.share_refusal, *of_worker) if r))

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
