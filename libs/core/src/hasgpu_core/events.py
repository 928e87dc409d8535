"""What the services tell each other: the domain's side of `hasgpu.events.v1`. Subjects are built here and only here."""

from __future__ import annotations

from dataclasses import dataclass, field

from hasgpu_core.function import FunctionSpec
from hasgpu_core.resources import Allocation, DeviceInfo, InstanceState, Row


@dataclass(frozen=True, slots=True)
class FunctionEvent:
    """function.<fn> (STATE), by the gateway."""

    spec: FunctionSpec
    revision: int
    """Grows with every deploy and update; also the model version that clients see."""
    updated_unix_ns: int


@dataclass(frozen=True, slots=True)
class DemandEvent:
    """demand.<fn>.<gateway> (core NATS), by each gateway: cumulative counters, so that a lost message loses nothing."""

    function: str
    gateway: str
    epoch: str
    """Of the gateway process; a new epoch starts the counters at zero."""
    observed_unix_ns: int
    arrived_count: int
    """Every request for the function that reached the gateway, those it refused for lack of room or time included."""
    ok_count: int
    failed_count: int
    refused_count: int
    late_count: int
    """Answered, but later than the objective."""
    queued_count: int
    in_flight_count: int
    oldest_wait_ms: int
    window_count: int
    """Requests answered in the last few seconds; at 0 the percentiles are None."""
    p50_ms: int | None
    p95_ms: int | None
    p99_ms: int | None
    arrived_items_count: int = 0
    """Items (rows) of the requests that arrived, those of refused ones included: what capacity is counted in."""
    queued_items_count: int = 0
    """Items of the requests in line."""


@dataclass(frozen=True, slots=True)
class BatchObservation:
    """One executed batch, as the worker measured it."""

    batch: int
    sm_pct: int
    request_permille: int
    latency_ns: int
    """Gate wait and execution."""
    device_time_ns: int
    gate_wait_ns: int | None = None
    """Part of the latency that was waited at the gate; None: the worker does not tell."""


@dataclass(frozen=True, slots=True)
class InstanceEvent:
    """instance.<fn>.<id> (STATE), by the node agent."""

    function: str
    instance: str
    node: str
    gpu: str
    row: int
    state: InstanceState
    reason: str
    """In words, for FAILED and for refused changes."""
    address: str
    """host:port of its WorkerService; empty until it listens."""
    allocation: Allocation
    """In force."""
    allocation_revision: int
    function_revision: int
    device_model: str
    plan_revision: int
    device_time_ns: int = 0
    debt_ns: int = 0
    batches_count: int = 0
    restarts_count: int = 0
    observed_unix_ns: int = 0
    observations: tuple[BatchObservation, ...] = ()
    pid: int = 0
    """Of the worker process on its node; 0: none."""


@dataclass(frozen=True, slots=True)
class NodeEvent:
    """node.<node> (STATE), by the node agent: the heartbeat."""

    node: str
    address: str
    devices: tuple[DeviceInfo, ...]
    observed_unix_ns: int
    plan_revision: int
    draining: bool = False


@dataclass(frozen=True, slots=True)
class DeviceEvent:
    """device.<node>.<gpu> (core NATS), by the node agent."""

    device: DeviceInfo
    rows: tuple[Row, ...]
    memory_used_bytes: int
    """Promised to instances."""
    busy_permille: int
    """Share of the last telemetry period for which the device was held, summed over its rows weighted by SM share."""
    observed_unix_ns: int
    allocated_gpu_ns: int
    """Since the agent began: integral of SM share times request, in GPU-nanoseconds."""
    measured_memory_bytes: int | None = None
    """In use on the device, as its driver says; None, here and below: it does not say."""
    power_mw: int | None = None
    utilisation_pct: int | None = None
    """Part of the driver's last sample period for which any kernel ran, 0..100."""
    temperature_c: int | None = None
    sm_clock_mhz: int | None = None


@dataclass(frozen=True, slots=True)
class VerticalScaleEvent:
    """scale.vertical.<node>.<instance> (STATE), by the scaler."""

    function: str
    instance: str
    node: str
    allocation: Allocation
    revision: int
    """Of the desired state; the newest wins."""
    reason: str
    decided_unix_ns: int


@dataclass(frozen=True, slots=True)
class DesiredInstance:
    """One instance as the scaler wants it."""

    instance: str
    allocation: Allocation
    standby: bool = False
    """Ready, parked at the smallest quota, and gets no requests."""


@dataclass(frozen=True, slots=True)
class HorizontalScaleEvent:
    """scale.horizontal.<fn> (COMMANDS), by the scaler: all instances wanted; none: the function went."""

    function: str
    revision: int
    instances: tuple[DesiredInstance, ...]
    reason: str
    decided_unix_ns: int
    fencing_token: int


@dataclass(frozen=True, slots=True)
class PlannedInstance:
    """One instance bound to a row of a device."""

    function: str
    instance: str
    gpu: str
    row: int
    allocation: Allocation
    allocation_revision: int
    standby: bool = False
    moving_from: str = ""
    """It is to take over from the same instance on this node, which serves until it is READY; until then it is not told
    of. "": it moves from no other node."""
    moving_to: str = ""
    """It serves until the same instance is READY on this node, and leaves this plan then. "": it moves nowhere."""


@dataclass(frozen=True, slots=True)
class PlanEvent:
    """plan.<node> (STATE), by the scheduler: all that the node must run."""

    node: str
    revision: int
    instances: tuple[PlannedInstance, ...] = field(default_factory=tuple)
    fencing_token: int = 0
    reason: str = ""


def function_subject(function: str) -> str:
    """`function.<fn>`; pass "*" for all."""
    return f"function.{function}"


def demand_subject(function: str, gateway: str) -> str:
    """`demand.<fn>.<gateway>`."""
    return f"demand.{function}.{gateway}"


def instance_subject(function: str, instance: str) -> str:
    """`instance.<fn>.<id>`."""
    return f"instance.{function}.{instance}"


def node_subject(node: str) -> str:
    """`node.<node>`."""
    return f"node.{node}"


def device_subject(node: str, gpu: str) -> str:
    """`device.<node>.<gpu>`."""
    return f"device.{node}.{gpu}"


def capacity_subject(function: str, device_model: str) -> str:
    """`capacity.<fn>.<device model>`."""
    return f"capacity.{function}.{device_model}"


def vertical_subject(node: str, instance: str) -> str:
    """`scale.vertical.<node>.<instance>`."""
    return f"scale.vertical.{node}.{instance}"


def horizontal_subject(function: str) -> str:
    """`scale.horizontal.<fn>`."""
    return f"scale.horizontal.{function}"


def plan_subject(node: str) -> str:
    """`plan.<node>`."""
    return f"plan.{node}"


QUESTION_SUBJECT = "system.ask"
"""Core NATS: who is there, and how are you? Every service answers to the subject that the question's nonce names."""


def report_subject(nonce: str) -> str:
    """`system.report.<nonce>`."""
    return f"system.report.{nonce}"


STATE_SUBJECTS = ("function.>", "plan.>", "instance.>", "node.>", "capacity.>", "scale.vertical.>")
COMMAND_SUBJECTS = ("scale.horizontal.>",)
