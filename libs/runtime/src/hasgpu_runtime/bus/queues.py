"""Bounded queues between a broker's callbacks and the one task that iterates over them."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from typing import Generic, TypeVar

from hasgpu_core.ports import CaughtUp, StateChange

_T = TypeVar("_T")

DEFAULT_BOUND = 4_096
"""Messages held for one listener."""


class DroppingQueue(Generic[_T]):
    """Keeps the newest `bound` items; `dropped_count` tells how many older ones a slow reader has lost."""

    def __init__(self, bound: int = DEFAULT_BOUND) -> None:
        self._items: deque[_T] = deque(maxlen=bound)
        self._ready = asyncio.Event()
        self.dropped_count = 0

    def put(self, item: _T) -> None:
        """Appends; at the bound the oldest item goes."""
        if len(self._items) == self._items.maxlen:
            self.dropped_count += 1
        self._items.append(item)
        self._ready.set()

    def __aiter__(self) -> AsyncIterator[_T]:
        return self

    async def __anext__(self) -> _T:
        while not self._items:
            self._ready.clear()
            await self._ready.wait()
        return self._items.popleft()


class ChangeQueue:
    """Changes of a watch in order; past the bound, all but the last change of a subject are dropped.

    So it never holds more than the bound or the number of subjects, whichever is larger.
    """

    def __init__(self, bound: int = DEFAULT_BOUND) -> None:
        self._items: deque[StateChange | CaughtUp] = deque()
        self._bound = bound
        self._compact_at = bound
        self._ready = asyncio.Event()

    def put(self, item: StateChange | CaughtUp) -> None:
        """Appends."""
        self._items.append(item)
        if len(self._items) > self._compact_at:
            self._compact()
        self._ready.set()

    def _compact(self) -> None:
        """Keeps the last change of each subject, in the order of these, and the last CaughtUp."""
        newest: dict[str, StateChange | CaughtUp] = {}
        for item in self._items:
            key = item.subject if isinstance(item, StateChange) else ""
            newest.pop(key, None)
            newest[key] = item
        self._items = deque(newest.values())
        self._compact_at = max(self._bound, 2 * len(self._items))

    def __aiter__(self) -> AsyncIterator[StateChange | CaughtUp]:
        return self

    async def __anext__(self) -> StateChange | CaughtUp:
        while not self._items:
            self._ready.clear()
            await self._ready.wait()
        return self._items.popleft()
