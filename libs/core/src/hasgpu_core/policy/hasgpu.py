"""HAS-GPU's hybrid scaling with an SLO and a queue in the loop: vertical before horizontal, up and down.

Source: Gu et al., HAS-GPU, Euro-Par 2025 (arXiv 2505.01968), and its released code. Mended here: the SLO and the queue
are inputs, quotas come down again, each function has a filter of its own, and an instance counts when it is ready.

| situation of a function | what is done |
|---|---|
| held by hand | nothing |
| fewer instances than min_instances, or none and a request came | a first one is started |
| no demand data | nothing else |
| idle for idle_to_zero_s and min_instances = 0 | all go |
| need above the ready capacity | quotas grow; what is still missing: standbys, then new instances |
| need well below it for remove_hold_s | an instance goes, the others grow if they must |
| need well below it for quota_hold_s | quotas come down |
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from hasgpu_core.cluster import ClusterSnapshot, FunctionView, InstanceView
from hasgpu_core.demand import SILENT_AFTER_S
from hasgpu_core.policy._draft import Draft, Room
from hasgpu_core.policy._grow import (
    EPSILON_RPS,
    activate_standbys,
    add_instances,
    apply_growth,
    growth,
    own_shape,
    park_new,
)
from hasgpu_core.policy._need import Need, need_of, predict, violated
from hasgpu_core.policy._reasons import change_words, head_words, join_words, pct
from hasgpu_core.policy._shrink import idle, lower_quotas, remove_instance, to_zero
from hasgpu_core.policy._sizing import Candidate, best_effort, best_new, meets_objective, unpredicted
from hasgpu_core.policy.placement import NoRoom
from hasgpu_core.policy.scaling import Decision, FunctionState, PolicyState, ScalingSettings
from hasgpu_core.resources import PARKED_QUOTA_PERMILLE, WHOLE_PERMILLE, InstanceState

_ANY_RPS = 1e-3
"""What a first instance is sized for when no rate is known: the cheapest configuration inside the SLO."""
_CAPACITY_TOLERANCE = 1e-9


@dataclass(slots=True)
class _Look:
    """One function in one pass: what is known, and the draft that becomes its decision."""

    function: FunctionView
    draft: Draft
    state: FunctionState
    need: Need | None
    capacity_rps: float
    settings: ScalingSettings
    notes: list[str]
    """What is not done and why, in words."""

    @property
    def demanded(self) -> bool:
        """Whether anybody asks for the function."""
        demand = self.function.demand
        return bool(demand.queued_items_count or demand.in_flight_count or demand.rate_rps)


class HasGpuPolicy:
    """See the module; `docs/scaling.md` tells it with an example."""

    def __init__(self, settings: ScalingSettings) -> None:
        self._settings = settings

    @property
    def name(self) -> str:
        """As shown with its decisions."""
        return "hasgpu"

    def decide(
        self, snapshot: ClusterSnapshot, state: PolicyState, now_s: float
    ) -> tuple[tuple[Decision, ...], PolicyState]:
        """Returns one decision a function of the snapshot (in its order) and the state to pass next time.

        Functions take room from each other in the order of their urgency: those with nothing ready first, then by the
        part of their need that is not covered, then by name.
        """
        room = Room(snapshot.devices)
        looks = [
            self._look(function, state.functions.get(function.spec.name, FunctionState()), room, now_s)
            for function in snapshot.functions
        ]
        decided: dict[str, tuple[Decision, FunctionState]] = {}
        for look in sorted(looks, key=_urgency):
            self._plan(look, room, now_s)
            decided[look.function.spec.name] = (self._decision(look), look.state)
        names = [function.spec.name for function in snapshot.functions]
        return tuple(decided[n][0] for n in names), PolicyState({n: decided[n][1] for n in names})

    def _look(self, function: FunctionView, state: FunctionState, room: Room, now_s: float) -> _Look:
        """Takes the measurement in and works out the need."""
        settings = self._settings
        state = replace(
            state,
            coming_since_s=_since_s(function, state.coming_since_s, now_s, _on_its_way),
            refused_since_s=_since_s(function, state.refused_since_s, now_s, _refused),
        )
        draft = Draft(
            function,
            headroom_permille=settings.limit_headroom_permille,
            stuck=_longer(state.coming_since_s, settings.start_timeout_s, now_s),
            refused=_longer(state.refused_since_s, settings.refused_after_s, now_s),
        )
        if not meets_objective(draft, room, settings):
            # Where only slow configurations meet the SLO, they have to do.
            settings = replace(settings, latency_margin=1.0)
        capacity_rps = draft.ready_capacity_rps()
        if state.settled_at_s is None or abs(capacity_rps - state.ready_capacity_rps) > _CAPACITY_TOLERANCE:
            state = replace(state, ready_capacity_rps=capacity_rps, settled_at_s=now_s)
        state = idle(draft, predict(function.demand, state, settings, now_s), now_s)
        need, state = need_of(
            function,
            state,
            settings,
            ready_capacity_rps=capacity_rps,
            coming=any(share.coming for share in draft.active),
            now_s=now_s,
        )
        return _Look(function, draft, state, need, capacity_rps, settings, [])

    def _plan(self, look: _Look, room: Room, now_s: float) -> None:
        """Changes the draft; the table in the module's docstring, from the top down."""
        if look.function.held:
            look.notes.append("held by hand: left alone")
            return
        before = len(look.draft.active)
        self._keep_floor(look, room)
        self._keep_standbys(look, room)
        if not room.devices:
            look.notes.append("no device is known: shares are kept")
        elif look.need is None:
            look.notes.append(_no_data_words(look.function))
        elif self._goes_to_zero(look, now_s):
            pass
        elif _feasible(look, room):
            self._scale(look, look.need, room, now_s)
        else:
            self._scale_blindly(look, room, now_s)
        if len(look.draft.active) > before:
            look.state = replace(look.state, scaled_up_at_s=now_s)
        for share in look.draft.shares:
            if share.refused_permille is not None and share.view is not None:
                look.notes.append(f"{share.instance} stays at {pct(share.refused_permille)}: {share.view.reason}")
            if share.failed and share.view is not None:
                why = share.view.reason or f"not ready for {self._settings.start_timeout_s:.0f} s"
                look.notes.append(f"{share.instance} has failed ({why})")

    def _keep_floor(self, look: _Look, room: Room) -> None:
        """Starts instances up to min_instances, or one when there is none and somebody asks. Needs no demand data."""
        floor = look.function.spec.min_instances or int(look.demanded)
        while len(look.draft.active) < floor:
            missing_rps = max(_ANY_RPS, look.need.lasting_rps if look.need and not look.draft.active else 0.0)
            before = len(look.draft.active)
            activate_standbys(look.draft, room, missing_rps, look.settings)
            if len(look.draft.active) > before:
                continue
            found = self._first(look, room, missing_rps)
            if isinstance(found, NoRoom):
                look.notes.append(found.reason)
                return
            share = look.draft.add(found.sm_pct, found.request_permille, found.device_model)
            room.occupy(found.placement, share.allocation)

    def _first(self, look: _Look, room: Room, missing_rps: float) -> Candidate | NoRoom:
        """The configuration of an instance that the floor asks for."""
        if not _predicted(look, room):
            look.notes.append("no prediction yet: the fixed starting configuration")
            return unpredicted(look.draft, room, look.settings)
        if meets_objective(look.draft, room, look.settings):
            return best_new(look.draft, room, missing_rps, look.settings)
        found = best_effort(look.draft, room, look.settings)
        return found if isinstance(found, NoRoom) else found[0]

    def _keep_standbys(self, look: _Look, room: Room) -> None:
        """Parks as many instances as the function wants; one too many goes."""
        draft, wanted = look.draft, look.function.spec.standby
        if len(draft.standbys) > wanted:
            draft.remove(min(draft.standbys, key=lambda s: (not s.failed, s.ready, s.instance)))
        while len(draft.standbys) < wanted:
            pattern = self._first(look, room, _ANY_RPS)
            if isinstance(pattern, NoRoom):
                refused = pattern.reason
            else:
                refused = park_new(draft, room, pattern.sm_pct, pattern.device_model, PARKED_QUOTA_PERMILLE)
            if refused:
                look.notes.append(f"no standby: {refused}")
                return

    def _goes_to_zero(self, look: _Look, now_s: float) -> bool:
        """Gives up a function that has been idle for long and needs no instance; tells whether it did."""
        draft, idle_since_s = look.draft, look.state.idle_since_s
        if look.function.spec.min_instances or not draft.active or idle_since_s is None:
            return False
        left_s = look.settings.idle_to_zero_s - (now_s - idle_since_s)
        if left_s > 0:
            look.notes.append(f"idle: goes to zero in {left_s:.1f} s")
            return False
        to_zero(draft)
        look.state = replace(look.state, scaled_down_at_s=now_s, below_since_s=None, spare_since_s=None)
        look.notes.append(f"idle for {now_s - idle_since_s:.0f} s: scaled to zero")
        return True

    def _scale(self, look: _Look, need: Need, room: Room, now_s: float) -> None:
        """Grows or shrinks by the need."""
        draft, settings = look.draft, look.settings
        own_shape(draft, room, settings)
        if need.need_rps > look.capacity_rps + EPSILON_RPS:
            look.state = replace(look.state, below_since_s=None, spare_since_s=None)
            self._grow(look, need, room, now_s)
            return
        look.state = replace(look.state, short_since_s=None)
        look.state, waiting = remove_instance(draft, room, need.need_rps, look.state, settings, now_s)
        if not draft.actions():
            look.state, waiting_quota = lower_quotas(draft, need.need_rps, look.state, settings, now_s)
            waiting = join_words(waiting_quota, waiting)
        if waiting:
            look.notes.append(waiting)

    def _grow(self, look: _Look, need: Need, room: Room, now_s: float) -> None:
        """Quotas of ready instances first, then standbys, then new instances for what will be missing for good."""
        draft, settings = look.draft, look.settings
        apply_growth(draft, room, growth(draft, draft.ready, room, need.need_rps, settings))
        # Instances on their way count with what they can grow to: their quotas follow as soon as they are ready.
        coming_rps = draft.reach_rps([share for share in draft.active if share.coming], room)
        missing_rps = need.lasting_rps - draft.ready_capacity_rps() - coming_rps
        if missing_rps <= EPSILON_RPS:
            look.state = replace(look.state, short_since_s=None)
            if coming_rps > 0:
                look.notes.append(f"up to {coming_rps:.1f} rps are on their way")
            elif need.need_rps > draft.ready_capacity_rps() + EPSILON_RPS:
                look.notes.append("quotas are at their ceiling; the backlog drains without a new instance")
            return
        missing_rps = activate_standbys(draft, room, missing_rps, settings)
        since_s = now_s if look.state.short_since_s is None else look.state.short_since_s
        look.state = replace(look.state, short_since_s=since_s)
        if missing_rps <= EPSILON_RPS or not draft.active:
            return
        failed = [share for share in draft.active if share.failed]
        if failed and (len(failed) > 1 or not draft.ready):
            look.notes.append("no further instance while the ones there fail")
            return
        left_s = settings.add_hold_s - (now_s - since_s)
        if left_s > 0 and missing_rps <= settings.add_at_once_share * need.lasting_rps:
            look.notes.append(f"{missing_rps:.1f} rps are missing; an instance is added in {left_s:.1f} s")
            return
        # At most doubling at a time keeps one wrong number from filling the cluster.
        at_most = max(1, len(draft.active))
        missing_rps, why = add_instances(draft, room, missing_rps, settings, at_most=at_most)
        if why:
            look.notes.append(f"{missing_rps:.1f} rps are missing: {why}")

    def _scale_blindly(self, look: _Look, room: Room, now_s: float) -> None:
        """Without a usable prediction: quotas grow a step at a time while the SLO is missed; nothing shrinks."""
        draft, settings = look.draft, look.settings
        if _predicted(look, room):
            found = best_effort(draft, room, settings)
            fastest = "" if isinstance(found, NoRoom) else f"; the fastest that has room takes {found[1] * 1e3:.0f} ms"
            look.notes.append(f"no configuration meets the SLO of {look.function.spec.slo_ms} ms{fastest}")
        else:
            look.notes.append("no prediction for this function yet")
        settled_at_s = look.state.scaled_up_at_s
        settled = settled_at_s is None or now_s - settled_at_s >= settings.feedback_after_s
        if not settled or not violated(look.function):
            return
        for share in draft.ready:
            if share.view is None:
                continue
            step = settings.quota_step_permille
            permille = (share.allocation.request_permille // step + 1) * step
            more = permille - share.allocation.request_permille
            free = room.free_permille(share.view.node, share.view.gpu, share.view.row)
            if permille <= WHOLE_PERMILLE and more <= free:
                apply_growth(draft, room, {share.instance: permille})
                look.state = replace(look.state, scaled_up_at_s=now_s)

    def _decision(self, look: _Look) -> Decision:
        """Puts the draft and the words together."""
        draft, demand = look.draft, look.function.demand
        actions = draft.actions()
        changes = [change_words(action, draft) for action in actions]
        words = changes + look.notes or ["nothing to do"]
        coming = any(share.coming for share in draft.shares)
        busy = look.demanded or coming or bool(actions) or look.state.below_since_s is not None
        return Decision(
            function=look.function.spec.name,
            desired=draft.desired(),
            actions=actions,
            reason=f"{head_words(look.function, look.need, look.capacity_rps)}: {'; '.join(words)}",
            look_again_s=self._settings.look_again_s if busy else self._settings.look_again_idle_s,
            next_ordinal=draft.next_ordinal,
            observed_rps=demand.rate_rps,
            predicted_rps=look.need.predicted_rps if look.need else None,
            capacity_rps=look.capacity_rps,
            queued_items_count=demand.queued_items_count,
            p95_s=demand.p95_s,
            standby_changed=draft.standby_changed(),
            needed_rps=look.need.need_rps if look.need else None,
        )


def _urgency(look: _Look) -> tuple[bool, float, str]:
    covered = 1.0
    if look.need is not None and look.need.need_rps > 0:
        covered = min(1.0, look.capacity_rps / look.need.need_rps)
    return (bool(look.draft.ready), covered, look.function.spec.name)


def _on_its_way(view: InstanceView) -> bool:
    """Whether it waits for its worker; loading is bounded by its agent, since large weights take minutes."""
    return view.state not in (InstanceState.READY, InstanceState.FAILED, InstanceState.LOADING)


def _refused(view: InstanceView) -> bool:
    return view.refused_permille is not None


def _since_s(
    function: FunctionView, before: Mapping[str, float], now_s: float, holds: Callable[[InstanceView], bool]
) -> Mapping[str, float]:
    """Since when something has held of each instance of which it holds."""
    return {view.instance: before.get(view.instance, now_s) for view in function.instances if holds(view)}


def _longer(since_s: Mapping[str, float], limit_s: float, now_s: float) -> frozenset[str]:
    return frozenset(name for name, since in since_s.items() if now_s - since > limit_s)


def _predicted(look: _Look, room: Room) -> bool:
    """Whether there is a prediction for any device model at hand; a guess that calls the SLO impossible is none."""
    models = {device.info.model for device in room.devices}
    tables = [table for model, table in look.function.tables.items() if model in models and table.points]
    return any(table.basis == "profiled" or any(table.feasible()) for table in tables)


def _feasible(look: _Look, room: Room) -> bool:
    """Whether capacity can be reckoned with: predictions exist, and something meets the SLO."""
    return _predicted(look, room) and meets_objective(look.draft, room, look.settings)


def _no_data_words(function: FunctionView) -> str:
    age_s = function.demand.age_s
    if age_s == float("inf"):
        return "no demand data yet: shares are kept"
    if age_s <= SILENT_AFTER_S:
        return "a first demand report, a rate takes two: shares are kept"
    return f"no demand data for {age_s:.0f} s: shares are kept"
