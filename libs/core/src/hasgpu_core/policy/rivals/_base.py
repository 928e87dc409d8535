"""What the rivals have in common: a tick of their own, drafts whose limit is the request, and their words.

A rival that takes over from another policy finds instances of a shape that it would never choose. At its first look it
names these, scales as if they were not there, and lets them serve until its own are ready and enough. Where there is no
room for its own beside them, one of several goes if the rest sustain the rate, and otherwise they go on serving: no
request is lost for the sake of a shape. Parked ones go at once.
What it has found once is not looked at again, so that a prediction that changes replaces nothing.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

from hasgpu_core.capacity import CapacityTable
from hasgpu_core.cluster import ClusterSnapshot, FunctionView
from hasgpu_core.policy._draft import Draft, Room, Share
from hasgpu_core.policy._handover import one_to_spare
from hasgpu_core.policy._reasons import change_words
from hasgpu_core.policy.placement import Placement
from hasgpu_core.policy.scaling import Decision, FunctionState, PolicyState
from hasgpu_core.resources import PARKED_QUOTA_PERMILLE

_SLACK_S = 1e-6


class RivalDraft(Draft):
    """A draft whose `active` instances are those of the rival's own shape."""

    foreign: frozenset[str] = frozenset()

    @property
    def active(self) -> list[Share]:
        """Those that are neither parked nor another policy's."""
        return [share for share in self.shares if not share.standby and share.instance not in self.foreign]

    @property
    def others(self) -> list[Share]:
        """Those of another policy's shape, parked ones too."""
        return [share for share in self.shares if share.instance in self.foreign]


@dataclass(slots=True)
class Scene:
    """One function in one pass of a rival."""

    function: FunctionView
    draft: RivalDraft
    room: Room
    now_s: float
    capacity_rps: float = 0.0
    predicted_rps: float | None = None
    refused: bool = False
    """An instance was to be added, and there was no room."""

    @property
    def table(self) -> CapacityTable | None:
        """Predictions for the first device model at hand."""
        for model in sorted({device.info.model for device in self.room.devices}):
            table = self.function.tables.get(model)
            if table is not None and table.points:
                return table
        return None

    @property
    def quotas_permille(self) -> tuple[int, ...]:
        """Quotas that predictions are of; who has no more than the smallest counts as parked and gets no request."""
        table = self.table
        return tuple(q for q in table.quotas_permille if q > PARKED_QUOTA_PERMILLE) if table is not None else ()

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
            self.refused = True
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
            draft = RivalDraft(
                function, headroom_permille=self.headroom_permille, stuck=frozenset(), refused=frozenset()
            )
            scene = Scene(function, draft, room, now_s)
            memory, reason = before.own, "between two looks"
            memory = self.observe(scene, memory)
            due = before.settled_at_s is None or now_s - before.settled_at_s >= self.period_s - _SLACK_S
            held = function.held or not room.devices or scene.table is None
            # Set by hand, it is looked at anew when that is over.
            foreign = None if function.held else before.foreign
            if due and not held:
                if foreign is None:
                    foreign = frozenset(s.instance for s in draft.shares if s.standby or not self.fits(scene, s))
                draft.foreign = foreign
                memory, reason = self.scale(scene, memory)
                reason += self._replace(scene)
                foreign &= {share.instance for share in draft.shares}
            decided_s = now_s if due else before.settled_at_s
            states[function.spec.name] = FunctionState(own=memory, settled_at_s=decided_s, foreign=foreign)
            decisions.append(self._decision(scene, reason))
        return tuple(decisions), PolicyState(states)

    def observe(self, scene: Scene, memory: object) -> object:
        """Takes in what is shown at every look; returns what is remembered."""
        return memory

    @abstractmethod
    def scale(self, scene: Scene, memory: object) -> tuple[object, str]:
        """Changes the draft; returns what is remembered and the reason in words."""

    @abstractmethod
    def fits(self, scene: Scene, share: Share) -> bool:
        """Whether the policy might have chosen the share of an active instance that it finds."""

    @abstractmethod
    def first(self, scene: Scene) -> None:
        """Adds one instance of its own shape, where there is room."""

    def _replace(self, scene: Scene) -> str:
        """Lets instances of another shape go as soon as its own do their work; returns what it waits for, in words."""
        draft = scene.draft
        for share in draft.others:
            if share.standby or share.failed:
                draft.remove(share)
        others = draft.others
        if not others:
            return ""
        names = ", ".join(share.instance for share in others)
        if not draft.active:
            self.first(scene)
            if not draft.active:
                return self._make_room(scene, f"; no room for its own shape beside {names}, which serve on")
        if any(not share.ready for share in draft.active):
            return f"; {names} serve until its own are ready"
        if scene.refused and scene.capacity_rps < (scene.function.demand.rate_rps or 0.0):
            return self._make_room(scene, f"; no room for more of its own shape: {names} serve on")
        for share in others:
            draft.remove(share)
        return f"; its own replace {names}"

    def _make_room(self, scene: Scene, otherwise: str) -> str:
        """Lets one of several of another shape go where the rest do; tells which, or `otherwise`."""
        share = one_to_spare(scene.draft, scene.draft.others, scene.function.demand.rate_rps or 0.0)
        if share is None or scene.function.demand.rate_rps is None:
            return otherwise
        scene.draft.remove(share)
        return f"; {share.instance} makes room for its own shape"

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
