"""Running a scenario: the policies of hasgpu-core in virtual time."""

from __future__ import annotations

from collections import Counter
from random import Random

from hasgpu_core.events import FunctionEvent
from hasgpu_core.policy.hasgpu import HasGpuPolicy
from hasgpu_core.policy.scaling import ActionKind, Decision, ScalingPolicy, ScalingSettings

from hasgpu_sim.arrivals import arrival_times_s
from hasgpu_sim.cluster import Cluster
from hasgpu_sim.event_queue import EventQueue
from hasgpu_sim.gateway import FunctionGateway
from hasgpu_sim.recording import (
    InitialDesired,
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


class _World:
    """One run."""

    def __init__(self, scenario: Scenario, policy: ScalingPolicy) -> None:
        self._scenario = scenario
        self._events = EventQueue()
        self._entries: list[RecordedInput | RecordedTick] = []
        self._decisions: list[tuple[float, Decision]] = []
        self._shares: list[ShareSample] = []
        self._actions: dict[str, Counter[ActionKind]] = {load.spec.name: Counter() for load in scenario.functions}
        self._loop = Loop(policy)
        self._gateways = {
            load.spec.name: FunctionGateway(load, self._events, window_s=scenario.timing.window_s)
            for load in scenario.functions
        }
        self._cluster = Cluster(scenario, self._events, self._gateways, self._tell)

    def run(self) -> SimResult:
        """Runs to the end of the scenario."""
        scenario = self._scenario
        rng = Random(scenario.seed)  # noqa: S311  a simulation is reproduced from its seed
        for load in scenario.functions:
            self._deploy(load)
            gateway = self._gateways[load.spec.name]
            for at_s in arrival_times_s(load.steps, load.process, rng):
                if at_s <= scenario.duration_s:
                    self._events.at(at_s, gateway.arrive)
        self._heartbeat()
        self._report()
        self._tick()
        self._events.run_until(scenario.duration_s)
        return SimResult(
            functions={load.spec.name: self._result(load) for load in scenario.functions},
            decisions=tuple(self._decisions),
            shares=tuple(self._shares),
            recording=RecordedLoad(tuple(self._entries)),
        )

    def _deploy(self, load: FunctionLoad) -> None:
        name = load.spec.name
        self._tell(FunctionEvent(load.spec, 1, 0))
        for table in load.tables:
            self._tell(table)
        self._tell(InitialDesired(name, load.desired, len(load.desired), load.held))
        self._cluster.want(name, load.desired, at_once=True)

    def _tell(self, event: RecordedEvent) -> None:
        """Gives an event to the loop, and keeps it."""
        now_s = self._events.now_s
        self._entries.append(RecordedInput(now_s, event))
        apply(self._loop.observer, event, now_s)

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
        decisions = self._loop.tick(now_s)
        self._entries.append(RecordedTick(now_s, decisions))
        for decision in decisions:
            if decision.actions:
                self._decisions.append((now_s, decision))
                self._actions[decision.function].update(action.kind for action in decision.actions)
            self._cluster.want(decision.function, decision.desired)
        for function, instance, allocation, ready in self._cluster.instances():
            self._shares.append(
                ShareSample(now_s, function, instance, allocation.sm_pct, allocation.request_permille, ready)
            )
        self._events.after(self._scenario.timing.tick_s, self._tick)

    def _result(self, load: FunctionLoad) -> FunctionResult:
        gateway = self._gateways[load.spec.name]
        return FunctionResult(
            requests_count=gateway.arrived_count,
            refused_count=gateway.refused_count,
            expired_count=gateway.expired_count,
            unanswered_count=gateway.queued_count + gateway.in_flight_count,
            latencies_s=sorted(gateway.latencies_s),
            waits_s=sorted(gateway.waits_s),
            slo_s=load.spec.slo_s,
            gpu_seconds=self._cluster.gpu_seconds(load.spec.name),
            actions={kind: self._actions[load.spec.name][kind] for kind in ActionKind},
        )


def simulate(scenario: Scenario, policy: ScalingPolicy | None = None) -> SimResult:
    """Returns what comes of a scenario under a policy (default: HasGpuPolicy with its default settings).

    Service times are those of the capacity tables at the quota in force: idle device time is not lent between
    request and limit, so latencies are on the pessimistic side.
    """
    return _World(scenario, policy or HasGpuPolicy(ScalingSettings())).run()
