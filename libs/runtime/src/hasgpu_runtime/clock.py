"""The one place outside measuring device code where the system's time is read."""

from __future__ import annotations

import asyncio
import time


class SystemClock:
    """Implements `hasgpu_core.ports.Clock` on the machine's clocks."""

    def now_s(self) -> float:
        """Returns monotonic seconds; only differences mean anything."""
        return time.monotonic()  # noqa: TID251  this is the clock

    def unix_ns(self) -> int:
        """Returns nanoseconds since 1970."""
        return time.time_ns()

    async def sleep(self, delay_s: float) -> None:
        """Waits; a delay of zero or less yields once."""
        await asyncio.sleep(max(0.0, delay_s))  # noqa: TID251  this is the clock
