"""A clock that a test or a simulator moves by hand."""

from __future__ import annotations


class ManualClock:
    """Stands still until moved; `sleep` moves it, so a loop that sleeps runs through its virtual time at once."""

    def __init__(self, start_s: float = 0.0, *, unix_offset_ns: int = 0) -> None:
        self._now_s = start_s
        self._unix_offset_ns = unix_offset_ns

    def now_s(self) -> float:
        """Returns the time set."""
        return self._now_s

    def unix_ns(self) -> int:
        """Returns the time set plus the offset."""
        return self._unix_offset_ns + round(self._now_s * 1e9)

    def advance(self, delay_s: float) -> None:
        """Moves the clock on; going back is refused."""
        if delay_s < 0:
            raise ValueError(f"a clock does not go back: {delay_s} s")
        self._now_s += delay_s

    async def sleep(self, delay_s: float) -> None:
        """Moves the clock on by the delay."""
        self.advance(max(0.0, delay_s))
