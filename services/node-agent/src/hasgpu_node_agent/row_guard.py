"""The guard of rows: nothing is launched or resized that would over-fill a row, the SMs or the memory of a device."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from hasgpu_core.errors import CapacityError, NotFoundError
from hasgpu_core.function import MIB
from hasgpu_core.resources import (
    WHOLE_PCT,
    WHOLE_PERMILLE,
    Allocation,
    DeviceHealth,
    DeviceInfo,
    DeviceState,
    Row,
)

from hasgpu_node_agent.row_layout import fits, unit_pct


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
    """As asked for."""
    width_pct: int
    """Share of the SMs that the device gives for it."""

    @property
    def gpu_share(self) -> float:
        """The part of the device that it takes: the SM share given times requested time, 0..1."""
        return self.width_pct / WHOLE_PCT * self.allocation.request_permille / WHOLE_PERMILLE


class RowGuard:
    """Reservations of all workers of a node, and what their devices are.

    A row is as wide as the widest of its reservations, each of which counts with the SM share that the device gives for
    it. The invariants, at all times: the requests of a row add up to at most 1000 per mille, the rows of a device fit
    beside each other, the memory adds up to at most what it has.
    """

    def __init__(self, devices: Sequence[DeviceInfo]) -> None:
        self._devices = {device.gpu: device for device in devices}
        self._reservations: dict[WorkerKey, Reservation] = {}
        self._versions = dict.fromkeys(self._devices, 0)

    @property
    def devices(self) -> tuple[DeviceInfo, ...]:
        """The node's devices, in their order."""
        return tuple(self._devices.values())

    def device(self, gpu: str) -> DeviceInfo:
        """Returns a device by its name; raises NotFoundError."""
        if gpu not in self._devices:
            raise NotFoundError("device", gpu, f"this node has {', '.join(self._devices) or 'none'}")
        return self._devices[gpu]

    def set_health(self, gpu: str, health: DeviceHealth, reason: str) -> bool:
        """Notes how a device is; returns whether that is news. Raises NotFoundError."""
        present = self.device(gpu)
        if (present.health, present.health_reason) == (health, reason):
            return False
        self._devices[gpu] = replace(present, health=health, health_reason=reason)
        return True

    def version(self, gpu: str) -> int:
        """Returns a number that grows whenever the widths of a device's rows may have changed."""
        return self._versions[gpu]

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
        width_pct = self.device(gpu).given_sm_pct(allocation.sm_pct)
        self._check(key, gpu, row, allocation, width_pct)
        present = self._reservations.get(key)
        if present is None or (present.gpu, present.row, present.width_pct) != (gpu, row, width_pct):
            self._changed(present)
            self._versions[gpu] += 1
        self._reservations[key] = Reservation(gpu=gpu, row=row, allocation=allocation, width_pct=width_pct)

    def resize(self, key: WorkerKey, allocation: Allocation) -> None:
        """Changes a reservation; raises as `reserve` does, and NotFoundError when the worker has none."""
        present = self._reservations.get(key)
        if present is None:
            raise NotFoundError("reservation", f"{key.instance}/{key.generation}")
        self.reserve(key, present.gpu, present.row, allocation)

    def release(self, key: WorkerKey) -> None:
        """Gives a reservation back; a worker without one is ignored."""
        self._changed(self._reservations.pop(key, None))

    def _changed(self, former: Reservation | None) -> None:
        if former is not None:
            self._versions[former.gpu] += 1

    def rows(self, gpu: str) -> tuple[Row, ...]:
        """Returns the rows in use, by index."""
        return _rows(r for r in self._reservations.values() if r.gpu == gpu)

    def state(self, gpu: str) -> DeviceState:
        """Returns a device and what is taken of it; raises NotFoundError."""
        used = sum(r.allocation.memory_bytes for r in self._reservations.values() if r.gpu == gpu)
        return DeviceState(info=self.device(gpu), rows=self.rows(gpu), memory_used_bytes=used)

    def gpu_share(self, gpu: str) -> float:
        """Returns the part of the device that is reserved: the sum of SM share times request, 0..1."""
        return sum(r.gpu_share for r in self._reservations.values() if r.gpu == gpu)

    def reservations(self) -> Iterator[tuple[WorkerKey, Reservation]]:
        """Yields all that is reserved, profiling runs included."""
        yield from self._reservations.items()

    def _check(self, key: WorkerKey, gpu: str, row: int, allocation: Allocation, width_pct: int) -> None:
        info = self.device(gpu)
        others = [r for other, r in self._reservations.items() if other != key and r.gpu == gpu]
        rows = {r.index: r for r in _rows(others)}
        present = rows.get(row, Row(index=row, sm_pct=0, used_permille=0))
        if present.used_permille + allocation.request_permille > WHOLE_PERMILLE:
            raise CapacityError(
                f"row {row} of {gpu} has {present.free_permille} ‰ free, {allocation.request_permille} ‰ were asked for"
            )
        elsewhere = [r.sm_pct for r in rows.values() if r.index != row]
        asked = f"{allocation.sm_pct} % were asked for"
        if width_pct != allocation.sm_pct:
            asked += f", which takes {width_pct} %"
        if sum(elsewhere) + max(present.sm_pct, width_pct) > WHOLE_PCT:
            raise CapacityError(f"{gpu} has {WHOLE_PCT - sum(elsewhere)} % of its SMs free for row {row}, {asked}")
        if not fits((*elsewhere, max(present.sm_pct, width_pct)), unit_pct(info)):
            raise CapacityError(
                f"row {row} finds no place on {gpu}, where rows begin at multiples of {unit_pct(info)} % and "
                f"{', '.join(map(str, elsewhere))} % are taken: {asked}"
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
        widths[r.row] = max(widths.get(r.row, 0), r.width_pct)
        used[r.row] = used.get(r.row, 0) + r.allocation.request_permille
    return tuple(Row(index=i, sm_pct=widths[i], used_permille=used[i]) for i in sorted(widths))
