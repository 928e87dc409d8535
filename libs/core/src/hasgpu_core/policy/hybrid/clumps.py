"""How much arrivals come in clumps, told by the late requests: an account of what an objective lets be late.

Plans reckon with random arrivals. Where clients send several requests at once, or each request brings others with it,
more collide than that. Counts tell little of it: they are taken ten times a second, and what matters are milliseconds.
What tells it is that more requests are late than the plan lets be. So an account is kept: each request pays
`late_share` into it, each late one takes 1 out. What is owed says how large clumps are taken to be (`plan`): every
`clump_late` owed raise the part of the requests that bring another one with them by a tenth.

The account drives the late towards `late_share` N of N requests and a few more, whatever the arrivals are. It is no
bound: plans follow only what was late already, and no more than `_ONCE_LATE` late requests of one look count.

Late requests count only while the plan is in force and claims to suffice; what comes of a larger rate, of cold starts
and of wrong predictions is the business of others (`forecast`, `feedback`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from hasgpu_core.cluster import DemandView
from hasgpu_core.policy.hybrid.settings import HybridSettings

_ONCE_LATE = 2
"""So many late requests of one look count: what made many late at once was one thing."""


@dataclass(frozen=True, slots=True)
class Clumps:
    """Of one function."""

    late_count: int | None = None
    """Total at the last look; None: not known yet."""
    items_count: int = 0
    """Total of arrivals then."""
    at_s: float = 0.0
    """Time of the last look."""
    owed: float = 0.0
    """Late requests beyond what may be late, bounded and slowly forgotten."""
    level: int = 0
    """Tenths of the requests that bring another one with them, as plans reckon."""
    unsettled_s: float = -math.inf
    """When the plan was last not in force, did not suffice, or requests waited that were late already."""


def observe(clumps: Clumps, demand: DemandView, now_s: float, *, counts: bool, settings: HybridSettings) -> Clumps:
    """Returns the account after one look.

    Args:
        clumps: Before.
        demand: What the gateways saw.
        now_s: Of this look.
        counts: Late requests are taken out of the account: the plan is in force and claims to suffice.
        settings: The policy's.
    """
    if demand.late_count is None or demand.arrived_items_count is None:
        return clumps
    late, items = demand.late_count, demand.arrived_items_count
    before = Clumps(late, items, now_s, clumps.owed, clumps.level)
    if clumps.late_count is None or late < clumps.late_count or items < clumps.items_count:
        return before  # the first look, or a gateway left the sum
    paid = settings.late_share * (items - clumps.items_count) / demand.items_per_request
    taken = min(late - clumps.late_count, _ONCE_LATE) if counts else 0
    if not taken and not clumps.owed:
        return before
    kept = clumps.owed * math.exp((clumps.at_s - now_s) / settings.clump_forget_s)
    owed = min(max(0.0, kept + taken - paid), settings.clump_late * settings.clump_most)
    level, exact = clumps.level, owed / settings.clump_late
    if exact >= level + 1:
        level = int(exact)
    elif exact < level - 0.5:
        level = int(exact + 0.5)
    return replace(before, owed=owed, level=level)
