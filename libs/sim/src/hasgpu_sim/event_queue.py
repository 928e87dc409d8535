"""Discrete events in virtual time."""

from __future__ import annotations

import heapq
from collections.abc import Callable


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

    def after(self, delay_s: float, call: Callable[[], None]) -> None:
        """Schedules a time from now."""
        self.at(self._now_s + delay_s, call)

    def run_until(self, end_s: float) -> None:
        """Runs everything up to and including `end_s`; the time is `end_s` then."""
        while self._heap and self._heap[0][0] <= end_s:
            self._now_s, _, call = heapq.heappop(self._heap)
            call()
        self._now_s = end_s
