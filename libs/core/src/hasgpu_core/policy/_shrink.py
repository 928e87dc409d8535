"""Shrinking: quotas after a short hold, instances after a long one, to zero after an idle period."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from hasgpu_core.policy._draft import Draft, Room, Share
from hasgpu_core.policy._grow import apply_growth, growth
from hasgpu_core.policy._sizing import smallest_quota_permille
from hasgpu_core.policy.scaling import FunctionState, ScalingSettings


def lower_quotas(
    draft: Draft, need_rps: float, state: FunctionState, settings: ScalingSettings, now_s: float
) -> tuple[FunctionState, str]:
    """Lowers quotas once the need has been low for the hold; returns the state, and what is waited for in words.

    The hold restarts when at some look nothing could come down. What comes down is judged by the largest need since
    the hold began, so a dip at its end lowers nothing further.
    """
    if not _lower(draft, need_rps, settings):
        return replace(state, below_since_s=None, below_peak_rps=0.0), ""
    since_s = now_s if state.below_since_s is None else state.below_since_s
    peak_rps = max(state.below_peak_rps, need_rps) if state.below_since_s is not None else need_rps
    left_s = settings.quota_hold_s - (now_s - since_s)
    if left_s > 0:
        waiting = f"quotas can come down in {left_s:.1f} s"
        return replace(state, below_since_s=since_s, below_peak_rps=peak_rps), waiting
    lowered = _lower(draft, peak_rps, settings)
    for share in draft.ready:
        if share.instance in lowered:
            draft.set_request(share, lowered[share.instance])
    return replace(state, below_since_s=now_s, below_peak_rps=need_rps), ""


def remove_instance(
    draft: Draft, room: Room, need_rps: float, state: FunctionState, settings: ScalingSettings, now_s: float
) -> tuple[FunctionState, str]:
    """Removes one instance once it has not been needed for the hold, and since the last instance came or went.

    The others absorb its load: they must be able to cover the largest need of the hold with a margin inside their
    rows, and their quotas are raised in the same decision.
    """
    if _removable(draft, room, need_rps, need_rps, settings) is None:
        return replace(state, spare_since_s=None, spare_peak_rps=0.0), ""
    since_s = now_s if state.spare_since_s is None else state.spare_since_s
    peak_rps = max(state.spare_peak_rps, need_rps) if state.spare_since_s is not None else need_rps
    state = replace(state, spare_since_s=since_s, spare_peak_rps=peak_rps)
    marks_s = [mark for mark in (since_s, state.scaled_up_at_s, state.scaled_down_at_s) if mark is not None]
    left_s = settings.remove_hold_s - (now_s - max(marks_s))
    if left_s > 0:
        return state, f"an instance can go in {left_s:.1f} s"
    found = _removable(draft, room, need_rps, peak_rps, settings)
    if found is None:  # not at the peak of the hold: it starts anew from here
        return replace(state, spare_since_s=now_s, spare_peak_rps=need_rps), ""
    share, grown = found
    _give_up(draft, share)
    apply_growth(draft, room, grown)
    return replace(state, spare_since_s=None, spare_peak_rps=0.0, scaled_down_at_s=now_s), ""


def to_zero(draft: Draft) -> None:
    """Gives up every active instance; ready ones stay as standbys as far as the function wants any."""
    for share in draft.active:
        _give_up(draft, share)


def idle(draft: Draft, state: FunctionState, now_s: float) -> FunctionState:
    """Returns the state with the idle time kept: since when nothing arrived, waited or ran. No data is not idle."""
    demand = draft.function.demand
    if demand.rate_rps != 0 or demand.queued_items_count or demand.in_flight_count:
        return replace(state, idle_since_s=None)
    return state if state.idle_since_s is not None else replace(state, idle_since_s=now_s)


def _give_up(draft: Draft, share: Share) -> None:
    if share.ready and len(draft.standbys) < draft.function.spec.standby:
        draft.park(share)
    else:
        draft.remove(share)


def _lower(draft: Draft, need_rps: float, settings: ScalingSettings) -> Mapping[str, int]:
    """The quotas that can come down, from the smallest SM share up, so that what remains covers the need with room."""
    capacity_rps = draft.ready_capacity_rps()
    lowered: dict[str, int] = {}
    for share in sorted(draft.ready, key=lambda s: (s.allocation.sm_pct, s.instance)):
        table = draft.table(share)
        floor_permille = smallest_quota_permille(table, share.allocation.sm_pct, settings) if table else None
        if floor_permille is None:
            continue
        own_rps = draft.capacity_rps(share)
        step = settings.quota_step_permille
        permille = (share.allocation.request_permille - 1) // step * step
        while permille >= floor_permille:
            after_rps = capacity_rps - own_rps + draft.capacity_rps(share, permille)
            if need_rps > settings.shrink_margin * after_rps:
                break
            lowered[share.instance] = permille
            permille -= step
        if share.instance in lowered:
            capacity_rps += draft.capacity_rps(share, lowered[share.instance]) - own_rps
    return lowered


def _removable(
    draft: Draft, room: Room, need_rps: float, peak_rps: float, settings: ScalingSettings
) -> tuple[Share, Mapping[str, int]] | None:
    """The instance that can go first, and the quotas with which the others take over; None: all are needed.

    Failed ones go before those on their way, these before ready ones, and these from the smallest SM share up, the
    youngest first. The others must be able to reach the peak of the hold; their quotas are raised for the need of now,
    which must not cost more than what it replaces.
    """
    spec = draft.function.spec
    if len(draft.active) <= max(1, spec.min_instances):
        return None
    for share in sorted(draft.active, key=lambda s: (s.ready, not s.failed, s.allocation.sm_pct, _youngest_first(s))):
        others = [other for other in draft.ready if other is not share]
        if not others or peak_rps > settings.remove_margin * draft.reach_rps(others, room):
            continue
        grown = growth(draft, others, room, need_rps / settings.shrink_margin, settings)
        more = sum(
            (grown[o.instance] - o.allocation.request_permille) * o.allocation.sm_pct
            for o in others
            if o.instance in grown
        )
        if more <= share.allocation.request_permille * share.allocation.sm_pct:
            return share, grown
    return None


def _youngest_first(share: Share) -> tuple[int, str]:
    ordinal = share.instance.rpartition("-")[2]
    return (-int(ordinal) if ordinal.isdecimal() else 0, share.instance)
