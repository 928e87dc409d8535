"""Discrete events in virtual time."""

from __future__ import annotations

import heapq
from collections.abc import Callable

_FIRST = -(1 << 40)
"""Sequence numbers from here on come before those of all other events."""


class EventQueue:
    """Calls back in the order of time, and of scheduling at equal times."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._sequence = 0
        self._now_s = 0.0

    @property
    def now_s(self) -> float:
        """The virtual time."""
        return self._now_s

    def at(self, when_s: float, call: Callable[[], None]) -> None:
        """Schedules; a time that has passed is refused."""
        if when_s < self._now_s:
            raise ValueError(f"{when_s} s has passed; it is {self._now_s} s")
        self._sequence += 1
        heapq.heappush(self._heap, (when_s, self._sequence, call))

    def at_first(self, when_s: float, rank: int, call: Callable[[], None]) -> None:
        """Schedules before all that `at` schedules for the same time, in the order of `rank` (0 and up)."""
        if when_s < self._now_s:
            raise ValueError(f"{when_s} s has passed; it is {self._now_s} s")
        heapq.heappush(self._heap, (when_s, _FIRST + rank, call))

    def after(self, delay_s: float, call: Callable[[], None]) -> None:
        """Schedules a time from now."""
        self.at(self._now_s + delay_s, call)

    def run_until(self, end_s: float) -> None:
        """Runs everything up to and including `end_s`; the time is `end_s` then."""
        heap, pop = self._heap, heapq.heappop
        while heap and heap[0][0] <= end_s:
            self._now_s, _, call = pop(heap)
            call()
        self._now_s = end_s
