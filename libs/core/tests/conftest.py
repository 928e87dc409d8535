"""Builders for values, and a loop that carries a policy's decisions out at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

import pytest
from hasgpu_core.capacity import CapacityPoint, CapacityTable, capacity_rps
from hasgpu_core.cluster import ClusterSnapshot, DemandView, FunctionView, InstanceView
from hasgpu_core.events import DesiredInstance
from hasgpu_core.function import MIB, Artifact, FunctionSpec, ModelFormat, TensorSpec
from hasgpu_core.policy.hasgpu import HasGpuPolicy
from hasgpu_core.policy.placement import Placement, occupy, place
from hasgpu_core.policy.scaling import Decision, PolicyState, ScalingSettings
from hasgpu_core.resources import Allocation, DeviceInfo, DeviceState, InstanceState
from hypothesis import settings

# No deadline: the machine may be busy with other tests.
settings.register_profile("core", max_examples=40, stateful_step_count=30, deadline=None)
settings.load_profile("core")

RUNGS = (25, 50, 75, 100)
SPEED = {25: 0.5, 50: 1.0, 75: 1.4, 100: 1.7}


class Make:
    """Builders."""

    def spec(self, name: str = "f", *, slo_ms: int = 300, **fields: object) -> FunctionSpec:
        tensor = TensorSpec("x", "FP32", (-1, 3))
        spec = FunctionSpec(
            name, ModelFormat.PYTHON, Artifact("0" * 64, 1), "model.py", (tensor,), (tensor,), slo_ms, **fields
        )  # type: ignore[arg-type]
        spec.validate()
        return spec

    def device(self, node: str = "n0", gpu: str = "g0", *, model: str = "cpu-2c", memory_mib: int = 8192) -> DeviceInfo:
        return DeviceInfo(node, gpu, model, "cpu", memory_mib * MIB, RUNGS)

    def table(
        self,
        function: str = "f",
        *,
        model: str = "cpu-2c",
        slo_ms: int = 300,
        item_s: float = 0.010,
        batches: Iterable[int] = (1, 2, 4, 8),
    ) -> CapacityTable:
        """Latency = item_s × (1 + batch) / 2 / speed of the SM share / quota."""
        points = []
        for batch in batches:
            for sm_pct in RUNGS:
                for quota in range(100, 1001, 100):
                    latency_s = item_s * (1 + batch) / 2 / SPEED[sm_pct] / (quota / 1000)
                    capacity = capacity_rps(batch=batch, latency_s=latency_s, slo_s=slo_ms / 1e3)
                    points.append(CapacityPoint(batch, sm_pct, quota, latency_s, capacity))
        return CapacityTable(function, 1, model, 1, 0, slo_ms, tuple(points))


class Bench:
    """A cluster in which decisions take effect at once, except that new instances start when told to."""

    def __init__(self, settings: ScalingSettings, devices: Iterable[DeviceInfo]) -> None:
        self.policy = HasGpuPolicy(settings)
        self.state = PolicyState()
        self.infos = tuple(devices)
        self.now_s = 100.0
        self.specs: dict[str, FunctionSpec] = {}
        self.tables: dict[str, dict[str, CapacityTable]] = {}
        self.instances: dict[str, dict[str, InstanceView]] = {}
        self.ordinals: dict[str, int] = {}
        self.held: set[str] = set()
        self.start_state = InstanceState.READY
        self.decisions: list[Decision] = []

    def deploy(self, spec: FunctionSpec, *tables: CapacityTable) -> None:
        self.specs[spec.name] = spec
        self.tables[spec.name] = {table.device_model: table for table in tables}
        self.instances.setdefault(spec.name, {})
        self.ordinals.setdefault(spec.name, 0)

    def put(
        self,
        function: str,
        *,
        sm_pct: int = 50,
        permille: int = 100,
        standby: bool = False,
        state: InstanceState = InstanceState.READY,
    ) -> str:
        """Adds an instance by hand."""
        name = f"{function}-{self.ordinals[function]}"
        self.ordinals[function] += 1
        allocation = Allocation(sm_pct, permille, 1000, self.specs[function].memory_bytes)
        self._bind(function, DesiredInstance(name, allocation, standby), state)
        return name

    def set_state(self, instance: str, state: InstanceState, reason: str = "") -> None:
        for views in self.instances.values():
            if instance in views:
                views[instance] = replace(views[instance], state=state, reason=reason)

    @property
    def devices(self) -> tuple[DeviceState, ...]:
        devices = tuple(DeviceState(info) for info in self.infos)
        for views in self.instances.values():
            for view in views.values():
                if view.node:
                    where = Placement(view.node, view.gpu, view.row, False, "")
                    devices = occupy(devices, where, view.allocation)
        for device in devices:
            assert sum(row.sm_pct for row in device.rows) <= 100
            assert all(row.used_permille <= 1000 for row in device.rows)
        return devices

    def snapshot(self, demand: dict[str, DemandView]) -> ClusterSnapshot:
        functions = tuple(
            FunctionView(
                spec=spec,
                revision=1,
                demand=demand.get(name, DemandView(None, age_s=float("inf"))),
                instances=tuple(self.instances[name][i] for i in sorted(self.instances[name])),
                tables=self.tables[name],
                held=name in self.held,
                next_ordinal=self.ordinals[name],
            )
            for name, spec in sorted(self.specs.items())
        )
        return ClusterSnapshot(functions, self.devices)

    def tick(self, dt_s: float = 0.5, **demand: DemandView | float | None) -> dict[str, Decision]:
        """Makes one pass; a number as demand is a rate, None that nobody reports."""
        views = {
            name.replace("_", "-"): view
            if isinstance(view, DemandView)
            else DemandView(view, age_s=0.1 if view is not None else float("inf"))
            for name, view in demand.items()
        }
        snapshot = self.snapshot(views)
        decided, state = self.policy.decide(snapshot, self.state, self.now_s)
        again = self.policy.decide(snapshot, self.state, self.now_s)
        assert again == (decided, state), "equal arguments must give equal results"
        self.state = state
        self.now_s += dt_s
        # Shares of those that are there change in milliseconds, long before a new instance is bound.
        for decision in decided:
            self._resize(decision)
        for decision in decided:
            self._start(decision)
        self.decisions += decided
        return {decision.function: decision for decision in decided}

    def run(self, seconds: float, **demand: DemandView | float | None) -> list[Decision]:
        """Makes passes for a while; returns the decisions that had actions."""
        first = len(self.decisions)
        for _ in range(round(seconds / 0.5)):
            self.tick(**demand)
        return [decision for decision in self.decisions[first:] if decision.actions]

    def requests(self, function: str = "f") -> dict[str, int]:
        """Quotas by instance, standbys left out."""
        return {
            name: view.allocation.request_permille
            for name, view in sorted(self.instances[function].items())
            if not view.standby
        }

    def _resize(self, decision: Decision) -> None:
        views = self.instances[decision.function]
        wanted = {want.instance: want for want in decision.desired}
        assert list(wanted) == sorted(wanted)
        for name in [name for name in views if name not in wanted]:
            del views[name]
        for name in views:
            views[name] = replace(views[name], allocation=wanted[name].allocation, standby=wanted[name].standby)

    def _start(self, decision: Decision) -> None:
        for want in decision.desired:
            if want.instance not in self.instances[decision.function]:
                self._bind(decision.function, want, self.start_state)
        self.ordinals[decision.function] = decision.next_ordinal

    def _bind(self, function: str, want: DesiredInstance, state: InstanceState) -> None:
        outcome = place(want.allocation, self.devices)
        view = InstanceView(want.instance, want.allocation, state, standby=want.standby)
        if isinstance(outcome, Placement):
            model = next(i.model for i in self.infos if (i.node, i.gpu) == (outcome.node, outcome.gpu))
            view = replace(view, node=outcome.node, gpu=outcome.gpu, row=outcome.row, device_model=model)
        else:
            view = replace(view, state=InstanceState.PENDING)
        self.instances[function][want.instance] = view


@pytest.fixture
def make() -> Make:
    return Make()


@pytest.fixture
def bench(make: Make) -> Callable[..., Bench]:
    def build(*devices: DeviceInfo, settings: ScalingSettings | None = None) -> Bench:
        return Bench(settings or ScalingSettings(), devices or (make.device(),))

    return build
