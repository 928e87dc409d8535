"""Puts changed shares in force: shrinks first, awaits the workers' confirmation, then grows."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import replace
from typing import Protocol

from hasgpu_core.errors import CapacityError
from hasgpu_core.resources import Allocation, DeviceInfo

from hasgpu_node_agent.instance import Instance, PendingShare, Worker
from hasgpu_node_agent.places import RowPlaces
from hasgpu_node_agent.plan import ShareTarget, share_target
from hasgpu_node_agent.row_guard import RowGuard
from hasgpu_node_agent.row_layout import Lease

CONFIRM_TIMEOUT_S = 2.0
"""A worker confirms at its next segment, or within some milliseconds when it idles."""
LIVE_SM_BACKENDS = frozenset({"cpu", "emulated"})
"""Where a running worker's SM share can change; elsewhere the worker is replaced."""
LIVE_SM_MODES = frozenset({"mps+green"})
"""Likewise, of CUDA devices."""


class ShareListener(Protocol):
    """Told of each change, for traces and events."""

    def written(self, instance: Instance, worker: Worker, target: ShareTarget) -> None:
        """A share is in the control block."""
        ...

    def applied(self, instance: Instance, worker: Worker, target: ShareTarget, *, confirmed: bool) -> None:
        """The share is in force; not confirmed: the worker did not answer in time."""
        ...

    def refused(self, instance: Instance, reason: str) -> None:
        """The share does not fit now; it is tried again when something is given back. "" takes a refusal back."""
        ...


class ShareApplier:
    """Brings the shares of all workers to their targets, one step at a time; a step never waits."""

    def __init__(self, guard: RowGuard, listener: ShareListener, now_s: Callable[[], float]) -> None:
        self._guard = guard
        self._listener = listener
        self._now_s = now_s
        self.places = RowPlaces(guard)
        """Where the rows lie."""

    def step(self, instances: Collection[Instance]) -> bool:
        """Makes what can be made now; returns whether a confirmation is awaited, so that it is worth another look."""
        held = [(instance, worker) for instance in instances for worker in instance.workers()]
        running = workers_that_run(instances)
        for worker in running:
            worker.settle_lease()
        for instance, worker in held:
            self._settle(instance, worker)
        wanting = [(i, w, t) for i, w in held if (t := _wanted(i, w)) is not None]
        growing = []
        for instance, worker, target in wanting:
            lowered = _lowered(worker.share.allocation, target.allocation)
            if lowered == target.allocation:
                self._write(instance, worker, target)
            elif lowered != worker.share.allocation and _differs_in_share(lowered, worker.share.allocation):
                self._write(instance, worker, ShareTarget(lowered, worker.share.revision))
            else:
                growing.append((instance, worker, target))
        self._grow(growing, held, running)
        moving = self.places.step(running)
        return moving or any(worker.pending is not None for _, worker in held)

    def _settle(self, instance: Instance, worker: Worker) -> None:
        pending = worker.pending
        if pending is None:
            reserved = self._guard.get(worker.key)
            if reserved is not None and reserved.allocation != worker.share.allocation:
                # Reserved to grow, and not written yet: it is reserved again if it is still wanted.
                self._guard.resize(worker.key, worker.share.allocation)
            return
        confirmed = worker.process.applied_epoch() >= pending.epoch
        if not confirmed and self._now_s() < pending.deadline_s:
            return
        self._guard.resize(worker.key, pending.target.allocation)
        worker.share = pending.target
        worker.pending = None
        worker.process.note_share(pending.target.allocation, pending.target.revision)
        self._listener.applied(instance, worker, pending.target, confirmed=confirmed)

    def _grow(
        self,
        growing: Sequence[tuple[Instance, Worker, ShareTarget]],
        held: Sequence[tuple[Instance, Worker]],
        running: Sequence[Worker],
    ) -> None:
        """Reserves all growth that there is room for, then writes what nobody stands in the way of."""
        reserved = []
        for instance, worker, target in growing:
            try:
                self._guard.resize(worker.key, target.allocation)
            except CapacityError as error:
                shrinking = any(w.pending is not None and w.device.gpu == worker.device.gpu for _, w in held)
                if not shrinking and instance.share_refusal != str(error):
                    instance.share_refusal = str(error)
                    self._listener.refused(instance, str(error))
            else:
                reserved.append((instance, worker, target))
        for instance, worker, target in reserved:
            width_pct = worker.device.given_sm_pct(target.allocation.sm_pct)
            lease: Lease | None = worker.newest_lease
            if width_pct != worker.newest_lease.width_pct:
                lease = self.places.wider(worker, width_pct, running)
            if lease is not None:
                self._write(instance, worker, target, lease)

    def _write(self, instance: Instance, worker: Worker, target: ShareTarget, lease: Lease | None = None) -> None:
        now_s = self._now_s()
        if instance.share_refusal:
            instance.share_refusal = ""
            self._listener.refused(instance, "")
        if target.allocation == worker.share.allocation:
            worker.share = target
            worker.process.note_share(target.allocation, target.revision)
            self._listener.applied(instance, worker, target, confirmed=True)
            return
        if lease is None:
            newest = worker.newest_lease
            width_pct = worker.device.given_sm_pct(target.allocation.sm_pct)
            lease = replace(newest, width_pct=min(width_pct, newest.width_pct))
        epoch = self.places.write(worker, target.allocation, lease)
        worker.pending = PendingShare(target, epoch, now_s, now_s + CONFIRM_TIMEOUT_S)
        self._listener.written(instance, worker, target)


def workers_that_run(instances: Iterable[Instance]) -> list[Worker]:
    """Returns all workers that may still run something, those that leave included."""
    return [w for i in instances for w in (*i.workers(), *i.leaving) if w.process.exit_reason is None]


def _wanted(instance: Instance, worker: Worker) -> ShareTarget | None:
    """The share to bring a worker to; None: it has it, awaits it, or can't take it alive."""
    if worker.pending is not None or instance.planned is None or worker.process.exit_reason is not None:
        return None
    target = share_target(instance.planned, instance.vertical)
    if target.revision <= worker.share.revision:
        return None
    if not takes_alive(worker, target.allocation):
        return None
    return target


def changes_sms_live(device: DeviceInfo) -> bool:
    """Whether the SM share of a device's running workers can change."""
    return device.mode in LIVE_SM_MODES if device.mode else device.backend in LIVE_SM_BACKENDS


def takes_alive(worker: Worker, allocation: Allocation) -> bool:
    """Whether a running worker can be brought to a share without being replaced."""
    device = worker.device
    if changes_sms_live(device):
        return True
    return device.given_sm_pct(allocation.sm_pct) == device.given_sm_pct(worker.share.allocation.sm_pct)


def _differs_in_share(a: Allocation, b: Allocation) -> bool:
    return (a.sm_pct, a.request_permille) != (b.sm_pct, b.request_permille)


def _lowered(present: Allocation, target: Allocation) -> Allocation:
    """The target where it lowers, the present share where the target raises; equal to the target: it only lowers."""
    sm_pct = min(present.sm_pct, target.sm_pct)
    request_permille = min(present.request_permille, target.request_permille)
    only_lowers = sm_pct == target.sm_pct and request_permille == target.request_permille
    return Allocation(
        sm_pct=sm_pct,
        request_permille=request_permille,
        limit_permille=target.limit_permille if only_lowers else max(request_permille, present.limit_permille),
        memory_bytes=present.memory_bytes,
    )
