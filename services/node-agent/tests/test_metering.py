"""What the node agent tells of functions, shares and devices."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hasgpu_core.clock import ManualClock
from hasgpu_core.events import DeviceEvent, InstanceEvent
from hasgpu_core.resources import Allocation, DeviceHealth, DeviceInfo, InstanceState, Row
from hasgpu_node_agent.metering import FunctionMeters, MeteredShares, collect_device, collect_instance
from hasgpu_node_agent.row_guard import WorkerKey
from hasgpu_runtime import metric_catalogue as names
from hasgpu_runtime.metric_catalogue import MetricSpec
from hasgpu_runtime.metrics import Metrics, Sink

WORKER = WorkerKey("f-0", 1)


def told(sink: Sink, spec: MetricSpec) -> dict[tuple[str, ...], float]:
    return {point.labels: point.value for point in sink.points.get(spec.name, {}).values()}


def collected(meters: FunctionMeters, *, price_per_hour: float = 0.0) -> Sink:
    sink = Sink(Metrics())
    meters.collect(sink, "n", price_per_hour)
    return sink


def test_what_is_allocated_and_what_it_costs() -> None:
    meters = FunctionMeters(100.0)
    meters.accrue([("f", "gpu0", 0.25), ("f", "gpu0", 0.25), ("g", "gpu0", 0.1)], 100.0)
    meters.accrue([("f", "gpu0", 1.0)], 104.0)
    meters.accrue([], 105.0)
    meters.accrue([], 200.0)
    sink = collected(meters, price_per_hour=3_600.0)
    assert told(sink, names.FUNCTION_GPU_TIME) == pytest.approx({("f", "n", "gpu0"): 3.0, ("g", "n", "gpu0"): 0.4})
    assert told(sink, names.FUNCTION_COST) == pytest.approx({("f", "n", "gpu0"): 3.0, ("g", "n", "gpu0"): 0.4})
    assert told(collected(meters), names.FUNCTION_COST) == {}, "without a price there is no cost, not one of zero"


def test_what_is_used_counts_from_when_a_worker_is_first_seen() -> None:
    meters = FunctionMeters(0.0)
    for used_ns in (7_000_000_000, 8_000_000_000, 8_500_000_000):
        meters.use("gpu0", [("f", WORKER, 50, used_ns)])
    assert told(collected(meters), names.FUNCTION_GPU_USED) == {("f", "n", "gpu0"): 0.75}


def test_the_account_of_a_deleted_function_goes_once_nothing_of_it_is_reserved() -> None:
    meters = FunctionMeters(0.0)
    meters.accrue([("f", "gpu0", 0.5)], 0.0)
    meters.keep_only(lambda function: False, lambda key: True)
    assert told(collected(meters), names.FUNCTION_GPU_TIME)
    meters.accrue([], 1.0)
    meters.keep_only(lambda function: True, lambda key: True)
    assert told(collected(meters), names.FUNCTION_GPU_TIME) == {("f", "n", "gpu0"): 0.5}
    meters.keep_only(lambda function: False, lambda key: False)
    assert told(collected(meters), names.FUNCTION_GPU_TIME) == {}


INSTANCE = InstanceEvent(
    function="f",
    instance="f-0",
    node="n",
    gpu="gpu0",
    row=2,
    state=InstanceState.READY,
    reason="",
    address="h:1",
    allocation=Allocation(50, 300, 1000, 1 << 20),
    allocation_revision=1,
    function_revision=1,
    device_model="m",
    plan_revision=1,
    device_time_ns=1_500_000_000,
    batches_count=4,
    pid=7,
)


def test_an_instances_share_is_told_while_it_has_a_worker() -> None:
    sink = Sink(Metrics())
    collect_instance(sink, INSTANCE)
    collect_instance(sink, replace(INSTANCE, instance="f-1", state=InstanceState.PENDING, pid=0))
    collect_instance(sink, replace(INSTANCE, instance="f-2", state=InstanceState.PENDING, pid=0))
    labels = ("f", "f-0", "n", "gpu0", "2")
    assert told(sink, names.INSTANCES) == {("f", "n", "ready"): 1, ("f", "n", "pending"): 2}
    assert told(sink, names.ALLOCATION_SM) == {labels: 0.5}
    assert told(sink, names.ALLOCATION_REQUEST) == {labels: 0.3}
    assert told(sink, names.INSTANCE_DEVICE_TIME) == {labels: 1.5}


def test_what_the_driver_does_not_tell_is_absent() -> None:
    info = DeviceInfo("n", "gpu0", "H100", "cuda", 80 << 30, (100,), mode="mps+pct", health=DeviceHealth.DEGRADED)
    event = DeviceEvent(
        device=info,
        rows=(Row(0, 50, 800), Row(1, 25, 400)),
        memory_used_bytes=1 << 30,
        busy_permille=420,
        observed_unix_ns=0,
        allocated_gpu_ns=0,
        power_mw=350_000,
    )
    sink = Sink(Metrics())
    collect_device(sink, event)
    assert told(sink, names.GPU_ASKED) == {("n", "gpu0"): pytest.approx(0.5)}
    assert told(sink, names.GPU_DELIVERED) == {("n", "gpu0"): 0.42}
    assert told(sink, names.ROW_SM) == {("n", "gpu0", "0"): 0.5, ("n", "gpu0", "1"): 0.25}
    assert told(sink, names.GPU_POWER) == {("n", "gpu0"): pytest.approx(350.0)}
    assert told(sink, names.GPU_HEALTH) == {("n", "gpu0", "degraded"): 1}
    assert told(sink, names.GPU_TEMPERATURE) == {}


class Listener:
    def __init__(self) -> None:
        self.heard: list[str] = []

    def written(self, instance, worker, target) -> None:
        self.heard.append("written")

    def applied(self, instance, worker, target, *, confirmed) -> None:
        self.heard.append(f"applied {confirmed}")

    def refused(self, instance, reason) -> None:
        self.heard.append(f"refused {reason}")


class Worker:
    key = WORKER


def test_the_time_of_a_share_change_is_measured_and_passed_on() -> None:
    metrics, clock, listener = Metrics(), ManualClock(), Listener()
    shares = MeteredShares(listener, metrics, "n", clock)
    worker = Worker()
    shares.written(None, worker, None)
    clock.advance(0.04)
    shares.applied(None, worker, None, confirmed=True)
    shares.applied(None, worker, None, confirmed=True)  # nothing was written for this one
    shares.refused(None, "full")
    cell = metrics.histogram(names.SHARE_APPLY_DURATION, "n", "confirmed")
    assert (sum(cell.counts), cell.total) == (1, pytest.approx(0.04))
    assert listener.heard == ["written", "applied True", "applied True", "refused full"]
