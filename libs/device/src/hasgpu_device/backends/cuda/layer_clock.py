"""About how much device time a running segment has used, though the host runs ahead of the device.

Launches are asynchronous: when the host passes a layer, the device may be far behind, so the host's clock says little
of the segment's device time, and asking the device at every layer would drain it. Two ways, chosen for each batch by
whether its kind (rung and padded size) has been learnt:

- **measuring**: an event is recorded at every boundary, and the host waits for the one `RUN_AHEAD` boundaries back. So
  the time up to there is known exactly, and the device keeps that many layers in store. Two such runs teach the clock
  the time of every stretch between boundaries (the first run also loads kernels; the smaller of the two counts).
- **learnt**: the sum of the stretches passed, scaled by how the last segments of this kind really went. No call to the
  device: some arithmetic a boundary.

In both, the answer at a boundary includes the stretch that follows (learnt) or the last one (measuring): a segment
should end before the boundary that would make it too long. What a segment is charged is never taken from here: it is
measured by a pair of events around the whole of it. A batch with more boundaries than learnt (a loop that runs more
often) is measured from there on.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any, Protocol

RUN_AHEAD = 8
"""Layers that the device may lie behind while they are measured: enough to hide launches, little to wait for."""
LEARNT_RUNS = 2
MAX_STRETCHES = 20_000
"""A batch of more boundaries is learnt up to here."""
_EASING = 0.2
_SCALE_BOUNDS = (0.25, 4.0)
MAX_KINDS = 512


class Events(Protocol):
    """Marks in the order of the device's work."""

    def record(self) -> Any:
        """Marks this place in the work given so far."""
        ...

    def wait(self, mark: Any) -> None:
        """Waits until the device has come to a mark."""
        ...

    def between_ns(self, first: Any, last: Any) -> int:
        """Returns the device time between two marks that the device has passed."""
        ...


@dataclass(slots=True)
class _Kind:
    """What is known of a kind of batch."""

    stretches_ns: list[int] = field(default_factory=list)
    """Before the first boundary, between boundaries, after the last."""
    runs: int = 0
    scale: float = 1.0


class LayerClock:
    """Tells time at boundaries; lives in the executor thread.

    Args:
        events: The device's.
        run_ahead: See `RUN_AHEAD`.
    """

    def __init__(self, events: Events, *, run_ahead: int = RUN_AHEAD) -> None:
        self._events = events
        self._run_ahead = run_ahead
        self._kinds: dict[Hashable, _Kind] = {}
        self._kind: _Kind | None = None
        self._index = 0
        self._stretches: list[int] = []
        self._is_measuring = False
        self._is_learning = False
        self._is_over = False
        self._open: deque[Any] = deque()
        self._last_mark: Any = None
        self._known_ns = 0
        self._last_ns = 0
        self._passed_ns = 0

    def begin_batch(self, kind: Hashable) -> None:
        """A batch begins, in a running segment."""
        known = self._kinds.get(kind)
        if known is None:
            if len(self._kinds) >= MAX_KINDS:
                self._kinds.pop(next(iter(self._kinds)))
            known = self._kinds[kind] = _Kind()
        self._kind = known
        self._index = 0
        self._stretches = []
        self._is_measuring = self._is_learning = known.runs < LEARNT_RUNS
        self._is_over = False
        self._passed_ns = 0

    def begin_segment(self, mark: Any) -> None:
        """A segment begins at this mark."""
        self._open.clear()
        self._last_mark = mark
        self._known_ns = self._last_ns = self._passed_ns = 0

    def boundary(self) -> int:
        """A boundary is passed; returns the segment's device time as told above, in nanoseconds."""
        kind = self._kind
        if kind is None or self._is_over:
            return 0
        index, self._index = self._index, self._index + 1
        learnt = kind.stretches_ns
        if not self._is_measuring:
            if index + 1 < len(learnt):
                self._passed_ns += learnt[index]
                return round((self._passed_ns + learnt[index + 1]) * kind.scale) if self._passed_ns else 0
            # More boundaries than learnt: the first mark that is waited for covers the segment so far.
            self._is_measuring = True
            self._passed_ns = 0
        self._open.append(self._events.record())
        while len(self._open) > self._run_ahead:
            self._settle()
        return self._known_ns + self._last_ns

    def _settle(self) -> None:
        """Waits for the oldest open mark."""
        mark = self._open.popleft()
        self._events.wait(mark)
        self._last_ns = self._events.between_ns(self._last_mark, mark)
        self._last_mark = mark
        self._known_ns += self._last_ns
        if len(self._stretches) < MAX_STRETCHES:
            self._stretches.append(self._last_ns)

    def end_batch(self, *, complete: bool = True) -> None:
        """The batch is over; to be called while its last segment still runs.

        Args:
            complete: Whether it came to its end; only then is it learnt from.
        """
        kind = self._kind
        if kind is None:
            return
        self._is_over = True
        if not complete:
            self._kind = None
        elif self._is_learning:
            self._open.append(self._events.record())
            while self._open:
                self._settle()
            self._learn(kind)
        elif not self._is_measuring and self._index < len(kind.stretches_ns):
            # What follows the last boundary belongs to the segment that is about to end.
            self._passed_ns += kind.stretches_ns[self._index]

    def end_segment(self, device_ns: int) -> None:
        """A segment ended, and the device with it.

        Args:
            device_ns: What was measured for it.
        """
        kind = self._kind
        if kind is None:
            return
        if self._is_measuring:
            while self._open:
                self._settle()
        elif self._passed_ns and device_ns:
            low, high = _SCALE_BOUNDS
            really = min(high, max(low, device_ns / self._passed_ns))
            kind.scale += _EASING * (really - kind.scale)
        if self._is_over:
            self._kind = None

    def _learn(self, kind: _Kind) -> None:
        seen, before = self._stretches, kind.stretches_ns
        if len(seen) == len(before):
            kind.stretches_ns = [min(one, other) for one, other in zip(seen, before, strict=True)]
        elif len(seen) > len(before):
            kind.stretches_ns = seen
        kind.runs += 1

    def stretches_ns(self, kind: Hashable) -> tuple[int, ...]:
        """Returns what was learnt: the time before the first boundary, between boundaries and after the last."""
        known = self._kinds.get(kind)
        return tuple(known.stretches_ns) if known is not None else ()

    def forget(self, kind: Hashable) -> None:
        """Forgets a kind whose batches are run in another way from now on."""
        self._kinds.pop(kind, None)
