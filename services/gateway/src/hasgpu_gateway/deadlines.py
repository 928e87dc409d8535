"""One timer for the deadlines of many requests."""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Callable

from hasgpu_core.ports import Clock

from hasgpu_gateway.pending import Pending

_COMPACT_AT = 1_024
"""Entries from which those of answered requests are thrown out before their time."""


class Deadlines:
    """Calls back when a request's deadline comes, unless the request was dropped by then.

    An answered request is let go at once; only its deadline stays behind until it comes, or until such numbers prevail.
    """

    def __init__(self, clock: Clock, expire: Callable[[Pending], None]) -> None:
        self._clock = clock
        self._expire = expire
        self._live: dict[int, Pending] = {}
        self._heap: list[tuple[float, int]] = []
        self._timer: asyncio.TimerHandle | None = None
        self._armed_s = float("inf")

    def __len__(self) -> int:
        return len(self._live)

    def add(self, pending: Pending) -> None:
        """Watches over a request."""
        self._live[pending.sequence] = pending
        heapq.heappush(self._heap, (pending.deadline_s, pending.sequence))
        if len(self._heap) >= max(_COMPACT_AT, 2 * len(self._live)):
            self._heap = [entry for entry in self._heap if entry[1] in self._live]
            heapq.heapify(self._heap)
        if pending.deadline_s < self._armed_s:
            self._arm()

    def drop(self, pending: Pending) -> None:
        """The request is answered."""
        self._live.pop(pending.sequence, None)

    def close(self) -> None:
        """Forgets all."""
        self._heap.clear()
        self._live.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _arm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._armed_s = float("inf")
        while self._heap and self._heap[0][1] not in self._live:
            heapq.heappop(self._heap)
        if self._heap:
            self._armed_s = self._heap[0][0]
            delay_s = max(0.0, self._armed_s - self._clock.now_s())
            self._timer = asyncio.get_running_loop().call_later(delay_s, self._fire)

    def _fire(self) -> None:
        now_s = self._clock.now_s()
        self._timer = None
        while self._heap and self._heap[0][0] <= now_s:
            pending = self._live.pop(heapq.heappop(self._heap)[1], None)
            if pending is not None:
                self._expire(pending)
        self._arm()
