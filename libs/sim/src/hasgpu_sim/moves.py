"""The scheduler's moves in virtual time: what is to be emptied, a GPU to free, room to make.

What moves is decided by `hasgpu_core.policy.placement.migration`, as in the live scheduler, at the times at which that
looks: for what must leave at every look, for better places every `period_s`, and only when two of these looks in a row
find the same plan. How a move is made is the cluster's: the new place is taken, and the old one freed when the instance
has been READY in the new one and has answered what it had.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Protocol

from hasgpu_core.policy.placement import Ties
from hasgpu_core.policy.placement.migration import Bound, MigrationPlan, Move, Purpose, evacuate, free_gpu, make_room
from hasgpu_core.resources import Allocation, DeviceState

from hasgpu_sim.event_queue import EventQueue
from hasgpu_sim.scenario import Moving

LOOK_S = 1.0
"""Between two looks for what must leave."""
_MOST_WAITING_TRIED = 4


class Movable(Protocol):
    """What the mover sees of the cluster, and does to it."""

    def bound(self) -> Sequence[Bound]:
        """All instances that have a place."""
        ...

    def devices(self) -> Sequence[DeviceState]:
        """Devices that may take something, with all room taken."""
        ...

    def leaving(self) -> Sequence[Bound]:
        """Instances that serve where nothing may stay."""
        ...

    def waiting(self) -> Sequence[tuple[str, Allocation]]:
        """Instances that found no place, and what they need."""
        ...

    def serving(self) -> Collection[str]:
        """Instances that are READY and not moving."""
        ...

    def moving_count(self) -> int:
        """Moves under way."""
        ...

    def ties_of(self, item: Bound) -> Ties:
        """Where the others of its function are."""
        ...

    def begin(self, move: Move) -> bool:
        """Begins a move; False: things are not as they were."""
        ...


class Mover:
    """Decides what moves."""

    def __init__(self, settings: Moving, events: EventQueue, cluster: Movable) -> None:
        self._settings = settings
        self._events = events
        self._cluster = cluster
        self._queue: list[Move] = []
        self._looked_s: float | None = None
        self._seen: tuple[Purpose, str] | None = None
        self._rests_until_s: dict[str, float] = {}
        self._known: set[str] = set()

    def look(self) -> None:
        """Begins what may begin, and looks again later."""
        now_s, cluster, settings = self._events.now_s, self._cluster, self._settings
        bound = cluster.bound()
        # What was placed just now stays for a while, as what has moved does, unless it must leave.
        present = {item.planned.instance for item in bound}
        for instance in present - self._known:
            self._rests_until_s[instance] = now_s + settings.cooldown_s
        self._known = present
        leaving = [b for b in cluster.leaving() if b.planned.instance in cluster.serving()]
        if leaving:
            plan, _ = evacuate(leaving, cluster.devices(), why="its node drains", ties_of=cluster.ties_of)
            self._queue = list(plan.moves)
        elif not self._queue and not cluster.moving_count():
            self._better(bound, now_s)
        while self._queue and cluster.moving_count() < settings.at_once:
            move = self._queue.pop(0)
            if not cluster.begin(move):
                self._queue.clear()
            else:
                self._rests_until_s[move.bound.planned.instance] = now_s + settings.cooldown_s
        self._events.after(LOOK_S, self.look)

    def _better(self, bound: Sequence[Bound], now_s: float) -> None:
        """Takes a plan for better places up when two looks have found it."""
        if self._looked_s is not None and now_s - self._looked_s < self._settings.period_s:
            return
        self._looked_s = now_s
        plan = self._plan(bound, now_s)
        seen = (plan.purpose, plan.reason) if plan is not None else None
        if plan is not None and seen == self._seen:
            self._queue = list(plan.moves)
        self._seen = seen

    def _plan(self, bound: Sequence[Bound], now_s: float) -> MigrationPlan | None:
        """Moves that make room for something that waits, else moves that free a GPU."""
        cluster, settings, devices = self._cluster, self._settings, self._cluster.devices()
        serving = cluster.serving()
        pinned = {b.planned.instance for b in bound} - set(serving)
        resting = {name for name, until_s in self._rests_until_s.items() if until_s > now_s}
        for instance, allocation in list(cluster.waiting())[:_MOST_WAITING_TRIED]:
            plan = make_room(
                allocation, devices, bound, pinned=pinned, most_moves=settings.most_moves, ties_of=cluster.ties_of
            )
            if plan is not None:
                return replace(plan, reason=f"{instance} waits: {plan.reason}")
        return free_gpu(
            devices,
            bound,
            pinned=pinned | resting,
            headroom_permille=settings.headroom_permille,
            most_moves=settings.most_moves,
            ties_of=cluster.ties_of,
        )
