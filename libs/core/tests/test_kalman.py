from __future__ import annotations

import math
from random import Random

from hasgpu_core.policy.kalman import RateFilter
from hypothesis import given
from hypothesis import strategies as st


def test_constant_rate_is_believed_as_it_is() -> None:
    belief = RateFilter.start(0.0)
    for _ in range(60):
        belief = belief.update(10.0)
    assert math.isclose(belief.rate_rps, 10.0, abs_tol=0.01)  # the released filter settles 6 rps above


def test_steps_are_followed_within_two_updates_up_and_down() -> None:
    belief = RateFilter.start(5.0)
    for _ in range(20):
        belief = belief.update(5.0, noise_variance=2.5)
    assert belief.update(15.0, noise_variance=2.5).rate_rps == 15.0
    high = belief.update(60.0).update(60.0)
    assert abs(high.rate_rps - 60.0) < 1
    for _ in range(20):
        high = high.update(60.0, noise_variance=30)
    assert high.update(5.0, noise_variance=30).rate_rps == 5.0


def test_the_second_of_two_lesser_jumps_to_one_side_is_followed() -> None:
    belief = RateFilter.start(20.0)
    for _ in range(20):
        belief = belief.update(20.0)
    first = belief.update(29.0)
    assert first.rate_rps < 25
    assert first.update(31.0).rate_rps == 31.0
    assert first.update(13.0).rate_rps > 18.0  # to the other side: noise


def test_noise_is_smoothed() -> None:
    rng = Random(1)
    belief = RateFilter.start(20.0)
    measured, believed = [], []
    for _ in range(400):
        value = rng.gauss(20.0, math.sqrt(10.0))
        belief = belief.update(value)
        measured.append((value - 20) ** 2)
        believed.append((belief.rate_rps - 20) ** 2)
    assert sum(believed) < 0.4 * sum(measured)


@given(st.lists(st.floats(0, 1e6), max_size=50), st.floats(0.5, 1e4))
def test_belief_is_a_rate_and_its_variance_stays_positive(rates: list[float], noise: float) -> None:
    belief = RateFilter.start(rates[0] if rates else 0.0)
    for rate in rates:
        belief = belief.update(rate, noise_variance=noise)
        assert belief.rate_rps >= 0
        assert 0 < belief.variance < math.inf
        assert belief.rate_rps <= max(rates) + 1e-6 * (1 + max(rates))
