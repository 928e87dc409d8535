"""The last decisions, kept in memory so that they can be explained."""

from __future__ import annotations

import heapq
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass, field

from hasgpu_core.policy.scaling import ActionKind, Decision

KEPT_COUNT = 500
DEFAULT_LIMIT = 20
ADVISORY = "advisory"


@dataclass(frozen=True, slots=True)
class LoggedDecision:
    """A decision and how it came about."""

    decision: Decision
    decided_unix_ns: int
    revision: int
    """Of the desired state after it."""
    origin: str
    """"policy", "manual", or "advisory": shown and not done."""
    policy: str
    """The policy's name; empty for one made by hand."""
    slo_ms: int

    @property
    def idle(self) -> bool:
        """Whether it changed nothing."""
        return not self.decision.actions


def _says_the_same(before: LoggedDecision, after: LoggedDecision) -> bool:
    return before.origin == after.origin and before.decision.actions == after.decision.actions


@dataclass(slots=True)
class _Ring:
    """Decisions that acted and decisions that did not, apart, so that quiet times don't push the former out."""

    acted: deque[LoggedDecision] = field(default_factory=lambda: deque(maxlen=KEPT_COUNT))
    idle: deque[LoggedDecision] = field(default_factory=lambda: deque(maxlen=KEPT_COUNT))


class DecisionLog:
    """Keeps the last KEPT_COUNT decisions of each function that changed something, and as many that did not."""

    def __init__(self) -> None:
        self._rings: dict[str, _Ring] = {}
        self._last: dict[str, LoggedDecision] = {}
        self._actions: dict[str, Counter[tuple[ActionKind, str]]] = {}

    def add(self, logged: LoggedDecision) -> None:
        """Keeps a decision; of idle ones in a row for the same reason only the newest."""
        function = logged.decision.function
        self._last[function] = logged
        self._actions.setdefault(function, Counter()).update(
            (action.kind, logged.origin) for action in logged.decision.actions
        )
        ring = self._rings.setdefault(function, _Ring())
        if not logged.idle:
            if logged.origin == ADVISORY and ring.acted and _says_the_same(ring.acted[-1], logged):
                ring.acted.pop()  # it is said at every pass while nobody does it
            ring.acted.append(logged)
            return
        if ring.idle:
            last = ring.idle[-1]
            acted_since = ring.acted and ring.acted[-1].decided_unix_ns > last.decided_unix_ns
            if last.decision.reason == logged.decision.reason and not acted_since:
                ring.idle.pop()
        ring.idle.append(logged)

    def newest(self, function: str, *, limit: int = 0, include_idle: bool = False) -> list[LoggedDecision]:
        """Returns decisions, newest first; at most `limit` (0: DEFAULT_LIMIT). Unknown function: none."""
        ring = self._rings.get(function)
        if ring is None:
            return []
        merged: list[LoggedDecision] = list(reversed(ring.acted))
        if include_idle:
            merged = list(
                heapq.merge(merged, reversed(ring.idle), key=lambda logged: logged.decided_unix_ns, reverse=True)
            )
        return merged[: limit or DEFAULT_LIMIT]

    def last(self, function: str) -> LoggedDecision | None:
        """Returns the newest decision, whether it changed something or not."""
        return self._last.get(function)

    def actions_count(self, function: str) -> Mapping[tuple[ActionKind, str], int]:
        """Returns how many changes of each kind and origin this process has decided."""
        return self._actions.get(function, {})

    def forget(self, function: str) -> None:
        """Drops a deleted function's decisions."""
        for held in (self._rings, self._last, self._actions):
            held.pop(function, None)
