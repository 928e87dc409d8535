"""The guard of rows: nothing is launched or resized that would over-fill a row, the SMs or the memory of a device."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from hasgpu_core.errors import CapacityError, NotFoundError
from hasgpu_core.function import MIB
from hasgpu_core.resources import WHOLE_PCT, WHOLE_PERMILLE, Allocation, DeviceInfo, DeviceState, Row


@dataclass(frozen=True, slots=True)
class WorkerKey:
    """One worker process: while an instance is replaced, it has two."""

    instance: str
    generation: int
    """Counts the workers that this node started for the instance, from 1."""


@dataclass(frozen=True, slots=True)
class Reservation:
    """What a worker may use, and where."""

    gpu: str
    row: int
    allocation: Allocation


class RowGuard:
    """Reservations of all workers of a node.

    A row is as wide as the widest of its reservations. The invariants, at all times: the requests of a row add up to at
    most 1000 per mille, the rows of a device to at most 100 % of its SMs, the memory to at most what it has.
    """

    def __init__(self, devices: Sequence[DeviceInfo]) -> None:
        self._devices = {device.gpu: device for device in devices}
        self._reservations: dict[WorkerKey, Reservation] = {}

    @property
    def devices(self) -> tuple[DeviceInfo, ...]:
        """The node's devices, in their order."""
        return tuple(self._devices.values())

    def device(self, gpu: str) -> DeviceInfo:
        """Returns a device by its name; raises NotFoundError."""
        if gpu not in self._devices:
            raise NotFoundError("device", gpu, f"this node has {', '.join(self._devices) or 'none'}")
        return self._devices[gpu]

    def get(self, key: WorkerKey) -> Reservation | None:
        """Returns a worker's reservation, or None."""
        return self._reservations.get(key)

    def reserve(self, key: WorkerKey, gpu: str, row: int, allocation: Allocation) -> None:
        """Reserves, in place of what the worker had before.

        Raises:
            CapacityError: it does not fit; says what is free. The former reservation stays.
            NotFoundError: the node has no such device.
            InvalidError: the allocation can't be.
        """
        allocation.validate()
        self._check(key, gpu, row, allocation)
        self._reservations[key] = Reservation(gpu=gpu, row=row, allocation=allocation)

    def resize(self, key: WorkerKey, allocation: Allocation) -> None:
        """Changes a reservation; raises as `reserve` does, and NotFoundError when the worker has none."""
        present = self._reservations.get(key)
        if present is None:
            raise NotFoundError("reservation", f"{key.instance}/{key.generation}")
        self.reserve(key, present.gpu, present.row, allocation)

    def release(self, key: WorkerKey) -> None:
        """Gives a reservation back; a worker without one is ignored."""
        self._reservations.pop(key, None)

    def rows(self, gpu: str) -> tuple[Row, ...]:
        """Returns the rows in use, by index."""
        return _rows(r for r in self._reservations.values() if r.gpu == gpu)

    def state(self, gpu: str) -> DeviceState:
        """Returns a device and what is taken of it; raises NotFoundError."""
        used = sum(r.allocation.memory_bytes for r in self._reservations.values() if r.gpu == gpu)
        return DeviceState(info=self.device(gpu), rows=self.rows(gpu), memory_used_bytes=used)

    def gpu_share(self, gpu: str) -> float:
        """Returns the part of the device that is reserved: the sum of SM share times request, 0..1."""
        return sum(r.allocation.gpu_share for r in self._reservations.values() if r.gpu == gpu)

    def _check(self, key: WorkerKey, gpu: str, row: int, allocation: Allocation) -> None:
        info = self.device(gpu)
        others = [r for other, r in self._reservations.items() if other != key and r.gpu == gpu]
        rows = {r.index: r for r in _rows(others)}
        present = rows.get(row, Row(index=row, sm_pct=0, used_permille=0))
        if present.used_permille + allocation.request_permille > WHOLE_PERMILLE:
            raise CapacityError(
                f"row {row} of {gpu} has {present.free_permille} ‰ free, {allocation.request_permille} ‰ were asked for"
            )
        elsewhere_pct = sum(r.sm_pct for r in rows.values() if r.index != row)
        if elsewhere_pct + max(present.sm_pct, allocation.sm_pct) > WHOLE_PCT:
            raise CapacityError(
                f"{gpu} has {WHOLE_PCT - elsewhere_pct} % of its SMs free for row {row}, "
                f"{allocation.sm_pct} % were asked for"
            )
        free_bytes = info.memory_bytes - sum(r.allocation.memory_bytes for r in others)
        if allocation.memory_bytes > free_bytes:
            raise CapacityError(
                f"{gpu} has {free_bytes // MIB} MiB of memory free, {allocation.memory_bytes // MIB} MiB were asked for"
            )


def _rows(reservations: Iterable[Reservation]) -> tuple[Row, ...]:
    widths: dict[int, int] = {}
    used: dict[int, int] = {}
    for r in reservations:
        widths[r.row] = max(widths.get(r.row, 0), r.allocation.sm_pct)
        used[r.row] = used.get(r.row, 0) + r.allocation.request_permille
    return tuple(Row(index=i, sm_pct=widths[i], used_permille=used[i]) for i in sorted(widths))
