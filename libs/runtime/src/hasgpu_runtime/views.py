"""Last values of STATE subjects as a dictionary that keeps itself up to date."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Generic, TypeVar

from hasgpu_core.errors import InvalidError
from hasgpu_core.ports import Bus, CaughtUp, StateChange

_log = logging.getLogger(__name__)

_T = TypeVar("_T")


class StateView(Generic[_T]):
    """Follows patterns of one kind of event; `run` it in a task.

    Args:
        bus: Where the events come from.
        patterns: Of subjects whose payloads `decode` reads.
        decode: Raises InvalidError for what it can't read; that is logged, and the last readable value stays.
        on_change: Called with the subject and the new value, None when it went; must not block.
        on_caught_up: Called each time all last values have been read.
    """

    def __init__(
        self,
        bus: Bus,
        *patterns: str,
        decode: Callable[[bytes], _T],
        on_change: Callable[[str, _T | None], None] | None = None,
        on_caught_up: Callable[[], None] | None = None,
    ) -> None:
        self._bus = bus
        self._patterns = patterns
        self._decode = decode
        self._on_change = on_change
        self._on_caught_up = on_caught_up
        self._values: dict[str, _T] = {}
        self._caught_up = asyncio.Event()

    @property
    def values(self) -> Mapping[str, _T]:
        """Subject to value, as of now; a live view."""
        return MappingProxyType(self._values)

    @property
    def is_caught_up(self) -> bool:
        """Whether all last values have been read once."""
        return self._caught_up.is_set()

    async def caught_up(self) -> None:
        """Waits until all last values have been read once."""
        await self._caught_up.wait()

    async def run(self) -> None:
        """Follows the changes until it is cancelled."""
        async with self._bus.watch(*self._patterns) as changes:
            async for change in changes:
                if isinstance(change, CaughtUp):
                    self._caught_up.set()
                    if self._on_caught_up is not None:
                        self._on_caught_up()
                else:
                    self._apply(change)

    def _apply(self, change: StateChange) -> None:
        if change.payload is None:
            if self._values.pop(change.subject, None) is None:
                return
            value = None
        else:
            try:
                value = self._decode(change.payload)
            except InvalidError as error:
                _log.warning("%s can't be read: %s", change.subject, error)
                return
            self._values[change.subject] = value
        if self._on_change is not None:
            self._on_change(change.subject, value)
