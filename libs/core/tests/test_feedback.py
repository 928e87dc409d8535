"""Lateness that the rate does not explain, and what is done about it."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hasgpu_core.cluster import DemandView
from hasgpu_core.policy.hybrid import HybridSettings
from hasgpu_core.policy.hybrid.feedback import Feedback, observe

SETTINGS = HybridSettings()
SLO_S = 0.1
LATE = DemandView(rate_rps=10.0, p95_s=0.2)
FINE = DemandView(rate_rps=10.0, p95_s=0.05)


def run(
    feedback: Feedback,
    demand: DemandView,
    start_s: float,
    seconds: float,
    *,
    suffices: bool = True,
    settings: HybridSettings = SETTINGS,
) -> Feedback:
    for tick in range(int(seconds * 4)):
        now_s = start_s + tick / 4
        feedback = observe(feedback, demand, SLO_S, suffices=suffices, now_s=now_s, settings=settings)
    return feedback


def test_nothing_happens_without_lasting_lateness_or_while_the_plan_explains_it() -> None:
    assert not run(Feedback(), FINE, 0, 100).active
    assert not run(Feedback(), LATE, 0, SETTINGS.feedback_hold_s - 1).active
    assert not run(Feedback(), LATE, 0, 100, suffices=False).active
    feedback = Feedback()
    for at_s in range(0, 60, 6):  # late for 4 s, fine for 2 s, again and again
        feedback = run(run(feedback, LATE, at_s, 4), FINE, at_s + 4, 2)
    assert not feedback.active


def test_first_the_share_becomes_its_own_and_then_more_is_planned_for() -> None:
    first = run(Feedback(), LATE, 0, SETTINGS.feedback_hold_s + 1)
    assert (first.secured, first.factor) == (True, 1.0)
    more = run(first, LATE, 7, SETTINGS.feedback_after_s + 1)
    assert (more.secured, more.factor) == (True, SETTINGS.feedback_factor)
    assert "shares are their own" in more.words()
    assert "1.25 times" in more.words()
    assert run(more, LATE, 16, 1_000).factor == SETTINGS.feedback_most


def test_where_nothing_is_lent_more_is_planned_for_at_once() -> None:
    feedback = run(Feedback(), LATE, 0, SETTINGS.feedback_hold_s + 1, settings=replace(SETTINGS, lend=False))
    assert (feedback.secured, feedback.factor) == (False, SETTINGS.feedback_factor)


def test_a_long_wait_is_lateness_too() -> None:
    waiting = DemandView(rate_rps=10.0, queued_items_count=5, oldest_wait_s=0.3)
    assert run(Feedback(), waiting, 0, SETTINGS.feedback_hold_s + 1).secured


def test_at_the_first_late_request_all_idle_time_may_be_used_for_a_while() -> None:
    feedback = run(Feedback(), LATE, 0, 0.25, suffices=False)
    assert feedback.strained(1.0, SETTINGS)
    assert not feedback.strained(1.0, replace(SETTINGS, lend=False))
    assert run(feedback, FINE, 1, 5).strained(6.0, SETTINGS)
    assert not run(feedback, FINE, 1, 5).strained(SETTINGS.strain_s + 1, SETTINGS)


def test_it_is_taken_back_step_by_step_and_more_slowly_when_that_was_too_soon() -> None:
    feedback = run(Feedback(), LATE, 0, 20)
    assert feedback.secured
    assert feedback.factor > 1
    eased = run(feedback, FINE, 20, SETTINGS.feedback_ease_s + 1)
    assert (eased.secured, eased.factor) == (True, 1.0)
    done = run(eased, FINE, 81, SETTINGS.feedback_ease_s + 1)
    assert not done.active
    again = run(done, LATE, 142, SETTINGS.feedback_hold_s + 1)
    assert again.patience == 2.0
    assert run(again, FINE, 149, SETTINGS.feedback_ease_s + 1).secured
    assert not run(again, FINE, 149, 2 * SETTINGS.feedback_ease_s + 1).secured


@pytest.mark.parametrize("lend", [True, False])
def test_it_never_asks_for_more_than_its_bound(lend: bool) -> None:
    settings = replace(SETTINGS, lend=lend)
    assert run(Feedback(), LATE, 0, 3_600, settings=settings).factor <= settings.feedback_most
