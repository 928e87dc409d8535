"""Running a scenario: the policies of hasgpu-core in virtual time."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from random import Random

from hasgpu_core.demand import RATE_WINDOW_S, DemandTracker
from hasgpu_core.events import DemandEvent, FunctionEvent, InstanceEvent
from hasgpu_core.observe import ClusterObserver
from hasgpu_core.policy.hasgpu import HasGpuPolicy
from hasgpu_core.policy.scaling import ActionKind, Decision, ScalingPolicy, ScalingSettings

from hasgpu_sim.arrivals import arrival_times_s
from hasgpu_sim.cluster import Cluster
from hasgpu_sim.event_queue import EventQueue
from hasgpu_sim.gateway import FunctionGateway, GatewayHooks, LatencyCache
from hasgpu_sim.lending import Lender
from hasgpu_sim.moves import Mover
from hasgpu_sim.physics import Physics
from hasgpu_sim.recording import (
    InitialDesired,
    InstanceGone,
    Loop,
    RecordedEvent,
    RecordedInput,
    RecordedLoad,
    RecordedTick,
    apply,
)
from hasgpu_sim.scenario import FunctionLoad, FunctionResult, Scenario, ShareSample, SimResult

GATEWAY = "sim"
EPOCH = "sim-0"
_FOREVER_S = 1e9
"""In a sparse run gateways are never silent: they report when there is something to report."""


class _World:
    """One run."""

    def __init__(self, scenario: Scenario, policy: ScalingPolicy, stopwatch: Callable[[], float] | None) -> None:
        self._scenario = scenario
        self._events = EventQueue()
        self._entries: list[RecordedInput | RecordedTick] = []
        self._decisions: list[tuple[float, Decision]] = []
        self._shares: list[ShareSample] = []
        self._actions: dict[str, Counter[ActionKind]] = {load.spec.name: Counter() for load in scenario.functions}
        self._lead_gpu_seconds: dict[str, float] = {}
        self._lead_borrowed: dict[str, float] = {}
        self._stopwatch = stopwatch
        self._decide_s = array("d")
        observer = None
        if scenario.sparse:
            observer = ClusterObserver(demand=DemandTracker(silent_after_s=_FOREVER_S))
        self._loop = Loop(policy, observer)
        cache, rows_busy = LatencyCache(), dict[tuple[str, str, int], int]()
        hooks = GatewayHooks(borrowed=self._borrowed, pressed=self._press)
        lender = None
        if scenario.lend and scenario.physics is Physics.TABLE:
            lender = Lender(self._events, self._lent)
        self._gateways = {
            load.spec.name: FunctionGateway(
                load,
                self._events,
                timing=scenario.timing,
                physics=scenario.physics,
                cache=cache,
                hooks=hooks,
                rows_busy=rows_busy,
                lender=lender,
            )
            for load in scenario.functions
        }
        self._cluster = Cluster(scenario, self._events, self._gateways, self._tell)
        self._due_s: dict[str, float] = dict.fromkeys(self._gateways, 0.0)
        self._told: dict[str, tuple[float, int]] = {}
        self._asleep: set[str] = set()

    def run(self) -> SimResult:
        """Runs to the end of the scenario."""
        scenario = self._scenario
        rng = Random(scenario.seed)  # noqa: S311  a simulation is reproduced from its seed
        for index, load in enumerate(scenario.functions):
            self._deploy(load)
            times: Sequence[float] = load.arrivals_s
            if load.steps:
                times = sorted([*arrival_times_s(load.steps, load.process, rng), *times])
            self._schedule(index, load.spec.name, times)
        for loss in scenario.losses:
            self._events.at(scenario.lead_s + loss.at_s, partial(self._cluster.lose, loss.node))
            if loss.back_s is not None:
                self._events.at(scenario.lead_s + loss.back_s, partial(self._cluster.regain, loss.node))
        for drain in scenario.drains:
            self._events.at(scenario.lead_s + drain.at_s, partial(self._cluster.drain_node, drain.node))
        if scenario.moving is not None:
            self._events.at(0.0, Mover(scenario.moving, self._events, self._cluster).look)
        if scenario.lead_s > 0:
            self._events.at(scenario.lead_s, self._begin)
        self._heartbeat()
        if not scenario.sparse:
            self._report()
        self._tick()
        self._events.run_until(scenario.lead_s + scenario.duration_s)
        return SimResult(
            functions={load.spec.name: self._result(load) for load in scenario.functions},
            decisions=tuple(self._decisions),
            shares=tuple(self._shares),
            recording=RecordedLoad(tuple(self._entries)),
            moves=tuple((at_s - scenario.lead_s, name, old, new) for at_s, name, old, new in self._cluster.moves),
            gpus_peak=self._cluster.gpus_peak,
            decide_s=array("d", sorted(self._decide_s)),
        )

    def _deploy(self, load: FunctionLoad) -> None:
        name = load.spec.name
        self._tell(FunctionEvent(load.spec, 1, 0))
        for table in load.tables:
            self._tell(table)
        self._tell(InitialDesired(name, load.desired, len(load.desired), load.held))
        self._cluster.want(name, load.desired, at_once=True)

    def _schedule(self, index: int, function: str, times_s: Sequence[float]) -> None:
        """Lets one arrival after the other come; before anything else that happens at the same time."""
        gateway, events = self._gateways[function], self._events
        lead_s, end_s = self._scenario.lead_s, self._scenario.duration_s
        remaining = iter(times_s)
        asleep = self._asleep

        def arrive() -> None:
            gateway.arrive()
            if function in asleep and not gateway.ready:
                self._wake(function)
            schedule_next()

        def schedule_next() -> None:
            at_s = next(remaining, None)
            if at_s is not None and at_s <= end_s:
                events.at_first(lead_s + at_s, index, arrive)

        schedule_next()

    def _begin(self) -> None:
        """The lead is over: from here on it counts."""
        for name in self._gateways:
            self._lead_gpu_seconds[name] = self._cluster.gpu_seconds(name)
            self._lead_borrowed[name] = self._cluster.borrowed_gpu_seconds(name)
            self._actions[name].clear()

    def _tell(self, event: RecordedEvent) -> None:
        """Gives an event to the loop, and keeps it."""
        now_s = self._events.now_s
        if not self._scenario.sparse:
            self._entries.append(RecordedInput(now_s, event))
        elif isinstance(event, InstanceEvent | InstanceGone):
            self._press(event.function)
        apply(self._loop.observer, event, now_s)

    def _lent(self, function: str, gpus: float) -> None:
        self._cluster.lend(function, gpus)

    def _borrowed(self, function: str, gpu_seconds: float) -> None:
        self._cluster.borrow(function, gpu_seconds)

    def _press(self, function: str) -> None:
        """A function is to be looked at at the next tick."""
        self._due_s[function] = 0.0

    def _wake(self, function: str) -> None:
        """A request for a function that nobody looked at for a while; its gateway had gone on reporting none."""
        self._asleep.discard(function)
        self._due_s[function] = 0.0
        now_s = self._events.now_s
        told_s, arrived_count = self._told.get(function, (0.0, 0))
        before_s = now_s - RATE_WINDOW_S
        gateway = self._gateways[function]
        if before_s > told_s and gateway.arrived_count == arrived_count + 1:
            report = gateway.report(GATEWAY, EPOCH, round(before_s * 1e9))
            rows = report.arrived_items_count // max(1, report.arrived_count)
            still = DemandEvent(
                function, GATEWAY, EPOCH, report.observed_unix_ns, arrived_count, report.ok_count, report.failed_count,
                report.refused_count, report.late_count, 0, 0, 0, 0, None, None, None, arrived_count * rows, 0,
            )  # fmt: skip
            self._tell(still)

    def _unix_ns(self) -> int:
        return round(self._events.now_s * 1e9)

    def _heartbeat(self) -> None:
        for event in self._cluster.heartbeat(self._unix_ns()):
            self._tell(event)
        self._events.after(self._scenario.timing.telemetry_period_s, self._heartbeat)

    def _report(self) -> None:
        for gateway in self._gateways.values():
            gateway.dispatch()
            self._tell(gateway.report(GATEWAY, EPOCH, self._unix_ns()))
        self._events.after(self._scenario.timing.demand_period_s, self._report)

    def _tick(self) -> None:
        now_s = self._events.now_s
        names = None
        if self._scenario.sparse:
            names = [name for name, due_s in self._due_s.items() if due_s <= now_s]
            for name in names:
                gateway = self._gateways[name]
                gateway.dispatch()
                self._tell(gateway.report(GATEWAY, EPOCH, self._unix_ns()))
                self._told[name] = (now_s, gateway.arrived_count)
        if names is None or names:
            self._decide(now_s, names)
        self._sample(now_s)
        self._events.after(self._scenario.timing.tick_s, self._tick)

    def _decide(self, now_s: float, names: list[str] | None) -> None:
        started_s = self._stopwatch() if self._stopwatch else 0.0
        decisions = self._loop.tick(now_s, names)
        if self._stopwatch:
            self._decide_s.append(self._stopwatch() - started_s)
        if names is None:
            self._entries.append(RecordedTick(now_s, decisions))
        for decision in decisions:
            name = decision.function
            if decision.actions:
                self._decisions.append((now_s - self._scenario.lead_s, decision))
                self._actions[name].update(action.kind for action in decision.actions)
            self._cluster.want(name, decision.desired)
            self._due_s[name] = now_s + decision.look_again_s
            if decision.look_again_s > RATE_WINDOW_S:
                self._asleep.add(name)
            else:
                self._asleep.discard(name)

    def _sample(self, now_s: float) -> None:
        at_s = now_s - self._scenario.lead_s
        if self._scenario.sample_s <= 0 or at_s < 0:
            return
        period_s, tick_s = self._scenario.sample_s, self._scenario.timing.tick_s
        if period_s > tick_s and at_s % period_s >= tick_s:
            return
        for function, instance, allocation, ready in self._cluster.instances():
            self._shares.append(
                ShareSample(at_s, function, instance, allocation.sm_pct, allocation.request_permille, ready)
            )

    def _result(self, load: FunctionLoad) -> FunctionResult:
        name = load.spec.name
        gateway = self._gateways[name]
        return FunctionResult(
            requests_count=gateway.arrived_count,
            refused_count=gateway.refused_count,
            expired_count=gateway.expired_count,
            unanswered_count=gateway.queued_count + gateway.in_flight_count,
            latencies_s=array("d", sorted(gateway.latencies_s)),
            waits_s=array("d", sorted(gateway.waits_s)),
            slo_s=load.spec.slo_s,
            gpu_seconds=self._cluster.gpu_seconds(name) - self._lead_gpu_seconds.get(name, 0.0),
            actions={kind: self._actions[name][kind] for kind in ActionKind},
            borrowed_gpu_seconds=self._cluster.borrowed_gpu_seconds(name) - self._lead_borrowed.get(name, 0.0),
            violated_s=array("d", sorted(at_s - self._scenario.lead_s for at_s in gateway.violated_s)),
        )


def simulate(
    scenario: Scenario, policy: ScalingPolicy | None = None, *, stopwatch: Callable[[], float] | None = None
) -> SimResult:
    """Returns what comes of a scenario under a policy (default: HasGpuPolicy with its default settings).

    `stopwatch` gives the wall-clock time of the policy's passes; it has no influence on anything else.
    """
    return _World(scenario, policy or HasGpuPolicy(ScalingSettings()), stopwatch).run()
