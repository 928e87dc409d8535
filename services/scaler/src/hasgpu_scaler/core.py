"""What the scaler knows and decides, without touching the world: events and times in, decisions and records out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from hasgpu_core.cluster import ClusterSnapshot, FunctionView
from hasgpu_core.errors import NotFoundError
from hasgpu_core.events import DesiredInstance, FunctionEvent, InstanceEvent
from hasgpu_core.observe import ClusterObserver
from hasgpu_core.policy.advisory import missing_minimum
from hasgpu_core.policy.scaling import Decision, PolicyState, ScalingPolicy
from hasgpu_core.ports import Clock
from hasgpu_core.resources import InstanceState

from hasgpu_scaler.manual import ManualRequest, decide_manual
from hasgpu_scaler.recorder import Recorder
from hasgpu_scaler.records import DesiredRecord, sort_instances

DELETE_GRACE_S = 2.0
"""A function has to be gone for this long before it is taken down: a bus that lost its values gets them back first."""
TOMBSTONE_S = 3_600.0
"""How long a deleted function's record stays; longer than the scheduler remembers its last revision."""


class ScalerCore:
    """The scaler's state machine; one task drives it.

    `observer` is fed by the shell. `tick` runs the policy; a decision takes effect here when `commit` is called with
    the record made from it, once that is stored, and is taken back with `roll_back` when it could not be.
    """

    def __init__(
        self, *, policy: ScalingPolicy, observer: ClusterObserver, clock: Clock, recorder: Recorder | None = None
    ) -> None:
        self.policy = policy
        self.observer = observer
        self._clock = clock
        self._recorder = recorder
        self._advised: tuple[Decision, ...] = ()
        self._state = PolicyState()
        self._before = PolicyState()
        self._records: dict[str, DesiredRecord] = {}
        self._functions: dict[str, FunctionEvent] = {}
        self._gone_since_s: dict[str, float] = {}
        self._revision_floor: dict[str, int] = {}
        self._states: dict[str, dict[str, InstanceState]] = {}
        self._views: dict[str, FunctionView] = {}
        self._paused = False

    # What comes in.

    def load(self, records: Mapping[str, DesiredRecord], *, paused: bool) -> None:
        """Takes over what the store holds (at the start of every leadership)."""
        self._records = dict(records)
        self._paused = paused
        for record in self._records.values():
            self._tell(record)
            if record.function not in self._functions and not record.deleted_unix_ns:
                self._gone_since_s.setdefault(record.function, self._clock.now_s())

    def on_function(self, event: FunctionEvent) -> bool:
        """A function was deployed or updated; returns whether a pass is due."""
        name = event.spec.name
        old = self._functions.get(name)
        self._functions[name] = event
        self._gone_since_s.pop(name, None)
        self.observer.apply_function(event)
        if old is None and name in self._records:
            self._tell(self._records[name])
        return old != event

    def on_function_gone(self, name: str, now_s: float) -> None:
        """A function was deleted."""
        if self._functions.pop(name, None) is not None:
            self.observer.remove_function(name)
            self._gone_since_s[name] = now_s

    def on_instance(self, event: InstanceEvent) -> bool:
        """An instance changed; returns whether its state is another."""
        self.observer.apply_instance(event)
        floor = self._revision_floor.get(event.function, 0)
        self._revision_floor[event.function] = max(floor, event.allocation_revision)
        states = self._states.setdefault(event.function, {})
        changed = states.get(event.instance) is not event.state
        states[event.instance] = event.state
        return changed

    def on_instance_gone(self, function: str, instance: str) -> bool:
        """An instance is gone; returns whether it was known."""
        self.observer.remove_instance(function, instance)
        states = self._states.get(function, {})
        known = states.pop(instance, None) is not None
        if not states:
            self._states.pop(function, None)
        return known

    # What is decided.

    def set_policy(self, policy: ScalingPolicy) -> None:
        """Lets another policy decide from the next pass on; it starts without memory, which delays shrinking."""
        self.policy = policy
        self._state = self._before = PolicyState()

    def stop_recording(self) -> None:
        """Another process decides now."""
        if self._recorder is not None:
            self._recorder.stop()

    @property
    def advised(self) -> tuple[Decision, ...]:
        """What the last tick would have done of functions in advisory mode."""
        return self._advised

    def tick(self, now_s: float) -> tuple[Decision, ...]:
        """Runs the policy on a snapshot; returns one decision a function that is not in advisory mode.

        Those that are get theirs after all others, from the room that is left: `advised` has them. Of these only what
        gives a function its `min` instances is among the decisions.
        """
        unix_ns = self._clock.unix_ns()
        for name in self._functions:
            record = self._records.get(name)
            self.observer.set_held(name, self._paused or (record is not None and record.is_held(unix_ns)))
        snapshot = self.observer.snapshot(now_s)
        self._views = {view.spec.name: view for view in snapshot.functions}
        self._before = self._state
        advisory = tuple(view for view in snapshot.functions if view.spec.advisory)
        acting = snapshot
        if advisory:
            acting = replace(snapshot, functions=tuple(v for v in snapshot.functions if not v.spec.advisory))
        decisions, self._state = self.policy.decide(acting, self._state, now_s)
        self._advised = ()
        if advisory:
            self._advise(replace(snapshot, functions=advisory), now_s)
            floors = (missing_minimum(self._views[advice.function], advice) for advice in self.advised)
            decisions += tuple(floor for floor in floors if floor is not None)
        if self._recorder is not None:
            self._recorder.tick(self.policy.name, decisions, self._advised, now_s)
        return decisions

    def _advise(self, snapshot: ClusterSnapshot, now_s: float) -> None:
        self._advised, state = self.policy.decide(snapshot, self._before, now_s)
        self._state = replace(self._state, functions={**self._state.functions, **state.functions})

    def view(self, function: str) -> FunctionView | None:
        """Returns the function as the last tick saw it."""
        return self._views.get(function)

    def next_record(self, decision: Decision, unix_ns: int) -> DesiredRecord | None:
        """Returns the record that a decision asks for; None when nothing changes.

        A function that runs and has no record (the store was lost) gets one that takes over what runs.
        """
        base = self._base(decision.function)
        instances = sort_instances(decision.desired)
        if instances == base.instances:
            return None
        return base.changed(
            reason=decision.reason,
            unix_ns=unix_ns,
            instances=instances,
            next_ordinal=max(decision.next_ordinal, base.next_ordinal),
            deleted_unix_ns=0,
        )

    def commit(self, record: DesiredRecord) -> None:
        """Notes that a record is stored."""
        self._records[record.function] = record
        if record.deleted_unix_ns:
            self._gone_since_s.pop(record.function, None)
        self._tell(record)

    def roll_back(self, function: str) -> None:
        """Takes the policy's memory of a function back to before the last tick: its decision was not stored."""
        functions = dict(self._state.functions)
        before = self._before.functions.get(function)
        if before is None:
            functions.pop(function, None)
        else:
            functions[function] = before
        self._state = replace(self._state, functions=functions)

    def decide_manual(self, request: ManualRequest, now_s: float) -> tuple[Decision, DesiredRecord]:
        """Returns what a request by hand asks for; raises as `manual.decide_manual`, and NotFoundError."""
        if request.function not in self._functions:
            raise self.not_found(request.function)
        snapshot = self.observer.snapshot(now_s)
        view = next(view for view in snapshot.functions if view.spec.name == request.function)
        base = self._base(request.function)
        if request.function not in self._records:
            base = replace(base, instances=_desired_of(view), next_ordinal=view.next_ordinal)
        decision = decide_manual(request, base, view, snapshot.devices)
        unix_ns = self._clock.unix_ns()
        record = base.changed(
            reason=decision.reason,
            unix_ns=unix_ns,
            instances=decision.desired,
            next_ordinal=decision.next_ordinal,
            held_until_unix_ns=unix_ns + request.hold_s * 1_000_000_000,
            deleted_unix_ns=0,
        )
        return decision, record

    def pause(self, function: str, *, paused: bool) -> DesiredRecord | None:
        """Returns the record that pauses or resumes a function; None when it is so already. Raises NotFoundError."""
        if function not in self._functions:
            raise self.not_found(function)
        base = self._base(function)
        if base.paused == paused:
            return None
        if not base.revision:
            view = self._views.get(function)
            base = replace(
                base, instances=_desired_of(view) if view else (), next_ordinal=view.next_ordinal if view else 0
            )
        return base.changed(
            reason="paused by hand" if paused else "resumed by hand", unix_ns=self._clock.unix_ns(), paused=paused
        )

    def set_paused(self, paused: bool) -> None:
        """Notes that pausing (or resuming) everything is stored."""
        self._paused = paused

    def removals(self, now_s: float) -> tuple[DesiredRecord, ...]:
        """Returns the empty records of functions that were deleted."""
        unix_ns = self._clock.unix_ns()
        return tuple(
            self._records[name].changed(
                reason="the function was deleted",
                unix_ns=unix_ns,
                instances=(),
                paused=False,
                held_until_unix_ns=0,
                deleted_unix_ns=unix_ns,
            )
            for name, since_s in sorted(self._gone_since_s.items())
            if name in self._records and not self._records[name].deleted_unix_ns and now_s - since_s >= DELETE_GRACE_S
        )

    def to_forget(self) -> tuple[str, ...]:
        """Returns functions deleted long ago, of which nothing runs."""
        limit_unix_ns = self._clock.unix_ns() - round(TOMBSTONE_S * 1e9)
        return tuple(
            name
            for name, record in sorted(self._records.items())
            if 0 < record.deleted_unix_ns < limit_unix_ns and name not in self._functions and name not in self._states
        )

    def forget(self, function: str) -> None:
        """Drops a deleted function for good."""
        for held in (self._records, self._gone_since_s, self._revision_floor):
            held.pop(function, None)

    # What others may look at.

    @property
    def functions(self) -> Mapping[str, FunctionEvent]:
        """The functions deployed, by name."""
        return self._functions

    @property
    def records(self) -> Mapping[str, DesiredRecord]:
        """The stored desired states, by function; those of deleted functions too."""
        return self._records

    @property
    def paused(self) -> bool:
        """Whether all scaling is paused."""
        return self._paused

    def not_found(self, function: str) -> NotFoundError:
        """Returns the error for an unknown function."""
        return NotFoundError("function", function, f"there are: {', '.join(sorted(self._functions)) or 'none'}")

    def shown(self, function: str) -> DesiredRecord:
        """Returns the function's desired state, empty while nothing was decided; raises NotFoundError."""
        record = self._records.get(function)
        if function not in self._functions and (record is None or record.deleted_unix_ns):
            raise self.not_found(function)
        return record or DesiredRecord(function)

    def held_until_unix_ns(self, record: DesiredRecord) -> int:
        """Returns until when a function is held by hand; 0: it is not, or not any more."""
        return record.held_until_unix_ns if record.held_until_unix_ns > self._clock.unix_ns() else 0

    def _base(self, function: str) -> DesiredRecord:
        """The record to go on from; a new one starts above every revision that an agent has reported."""
        return self._records.get(function) or DesiredRecord(function, revision=self._revision_floor.get(function, 0))

    def _tell(self, record: DesiredRecord) -> None:
        if record.function in self._functions:
            self.observer.set_desired(record.function, record.instances, record.next_ordinal)


def _desired_of(view: FunctionView) -> tuple[DesiredInstance, ...]:
    return tuple(DesiredInstance(item.instance, item.allocation, item.standby) for item in view.instances)
