"""Refusing early what can't be answered in time."""

from __future__ import annotations

from dataclasses import dataclass


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
    yet) admits: the request waits for an instance within its deadline.
    """
    raise NotImplementedError
