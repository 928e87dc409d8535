"""Refusing early what can't be answered in time."""

from __future__ import annotations

from dataclasses import dataclass

SHORTEST_RETRY_S = 0.1
"""A refused caller is never asked back sooner, so that refusals don't turn into a spin."""
LONGEST_RETRY_S = 30.0
"""Nor told to stay away longer: scaling will have acted by then."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a request is not taken."""

    reason: str
    retry_after_s: float


def admit(
    *,
    now_s: float,
    deadline_s: float,
    rows: int,
    queued_rows: int,
    capacity_rps: float | None,
    batch_latency_s: float | None,
) -> Refusal | None:
    """Returns None when the request can be answered before its deadline as far as is known, else the refusal.

    `capacity_rps` is the full throughput of the ready instances; None or 0 (none is ready, or no prediction exists
    yet) admits: the request waits for an instance within its deadline. The answer is expected after the rows ahead
    have run at that throughput and then the request's own batch (`batch_latency_s`, or its own rows at that
    throughput, whichever is longer). The caller is asked back after the excess: then the queue will be short enough.
    """
    left_s = deadline_s - now_s
    if left_s <= 0:
        return Refusal(f"the deadline passed {-left_s * 1e3:.0f} ms ago", SHORTEST_RETRY_S)
    if not capacity_rps or capacity_rps <= 0:
        return None
    own_s = max(batch_latency_s or 0.0, rows / capacity_rps)
    expected_s = queued_rows / capacity_rps + own_s
    if expected_s <= left_s:
        return None
    return Refusal(
        f"{queued_rows} rows wait ahead at {capacity_rps:.1f} rows/s: the answer is expected in "
        f"{expected_s * 1e3:.0f} ms, the deadline is in {left_s * 1e3:.0f} ms",
        min(LONGEST_RETRY_S, max(SHORTEST_RETRY_S, expected_s - left_s)),
    )
