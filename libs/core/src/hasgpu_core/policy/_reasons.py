"""A decision in words."""

from __future__ import annotations

from hasgpu_core.cluster import FunctionView
from hasgpu_core.policy._draft import Draft
from hasgpu_core.policy._need import Need
from hasgpu_core.policy.scaling import Action, ActionKind


def pct(permille: int) -> str:
    """300 as "30 %"."""
    return f"{permille / 10:g} %"


def join_words(*parts: str) -> str:
    """Joins what is there."""
    return "; ".join(part for part in parts if part)


def head_words(function: FunctionView, need: Need | None, capacity_rps: float) -> str:
    """What the decision was made from."""
    if need is None:
        return f"ready capacity {capacity_rps:.1f}"
    queued = f" with {function.demand.queued_items_count} queued" if function.demand.queued_items_count else ""
    feedback = f" ({need.feedback})" if need.feedback else ""
    return (
        f"rate {need.predicted_rps:.1f} rps predicted ({need.observed_rps:.1f} observed), "
        f"needs {need.need_rps:.1f}{queued}{feedback}; ready capacity {capacity_rps:.1f}"
    )


def change_words(action: Action, draft: Draft) -> str:
    """What one action does."""
    if action.kind is ActionKind.HORIZONTAL_DOWN:
        return f"{action.instance} goes (SM {action.sm_pct} %, quota {pct(action.from_permille)})"
    share = draft.share(action.instance)
    if action.kind is ActionKind.HORIZONTAL_UP:
        kind = "standby" if share.standby else "instance"
        return f"new {kind} {action.instance} (SM {action.sm_pct} %, quota {pct(action.to_permille)})"
    change = f"{pct(action.from_permille)} -> {pct(action.to_permille)}"
    if share.view is not None and share.view.standby != share.standby:
        what = "is parked" if share.standby else "(standby) becomes active"
        return f"{action.instance} {what}, quota {change}"
    return f"quota of {action.instance} {change}"
