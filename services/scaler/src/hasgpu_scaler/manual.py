"""Scaling by hand: what was asked, checked against what is there, becomes a decision like any other."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from hasgpu_core.cluster import FunctionView, InstanceView
from hasgpu_core.errors import CapacityError, InvalidError, NotFoundError
from hasgpu_core.events import DesiredInstance
from hasgpu_core.policy.placement import NoRoom, occupy, place
from hasgpu_core.policy.scaling import Action, ActionKind, Decision
from hasgpu_core.resources import (
    PARKED_QUOTA_PERMILLE,
    SMALLEST_QUOTA_PERMILLE,
    WHOLE_PERMILLE,
    Allocation,
    DeviceState,
    InstanceState,
)

from hasgpu_scaler.records import DesiredRecord, sort_instances

DEFAULT_HOLD_S = 60
LONGEST_HOLD_S = 86_400


@dataclass(frozen=True, slots=True)
class ManualRequest:
    """What was asked; None: left as is."""

    function: str
    instance: str = ""
    """Empty: every instance of the function."""
    request_permille: int | None = None
    limit_permille: int | None = None
    instances_count: int | None = None
    """Of active instances; standbys stay."""
    hold_s: int = DEFAULT_HOLD_S

    def validate(self) -> None:
        """Raises InvalidError, naming the field, the bound and what came."""
        if self.request_permille is None and self.limit_permille is None and self.instances_count is None:
            raise InvalidError("request", expected="request_permille, limit_permille or instances", got="none of them")
        if self.instances_count is not None and self.instance:
            raise InvalidError("instance", expected="empty when instances is given", got=repr(self.instance))
        for name, value in (("request_permille", self.request_permille), ("limit_permille", self.limit_permille)):
            if value is not None and not SMALLEST_QUOTA_PERMILLE <= value <= WHOLE_PERMILLE:
                raise InvalidError(name, expected=f"{SMALLEST_QUOTA_PERMILLE}..{WHOLE_PERMILLE}", got=str(value))
        if not 1 <= self.hold_s <= LONGEST_HOLD_S:
            raise InvalidError("hold_s", expected=f"1..{LONGEST_HOLD_S}", got=str(self.hold_s))


def decide_manual(
    request: ManualRequest, record: DesiredRecord, view: FunctionView, devices: Sequence[DeviceState]
) -> Decision:
    """Returns the decision that does what was asked.

    `devices` are those of the snapshot, with everything that is desired taken off.

    Raises:
        NotFoundError: the instance is not one of the function's.
        InvalidError: a value is out of its range.
        CapacityError: a row or the cluster has no room; the message says what is free.
    """
    request.validate()
    wanted = {item.instance: item for item in record.instances}
    if request.instance and request.instance not in wanted:
        raise NotFoundError(
            "instance", request.instance, f"{request.function} has {', '.join(sorted(wanted)) or 'none'}"
        )
    actions: list[Action] = []
    if request.request_permille is not None or request.limit_permille is not None:
        for name, item in wanted.items():
            chosen = name == request.instance if request.instance else not item.standby
            if chosen:
                wanted[name] = replace(item, allocation=_with_quota(item.allocation, request))
        devices = _check_rows(record, wanted, view, devices)
        actions.extend(_vertical_actions(record, wanted))
    next_ordinal = max(record.next_ordinal, view.next_ordinal)
    if request.instances_count is not None:
        next_ordinal = _set_count(request, wanted, view, devices, next_ordinal, actions)
    return Decision(
        function=request.function,
        desired=sort_instances(wanted.values()),
        actions=tuple(actions),
        reason=f"set by hand ({_words(request)}), held for {request.hold_s} s",
        look_again_s=float(request.hold_s),
        next_ordinal=next_ordinal,
        observed_rps=view.demand.rate_rps,
        predicted_rps=None,
        capacity_rps=_capacity_rps(view),
        queued_items_count=view.demand.queued_items_count,
        p95_s=view.demand.p95_s,
        standby_changed=any(item.standby and not _standby_in(wanted, item.instance) for item in record.instances),
    )


def _standby_in(wanted: Mapping[str, DesiredInstance], instance: str) -> bool:
    """Whether it is still a standby; one that goes did not change into anything."""
    return instance not in wanted or wanted[instance].standby


def _with_quota(allocation: Allocation, request: ManualRequest) -> Allocation:
    """A limit below a new request follows it up; an explicit one has to be at least the request."""
    asked = request.request_permille if request.request_permille is not None else allocation.request_permille
    limit = request.limit_permille if request.limit_permille is not None else max(asked, allocation.limit_permille)
    changed = replace(allocation, request_permille=asked, limit_permille=limit)
    changed.validate()
    return changed


def _check_rows(
    record: DesiredRecord,
    wanted: dict[str, DesiredInstance],
    view: FunctionView,
    devices: Sequence[DeviceState],
) -> Sequence[DeviceState]:
    """Raises CapacityError when a row would be over-filled; returns the devices with the changes made."""
    before = {item.instance: item.allocation for item in record.instances}
    growth: dict[tuple[str, str, int], int] = {}
    for instance in view.instances:
        if instance.node and instance.instance in wanted and instance.instance in before:
            key = (instance.node, instance.gpu, instance.row)
            change = wanted[instance.instance].allocation.request_permille - before[instance.instance].request_permille
            growth[key] = growth.get(key, 0) + change
    for device in devices:
        for row in device.rows:
            more = growth.get((device.info.node, device.info.gpu, row.index), 0)
            if more > 0 and more > row.free_permille:
                raise CapacityError(
                    f"row {row.index} of {device.info.node}/{device.info.gpu} has {row.free_permille} ‰ free, "
                    f"{more} ‰ more are asked for"
                )
    return [_grown(device, growth) for device in devices]


def _grown(device: DeviceState, growth: Mapping[tuple[str, str, int], int]) -> DeviceState:
    """The device with more of its rows taken, in per mille by (node, GPU, row)."""
    return replace(
        device,
        rows=tuple(
            replace(
                row, used_permille=row.used_permille + growth.get((device.info.node, device.info.gpu, row.index), 0)
            )
            for row in device.rows
        ),
    )


def _vertical_actions(record: DesiredRecord, wanted: dict[str, DesiredInstance]) -> list[Action]:
    actions = []
    for item in record.instances:
        old, new = item.allocation, wanted[item.instance].allocation
        if (old.request_permille, old.limit_permille) != (new.request_permille, new.limit_permille):
            up = (new.request_permille, new.limit_permille) > (old.request_permille, old.limit_permille)
            actions.append(
                Action(
                    kind=ActionKind.VERTICAL_UP if up else ActionKind.VERTICAL_DOWN,
                    instance=item.instance,
                    sm_pct=new.sm_pct,
                    from_permille=old.request_permille,
                    to_permille=new.request_permille,
                )
            )
    return actions


def _set_count(
    request: ManualRequest,
    wanted: dict[str, DesiredInstance],
    view: FunctionView,
    devices: Sequence[DeviceState],
    next_ordinal: int,
    actions: list[Action],
) -> int:
    """Adds active instances (ready standbys before new ones) or removes some; returns the next ordinal."""
    count = request.instances_count or 0
    low, high = view.spec.min_instances, view.spec.max_instances
    if not low <= count <= high:
        raise InvalidError("instances", expected=f"{low}..{high} (the function's bounds)", got=str(count))
    active = [item for item in wanted.values() if not item.standby]
    for item in _least_useful(active, view)[: max(0, len(active) - count)]:
        del wanted[item.instance]
        allocation = item.allocation
        actions.append(
            Action(ActionKind.HORIZONTAL_DOWN, item.instance, allocation.sm_pct, allocation.request_permille, 0)
        )
    missing = count - len(active)
    for standby in _ready_standbys(wanted.values(), view)[: max(0, missing)]:
        found = _activated(request, standby, active, view, devices)
        if found is None:
            continue
        item, devices = found
        wanted[item.instance] = item
        missing -= 1
        before, after = standby.allocation.request_permille, item.allocation.request_permille
        actions.append(Action(ActionKind.VERTICAL_UP, item.instance, item.allocation.sm_pct, before, after))
    for _ in range(missing):
        allocation, devices = _allocation_with_room(request, active, view, devices)
        item = DesiredInstance(f"{request.function}-{next_ordinal}", allocation)
        next_ordinal += 1
        wanted[item.instance] = item
        actions.append(
            Action(ActionKind.HORIZONTAL_UP, item.instance, allocation.sm_pct, 0, allocation.request_permille)
        )
    return next_ordinal


def _least_useful(active: Sequence[DesiredInstance], view: FunctionView) -> list[DesiredInstance]:
    """Those that do not serve yet first, then the newest."""
    states = {item.instance: item.state for item in view.instances}

    def key(item: DesiredInstance) -> tuple[bool, int, str]:
        return (states.get(item.instance) is InstanceState.READY, -_ordinal(item.instance), item.instance)

    return sorted(active, key=key)


def _ordinal(instance: str) -> int:
    tail = instance.rpartition("-")[2]
    return int(tail) if tail.isdecimal() else 0


def _ready_standbys(wanted: Iterable[DesiredInstance], view: FunctionView) -> list[DesiredInstance]:
    """Those that can serve at once, the largest SM shares first."""
    ready = {item.instance for item in view.instances if item.state is InstanceState.READY}
    standbys = [item for item in wanted if item.standby and item.instance in ready]
    return sorted(standbys, key=lambda item: (-item.allocation.sm_pct, _ordinal(item.instance)))


def _activated(
    request: ManualRequest,
    standby: DesiredInstance,
    active: Sequence[DesiredInstance],
    view: FunctionView,
    devices: Sequence[DeviceState],
) -> tuple[DesiredInstance, Sequence[DeviceState]] | None:
    """Returns a standby made active and the devices with its quota on; None when its row has no room for that.

    It gets the quota of the largest active instance or, where the row has no room for that, the largest that has and
    meets the objective; where none is active, the smallest that meets the objective at its SM share; where no table
    says which that is, the whole row. A quota that was asked for is that or none.
    """
    seen = next(item for item in view.instances if item.instance == standby.instance)
    key = (seen.node, seen.gpu, seen.row)
    rows = [row for device in devices for row in device.rows if (device.info.node, device.info.gpu, row.index) == key]
    if not rows:
        return None
    parked = standby.allocation
    most_permille = parked.request_permille + rows[0].free_permille
    table = view.tables.get(seen.device_model)
    feasible = table.feasible() if table is not None else ()
    quotas = sorted({point.quota_permille for point in feasible if point.sm_pct == parked.sm_pct})
    quotas = [quota for quota in quotas if quota > PARKED_QUOTA_PERMILLE]
    if request.request_permille is not None:
        permille = request.request_permille
    elif active:
        permille = _largest(active).request_permille
        if permille > most_permille:
            permille = max((quota for quota in quotas if quota <= most_permille), default=permille)
    else:
        permille = quotas[0] if quotas else WHOLE_PERMILLE
    if permille > most_permille:
        return None
    more = permille - parked.request_permille
    # Parked, it may not borrow either; active, it may as much as the others: where little is asked for, that is its
    # share.
    limit = max(parked.limit_permille, permille, _largest(active).limit_permille if active else 0)
    allocation = _with_quota(replace(parked, request_permille=permille, limit_permille=limit), request)
    return DesiredInstance(standby.instance, allocation), [_grown(device, {key: more}) for device in devices]


def _largest(active: Sequence[DesiredInstance]) -> Allocation:
    return max((item.allocation for item in active), key=lambda a: (a.gpu_share, a.sm_pct * a.limit_permille))


def _allocation_with_room(
    request: ManualRequest, active: Sequence[DesiredInstance], view: FunctionView, devices: Sequence[DeviceState]
) -> tuple[Allocation, Sequence[DeviceState]]:
    """Returns the shares of one more instance and the devices with it on; raises CapacityError.

    It gets the shares of the largest active instance; where there is none, the cheapest ones that meet the objective
    and fit; where no table says which these are, a whole row of the largest SM share that fits.
    """
    if active:
        options = [_largest(active)]
    else:
        points = sorted(
            {
                (p.sm_pct, p.quota_permille)
                for table in view.tables.values()
                for p in table.feasible()
                if p.quota_permille > PARKED_QUOTA_PERMILLE  # who has no more than that counts as parked
            },
            key=lambda p: (p[0] * p[1], p),
        )
        rungs = sorted({rung for device in devices for rung in device.info.sm_rungs_pct}, reverse=True)
        options = [
            _with_quota(Allocation(sm_pct, quota, quota, view.spec.memory_bytes), request)
            for sm_pct, quota in points or [(rung, WHOLE_PERMILLE) for rung in rungs]
        ]
    reason = "no device is known"
    for allocation in options:
        found = place(allocation, devices)
        if not isinstance(found, NoRoom):
            return allocation, occupy(devices, found, allocation)
        reason = found.reason
    raise CapacityError(f"no room for another instance of {request.function}: {reason}")


def _capacity_rps(view: FunctionView) -> float:
    """What the ready instances sustain by the tables; 0 where there is none."""
    return sum(_instance_capacity_rps(item, view) for item in view.instances)


def _instance_capacity_rps(item: InstanceView, view: FunctionView) -> float:
    table = view.tables.get(item.device_model)
    if table is None or item.standby or item.state is not InstanceState.READY:
        return 0.0
    return table.capacity_rps(item.allocation.sm_pct, item.allocation.request_permille)


def _words(request: ManualRequest) -> str:
    parts = [
        f"{name} {value}{unit}"
        for name, value, unit in (
            ("request", request.request_permille, " ‰"),
            ("limit", request.limit_permille, " ‰"),
            ("instances", request.instances_count, ""),
        )
        if value is not None
    ]
    return f"{request.instance}: {', '.join(parts)}" if request.instance else ", ".join(parts)
