"""Queueing and batch formation at the gateway."""

from __future__ import annotations

import heapq
from bisect import bisect_left
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Generic, TypeVar

from hasgpu_core.errors import QueueFullError

T = TypeVar("T")

_COMPACT_AT_DEAD_COUNT = 64
"""Heaps are rebuilt when more of their entries than this, and more than half of them, may be dead."""
_LEAST_LATENCY_S = 1e-6
_ABOUT_AS_GOOD = 0.9
"""Predictions are not exact; of batch sizes within this part of the best the largest is taken."""


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
    """An item and where it stands; shared by the heaps, so that taking it out of one takes it out of all."""

    __slots__ = ("alive", "item", "late", "number")

    def __init__(self, item: Waiting[T], number: int) -> None:
        self.item = item
        self.alive = True
        self.late = False
        """It can't be answered by its due time any more."""
        self.number = number


_Heap = list[tuple[float, int, int, _Entry[T]]]
"""(time, sequence, number of the push, entry): the third keeps equal keys from comparing entries."""


class _Line(Generic[T]):
    """Entries by due time, all together and by signature: those that can still be in time, or those that can't."""

    def __init__(self, *, late: bool) -> None:
        self._late = late
        self._all: _Heap[T] = []
        self._by_signature: dict[Hashable, _Heap[T]] = {}

    def push(self, entry: _Entry[T]) -> None:
        key = (entry.item.due_s, entry.item.sequence, entry.number, entry)
        heapq.heappush(self._all, key)
        heapq.heappush(self._by_signature.setdefault(entry.item.signature, []), key)

    def first(self) -> _Entry[T] | None:
        return self._head(self._all)

    def pop(self, signature: Hashable) -> _Entry[T] | None:
        """Takes the signature's first entry out of its heap (and leaves it in the other)."""
        heap = self._by_signature.get(signature, [])
        entry = self._head(heap)
        if entry is not None:
            heapq.heappop(heap)
        elif not heap:
            self._by_signature.pop(signature, None)
        return entry

    def put_back(self, entry: _Entry[T]) -> None:
        """Undoes `pop`."""
        key = (entry.item.due_s, entry.item.sequence, entry.number, entry)
        heapq.heappush(self._by_signature.setdefault(entry.item.signature, []), key)

    @property
    def size(self) -> int:
        """Entries held, dead ones included."""
        return len(self._all) + sum(map(len, self._by_signature.values()))

    def _head(self, heap: _Heap[T]) -> _Entry[T] | None:
        """The first entry that still waits here; others before it are dropped."""
        while heap and not (heap[0][3].alive and heap[0][3].late == self._late):
            heapq.heappop(heap)
        return heap[0][3] if heap else None


class EdfQueue(Generic[T]):
    """Requests of one function, earliest due time first, with a bound.

    A request that can't be answered by its due time any more goes behind all that can: late is late, and serving it
    first would make the next one late too, and so on (the domino effect of earliest-deadline-first under overload).
    Late requests are served in due order as room is left, until their deadline.

    Each entry lies in three heaps: of all by due time, of its signature by due time, of all by deadline. An entry
    taken out through one is only marked and dropped from the others when it surfaces or when dead entries prevail, so
    each operation costs O(log n) on average. Not for several threads at once.
    """

    def __init__(self, *, max_count: int) -> None:
        self._max_count = max_count
        self._by_request: dict[int, _Entry[T]] = {}
        self._timely: _Line[T] = _Line(late=False)
        self._late: _Line[T] = _Line(late=True)
        self._deadline: _Heap[T] = []
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
        self._pushes += 1
        entry = _Entry(item, self._pushes)
        self._by_request[id(item.request)] = entry
        self._rows += item.rows
        self._insert(entry)
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
        out: list[Waiting[T]] = []
        while True:
            while self._deadline and not self._deadline[0][3].alive:
                heapq.heappop(self._deadline)
            if not self._deadline or self._deadline[0][0] > now_s:
                return out
            entry = self._deadline[0][3]
            self._take(entry)
            out.append(entry.item)

    def oldest_due_s(self) -> float | None:
        """Returns the earliest due time, late requests included; None when empty."""
        firsts = [entry.item.due_s for entry in (self._timely.first(), self._late.first()) if entry is not None]
        return min(firsts, default=None)

    def reconsider(self) -> None:
        """Forgets who was found to be late: predictions have changed, and some may be in time after all."""
        entries = [entry for entry in self._by_request.values() if entry.late]
        for entry in entries:
            entry.late = False
        if entries:
            self._rebuild()

    def form_batch(
        self,
        now_s: float,
        *,
        max_rows: int,
        latency_s: Callable[[int], float | None],
        soonest_s: Callable[[int], float | None] | None = None,
    ) -> list[Waiting[T]]:
        """Takes out the next batch for an instance; empty when nothing waits, or who waits does better elsewhere.

        `latency_s` gives the predicted time from now until this instance has answered so many rows; `soonest_s` the
        same for whichever instance would be first (None: this is the only one). Who can't be in time there is late.

        The first is the earliest due of those that can be in time; others of its signature follow in due order. Of the
        sizes possible the one is taken that answers the most rows in time per second of the predicted latency (None:
        unknown, any size will do), the largest where several are about as good: without congestion that is the
        largest batch that ends before its first is due; with it, a first request that would force small batches on all
        behind it is let go late. Room that is left goes to late requests, as long as nobody else becomes late by it.
        When nobody can be in time, throughput counts: late requests, as many as fit.

        A first request with more rows than `max_rows` goes alone; nothing overtakes a request of its signature and
        line that no longer fits.
        """
        first = self._first_timely(now_s, soonest_s or latency_s)
        if first is None or not _in_time(first.item, now_s, latency_s(first.item.rows)):
            return self._form_late(max_rows)
        candidates = self._candidates(self._timely, first.item.signature, max_rows, rows=0)
        count = _best_count([entry.item for entry in candidates], now_s, latency_s)
        for entry in candidates[count:]:
            self._timely.put_back(entry)
        chosen = candidates[:count]
        batch = [entry.item for entry in chosen]
        rows = sum(item.rows for item in batch)
        latency = latency_s(rows)
        in_time_due_s = [item.due_s for item in batch if _in_time(item, now_s, latency)]
        extra = self._candidates(self._late, first.item.signature, max_rows, rows=rows)
        for at, entry in enumerate(extra):
            grown = latency_s(rows + entry.item.rows)
            if grown is not None and now_s + grown > min(in_time_due_s):
                for rest in extra[at:]:
                    self._late.put_back(rest)
                break
            rows += entry.item.rows
            batch.append(entry.item)
            chosen.append(entry)
        for entry in chosen:
            self._take(entry)
        self._compact()
        return batch

    def _first_timely(self, now_s: float, latency_s: Callable[[int], float | None]) -> _Entry[T] | None:
        """The earliest due that can be in time; those before it go to the line of the late."""
        while (entry := self._timely.first()) is not None:
            if _in_time(entry.item, now_s, latency_s(entry.item.rows)):
                return entry
            entry.late = True
            self._late.push(entry)
        return None

    def _form_late(self, max_rows: int) -> list[Waiting[T]]:
        first = self._late.first()
        if first is None:
            return []
        chosen = self._candidates(self._late, first.item.signature, max_rows, rows=0)
        for entry in chosen:
            self._take(entry)
        self._compact()
        return [entry.item for entry in chosen]

    def _candidates(self, line: _Line[T], signature: Hashable, max_rows: int, *, rows: int) -> list[_Entry[T]]:
        """Takes out of a signature's heap, in due order, what fits beside `rows`; beside none, the first always."""
        out: list[_Entry[T]] = []
        while (entry := line.pop(signature)) is not None:
            if rows and rows + entry.item.rows > max_rows:
                line.put_back(entry)
                break
            rows += entry.item.rows
            out.append(entry)
            if rows >= max_rows:
                break
        return out

    def _insert(self, entry: _Entry[T]) -> None:
        heapq.heappush(self._deadline, (entry.item.deadline_s, entry.item.sequence, entry.number, entry))
        (self._late if entry.late else self._timely).push(entry)

    def _take(self, entry: _Entry[T]) -> None:
        entry.alive = False
        del self._by_request[id(entry.item.request)]
        self._rows -= entry.item.rows

    def _compact(self) -> None:
        """Rebuilds the heaps once most of what was pushed since the last time is dead: a bound on all of them."""
        if self._pushes - len(self) > max(_COMPACT_AT_DEAD_COUNT, len(self)):
            self._rebuild()

    def _rebuild(self) -> None:
        self._timely, self._late, self._deadline = _Line(late=False), _Line(late=True), []
        for number, entry in enumerate(self._by_request.values(), start=1):
            entry.number = number
            self._insert(entry)
        self._pushes = len(self._by_request)


def _in_time(item: Waiting[T], now_s: float, latency_s: float | None) -> bool:
    """Whether an answer after so long is in time; an unknown latency is taken to be."""
    return latency_s is None or now_s + latency_s <= item.due_s


def _best_count(items: Sequence[Waiting[T]], now_s: float, latency_s: Callable[[int], float | None]) -> int:
    """How many of the items, in due order, answer the most rows in time per second; the most of those about as good."""
    dues_s = [item.due_s for item in items]
    rows_before = list(accumulate((item.rows for item in items), initial=0))
    rates: list[float] = []
    for count in range(1, len(items) + 1):
        rows = rows_before[count]
        latency = latency_s(rows)
        if latency is None:
            return len(items)
        # In due order the late are the first.
        late_rows = rows_before[bisect_left(dues_s, now_s + latency, 0, count)]
        rates.append((rows - late_rows) / max(latency, _LEAST_LATENCY_S))
    enough = _ABOUT_AS_GOOD * max(rates)
    return max(count for count, rate in enumerate(rates, start=1) if rate >= enough)
