"""Where the rows of the node's devices lie: gives new workers their SMs and moves those that run.

A step writes what may be written now and never waits; `row_layout` has the rules.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence

from hasgpu_core.resources import Allocation, DeviceInfo

from hasgpu_node_agent.instance import Worker
from hasgpu_node_agent.row_guard import RowGuard, WorkerKey
from hasgpu_node_agent.row_layout import WHOLE, Holder, Lease, is_free, lay_out, next_leases, unit_pct

log = logging.getLogger(__name__)

TIMESHARE = "timeshare"
"""In this mode each instance has the whole device while it runs: partitions always overlap."""


class RowPlaces:
    """The layout of each device."""

    def __init__(self, guard: RowGuard) -> None:
        self._guard = guard
        self._firsts: dict[str, dict[int, int]] = {}
        self._laid_out: dict[str, int] = {}
        """Version of the guard's rows that the layout is of, by device."""
        self._quiet: dict[str, int] = {}
        """Version at which all workers of a device were where they should be."""
        self._awaited: dict[str, dict[int, int]] = {}
        """Rows that a worker is to be started in as soon as they have a place, with their widths."""

    # For new workers

    def begin_pass(self) -> None:
        """Forgets who waits for a place: who still does asks again in this pass."""
        for gpu in self._awaited:
            self._laid_out.pop(gpu, None)
        self._awaited.clear()

    @property
    def awaited(self) -> bool:
        """Whether a worker waits for a place."""
        return bool(self._awaited)

    def find(self, key: WorkerKey, workers: Sequence[Worker]) -> Lease | None:
        """Returns the SMs that a worker with a reservation may begin with; None: not yet, others have to move first.

        In that case the row is given a place in the next steps; the reservation may be given back meanwhile.

        Args:
            key: Of the new worker.
            workers: All others that may run something.
        """
        reserved = self._guard.get(key)
        assert reserved is not None, "a worker is given SMs after its share was reserved"
        self._lay_out(reserved.gpu)
        first_pct = self._firsts[reserved.gpu][reserved.row]
        device = self._guard.device(reserved.gpu)
        lease = Lease(first_pct, reserved.width_pct, device.mode == TIMESHARE)
        self._quiet.pop(reserved.gpu, None)
        if is_free(reserved.row, lease, self._holders(device, _on(device, workers))):
            return lease
        self._awaited.setdefault(reserved.gpu, {})[reserved.row] = reserved.width_pct
        return None

    # For those that run

    def wider(self, worker: Worker, width_pct: int, workers: Sequence[Worker]) -> Lease | None:
        """Returns the SMs with which a worker may grow to a width that is reserved; None: others have to move first."""
        gpu = worker.device.gpu
        self._lay_out(gpu)
        device = self._guard.device(gpu)
        lease = Lease(self._firsts[gpu][worker.row], width_pct, worker.newest_lease.exclusive)
        return lease if is_free(worker.row, lease, self._holders(device, _on(device, workers))) else None

    def write(self, worker: Worker, allocation: Allocation, lease: Lease) -> int:
        """Writes a share and its SMs into a worker's control block; returns the epoch that it will confirm."""
        epoch = worker.process.write_share(allocation, lease)
        if lease != worker.newest_lease:
            worker.moves.append((epoch, lease))
            self._quiet.pop(worker.device.gpu, None)
        return epoch

    def step(self, workers: Sequence[Worker]) -> bool:
        """Writes what may be written now; returns whether a confirmation is awaited."""
        by_gpu: defaultdict[str, list[Worker]] = defaultdict(list)
        for worker in workers:
            by_gpu[worker.device.gpu].append(worker)
        awaited = False
        for gpu, held in by_gpu.items():
            for worker in held:
                worker.settle_lease()
            if self._quiet.get(gpu) == self._guard.version(gpu) and gpu not in self._awaited:
                continue
            awaited |= self._move(self._guard.device(gpu), held)
        return awaited

    def _move(self, device: DeviceInfo, workers: Sequence[Worker]) -> bool:
        gpu = device.gpu
        self._lay_out(gpu)
        by_key = {worker.key: worker for worker in workers}
        holders = self._holders(device, workers)
        leases = next_leases(holders, always_exclusive=device.mode == TIMESHARE)
        for key, lease in leases.items():
            log.debug("%s: SMs %s", key.instance, lease)
            self.write(by_key[key], by_key[key].written, lease)
        if leases or not all(holder.is_settled for holder in holders):
            return True
        if all(holder.newest.exclusive == (device.mode == TIMESHARE) for holder in holders):
            self._quiet[gpu] = self._guard.version(gpu)
        return False

    def _lay_out(self, gpu: str) -> None:
        version = self._guard.version(gpu)
        if self._laid_out.get(gpu) == version and gpu not in self._awaited:
            return
        widths = {row.index: row.sm_pct for row in self._guard.rows(gpu)}
        wanted = dict(widths)
        for row, width_pct in self._awaited.get(gpu, {}).items():
            wanted[row] = max(wanted.get(row, 0), width_pct)
        present = self._firsts.get(gpu, {})
        unit = unit_pct(self._guard.device(gpu))
        found = lay_out(present, wanted, unit)
        if found is None:
            # Somebody else has taken the room meanwhile.
            self._awaited.pop(gpu, None)
            found = lay_out(present, widths, unit)
        self._firsts[gpu] = found if found is not None else dict.fromkeys(widths, 0)
        self._laid_out[gpu] = version

    def _holders(self, device: DeviceInfo, workers: Sequence[Worker]) -> list[Holder[WorkerKey]]:
        firsts: Mapping[int, int] = self._firsts.get(device.gpu, {})
        holders = []
        for worker in workers:
            goal = worker.newest_lease.range_pct
            if self._guard.get(worker.key) is not None:
                goal = firsts.get(worker.row, goal[0]), device.given_sm_pct(worker.written.sm_pct)
            holders.append(Holder(worker.key, worker.row, worker.possible_leases(), goal))
        return holders


def alone(device: DeviceInfo, allocation: Allocation) -> Lease:
    """Returns the SMs of a worker beside the rows: a profiling run's."""
    return Lease(0, device.given_sm_pct(allocation.sm_pct), device.mode == TIMESHARE)


def adopt_lease(worker: Worker) -> None:
    """Finds out what an adopted worker is bound by: anything, until it has confirmed what was written last."""
    lease, epoch = worker.process.written_lease()
    worker.lease, worker.moves = (lease, []) if worker.process.applied_epoch() >= epoch else (WHOLE, [(epoch, lease)])


def _on(device: DeviceInfo, workers: Sequence[Worker]) -> list[Worker]:
    return [worker for worker in workers if worker.device.gpu == device.gpu]
