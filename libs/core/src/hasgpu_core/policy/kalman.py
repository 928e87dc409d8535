"""A scalar Kalman filter of a request rate."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RateFilter:
    """The filter's belief; each function has one of its own."""

    rate_rps: float
    variance: float

    @classmethod
    def start(cls, measured_rps: float) -> RateFilter:
        """Returns the belief after one first measurement."""
        raise NotImplementedError

    def update(self, measured_rps: float) -> RateFilter:
        """Returns the belief after one more measurement."""
        raise NotImplementedError
