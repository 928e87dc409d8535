"""Whether a worker still shows that it lives.

A worker beats in its control block every quarter of a second and ends itself when a batch hangs. A handler that hangs
while it holds Python's interpreter lock stops all of that, so the agent looks from outside.
"""

from __future__ import annotations

from dataclasses import dataclass

SILENCE_S = 10.0
"""So long a worker may be silent in any case: its host may be short of time."""
EXECUTION_MARGIN_S = 5.0
"""So long beyond the longest time that a batch may take."""
LONGEST_STEP_S = 2.5
"""More than this between two looks means that the agent itself was kept from looking, which proves nothing."""


def allowed_silence_s(execution_timeout_ms: int) -> float:
    """Returns for how long a worker may be silent: a batch may rightly hold the interpreter lock as long as it runs."""
    return max(SILENCE_S, execution_timeout_ms / 1e3 + EXECUTION_MARGIN_S)


@dataclass(slots=True)
class Pulse:
    """For how long a worker has been silent, as far as it was watched."""

    beat_ns: int = 0
    """The last sign of life seen; 0: none yet."""
    looked_at_s: float = 0.0
    silent_s: float = 0.0

    def look(self, beat_ns: int, now_s: float) -> float:
        """Takes note of the worker's newest sign of life.

        Args:
            beat_ns: As the worker wrote it; 0: it has not begun to.
            now_s: Monotonic.

        Returns:
            Seconds that passed under watch since the sign of life last changed; 0 before the first.
        """
        if beat_ns != self.beat_ns or beat_ns == 0:
            self.silent_s = 0.0
        else:
            self.silent_s += min(max(0.0, now_s - self.looked_at_s), LONGEST_STEP_S)
        self.beat_ns, self.looked_at_s = beat_ns, now_s
        return self.silent_s
