"""What the rivals have in common: a tick of their own, drafts whose limit is the request, and their words."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

from hasgpu_core.capacity import CapacityTable
from hasgpu_core.cluster import ClusterSnapshot, FunctionView
from hasgpu_core.policy._draft import Draft, Room, Share
from hasgpu_core.policy._reasons import change_words
from hasgpu_core.policy.placement import Placement
from hasgpu_core.policy.scaling import Decision, FunctionState, PolicyState

_SLACK_S = 1e-6


@dataclass(slots=True)
class Scene:
    """One function in one pass of a rival."""

    function: FunctionView
    draft: Draft
    room: Room
    now_s: float
    capacity_rps: float = 0.0
    predicted_rps: float | None = None

    @property
    def table(self) -> CapacityTable | None:
        """Predictions for the first device model at hand."""
        for model in sorted({device.info.model for device in self.room.devices}):
            table = self.function.tables.get(model)
            if table is not None and table.points:
                return table
        return None

    @property
    def rungs_pct(self) -> tuple[int, ...]:
        """SM shares that devices give."""
        return tuple(sorted({rung for device in self.room.devices for rung in device.info.sm_rungs_pct}))

    def add(self, sm_pct: int, permille: int) -> Share | None:
        """Adds an instance where there is room; None: there is none."""
        table = self.table
        if table is None or len(self.draft.active) >= self.function.spec.max_instances:
            return None
        allocation = self.draft.allocation(sm_pct, permille)
        outcome = self.room.place(allocation, model=table.device_model)
        if not isinstance(outcome, Placement):
            return None
        self.room.occupy(outcome, allocation)
        return self.draft.add(sm_pct, permille, table.device_model)


class Rival(ABC):
    """A policy that looks at each function by itself, every `period_s`, and remembers one value of its own."""

    name = ""
    period_s = 2.0
    headroom_permille = 0
    """limit = request + this: what an instance may borrow."""
    observe_s = 0.0
    """How often it takes in what it is shown between two decisions; 0: at decisions only."""

    def decide(
        self, snapshot: ClusterSnapshot, state: PolicyState, now_s: float
    ) -> tuple[tuple[Decision, ...], PolicyState]:
        """Returns one decision a function; between two ticks of its own nothing changes."""
        room = Room(snapshot.devices)
        decisions, states = [], {}
        for function in snapshot.functions:
            before = state.functions.get(function.spec.name, FunctionState())
            draft = Draft(function, headroom_permille=self.headroom_permille, stuck=frozenset(), refused=frozenset())
            scene = Scene(function, draft, room, now_s)
            memory, reason = before.own, "between two looks"
            memory = self.observe(scene, memory)
            due = before.settled_at_s is None or now_s - before.settled_at_s >= self.period_s - _SLACK_S
            held = function.held or not room.devices or scene.table is None
            if due and not held:
                memory, reason = self.scale(scene, memory)
            decided_s = now_s if due else before.settled_at_s
            states[function.spec.name] = FunctionState(own=memory, settled_at_s=decided_s)
            decisions.append(self._decision(scene, reason))
        return tuple(decisions), PolicyState(states)

    def observe(self, scene: Scene, memory: object) -> object:
        """Takes in what is shown at every look; returns what is remembered."""
        return memory

    @abstractmethod
    def scale(self, scene: Scene, memory: object) -> tuple[object, str]:
        """Changes the draft; returns what is remembered and the reason in words."""

    def _decision(self, scene: Scene, reason: str) -> Decision:
        draft, demand = scene.draft, scene.function.demand
        actions = draft.actions()
        words = "; ".join([change_words(action, draft) for action in actions] or ["nothing to do"])
        return Decision(
            function=scene.function.spec.name,
            desired=draft.desired(),
            actions=actions,
            reason=f"{reason}: {words}",
            look_again_s=self.observe_s or self.period_s,
            next_ordinal=draft.next_ordinal,
            observed_rps=demand.rate_rps,
            predicted_rps=scene.predicted_rps,
            capacity_rps=scene.capacity_rps,
            queued_items_count=demand.queued_items_count,
            p95_s=demand.p95_s,
        )


def remove_surplus(draft: Draft, wanted: int, order: Callable[[Share], object]) -> None:
    """Removes active instances until so many are left, the least by `order` first."""
    active = sorted(draft.active, key=order)  # type: ignore[arg-type]  # keys are tuples of comparables
    for share in active[: max(0, len(active) - wanted)]:
        draft.remove(share)
