"""What is done of advice: a function in advisory mode has the instances that its spec declares, and no more.

`min` is its owner's word and not the policy's. Without these instances a function in advisory mode would never serve,
and there would be nothing to advise on.
"""

from __future__ import annotations

from dataclasses import replace

from hasgpu_core.cluster import FunctionView
from hasgpu_core.events import DesiredInstance
from hasgpu_core.policy.scaling import Decision


def missing_minimum(function: FunctionView, advice: Decision) -> Decision | None:
    """Returns the part of advice that gives a function its `min` active instances.

    Args:
        function: As it was when the advice was made.
        advice: What the policy would do.

    Returns:
        A decision that starts, or activates, as many of the instances advised as are missing, and leaves all else as it
        is; None: none is missing, or the advice has none to give (no room; held by hand). May be asked again: once
        what it decides is desired, nothing is missing.
    """
    present = {item.instance: item for item in function.instances}
    missing = function.spec.min_instances - sum(not item.standby for item in present.values())
    offered = [
        item
        for item in advice.desired
        if not item.standby and (item.instance not in present or present[item.instance].standby)
    ]
    # Parked ones first: they serve at once.
    offered.sort(key=lambda item: item.instance not in present)
    taken = {item.instance: item for item in offered[: max(0, missing)]}
    if not taken:
        return None
    kept = {item.instance: DesiredInstance(item.instance, item.allocation, item.standby) for item in function.instances}
    desired = kept | taken
    return replace(
        advice,
        desired=tuple(desired[name] for name in sorted(desired)),
        actions=tuple(action for action in advice.actions if action.instance in taken),
        reason=(
            f"advisory mode: {', '.join(sorted(taken))} for the minimum of {function.spec.min_instances}, "
            f"all else is left as it is (advised: {advice.reason})"
        ),
        standby_changed=any(name in present for name in taken),
    )
