"""A load as the scaler saw it, with the decisions made: to be fed to another shell of the same policy."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace

from hasgpu_core.capacity import CapacityTable
from hasgpu_core.events import DemandEvent, DesiredInstance, DeviceEvent, FunctionEvent, InstanceEvent, NodeEvent
from hasgpu_core.observe import ClusterObserver
from hasgpu_core.policy.scaling import Decision, PolicyState, ScalingPolicy


@dataclass(frozen=True, slots=True)
class InstanceGone:
    """The subject of an instance was deleted."""

    function: str
    instance: str


@dataclass(frozen=True, slots=True)
class InitialDesired:
    """What was desired of a function before the first decision, as a scaler finds it in its store."""

    function: str
    instances: tuple[DesiredInstance, ...]
    next_ordinal: int
    held: bool


RecordedEvent = (
    FunctionEvent
    | DemandEvent
    | InstanceEvent
    | InstanceGone
    | DeviceEvent
    | NodeEvent
    | CapacityTable
    | InitialDesired
)


@dataclass(frozen=True, slots=True)
class RecordedInput:
    """An event and when it came in."""

    at_s: float
    event: RecordedEvent


@dataclass(frozen=True, slots=True)
class RecordedTick:
    """A pass of the loop: what it decided from all inputs before it."""

    at_s: float
    decisions: tuple[Decision, ...]


@dataclass(frozen=True, slots=True)
class RecordedLoad:
    """Inputs and ticks in their order.

    To replay: go through `entries`; set the clock to each one's time; hand inputs over; at a tick let the loop make
    one pass and compare its decisions. The decisions' desired sets become the desired state, as in any live loop.
    """

    entries: tuple[RecordedInput | RecordedTick, ...]

    @property
    def ticks(self) -> Iterator[RecordedTick]:
        """The passes alone."""
        return (entry for entry in self.entries if isinstance(entry, RecordedTick))


def apply(observer: ClusterObserver, event: RecordedEvent, now_s: float) -> None:
    """Hands a recorded event to an observer."""
    if isinstance(event, FunctionEvent):
        observer.apply_function(event)
    elif isinstance(event, DemandEvent):
        observer.apply_demand(event, now_s)
    elif isinstance(event, InstanceEvent):
        observer.apply_instance(event)
    elif isinstance(event, InstanceGone):
        observer.remove_instance(event.function, event.instance)
    elif isinstance(event, DeviceEvent):
        observer.apply_device(event, now_s)
    elif isinstance(event, NodeEvent):
        observer.apply_node(event, now_s)
    elif isinstance(event, CapacityTable):
        observer.apply_table(event)
    else:
        observer.set_desired(event.function, event.instances, event.next_ordinal)
        observer.set_held(event.function, event.held)


class Loop:
    """The scaler's loop without its shell: an observer, a policy and the policy's memory."""

    def __init__(self, policy: ScalingPolicy, observer: ClusterObserver | None = None) -> None:
        self.observer = observer or ClusterObserver()
        self._policy = policy
        self._state = PolicyState()

    def tick(self, now_s: float, functions: Collection[str] | None = None) -> tuple[Decision, ...]:
        """Makes one pass, over the named functions or all; what it decides is what is desired from then on."""
        snapshot = self.observer.snapshot(now_s, functions)
        decisions, state = self._policy.decide(snapshot, self._state, now_s)
        if functions is not None:
            state = replace(state, functions={**self._state.functions, **state.functions})
        self._state = state
        for decision in decisions:
            self.observer.set_desired(decision.function, decision.desired, decision.next_ordinal)
        return decisions


def replay(load: RecordedLoad, policy: ScalingPolicy) -> tuple[RecordedTick, ...]:
    """Feeds a recording through a policy anew and returns what it decides at each tick."""
    loop = Loop(policy)
    ticks = []
    for entry in load.entries:
        if isinstance(entry, RecordedInput):
            apply(loop.observer, entry.event, entry.at_s)
        else:
            ticks.append(RecordedTick(entry.at_s, loop.tick(entry.at_s)))
    return tuple(ticks)
