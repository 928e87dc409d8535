"""The one catalogue of spans: their names, kinds and attributes, and which of them a complete trace holds.

Names that OpenTelemetry's semantic conventions give are used as they are (`rpc.*`, `messaging.*`, `db.*`, `network.*`:
https://opentelemetry.io/docs/specs/semconv/); all others begin with `hasgpu.`. Units end the name.

The span of an RPC is not listed: it is named after its method (`inference.GRPCInferenceService/ModelInfer`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

SpanName = Literal[
    "gateway.infer",
    "gateway.queue",
    "gateway.route",
    "gateway.batch",
    "worker.batch",
    "worker.gate_wait",
    "worker.execute",
    "scaler.demand",
    "scaler.decide",
    "scaler.store_desired",
    "scheduler.plan",
    "agent.apply_plan",
    "agent.start",
    "agent.apply_vertical",
    "agent.applied",
    "agent.profile",
    "rapp.train",
    "publish function",
    "publish demand",
    "publish instance",
    "publish node",
    "publish device",
    "publish capacity",
    "publish plan",
    "publish scale.vertical",
    "publish scale.horizontal",
]

SpanKind = Literal["internal", "server", "client", "producer", "consumer"]

# Attributes of ours.
FUNCTION = "hasgpu.function"
INSTANCE = "hasgpu.instance"
NODE = "hasgpu.node"
NODES = "hasgpu.nodes"
GPU = "hasgpu.gpu"
DEVICE_MODEL = "hasgpu.device_model"
ROW = "hasgpu.row"
SM_PCT = "hasgpu.sm_pct"
REQUEST_PERMILLE = "hasgpu.request_permille"
LIMIT_PERMILLE = "hasgpu.limit_permille"
BATCH_ROWS = "hasgpu.batch_rows"
BATCH_REQUESTS_COUNT = "hasgpu.batch_requests_count"
PREDICTED_LATENCY_MS = "hasgpu.predicted_latency_ms"
ACTUAL_LATENCY_MS = "hasgpu.actual_latency_ms"
LINE_MS = "hasgpu.line_ms"
GATE_WAIT_MS = "hasgpu.gate_wait_ms"
EXECUTE_MS = "hasgpu.execute_ms"
DEVICE_TIME_MS = "hasgpu.device_time_ms"
SEGMENTS_COUNT = "hasgpu.segments_count"
EMULATED = "hasgpu.emulated"
REVISION = "hasgpu.revision"
EPOCH = "hasgpu.epoch"
REASON = "hasgpu.reason"
ORIGIN = "hasgpu.origin"
ACTIONS = "hasgpu.actions"
INSTANCES = "hasgpu.instances"
INSTANCES_COUNT = "hasgpu.instances_count"
UNPLACED_COUNT = "hasgpu.unplaced_count"
OBSERVED_RPS = "hasgpu.observed_rps"
PREDICTED_RPS = "hasgpu.predicted_rps"
NEEDED_RPS = "hasgpu.needed_rps"
CAPACITY_RPS = "hasgpu.capacity_rps"
QUEUED_ITEMS_COUNT = "hasgpu.queued_items_count"
QUEUED_COUNT = "hasgpu.queued_count"
IN_FLIGHT_COUNT = "hasgpu.in_flight_count"
ARRIVED_COUNT = "hasgpu.arrived_count"
P95_MS = "hasgpu.p95_ms"
GATEWAY = "hasgpu.gateway"
POINTS_COUNT = "hasgpu.points_count"
VERSION = "hasgpu.version"

# Attributes of the semantic conventions.
RPC_SYSTEM = "rpc.system"
RPC_SERVICE = "rpc.service"
RPC_METHOD = "rpc.method"
RPC_STATUS = "rpc.grpc.status_code"
PEER_ADDRESS = "network.peer.address"
SERVER_ADDRESS = "server.address"
MESSAGING_SYSTEM = "messaging.system"
MESSAGING_DESTINATION = "messaging.destination.name"
MESSAGING_TEMPLATE = "messaging.destination.template"
MESSAGING_OPERATION = "messaging.operation.name"
MESSAGING_OPERATION_TYPE = "messaging.operation.type"
MESSAGING_BODY_BYTES = "messaging.message.body.size"
DB_SYSTEM = "db.system.name"
DB_OPERATION = "db.operation.name"

_ALLOCATION = (SM_PCT, REQUEST_PERMILLE)
_BATCH = (BATCH_ROWS, BATCH_REQUESTS_COUNT)
_PUBLISHED = (
    MESSAGING_SYSTEM,
    MESSAGING_DESTINATION,
    MESSAGING_TEMPLATE,
    MESSAGING_OPERATION,
    MESSAGING_OPERATION_TYPE,
    MESSAGING_BODY_BYTES,
)
_PROCESSED = (MESSAGING_SYSTEM, MESSAGING_DESTINATION, MESSAGING_OPERATION, MESSAGING_OPERATION_TYPE)
RPC_ATTRIBUTES = (RPC_SYSTEM, RPC_SERVICE, RPC_METHOD, RPC_STATUS)
"""Of the span of every RPC in its server."""


@dataclass(frozen=True, slots=True)
class SpanInfo:
    """What a span is."""

    service: str
    """`service.name` without its prefix `hasgpu-`; empty: any service."""
    meaning: str
    attributes: tuple[str, ...] = ()
    """Those that the span of something that went well always has."""
    kind: SpanKind = "internal"
    decision: bool = False
    """Part of a scaling decision: recorded whatever the ratio of the sampler."""


SPANS: Mapping[SpanName, SpanInfo] = {
    "gateway.infer": SpanInfo("gateway", "a request, from its arrival to its answer", (FUNCTION,)),
    "gateway.queue": SpanInfo("gateway", "... the part that it waited in its function's queue", (FUNCTION,)),
    "gateway.route": SpanInfo(
        "gateway",
        "... the part that it was in a batch at the instance chosen, trip included; linked with gateway.batch. "
        f"`{PREDICTED_LATENCY_MS}` once anything is known to predict from",
        (FUNCTION, INSTANCE, NODE, GPU, DEVICE_MODEL, ROW, *_ALLOCATION, LIMIT_PERMILLE, *_BATCH, ACTUAL_LATENCY_MS),
    ),
    "gateway.batch": SpanInfo(
        "gateway",
        "a batch, from forming it to its answer: in the trace of its first traced request, linked with gateway.route "
        "of every traced request in it",
        (FUNCTION, INSTANCE, *_ALLOCATION, *_BATCH, LINE_MS, GATE_WAIT_MS, EXECUTE_MS),
    ),
    "worker.batch": SpanInfo(
        "worker",
        "the batch in the worker, line included: in the trace of every traced request in it, linked with gateway.batch",
        (FUNCTION, INSTANCE, *_ALLOCATION, *_BATCH, LINE_MS, GATE_WAIT_MS, DEVICE_TIME_MS, SEGMENTS_COUNT),
    ),
    "worker.gate_wait": SpanInfo(
        "worker",
        "... the part that it waited at the device gate before its first segment; the first traced request's trace "
        "shows waits between segments too, below worker.execute",
        (FUNCTION, INSTANCE, *_ALLOCATION),
    ),
    "worker.execute": SpanInfo(
        "worker", "... the part that it ran", (FUNCTION, INSTANCE, *_ALLOCATION, *_BATCH, DEVICE_TIME_MS, EXECUTE_MS)
    ),
    "scaler.demand": SpanInfo(
        "scaler",
        "from the newest report of a gateway that a decision rests on to the decision",
        (FUNCTION, GATEWAY, ARRIVED_COUNT, QUEUED_COUNT, IN_FLIGHT_COUNT),
        decision=True,
    ),
    "scaler.decide": SpanInfo(
        "scaler",
        "one function's change: decided, stored. Rates where there are data",
        (FUNCTION, REVISION, REASON, ORIGIN, ACTIONS, CAPACITY_RPS, QUEUED_ITEMS_COUNT),
        decision=True,
    ),
    "scaler.store_desired": SpanInfo(
        "scaler",
        "writing the desired state",
        (FUNCTION, REVISION, INSTANCES, DB_SYSTEM, DB_OPERATION),
        kind="client",
        decision=True,
    ),
    "scheduler.plan": SpanInfo(
        "scheduler",
        "from a wanted set of instances to the nodes' plans; linked with further decisions that it serves",
        (NODES, UNPLACED_COUNT, REASON),
        decision=True,
    ),
    "agent.apply_plan": SpanInfo(
        "node-agent",
        "starting and retiring instances as a plan says",
        (NODE, REVISION, INSTANCES_COUNT, *_PROCESSED),
        kind="consumer",
        decision=True,
    ),
    "agent.start": SpanInfo(
        "node-agent",
        "a worker process, from its start until it is ready",
        (FUNCTION, INSTANCE, GPU, *_ALLOCATION, LIMIT_PERMILLE),
        decision=True,
    ),
    "agent.apply_vertical": SpanInfo(
        "node-agent",
        "from hearing of a new share to the control block",
        (FUNCTION, INSTANCE, REVISION, *_ALLOCATION, LIMIT_PERMILLE),
        kind="consumer",
        decision=True,
    ),
    "agent.applied": SpanInfo(
        "node-agent",
        "from writing a share, or from the worker being ready, until the worker reports the epoch in force",
        (FUNCTION, INSTANCE, REVISION, EPOCH),
        decision=True,
    ),
    "agent.profile": SpanInfo("node-agent", "measuring a function on a device", (FUNCTION, GPU, POINTS_COUNT)),
    "rapp.train": SpanInfo("rapp", "fitting a device model's predictor", (DEVICE_MODEL, VERSION)),
    "publish function": SpanInfo("", "a function's specification", _PUBLISHED, kind="producer"),
    "publish demand": SpanInfo("", "a gateway's demand", _PUBLISHED, kind="producer"),
    "publish instance": SpanInfo("", "an instance's state", _PUBLISHED, kind="producer"),
    "publish node": SpanInfo("", "a node's heartbeat", _PUBLISHED, kind="producer"),
    "publish device": SpanInfo("", "a device's telemetry", _PUBLISHED, kind="producer"),
    "publish capacity": SpanInfo("", "a capacity table", _PUBLISHED, kind="producer"),
    "publish plan": SpanInfo("", "a node's plan", _PUBLISHED, kind="producer"),
    "publish scale.vertical": SpanInfo("", "an instance's share", _PUBLISHED, kind="producer"),
    "publish scale.horizontal": SpanInfo("", "a function's set of instances", _PUBLISHED, kind="producer"),
}

SUBJECT_TEMPLATES: Mapping[str, tuple[SpanName, str]] = {
    "function": ("publish function", "function.{function}"),
    "demand": ("publish demand", "demand.{function}.{gateway}"),
    "instance": ("publish instance", "instance.{function}.{instance}"),
    "node": ("publish node", "node.{node}"),
    "device": ("publish device", "device.{node}.{gpu}"),
    "capacity": ("publish capacity", "capacity.{function}.{device_model}"),
    "plan": ("publish plan", "plan.{node}"),
    "scale.vertical": ("publish scale.vertical", "scale.vertical.{node}.{instance}"),
    "scale.horizontal": ("publish scale.horizontal", "scale.horizontal.{function}"),
}
"""By a subject's first word, or its first two where that is `scale`."""


@dataclass(frozen=True, slots=True)
class Link:
    """One span of a chain."""

    name: str
    service: str
    """`service.name`."""
    parent: str = ""
    """Name of its parent in the chain; empty: the chain begins here."""
    attributes: tuple[str, ...] = ()
    """That it must have."""


def _link(name: SpanName, parent: str, service: str = "") -> Link:
    info = SPANS[name]
    return Link(name, f"hasgpu-{service or info.service}", parent, info.attributes)


INFER = "inference.GRPCInferenceService/ModelInfer"

REQUEST_CHAIN = (
    Link(INFER, "hasgpu-gateway", "", RPC_ATTRIBUTES),
    _link("gateway.infer", INFER),
    _link("gateway.queue", "gateway.infer"),
    _link("gateway.route", "gateway.infer"),
    _link("worker.batch", "gateway.route"),
    _link("worker.gate_wait", "worker.batch"),
    _link("worker.execute", "worker.batch"),
)
"""In the trace of every traced request that was answered."""

_DECISION = (_link("scaler.decide", ""), _link("scaler.store_desired", "scaler.decide"))

VERTICAL_CHAIN = (
    *_DECISION,
    _link("publish scale.vertical", "scaler.decide", "scaler"),
    _link("agent.apply_vertical", "publish scale.vertical"),
    _link("agent.applied", "agent.apply_vertical"),
)
"""Of a decision that changes the share of an instance that runs."""

HORIZONTAL_CHAIN = (
    *_DECISION,
    _link("publish scale.horizontal", "scaler.decide", "scaler"),
    _link("scheduler.plan", "publish scale.horizontal"),
    _link("publish plan", "scheduler.plan", "scheduler"),
    _link("agent.apply_plan", "publish plan"),
    _link("agent.start", "agent.apply_plan"),
    _link("agent.applied", "agent.start"),
)
"""Of a decision that adds an instance."""


def from_demand(chain: Iterable[Link]) -> tuple[Link, ...]:
    """Returns a decision's chain as the policy's decisions have it: it begins with the demand that it rests on."""
    links = (replace(link, parent=link.parent or "scaler.demand") for link in chain)
    return (_link("scaler.demand", ""), *links)


@dataclass(frozen=True, slots=True)
class SeenSpan:
    """A span as a collector has it."""

    name: str
    service: str
    span_id: str
    parent_id: str
    """Empty: the root of its trace."""
    attributes: Collection[str]
    """Their names."""


def chain_faults(spans: Iterable[SeenSpan], chain: Iterable[Link]) -> tuple[str, ...]:
    """Returns what a trace lacks of a chain, in words; empty: the chain is complete.

    Args:
        spans: All of one trace.
        chain: Parents before their children.
    """
    faults: list[str] = []
    ids: dict[str, set[str]] = {}
    seen = list(spans)
    for link in chain:
        named = [span for span in seen if span.name == link.name and span.service == link.service]
        parents = ids.get(link.parent, set())
        placed = [span for span in named if not link.parent or span.parent_id in parents]
        ids[link.name] = {span.span_id for span in placed}
        if not named:
            faults.append(f"no {link.name} of {link.service}")
        elif not placed:
            faults.append(f"{link.name} is no child of {link.parent}")
        else:
            complete = [span for span in placed if set(link.attributes) <= set(span.attributes)]
            if not complete:
                lacking = sorted(set(link.attributes) - set(placed[0].attributes))
                faults.append(f"{link.name} lacks {', '.join(lacking)}")
    return tuple(faults)


def orphans(spans: Iterable[SeenSpan]) -> tuple[str, ...]:
    """Returns the names of a trace's spans whose parent is not in it, but for those of RPCs: a caller may be traced."""
    seen = list(spans)
    ids = {span.span_id for span in seen}
    return tuple(s.name for s in seen if s.parent_id and s.parent_id not in ids and RPC_SYSTEM not in s.attributes)
