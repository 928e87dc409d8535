"""A scalar Kalman filter of a request rate."""

from __future__ import annotations

import math
from dataclasses import dataclass

PROCESS_VARIANCE = 1.0
"""Q in rps²: how far the true rate wanders between two measurements (HAS-GPU's released constant)."""
PROCESS_FRACTION = 0.03
"""At high rates Q is the square of this part of the rate instead: large rates are followed as fast as small ones."""
MEASUREMENT_VARIANCE = 10.0
"""R in rps²: the noise of one measurement (HAS-GPU's released constant; the Poisson variance of 20 rps over 2 s)."""
START_VARIANCE = 1.0
"""P0 in rps² (HAS-GPU's released constant)."""
GATE_SIGMAS = 3.0
"""A measurement further off than this many standard deviations is a step of the load, not noise."""
TWICE_SIGMAS = 2.0
"""So are two in a row, to the same side, that are further off than this."""


@dataclass(frozen=True, slots=True)
class RateFilter:
    """The filter's belief; each function has one of its own.

    The model is a random walk measured directly (A = H = 1), with HAS-GPU's constants. Two things differ from its
    released code. There, `1·√P` is added to the state after every update and the state is clamped to the measurement
    plus 5 rps, so that the belief settles about 6 rps above any load and never comes down; here the belief is the
    estimate. And a measurement outside GATE_SIGMAS standard deviations of what the filter expects, or the second in a
    row outside TWICE_SIGMAS, replaces the belief at once (innovation gating), so that a step, up or down, is followed
    within an update or two while noise is smoothed.
    """

    rate_rps: float
    variance: float
    leaning: int = 0
    """The side (+1, -1) on which the last measurement was outside TWICE_SIGMAS; 0: it was inside."""

    @classmethod
    def start(cls, measured_rps: float) -> RateFilter:
        """Returns the belief after one first measurement."""
        return cls(max(0.0, measured_rps), START_VARIANCE)

    def update(self, measured_rps: float, *, noise_variance: float = MEASUREMENT_VARIANCE) -> RateFilter:
        """Returns the belief after one more measurement.

        `noise_variance` in rps² is that of this measurement: counting Poisson arrivals of rate r over a window of w
        seconds has the variance r / w, so a short window at a low rate is trusted more than R = 10 would say.
        """
        process = max(PROCESS_VARIANCE, (PROCESS_FRACTION * self.rate_rps) ** 2)
        expected_variance = self.variance + process
        innovation = measured_rps - self.rate_rps
        sigmas = abs(innovation) / math.sqrt(expected_variance + noise_variance)
        leaning = 0 if sigmas <= TWICE_SIGMAS else 1 if innovation > 0 else -1
        if sigmas > GATE_SIGMAS or (leaning and leaning == self.leaning):
            return RateFilter(max(0.0, measured_rps), noise_variance)
        gain = expected_variance / (expected_variance + noise_variance)
        rate_rps = max(0.0, self.rate_rps + gain * innovation)
        return RateFilter(rate_rps, (1.0 - gain) * expected_variance, leaning)
