"""Where an instance goes: node, GPU and row.

| module | does |
|---|---|
| `places` | one placement, by a look at every device; spreading and affinity |
| `room` | many placements, from sorted lists; the same answers |
| `rebinding` | the order in which those that wait are placed; new places for lost instances |
| `bounds` | how few GPUs could do at all |
| `migration` | moves that free a GPU, make room, or empty a device |
"""

from __future__ import annotations

from hasgpu_core.policy.placement.places import (
    NO_TIES,
    NoRoom,
    Placement,
    Rebound,
    Ties,
    live_rows,
    most_permille,
    occupy,
    place,
    unused_index,
)
from hasgpu_core.policy.placement.rebinding import ordinal_key, placing_order, rebind
from hasgpu_core.policy.placement.room import Room

__all__ = [
    "NO_TIES",
    "NoRoom",
    "Placement",
    "Rebound",
    "Room",
    "Ties",
    "live_rows",
    "most_permille",
    "occupy",
    "ordinal_key",
    "place",
    "placing_order",
    "rebind",
    "unused_index",
]
