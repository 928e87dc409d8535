"""Growing: quotas of ready instances, then standbys, then new instances."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from hasgpu_core.policy._draft import Draft, Room, Share
from hasgpu_core.policy._sizing import best_new, in_objective, quotas_permille
from hasgpu_core.policy.placement import NoRoom
from hasgpu_core.policy.scaling import ScalingSettings
from hasgpu_core.resources import WHOLE_PERMILLE, Allocation

EPSILON_RPS = 1e-6
"""Below it nothing is missing; above the rounding error of sums of capacities."""


def growth(
    draft: Draft, shares: Sequence[Share], room: Room, need_rps: float, settings: ScalingSettings
) -> Mapping[str, int]:
    """Returns the quotas in per mille, by instance, with which `shares` cover the need, or come as near as they can.

    As HAS-GPU does: from the largest SM share down, each in steps while its row has room, until the need is covered.
    A quota is not raised where that buys no capacity. Instances that keep their quota are not in the answer.
    """
    capacity_rps = sum(draft.capacity_rps(share) for share in shares)
    taken: dict[tuple[str, str, int], int] = {}
    grown: dict[str, int] = {}
    for share in sorted(shares, key=lambda s: (-s.allocation.sm_pct, s.instance)):
        if capacity_rps + EPSILON_RPS >= need_rps:
            break
        if share.view is None:
            continue
        row = (share.view.node, share.view.gpu, share.view.row)
        now_permille = share.allocation.request_permille
        most_permille = min(WHOLE_PERMILLE, now_permille + room.free_permille(*row) - taken.get(row, 0))
        own_rps = draft.capacity_rps(share)
        best_permille, best_rps = now_permille, own_rps
        for permille in quotas_permille(settings):
            if not now_permille < permille <= most_permille:
                continue
            if draft.capacity_rps(share, permille) > best_rps + EPSILON_RPS:
                best_permille, best_rps = permille, draft.capacity_rps(share, permille)
            if capacity_rps - own_rps + best_rps + EPSILON_RPS >= need_rps:
                break
        if best_permille > now_permille:
            grown[share.instance] = best_permille
            taken[row] = taken.get(row, 0) + best_permille - now_permille
            capacity_rps += best_rps - own_rps
    return grown


def apply_growth(draft: Draft, room: Room, grown: Mapping[str, int]) -> None:
    """Raises the quotas and takes their room."""
    for share in draft.shares:
        permille = grown.get(share.instance)
        if permille is None or share.view is None:
            continue
        more_permille = permille - share.allocation.request_permille
        room.take(share.view.node, share.view.gpu, share.view.row, more_permille)
        draft.set_request(share, permille)


def own_shape(draft: Draft, room: Room, settings: ScalingSettings) -> None:
    """Brings ready instances that another policy left to whole quota steps and to this one's limit.

    Quotas are rounded up, where the row has room: nothing gets slower by it, and what is too much comes down later.
    """
    step = settings.quota_step_permille
    for share in draft.ready:
        request_permille = share.allocation.request_permille
        permille = min(WHOLE_PERMILLE, -(-request_permille // step) * step)
        if share.view is None or share.allocation == draft.allocation(share.allocation.sm_pct, permille):
            continue
        row = (share.view.node, share.view.gpu, share.view.row)
        if permille - request_permille <= room.free_permille(*row):
            room.take(*row, permille - request_permille)
            draft.set_request(share, permille)


def activate_standbys(draft: Draft, room: Room, missing_rps: float, settings: ScalingSettings) -> float:
    """Activates ready standbys, each at its smallest adequate quota; returns what is missing after that."""
    ready = [share for share in draft.standbys if share.ready]
    for share in sorted(ready, key=lambda s: (-s.allocation.sm_pct, s.instance)):
        if missing_rps <= EPSILON_RPS or len(draft.active) >= draft.function.spec.max_instances:
            break
        table = draft.table(share)
        if share.view is None or table is None:
            continue
        row = (share.view.node, share.view.gpu, share.view.row)
        parked_permille = share.allocation.request_permille
        most_permille = parked_permille + room.free_permille(*row)
        sm_pct = share.allocation.sm_pct
        quotas = [
            q for q in quotas_permille(settings) if q <= most_permille and in_objective(table, sm_pct, q, settings)
        ]
        if not quotas:
            continue
        permille = next((q for q in quotas if draft.capacity_rps(share, q) >= missing_rps), quotas[-1])
        share.standby = False
        room.take(*row, permille - parked_permille)
        draft.set_request(share, permille)
        missing_rps -= draft.capacity_rps(share)
    return missing_rps


def add_instances(
    draft: Draft, room: Room, missing_rps: float, settings: ScalingSettings, *, at_most: int
) -> tuple[float, str]:
    """Adds new instances, bounded; returns what is missing after that and, if anything is, why in words."""
    added = 0
    while missing_rps > EPSILON_RPS:
        if len(draft.active) >= draft.function.spec.max_instances:
            return missing_rps, f"max_instances ({draft.function.spec.max_instances}) is reached"
        if added >= at_most:
            return missing_rps, f"at most {at_most} new instances at a time"
        found = best_new(draft, room, missing_rps, settings)
        if isinstance(found, NoRoom):
            return missing_rps, found.reason
        share = draft.add(found.sm_pct, found.request_permille, found.device_model)
        room.occupy(found.placement, share.allocation)
        missing_rps -= found.capacity_rps
        added += 1
    return 0.0, ""


def park_new(draft: Draft, room: Room, sm_pct: int, model: str, request_permille: int) -> str:
    """Adds one standby of an SM share on a device model; returns why not in words, or nothing."""
    allocation: Allocation = draft.allocation(sm_pct, request_permille)
    outcome = room.place(allocation, model=model)
    if isinstance(outcome, NoRoom):
        return outcome.reason
    draft.add(sm_pct, request_permille, model, standby=True)
    room.occupy(outcome, allocation)
    return ""
