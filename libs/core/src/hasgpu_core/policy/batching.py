"""Queueing and batch formation at the gateway."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Waiting(Generic[T]):
    """One request in line."""

    request: T
    rows: int
    """Items that it adds to a batch."""
    signature: Hashable
    """Requests of one batch agree in it (shapes and datatypes beyond the batch dimension)."""
    due_s: float
    """Arrival plus objective; orders the queue."""
    deadline_s: float
    """Past it the answer is of no use to the caller."""
    sequence: int
    """Breaks ties in arrival order."""
    retried: bool = False


class EdfQueue(Generic[T]):
    """Requests of one function, earliest due time first, with a bound."""

    def __init__(self, *, max_count: int) -> None:
        raise NotImplementedError

    def __len__(self) -> int:
        raise NotImplementedError

    def push(self, item: Waiting[T]) -> None:
        """Adds; raises QueueFullError ("Exceeds maximum queue size") at the bound (a retried item is always taken)."""
        raise NotImplementedError

    def discard(self, request: T) -> bool:
        """Takes a request out, by identity (its caller went away); tells whether it was there."""
        raise NotImplementedError

    def expired(self, now_s: float) -> list[Waiting[T]]:
        """Takes out and returns what can't be answered any more."""
        raise NotImplementedError

    def oldest_due_s(self) -> float | None:
        """Returns the earliest due time; None when empty."""
        raise NotImplementedError

    def form_batch(self, now_s: float, *, max_rows: int, latency_s: Callable[[int], float | None]) -> list[Waiting[T]]:
        """Takes out the next batch (empty when nothing waits).

        The first is the earliest due; others of its signature follow in due order while the predicted latency of the
        grown batch (None: unknown, any size will do) lets it finish before the first's due time. When even the first
        alone would be late, throughput counts and the batch grows to `max_rows`.
        """
        raise NotImplementedError
