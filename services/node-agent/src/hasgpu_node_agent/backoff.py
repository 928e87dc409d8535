"""How long to wait before a failed worker is started again."""

from __future__ import annotations

FIRST_S = 0.2
LONGEST_S = 10.0
HEALTHY_S = 30.0
"""After this long in good health the next failure counts as the first."""


class Backoff:
    """0.2 s, doubling to 10 s; starts over after 30 s of health."""

    def __init__(self) -> None:
        self._delay_s = FIRST_S
        self._until_s: float | None = None
        self._ready_since_s: float | None = None

    def ready(self, now_s: float) -> None:
        """Notes that the worker is in good health since now."""
        self._ready_since_s = now_s

    def failed(self, now_s: float) -> float:
        """Notes a failure; returns the delay in seconds until the next try."""
        if self._ready_since_s is not None and now_s - self._ready_since_s >= HEALTHY_S:
            self._delay_s = FIRST_S
        self._ready_since_s = None
        delay_s = self._delay_s
        self._until_s = now_s + delay_s
        self._delay_s = min(LONGEST_S, self._delay_s * 2)
        return delay_s

    def wait_s(self, now_s: float) -> float:
        """Returns the seconds until the next try may be made; 0.0: now."""
        return 0.0 if self._until_s is None else max(0.0, self._until_s - now_s)

    def reset(self) -> None:
        """Starts over: what is tried next is something else."""
        self._delay_s = FIRST_S
        self._until_s = None
