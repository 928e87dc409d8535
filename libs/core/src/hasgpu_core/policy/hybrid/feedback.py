"""What is done when requests are late although the plan claims to suffice: a prediction that is off, a full row.

At the first late request instances may use all that their rows have idle (`strained`): a vertical change of a limit,
which costs only what is used. Lateness that a larger rate explains is then the plan's business. What lasts has two
causes, taken in this order: others use the time that the instances counted on borrowing, so they are given what they
need as their own (`secured`); or batches take longer than predicted, so the plan is made for more than the rate
(`factor`). Both end again, step by step, when nothing has been late for a while, which grows each time that it was too
short.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from hasgpu_core.cluster import DemandView
from hasgpu_core.policy.hybrid.settings import HybridSettings

_GIVES_UP = 0.999


@dataclass(frozen=True, slots=True)
class Feedback:
    """Of one function."""

    secured: bool = False
    """Instances ask for what they use, instead of borrowing it."""
    factor: float = 1.0
    """Times the rate that is planned for."""
    late_s: float = -math.inf
    """When requests were last late, or about to be."""
    late_since_s: float | None = None
    """Since when requests have been late without a break while the plan claims to suffice."""
    acted_s: float = -math.inf
    """When it last did something."""
    eased_s: float = -math.inf
    """When it last took something back."""
    patience: float = 1.0
    """Times feedback_ease_s that nothing must have been late before something is taken back."""

    @property
    def active(self) -> bool:
        """Whether it asks for anything."""
        return self.secured or self.factor > 1.0

    def strained(self, now_s: float, settings: HybridSettings) -> bool:
        """Whether instances may use all that is idle."""
        return settings.lend and now_s - self.late_s < settings.strain_s

    def words(self) -> str:
        """What it asks for."""
        parts = ["shares are their own"] if self.secured else []
        parts += [f"plans for {self.factor:.2f} times the rate"] if self.factor > 1.0 else []
        return "late although it should suffice: " + " and ".join(parts)


def late(demand: DemandView, slo_s: float) -> bool:
    """Whether requests miss the objective, or have waited for so long that they will."""
    return (demand.p95_s is not None and demand.p95_s > slo_s) or demand.oldest_wait_s > slo_s / 2


def observe(
    feedback: Feedback, demand: DemandView, slo_s: float, *, suffices: bool, now_s: float, settings: HybridSettings
) -> Feedback:
    """Returns the feedback after one look.

    Args:
        feedback: Before.
        demand: What the gateways saw.
        slo_s: The objective.
        suffices: The plan is in force, has been for feedback_after_s, and claims to sustain the rate. While it is not,
            lateness tells nothing.
        now_s: Of this look.
        settings: The policy's.
    """
    if not late(demand, slo_s):
        if feedback.late_since_s is not None:
            feedback = replace(feedback, late_since_s=None)
        return _eased(feedback, now_s, settings)
    feedback = replace(feedback, late_s=now_s)
    if not suffices:
        return replace(feedback, late_since_s=None)
    since_s = now_s if feedback.late_since_s is None else feedback.late_since_s
    feedback = replace(feedback, late_since_s=since_s)
    if now_s - since_s < settings.feedback_hold_s or now_s - feedback.acted_s < settings.feedback_after_s:
        return feedback
    patience = feedback.patience
    if now_s - feedback.eased_s < settings.regret_s:
        patience = min(2 * patience, settings.most_patience)
    feedback = replace(feedback, acted_s=now_s, eased_s=-math.inf, patience=patience)
    if settings.lend and not feedback.secured:
        return replace(feedback, secured=True)
    return replace(feedback, factor=min(feedback.factor * settings.feedback_factor, settings.feedback_most))


def _eased(feedback: Feedback, now_s: float, settings: HybridSettings) -> Feedback:
    """Takes back the last step once nothing has been late for long enough."""
    last_s = max(feedback.acted_s, feedback.eased_s)
    if not feedback.active or now_s - last_s < feedback.patience * settings.feedback_ease_s:
        return feedback
    if feedback.factor > 1.0:
        factor = max(1.0, feedback.factor / settings.feedback_factor)
        return replace(feedback, factor=factor if factor * _GIVES_UP > 1.0 else 1.0, eased_s=now_s)
    return replace(feedback, secured=False, eased_s=now_s)
