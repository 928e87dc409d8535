"""Working copies that one pass of the policy changes: the shares of a function, and the room on the devices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from hasgpu_core.capacity import CapacityTable
from hasgpu_core.cluster import FunctionView, InstanceView
from hasgpu_core.events import DesiredInstance
from hasgpu_core.policy.placement import NoRoom, Placement, most_permille, occupy, place
from hasgpu_core.policy.scaling import Action, ActionKind
from hasgpu_core.resources import PARKED_QUOTA_PERMILLE, WHOLE_PERMILLE, Allocation, DeviceState, InstanceState


class Room:
    """What is free on the devices; functions decided in one pass take it from each other, none gives any back.

    Room that a decision frees is free only when the agent has done it, so it shows in a later snapshot.
    """

    def __init__(self, devices: Sequence[DeviceState]) -> None:
        self.devices = tuple(devices)

    def free_permille(self, node: str, gpu: str, row: int) -> int:
        """Request that a row has free; 0 when its device is not known."""
        for device in self.devices:
            if (device.info.node, device.info.gpu) == (node, gpu):
                return next((r.free_permille for r in device.rows if r.index == row), WHOLE_PERMILLE)
        return 0

    def take(self, node: str, gpu: str, row: int, permille: int) -> None:
        """Takes request from a row for an instance that is there already."""
        self.devices = tuple(
            replace(
                device,
                rows=tuple(
                    replace(r, used_permille=r.used_permille + permille) if r.index == row else r for r in device.rows
                ),
            )
            if (device.info.node, device.info.gpu) == (node, gpu)
            else device
            for device in self.devices
        )

    def place(self, allocation: Allocation, *, model: str, used: bool | None = None) -> Placement | NoRoom:
        """Returns where a new instance would go among devices of a model (used: those in use, or those not)."""
        return place(allocation, self._of(model, used))

    def most_permille(self, allocation: Allocation, *, model: str, used: bool | None = None) -> int:
        """Returns the largest request for which `place` has room, other things equal; 0: none."""
        return most_permille(allocation.sm_pct, allocation.memory_bytes, self._of(model, used))

    def _of(self, model: str, used: bool | None) -> list[DeviceState]:
        return [d for d in self.devices if d.info.model == model and (used is None or _in_use(d) == used)]

    def occupy(self, placement: Placement, allocation: Allocation) -> None:
        """Takes the room of a new instance."""
        self.devices = occupy(self.devices, placement, allocation)


def _in_use(device: DeviceState) -> bool:
    return any(row.used_permille > 0 for row in device.rows)


@dataclass(slots=True)
class Share:
    """One instance as the draft has it."""

    instance: str
    allocation: Allocation
    standby: bool
    view: InstanceView | None
    """As it was; None: new in this draft."""
    device_model: str
    failed: bool = False
    """FAILED, or on its way for too long."""
    refused_permille: int | None = None
    """The request in force while the agent refuses a larger one; None: it does not."""

    @property
    def ready(self) -> bool:
        """Whether it counts as capacity (an active one) or can be made to (a standby)."""
        return self.view is not None and self.view.state is InstanceState.READY

    @property
    def coming(self) -> bool:
        """Whether it is on its way to READY."""
        return not self.ready and not self.failed


class Draft:
    """The shares of one function while a decision is being made."""

    def __init__(
        self, function: FunctionView, *, headroom_permille: int, stuck: frozenset[str], refused: frozenset[str]
    ) -> None:
        self.function = function
        self.next_ordinal = function.next_ordinal
        self._headroom_permille = headroom_permille
        self._sorted: list[Share] | None = None
        self._shares = {
            view.instance: Share(
                instance=view.instance,
                allocation=view.allocation,
                standby=view.standby,
                view=view,
                device_model=view.device_model,
                failed=view.state is InstanceState.FAILED or view.instance in stuck,
                refused_permille=view.refused_permille if view.instance in refused else None,
            )
            for view in function.instances
        }

    @property
    def shares(self) -> list[Share]:
        """All of them, by id."""
        if self._sorted is None:
            self._sorted = [self._shares[name] for name in sorted(self._shares)]
        return self._sorted

    def share(self, instance: str) -> Share:
        """Returns one by its id."""
        return self._shares[instance]

    @property
    def active(self) -> list[Share]:
        """Those that are no standbys, failed ones included."""
        return [share for share in self.shares if not share.standby]

    @property
    def standbys(self) -> list[Share]:
        """Those parked."""
        return [share for share in self.shares if share.standby]

    @property
    def ready(self) -> list[Share]:
        """The active ones that answer requests now."""
        return [share for share in self.active if share.ready]

    def capacity_rps(self, share: Share, request_permille: int | None = None) -> float:
        """Returns what a share sustains inside the SLO (at another quota when given); 0.0 when nothing is known.

        Where it is not known what device it will get, the least of all device models counts. A request that the agent
        refuses buys nothing beyond the one in force.
        """
        permille = share.allocation.request_permille if request_permille is None else request_permille
        if share.refused_permille is not None:
            permille = min(permille, share.refused_permille)
        table = self.function.tables.get(share.device_model)
        tables = [table] if table else [] if share.device_model else list(self.function.tables.values())
        return min((t.capacity_rps(share.allocation.sm_pct, permille) for t in tables), default=0.0)

    def ready_capacity_rps(self) -> float:
        """Returns what the ready active instances sustain together."""
        return sum(self.capacity_rps(share) for share in self.ready)

    def reach_rps(self, shares: Sequence[Share], room: Room) -> float:
        """Returns what shares sustain together, grown as far as their rows let them, the largest SM shares first.

        One that is not bound yet counts with the whole row: it is known within moments, and asking for more until
        then would ask twice.
        """
        free: dict[tuple[str, str, int], int] = {}
        total_rps = 0.0
        for share in sorted(shares, key=lambda s: (-s.allocation.sm_pct, s.instance)):
            request_permille = share.allocation.request_permille
            permille = WHOLE_PERMILLE
            if share.view is not None and share.view.node:
                row = (share.view.node, share.view.gpu, share.view.row)
                left = free.setdefault(row, room.free_permille(*row))
                permille = min(WHOLE_PERMILLE, request_permille + left)
                free[row] = left - (permille - request_permille)
            total_rps += max(self.capacity_rps(share), self.capacity_rps(share, permille))
        return total_rps

    def table(self, share: Share) -> CapacityTable | None:
        """Returns the predictions for the device that a share is on."""
        return self.function.tables.get(share.device_model)

    def set_request(self, share: Share, request_permille: int) -> None:
        """Changes a quota, and the limit with it."""
        share.allocation = replace(
            share.allocation,
            request_permille=request_permille,
            limit_permille=self._limit_permille(request_permille),
        )

    def park(self, share: Share) -> None:
        """Makes a standby of an active instance."""
        share.standby = True
        self.set_request(share, PARKED_QUOTA_PERMILLE)

    def add(self, sm_pct: int, request_permille: int, device_model: str, *, standby: bool = False) -> Share:
        """Adds a new instance under the next name."""
        name = f"{self.function.spec.name}-{self.next_ordinal}"
        self.next_ordinal += 1
        allocation = self.allocation(sm_pct, request_permille)
        share = self._shares[name] = Share(name, allocation, standby, None, device_model)
        self._sorted = None
        return share

    def allocation(self, sm_pct: int, request_permille: int) -> Allocation:
        """Returns the allocation of a new instance."""
        memory_bytes = self.function.spec.memory_bytes
        return Allocation(sm_pct, request_permille, self._limit_permille(request_permille), memory_bytes)

    def remove(self, share: Share) -> None:
        """Takes an instance out."""
        del self._shares[share.instance]
        self._sorted = None

    def desired(self) -> tuple[DesiredInstance, ...]:
        """Returns the whole set, sorted by id."""
        return tuple(DesiredInstance(share.instance, share.allocation, share.standby) for share in self.shares)

    def standby_changed(self) -> bool:
        """Whether a kept instance turned from standby to active or back."""
        return any(share.view is not None and share.view.standby != share.standby for share in self.shares)

    def actions(self) -> tuple[Action, ...]:
        """Returns the changes since the start, one an instance: removals, then shrinking, growth and additions."""
        removed = [
            Action(
                ActionKind.HORIZONTAL_DOWN,
                view.instance,
                view.allocation.sm_pct,
                view.allocation.request_permille,
                0,
            )
            for view in self.function.instances
            if view.instance not in self._shares
        ]
        down, up, added = [], [], []
        for share in self.shares:
            to_permille = share.allocation.request_permille
            if share.view is None:
                kind = ActionKind.HORIZONTAL_UP
                added.append(Action(kind, share.instance, share.allocation.sm_pct, 0, to_permille))
                continue
            from_permille = share.view.allocation.request_permille
            if to_permille > from_permille or (share.view.standby and not share.standby):
                kind = ActionKind.VERTICAL_UP
                up.append(Action(kind, share.instance, share.allocation.sm_pct, from_permille, to_permille))
            elif to_permille < from_permille or (share.standby and not share.view.standby):
                kind = ActionKind.VERTICAL_DOWN
                down.append(Action(kind, share.instance, share.allocation.sm_pct, from_permille, to_permille))
        return (*removed, *down, *up, *added)

    def _limit_permille(self, request_permille: int) -> int:
        return min(WHOLE_PERMILLE, request_permille + self._headroom_permille)
