"""Queueing and batch formation at the gateway."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

from hasgpu_core.errors import QueueFullError

T = TypeVar("T")

_COMPACT_AT_DEAD_COUNT = 64
"""Heaps are rebuilt when more of their entries than this, and more than half of them, may be dead."""


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


class _Entry(Generic[T]):
    """An item and whether it still waits; shared by the heaps, so that taking it out of one takes it out of all."""

    __slots__ = ("alive", "item")

    def __init__(self, item: Waiting[T]) -> None:
        self.item = item
        self.alive = True


_Heap = list[tuple[float, int, int, _Entry[T]]]
"""(time, sequence, number of the push, entry): the third keeps equal keys from comparing entries."""


class EdfQueue(Generic[T]):
    """Requests of one function, earliest due time first, with a bound.

    Each entry lies in three heaps: of all by due time, of its signature by due time, of all by deadline. An entry
    taken out through one is only marked and dropped from the others when it surfaces or when dead entries prevail, so
    each operation costs O(log n) on average. Not for several threads at once.
    """

    def __init__(self, *, max_count: int) -> None:
        self._max_count = max_count
        self._by_request: dict[int, _Entry[T]] = {}
        self._due: _Heap[T] = []
        self._deadline: _Heap[T] = []
        self._by_signature: dict[Hashable, _Heap[T]] = {}
        self._rows = 0
        self._pushes = 0

    def __len__(self) -> int:
        return len(self._by_request)

    @property
    def rows(self) -> int:
        """Items of all waiting requests together."""
        return self._rows

    def push(self, item: Waiting[T]) -> None:
        """Adds; raises QueueFullError ("Exceeds maximum queue size") at the bound (a retried item is always taken)."""
        if len(self) >= self._max_count and not item.retried:
            raise QueueFullError(f"Exceeds maximum queue size: {self._max_count} requests wait")
        if id(item.request) in self._by_request:
            raise ValueError("the request waits already")
        entry = _Entry(item)
        self._by_request[id(item.request)] = entry
        self._rows += item.rows
        self._pushes += 1
        self._insert(entry, self._pushes)
        self._compact()

    def discard(self, request: T) -> bool:
        """Takes a request out, by identity (its caller went away); tells whether it was there."""
        entry = self._by_request.get(id(request))
        if entry is None:
            return False
        self._take(entry)
        self._compact()
        return True

    def expired(self, now_s: float) -> list[Waiting[T]]:
        """Takes out and returns what can't be answered any more."""
        out = []
        while (entry := _head(self._deadline)) is not None and entry.item.deadline_s <= now_s:
            self._take(entry)
            out.append(entry.item)
        return out

    def oldest_due_s(self) -> float | None:
        """Returns the earliest due time; None when empty."""
        entry = _head(self._due)
        return entry.item.due_s if entry else None

    def form_batch(self, now_s: float, *, max_rows: int, latency_s: Callable[[int], float | None]) -> list[Waiting[T]]:
        """Takes out the next batch (empty when nothing waits).

        The first is the earliest due; others of its signature follow in due order while the predicted latency of the
        grown batch (None: unknown, any size will do) lets it finish before the first's due time. When even the first
        alone would be late, throughput counts and the batch grows to `max_rows`. A first request with more rows than
        `max_rows` goes alone; nothing overtakes a request of its signature that no longer fits.
        """
        first = _head(self._due)
        if first is None:
            return []
        self._take(first)
        batch = [first.item]
        rows = first.item.rows

        def in_time(size: int) -> bool:
            latency = latency_s(size)
            return latency is None or now_s + latency <= first.item.due_s

        late = not in_time(rows)
        heap = self._by_signature.get(first.item.signature, [])
        while (entry := _head(heap)) is not None:
            grown = rows + entry.item.rows
            if grown > max_rows or not (late or in_time(grown)):
                break
            self._take(entry)
            batch.append(entry.item)
            rows = grown
        if not heap:
            self._by_signature.pop(first.item.signature, None)
        self._compact()
        return batch

    def _insert(self, entry: _Entry[T], number: int) -> None:
        item = entry.item
        heapq.heappush(self._due, (item.due_s, item.sequence, number, entry))
        heapq.heappush(self._deadline, (item.deadline_s, item.sequence, number, entry))
        heapq.heappush(self._by_signature.setdefault(item.signature, []), (item.due_s, item.sequence, number, entry))

    def _take(self, entry: _Entry[T]) -> None:
        entry.alive = False
        del self._by_request[id(entry.item.request)]
        self._rows -= entry.item.rows

    def _compact(self) -> None:
        """Rebuilds the heaps once most of what was pushed since the last time is dead: a bound on all of them."""
        if self._pushes - len(self) <= max(_COMPACT_AT_DEAD_COUNT, len(self)):
            return
        self._due, self._deadline, self._by_signature = [], [], {}
        for number, entry in enumerate(self._by_request.values(), start=1):
            self._insert(entry, number)
        self._pushes = len(self._by_request)


def _head(heap: _Heap[T]) -> _Entry[T] | None:
    """The first entry that still waits; dead ones before it are dropped."""
    while heap and not heap[0][3].alive:
        heapq.heappop(heap)
    return heap[0][3] if heap else None
