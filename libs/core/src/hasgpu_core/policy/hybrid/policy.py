"""The hybrid policy: for each function the cheapest set of equal shares that sustains what may come.

| situation of a function | what is done |
|---|---|
| held by hand, or no device is known | nothing |
| no prediction, or nothing meets the objective | what `hasgpu` does, which feels its way; it says what is the fastest |
| requests are late although the plan should suffice | own shares, then plans for more than the rate (`feedback`) |
| idle for idle_to_zero_s and min_instances = 0 | all go |
| the rate exceeds what the plan sustains, or counts do significantly, over any of several windows | a larger plan |
| a plan for the largest rate of the lookback is cheaper by the gain, for settle_s | that plan |
| shares differ from the plan | quotas, then parked instances; what no row has room for comes as new instances |
| fewer parked instances than some times that rate needs | one more starts, in a row of its own |

A plan is an SM share, a quota and a number of instances (`plan`), chosen over the whole surface; rates are forecast as
quantiles with the uncertainty of counting in them (`forecast`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from hasgpu_core.cluster import ClusterSnapshot, FunctionView
from hasgpu_core.policy._draft import Draft, Share
from hasgpu_core.policy._handover import one_to_spare
from hasgpu_core.policy._reasons import change_words, pct
from hasgpu_core.policy.hasgpu import HasGpuPolicy
from hasgpu_core.policy.hybrid import clumps as clump_account
from hasgpu_core.policy.hybrid import feedback as slo_feedback
from hasgpu_core.policy.hybrid.clumps import Clumps
from hasgpu_core.policy.hybrid.fairness import Wanted, enough_of, may_give, order, victims
from hasgpu_core.policy.hybrid.feedback import Feedback
from hasgpu_core.policy.hybrid.forecast import History, observe
from hasgpu_core.policy.hybrid.plan import Option, Planner
from hasgpu_core.policy.hybrid.room import IndexedRoom
from hasgpu_core.policy.hybrid.settings import HybridSettings
from hasgpu_core.policy.scaling import Action, ActionKind, Decision, FunctionState, PolicyState, ScalingSettings
from hasgpu_core.resources import PARKED_QUOTA_PERMILLE, WHOLE_PERMILLE, DeviceState, InstanceState

_RECLAIMS_A_PASS = 16
"""So many functions may have others give instances up in one pass, the most urgent first: a bound on its time."""

_NEW = FunctionState()
"""Of a function that is seen for the first time."""


@dataclass(slots=True)
class Memory:
    """What the policy remembers of one function. Each look changes its own copy, never what it was given."""

    history: History = field(default_factory=History)
    sm_pct: int | None = None
    """Chosen for it; None: not yet."""
    plan: Option | None = None
    """In force."""
    basis: str = ""
    """Of the table that it was made from: one made before anything was measured is made anew after that."""
    plan_regular: bool = False
    """Whether it was made for arrivals that keep their distance."""
    changed_s: float = -math.inf
    """When it last grew or shrank."""
    shrunk_s: float = -math.inf
    """When it last shrank."""
    patience: float = 1.0
    """Times settle_s that it waits before it shrinks; doubled when it had to grow soon after it had shrunk."""
    cheaper_since_s: float | None = None
    """Since when a cheaper plan would do."""
    idle_since_s: float | None = None
    surplus_since_s: float | None = None
    """Since when more instances are parked than are kept for a larger rate."""
    coming_since_s: Mapping[str, float] = field(default_factory=dict)
    reclaimed_s: float = -math.inf
    """When others last gave instances up for it."""
    feedback: Feedback = field(default_factory=Feedback)
    clumps: Clumps = field(default_factory=Clumps)


@dataclass(slots=True)
class _Look:
    """One function in one pass."""

    function: FunctionView
    draft: Draft
    memory: Memory
    planner: Planner | None
    regular: bool
    clump: int
    """Tenths of the requests that bring another one with them, as the plan reckons."""
    capacity_rps: float
    rate_rps: float
    """Planned for."""
    notes: list[str]
    wanted: Wanted | None = None
    """What no room was found for."""


class HybridPolicy:
    """See the module and `docs/scaling.md`."""

    def __init__(self, settings: HybridSettings | None = None) -> None:
        self._settings = settings or HybridSettings()
        self._unpredicted = HasGpuPolicy(ScalingSettings(idle_to_zero_s=self._settings.idle_to_zero_s))
        self._planners: dict[tuple[int, int, tuple[int, ...], int, int], Planner] = {}
        self._room: IndexedRoom | None = None

    @property
    def name(self) -> str:
        """As shown with its decisions."""
        return "hybrid"

    def decide(
        self, snapshot: ClusterSnapshot, state: PolicyState, now_s: float
    ) -> tuple[tuple[Decision, ...], PolicyState]:
        """Returns one decision a function of the snapshot (in its order) and the state to pass next time.

        Functions take room in the order of `fairness`, which also says who gives instances up when there is none.
        """
        room = self._room_of(snapshot.devices)
        looks = [
            self._look(function, state.functions.get(function.spec.name, _NEW), room.rungs_pct, now_s)
            for function in snapshot.functions
        ]
        blind = [look for look in looks if self._is_blind(look)] if snapshot.devices else []
        unplanned = self._unplanned(blind, snapshot.devices, state, now_s) if blind else {}
        planned = [look for look in looks if look.function.spec.name not in unplanned] if unplanned else looks
        givers = {look.function.spec.name: look for look in planned if may_give(look.function)}
        served = 0
        for look in sorted(planned, key=_urgency):
            self._plan(look, room, now_s)
            if look.wanted is not None and served < _RECLAIMS_A_PASS:
                served += 1
                self._reclaim(look, givers, snapshot.devices, now_s)
        made = {look.function.spec.name: self._decision(look, now_s) for look in planned}
        states = {look.function.spec.name: FunctionState(own=look.memory) for look in planned}
        for name, (decision, kept) in unplanned.items():
            made[name], states[name] = decision, kept
        names = [function.spec.name for function in snapshot.functions]
        return tuple(made[name] for name in names), PolicyState({name: states[name] for name in names})

    def _room_of(self, devices: tuple[DeviceState, ...]) -> IndexedRoom:
        """The room on the devices: that of the pass before while they are the same and nothing was taken of it."""
        if self._room is None or self._room.devices is not devices or self._room.touched:
            self._room = IndexedRoom(devices)
        return self._room

    def _is_blind(self, look: _Look) -> bool:
        """Whether there is nothing to plan with: no prediction, or none that meets the objective."""
        return not look.function.held and (look.planner is None or self._sm_pct(look, look.planner) is None)

    def _unplanned(
        self, looks: Sequence[_Look], devices: tuple[DeviceState, ...], state: PolicyState, now_s: float
    ) -> dict[str, tuple[Decision, FunctionState]]:
        """Decides by `hasgpu`, which feels its way: what is there grows step by step while the objective is missed."""
        views = tuple(look.function for look in looks)
        known = {view.spec.name: state.functions.get(view.spec.name, FunctionState()) for view in views}
        decisions, after = self._unpredicted.decide(ClusterSnapshot(views, devices), PolicyState(known), now_s)
        names = [view.spec.name for view in views]
        kept = [replace(after.functions[look.function.spec.name], own=look.memory) for look in looks]
        return dict(zip(names, zip(decisions, kept, strict=True), strict=True))

    def _reclaim(self, look: _Look, givers: Mapping[str, _Look], devices: Sequence[DeviceState], now_s: float) -> None:
        """Gives instances of others up for a function that found no room."""
        assert look.wanted is not None
        if now_s - look.memory.reclaimed_s < self._settings.reclaim_wait_s:
            return
        ready = bool(look.draft.ready)
        drafts = [other.draft for other in givers.values()]
        chosen = enough_of(victims(look.function, drafts, ready=ready), look.wanted, devices)
        for victim in chosen:
            victim.draft.remove(victim.share)
            name = look.function.spec.name
            givers[victim.draft.function.spec.name].notes.append(
                f"{victim.share.instance} is given up for {name} ({look.function.spec.slo_class.value})"
            )
        if chosen:
            look.memory.reclaimed_s = now_s
            look.notes.append(f"{', '.join(v.share.instance for v in chosen)} will make room")

    # What is seen

    def _look(
        self, function: FunctionView, state: FunctionState, rungs: Mapping[str, tuple[int, ...]], now_s: float
    ) -> _Look:
        settings = self._settings
        memory = state.own if isinstance(state.own, Memory) else Memory()
        demand = function.demand
        history = observe(memory.history, demand.arrived_items_count, now_s, settings)
        busy = demand.rate_rps != 0 or demand.queued_items_count or demand.in_flight_count
        idle_since_s = None if busy else memory.idle_since_s if memory.idle_since_s is not None else now_s
        coming_since_s = {
            view.instance: memory.coming_since_s.get(view.instance, now_s)
            for view in function.instances
            if view.state not in (InstanceState.READY, InstanceState.FAILED)
        }
        stuck = frozenset(
            view.instance
            for view in function.instances
            if view.state is not InstanceState.LOADING  # its agent bounds that; large weights take minutes
            and now_s - coming_since_s.get(view.instance, now_s) > settings.start_timeout_s
        )
        draft = Draft(function, headroom_permille=WHOLE_PERMILLE, stuck=stuck, refused=frozenset())
        memory = replace(memory, history=history, idle_since_s=idle_since_s, coming_since_s=coming_since_s)
        planner = self._planner(function, rungs)
        # Even arrivals allow for plans without slack, which leave none for a prediction that is off.
        regular = history.spacing.regular and not memory.feedback.active
        clump = 0 if regular or planner is None else _clump(planner, memory)
        capacity = 0.0
        if planner is not None:
            capacity = _sustained_rps(draft.ready, planner, regular=regular, clump=clump, lend=settings.lend)
        return _Look(function, draft, memory, planner, regular, clump, capacity, history.peak_rps(), [])

    def _planner(self, function: FunctionView, rungs: Mapping[str, tuple[int, ...]]) -> Planner | None:
        """The plans of the device model that has predictions; kept while table and rungs stay the same."""
        for model in rungs:
            table = function.tables.get(model)
            if table is None or not table.points:
                continue
            spec = function.spec
            most = max(1, min(spec.max_instances, self._settings.most_instances))
            key = (id(table.points), table.slo_ms, rungs[model], spec.max_batch, most)
            planner = self._planners.get(key)
            if planner is None or planner.table.points is not table.points:
                planner = self._planners[key] = Planner(table, rungs[model], spec.max_batch, most, self._settings)
            return planner
        return None

    # What is done

    def _plan(self, look: _Look, room: IndexedRoom, now_s: float) -> None:
        if look.function.held:
            look.notes.append("held by hand: left alone")
            return
        if not room.devices:
            look.notes.append("no device is known: shares are kept")
            return
        planner, spec = look.planner, look.function.spec
        assert planner is not None
        sm_pct = self._sm_pct(look, planner)
        assert sm_pct is not None
        for share in [s for s in look.draft.shares if s.failed and not _is_broken(s)]:
            look.draft.remove(share)
            look.notes.append(f"{share.instance} does not get ready and is replaced")
        if self._goes_to_zero(look, now_s):
            return
        demanded = look.function.demand.queued_items_count or look.function.demand.rate_rps
        if not look.draft.active and not spec.min_instances and not demanded:
            return
        self._size(look, planner, sm_pct, room, now_s)

    def _sm_pct(self, look: _Look, planner: Planner) -> int | None:
        """The SM share of a function: chosen over a range of rates at first, then kept."""
        sm_pct = look.memory.sm_pct
        if sm_pct is not None and planner.ladder(sm_pct, regular=False).options:
            return sm_pct
        chosen = planner.best_sm_pct(self._settings.reference_rps, regular=False)
        look.memory.sm_pct = chosen
        return chosen

    def _goes_to_zero(self, look: _Look, now_s: float) -> bool:
        since_s, wait_s = look.memory.idle_since_s, self._settings.idle_to_zero_s
        if look.function.spec.min_instances or since_s is None or not look.draft.shares:
            return False
        if now_s - since_s < wait_s:
            return False
        for share in look.draft.shares:
            look.draft.remove(share)
        look.notes.append(f"idle for {now_s - since_s:.0f} s: scaled to zero")
        return True

    def _size(self, look: _Look, planner: Planner, sm_pct: int, room: IndexedRoom, now_s: float) -> None:
        """Chooses the plan, and makes the set of shares what it says."""
        settings, memory = self._settings, look.memory
        ladder = planner.ladder(sm_pct, regular=look.regular, clump=look.clump)
        seen = max(memory.history.peak_rps(), memory.history.burst_rps(settings))
        burst = _burst_rps(memory.history, look.capacity_rps, look.regular, settings, now_s)
        memory = self._judged(look, max(seen, burst), now_s)
        look.rate_rps = rate = max(seen, burst) * memory.feedback.factor
        if memory.feedback.active:
            look.notes.append(memory.feedback.words())
        least = settings.least_rps if settings.lend else settings.least_reserved_rps
        if look.regular:
            least = max(least, settings.regular_least_rps)
        mostly = max(settings.headroom * memory.history.peak_rps() * memory.feedback.factor, least)
        wanted = ladder.cheapest(max(settings.headroom * rate, least), mostly)
        assert wanted is not None
        plan = memory.plan
        basis = planner.table.basis
        if plan is None or plan.sm_pct != sm_pct or memory.basis != basis:
            memory = replace(
                memory, basis=basis, plan=wanted, plan_regular=look.regular, changed_s=now_s, cheaper_since_s=None
            )
        else:
            sustains = planner.rate_rps(sm_pct, plan.quota_permille, plan.count, regular=look.regular, clump=look.clump)
            if rate > sustains and wanted.rate_rps > sustains:
                patience = memory.patience
                shrunk_s = memory.shrunk_s
                if now_s - shrunk_s < settings.regret_s:
                    # Each shrink is regretted once: growing in steps after it is one mistake, not several.
                    patience, shrunk_s = min(2 * patience, settings.most_patience), -math.inf
                memory = replace(
                    memory,
                    plan=wanted,
                    plan_regular=look.regular,
                    changed_s=now_s,
                    shrunk_s=shrunk_s,
                    cheaper_since_s=None,
                    patience=patience,
                )
            elif wanted.cost(min(rate, mostly)) <= (1 - settings.gain) * plan.cost(min(rate, mostly)):
                since_s = now_s if memory.cheaper_since_s is None else memory.cheaper_since_s
                left_s = max(since_s, memory.changed_s) + memory.patience * settings.settle_s - now_s
                if look.regular != memory.plan_regular:
                    left_s = min(left_s, since_s + settings.regular_settle_s - now_s)
                memory.cheaper_since_s = since_s
                if left_s > 0:
                    look.notes.append(f"a cheaper plan can be taken up in {left_s:.1f} s")
                else:
                    calm = now_s - memory.changed_s > settings.forgive_s
                    memory = replace(
                        memory,
                        plan=wanted,
                        plan_regular=look.regular,
                        changed_s=now_s,
                        shrunk_s=now_s,
                        cheaper_since_s=None,
                        patience=max(1.0, memory.patience / 2) if calm else memory.patience,
                    )
            else:
                memory.cheaper_since_s = None
        look.memory = memory
        assert memory.plan is not None
        plan = memory.plan
        if memory.feedback.secured:
            plan = replace(plan, request_permille=plan.quota_permille)
        if memory.feedback.strained(now_s, settings):
            plan = replace(plan, quota_permille=WHOLE_PERMILLE)
            if not memory.feedback.active:
                look.notes.append("requests are late or about to be: all idle time may be used")
        self._enforce(look, plan, room)
        spare = 1.0 if settings.lend else settings.spare
        largest = ladder.cheapest(max(spare * rate, settings.spare_least_rps))
        self._keep_parked(look, plan, largest, room, now_s)

    def _judged(self, look: _Look, rate_rps: float, now_s: float) -> Memory:
        """What lateness asks for that the rate does not explain."""
        settings, memory, function = self._settings, look.memory, look.function
        demand = function.demand
        suffices = not any(share.coming for share in look.draft.active) and look.capacity_rps >= rate_rps
        feedback = slo_feedback.observe(
            memory.feedback,
            demand,
            function.spec.slo_s,
            suffices=suffices and now_s - memory.changed_s >= settings.feedback_after_s,
            now_s=now_s,
            settings=settings,
        )
        # What is late because of a plan before, or of a cold start, comes for some time after it.
        settled = suffices and not feedback.active and demand.oldest_wait_s <= function.spec.slo_s
        unsettled_s = memory.clumps.unsettled_s if settled else now_s
        counts = now_s - max(memory.changed_s, unsettled_s) >= settings.rate_window_s
        clumps = clump_account.observe(memory.clumps, demand, now_s, counts=counts, settings=settings)
        clumps = replace(clumps, unsettled_s=unsettled_s)
        memory.feedback, memory.clumps = feedback, clumps
        return memory

    def _enforce(self, look: _Look, plan: Option, room: IndexedRoom) -> None:
        """Brings the shares to the plan as far as there is room; does nothing where they are there."""
        draft = look.draft
        mine = [s for s in draft.shares if s.allocation.sm_pct == plan.sm_pct]
        ready = sorted((s for s in mine if s.ready), key=lambda s: (s.standby, s.instance))
        kept = 0
        missing = len(ready) < plan.count
        for share in ready:
            if kept < plan.count and self._set(look, share, self._bridge(share, plan) if missing else plan, room):
                kept += 1
            elif not share.standby or share.allocation.request_permille > PARKED_QUOTA_PERMILLE:
                share.standby = True
                # The limit stays: what it is running when it is parked may still borrow, or it would take for ever.
                limit_permille = share.allocation.limit_permille if self._settings.lend else PARKED_QUOTA_PERMILLE
                _reshare(share, PARKED_QUOTA_PERMILLE, limit_permille)
        for share in [s for s in mine if s.coming][: plan.count - kept]:
            share.standby = False
            kept += 1
        # A worker that has failed is started again by its agent, less and less often: a new instance each time would go
        # round that. Beside those that serve one replacement is made; when it serves, the failed ones go.
        broken = [s for s in draft.shares if _is_broken(s)]
        held = max(0, len(broken) - bool(ready))
        look.notes += [f"{s.instance} has failed ({s.view.reason if s.view else ''})" for s in broken]
        while kept + held < plan.count and len(draft.active) < look.function.spec.max_instances:
            if self._add(look, plan, room, standby=False) is None:
                break
            kept += 1
        if broken and len(ready) >= plan.count:
            for share in broken:
                draft.remove(share)
        others = [s for s in draft.shares if s.allocation.sm_pct != plan.sm_pct]
        if any(s.ready for s in mine if not s.standby):
            for share in others:
                draft.remove(share)
        elif look.wanted is not None and (spare := one_to_spare(draft, others, look.rate_rps)) is not None:
            draft.remove(spare)
            look.notes.append(f"{spare.instance} makes room for the plan's own shape")

    def _bridge(self, share: Share, plan: Option) -> Option:
        """What a ready share has until the instances that the plan counts on are there: more than in the plan."""
        if self._settings.lend:
            return replace(plan, quota_permille=WHOLE_PERMILLE)
        held_permille = share.allocation.request_permille
        if share.standby or held_permille <= plan.request_permille:
            return plan
        return replace(plan, quota_permille=held_permille, request_permille=held_permille)

    def _set(self, look: _Look, share: Share, plan: Option, room: IndexedRoom) -> bool:
        """Gives a ready share what the plan says if its row has the room; tells whether it has it now."""
        view = share.view
        assert view is not None
        more = plan.request_permille - share.allocation.request_permille
        if more > 0:
            if more > room.free_permille(view.node, view.gpu, view.row):
                held = pct(share.allocation.request_permille)
                look.notes.append(f"{share.instance} stays at {held}: its row is full")
                # An active one goes on with what it has; telemetry from before a shrink may also say so for a moment.
                return not share.standby
            room.take(view.node, view.gpu, view.row, more)
        share.standby = False
        _reshare(share, plan.request_permille, plan.quota_permille)
        return True

    def _add(self, look: _Look, plan: Option, room: IndexedRoom, *, standby: bool) -> Share | None:
        """Starts an instance, in a row of its own where one is free: there it can grow to the whole of it."""
        draft = look.draft
        assert look.planner is not None
        model = look.planner.table.device_model
        # One that serves takes a row of its own even where it is the last: in another's it borrows what is left there.
        if (not standby or room.free_part(model) > self._settings.roomy) and room.new_row(
            draft.allocation(plan.sm_pct, WHOLE_PERMILLE), model
        ):
            return draft.add(plan.sm_pct, WHOLE_PERMILLE, model, standby=standby)
        allocation = draft.allocation(plan.sm_pct, plan.request_permille)
        if room.new_row(allocation, model) or room.share_row(allocation, model):
            return draft.add(plan.sm_pct, plan.request_permille, model, standby=standby)
        if not standby:
            look.wanted = Wanted(plan.sm_pct, plan.request_permille, allocation.memory_bytes, model)
        look.notes.append(
            f"no room: no {model} has SM {plan.sm_pct} % in no row, or a row of it with {plan.request_permille} ‰ free,"
            f" and {draft.function.spec.memory_bytes >> 20} MiB"
        )
        return None

    def _keep_parked(self, look: _Look, plan: Option, largest: Option | None, room: IndexedRoom, now_s: float) -> None:
        """Starts an instance to be parked while fewer are there than a much larger rate would need.

        One more than that goes when it has not been needed for retire_s.
        """
        draft, spec = look.draft, look.function.spec
        have = len(draft.shares)
        more = max(spec.standby, min(largest.count - plan.count if largest else 0, self._settings.most_parked))
        wanted = min(plan.count + more, spec.max_instances + spec.standby)
        assert look.planner is not None
        roomy = room.free_part(look.planner.table.device_model) > self._settings.roomy or have < spec.standby
        if have < wanted and roomy and not any(s.coming and s.standby for s in draft.shares):
            self._add(look, plan, room, standby=True)
        since_s = look.memory.surplus_since_s
        parked = sorted((s for s in draft.shares if s.standby and s.ready), key=lambda s: s.instance)
        if have <= wanted or not parked:
            since_s = None
        elif since_s is None:
            since_s = now_s
        elif now_s - since_s >= self._settings.retire_s:
            draft.remove(parked[-1])
            since_s = None
        look.memory.surplus_since_s = since_s

    def _look_again_s(self, look: _Look, *, changing: bool) -> float:
        """Soon where something may have to be done soon; the gateways' reports of a queue come in between."""
        settings, demand, memory = self._settings, look.function.demand, look.memory
        unsettled = (
            changing
            or demand.queued_items_count
            or demand.rate_rps is None
            or memory.coming_since_s
            or any(s.coming for s in look.draft.shares)
            or look.rate_rps * settings.calm > look.capacity_rps
        )
        if unsettled:
            return settings.look_again_s
        waiting_s = math.inf
        if memory.cheaper_since_s is not None:
            waiting_s = settings.settle_s / 4
        idle = not demand.rate_rps and not demand.in_flight_count
        return min(settings.look_again_idle_s if idle else settings.look_again_calm_s, waiting_s)

    # What is said

    def _decision(self, look: _Look, now_s: float) -> Decision:
        draft, demand = look.draft, look.function.demand
        changes, limits = draft.actions(), _limit_actions(draft)
        actions = (*changes, *limits)
        words = [change_words(action, draft) for action in changes]
        words += [f"limit of {a.instance} {pct(a.from_permille)} -> {pct(a.to_permille)}" for a in limits]
        words = words + look.notes or ["nothing to do"]
        observed = "no data" if demand.rate_rps is None else f"{demand.rate_rps:.1f} rps"
        kind = "regular" if look.regular else "random"
        return Decision(
            function=look.function.spec.name,
            desired=draft.desired(),
            actions=actions,
            reason=f"rate {observed} ({kind}), planned for {look.rate_rps:.1f}; sustains {look.capacity_rps:.1f}: "
            + "; ".join(words),
            look_again_s=self._look_again_s(look, changing=bool(actions)),
            next_ordinal=draft.next_ordinal,
            observed_rps=demand.rate_rps,
            predicted_rps=None if demand.rate_rps is None else look.rate_rps,
            capacity_rps=look.capacity_rps,
            queued_items_count=demand.queued_items_count,
            p95_s=demand.p95_s,
            standby_changed=draft.standby_changed(),
            needed_rps=None if demand.rate_rps is None else look.rate_rps,
        )


def _clump(planner: Planner, memory: Memory) -> int:
    """The clumps to reckon with, or the largest for which there are plans."""
    clump, sm_pct = memory.clumps.level, memory.sm_pct
    while clump and (sm_pct is None or not planner.ladder(sm_pct, regular=False, clump=clump).options):
        clump -= 1
    return clump


def _sustained_rps(ready: Sequence[Share], planner: Planner, *, regular: bool, clump: int, lend: bool) -> float:
    """What ready shares sustain together; unequal ones count as so many of the least, if that is more than the best."""
    if not ready:
        return 0.0
    kinds = {(s.allocation.sm_pct, _floored(_usable_permille(s, lend=lend))) for s in ready}
    if len(kinds) == 1:
        sm_pct, permille = next(iter(kinds))
        return planner.rate_rps(sm_pct, permille, len(ready), regular=regular, clump=clump)
    together = min(planner.rate_rps(sm, q, len(ready), regular=regular, clump=clump) for sm, q in kinds)
    alone = max(planner.rate_rps(sm, q, 1, regular=regular, clump=clump) for sm, q in kinds)
    return max(together, alone)


def _is_broken(share: Share) -> bool:
    """Whether its worker has failed; its agent starts it again."""
    return share.view is not None and share.view.state is InstanceState.FAILED


def _reshare(share: Share, request_permille: int, limit_permille: int) -> None:
    share.allocation = replace(share.allocation, request_permille=request_permille, limit_permille=limit_permille)


def _limit_actions(draft: Draft) -> list[Action]:
    """Changes of limits alone."""
    out = []
    for share in draft.shares:
        view = share.view
        if view is None or view.standby != share.standby:
            continue
        before, after = view.allocation, share.allocation
        if before.request_permille == after.request_permille and before.limit_permille != after.limit_permille:
            up = after.limit_permille > before.limit_permille
            kind = ActionKind.VERTICAL_UP if up else ActionKind.VERTICAL_DOWN
            out.append(Action(kind, share.instance, after.sm_pct, before.limit_permille, after.limit_permille))
    return out


def _usable_permille(share: Share, *, lend: bool) -> int:
    return share.allocation.limit_permille if lend else share.allocation.request_permille


def _floored(permille: int) -> int:
    return max(100, permille // 100 * 100)


def _burst_rps(history: History, capacity_rps: float, regular: bool, settings: HybridSettings, now_s: float) -> float:
    """The rate that a count asks for which is above what the plan sustains, significantly; 0: none does."""
    worst = 0.0
    for window_s in settings.burst_windows_s:
        items, seconds = history.count(now_s, window_s)
        if seconds > 1.5 * window_s + 0.2:
            continue
        expected = capacity_rps * seconds
        sigma = math.sqrt(expected) * (0.0 if regular else settings.burst_sigmas)
        if items > expected + sigma + 1.5:
            sure = items - (0.5 if regular else 0.5 * math.sqrt(items))
            worst = max(worst, sure / seconds)
    return worst


def _urgency(look: _Look) -> tuple[int, bool, float, str]:
    covered = min(1.0, look.capacity_rps / look.rate_rps) if look.rate_rps > 0 else 1.0
    return order(look.function, ready=bool(look.draft.ready), covered=covered)
