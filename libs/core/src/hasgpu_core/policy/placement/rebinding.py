"""The order in which instances are placed, and new places for those that lost theirs."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from hasgpu_core.events import PlannedInstance
from hasgpu_core.policy.placement.places import Placement, Rebound
from hasgpu_core.policy.placement.room import Room
from hasgpu_core.resources import Allocation, DeviceState

_NUMBERED = re.compile(r"(.*)-(\d+)")


def ordinal_key(instance: str) -> tuple[str, int]:
    """Returns a key that sorts `f-2` before `f-10`."""
    match = _NUMBERED.fullmatch(instance)
    return (match[1], int(match[2])) if match else (instance, 0)


def placing_order(
    allocation: Allocation, instance: str, *, standby: bool, memory_bytes: int
) -> tuple[bool, float, int, tuple[str, int]]:
    """Returns a key by which instances that wait together are placed.

    Active ones before standbys; then the one with the largest share of a GPU, of its SM-time or of its memory,
    whichever is more: best-fit decreasing, in the resource that each needs most of. Sorting by width and request alone
    fills whole rows with the smallest requests, and a GPU's memory runs out before its SM-time.

    Args:
        allocation: What it needs.
        instance: Its id; decides between equals.
        standby: Whether it is one.
        memory_bytes: Of a GPU, the largest there is; 0 when there is none.
    """
    share = max(allocation.gpu_share, allocation.memory_bytes / memory_bytes if memory_bytes else 0.0)
    return standby, -share, -allocation.sm_pct, ordinal_key(instance)


def rebind(lost: Iterable[PlannedInstance], devices: Sequence[DeviceState]) -> tuple[Rebound, ...]:
    """Returns new places for instances whose node is gone, or whose plan has to be made anew.

    They go by `placing_order`, so that equal arguments give equal answers. `devices` are the live ones, without the
    room of the lost instances; each placement takes its room from those after it. What fits nowhere has NoRoom as its
    outcome and should be tried again when room appears.
    """
    out = []
    room = Room(devices)
    largest_bytes = max((device.info.memory_bytes for device in devices), default=0)
    for planned in sorted(
        lost,
        key=lambda p: placing_order(p.allocation, p.instance, standby=p.standby, memory_bytes=largest_bytes),
    ):
        outcome = room.place(planned.allocation)
        if isinstance(outcome, Placement):
            room.occupy(outcome.node, outcome.gpu, outcome.row, planned.allocation)
        out.append(Rebound(planned, outcome))
    return tuple(out)
