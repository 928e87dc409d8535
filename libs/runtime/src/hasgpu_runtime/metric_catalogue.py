"""The one catalogue of metrics: names, kinds, units and attributes. Instruments, documents and tests come from it.

Names are OpenTelemetry's (dotted); units are UCUM codes (https://ucum.org/ucum), with what is counted in braces. At the
Prometheus endpoint a name has underscores, its unit in words and, for a counter, `_total` at its end:
`MetricSpec.prometheus`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from types import MappingProxyType


class Kind(Enum):
    """How values add up."""

    COUNTER = "counter"
    """Only grows while its process lives."""
    GAUGE = "gauge"
    """What is so now."""
    HISTOGRAM = "histogram"
    """How values are distributed, since the process started."""


_UNIT_WORDS: Mapping[str, str] = MappingProxyType(
    {"s": "seconds", "By": "bytes", "W": "watts", "Cel": "celsius", "Hz": "hertz", "1": ""}
)
"""Of those used here; as the OpenTelemetry specification translates units for Prometheus
(https://opentelemetry.io/docs/specs/otel/compatibility/prometheus_and_openmetrics/)."""
_SERVICES = ("gateway", "scaler", "scheduler", "node-agent", "rapp")


@dataclass(frozen=True, slots=True)
class MetricSpec:
    """One metric."""

    name: str
    """Dotted, without its unit."""
    kind: Kind
    unit: str
    """UCUM; "1" is a ratio, "" no unit at all (0 or 1), "{request}" counts requests."""
    attributes: tuple[str, ...]
    """In the order in which values are given for them."""
    services: tuple[str, ...]
    """Whose processes offer it."""
    description: str
    buckets: tuple[float, ...] = ()
    """Upper bounds, of a histogram."""

    @property
    def prometheus(self) -> str:
        """Returns its name at the Prometheus endpoint, without a histogram's `_bucket`, `_sum` and `_count`."""
        words = [self.name.replace(".", "_")]
        top, per, bottom = self.unit.partition("/")
        top = "" if top.startswith("{") else _UNIT_WORDS.get(top, "")
        unit = f"{top}_per_{'second' if bottom == 's' else bottom}".strip("_") if per else top
        if unit:
            words.append(unit)
        if self.kind is Kind.COUNTER:
            words.append("total")
        return "_".join(words)

    @property
    def series(self) -> tuple[str, ...]:
        """Returns all names under which Prometheus stores it."""
        name = self.prometheus
        return (f"{name}_bucket", f"{name}_sum", f"{name}_count") if self.kind is Kind.HISTOGRAM else (name,)


_ALL: dict[str, MetricSpec] = {}

LATENCY_BUCKETS_S = (
    0.002,
    0.005,
    0.01,
    0.02,
    0.03,
    0.05,
    0.075,
    0.1,
    0.15,
    0.2,
    0.3,
    0.5,
    0.75,
    1.0,
    1.5,
    2.0,
    5.0,
    10.0,
)
"""Dense where objectives of models usually lie, 20 ms to 500 ms."""
SLO_BUCKETS = (0.1, 0.25, 0.5, 0.75, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0, 3.0, 5.0, 10.0)
"""Of latency over objective; 1.0 is a bound, so that the share answered in time is exact."""
PREDICTION_BUCKETS = (0.25, 0.5, 0.67, 0.8, 0.9, 0.95, 1.0, 1.05, 1.1, 1.25, 1.5, 2.0, 4.0)
"""Of observed over predicted latency."""
BATCH_BUCKETS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0)
LOOP_BUCKETS_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
SHARE_BUCKETS_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0, 5.0)

_FUNCTION = ("function",)
_INSTANCE = ("function", "instance_id", "node", "gpu", "row")
_GPU = ("node", "gpu")
_SHARE = ("function", "node", "gpu")
_LOOPS = ("scaler", "scheduler", "node-agent", "rapp", "gateway")


def _metric(
    kind: Kind,
    name: str,
    unit: str,
    attributes: Iterable[str],
    services: Iterable[str],
    description: str,
    buckets: tuple[float, ...] = (),
) -> MetricSpec:
    spec = MetricSpec(f"hasgpu.{name}", kind, unit, tuple(attributes), tuple(services), description, buckets)
    assert spec.name not in _ALL
    _ALL[spec.name] = spec
    return spec


def _counter(name: str, unit: str, attributes: Iterable[str], service: str, description: str) -> MetricSpec:
    return _metric(Kind.COUNTER, name, unit, attributes, (service,), description)


def _gauge(name: str, unit: str, attributes: Iterable[str], service: str, description: str) -> MetricSpec:
    return _metric(Kind.GAUGE, name, unit, attributes, (service,), description)


def _histogram(
    name: str, unit: str, attributes: Iterable[str], service: str, buckets: tuple[float, ...], description: str
) -> MetricSpec:
    return _metric(Kind.HISTOGRAM, name, unit, attributes, (service,), description, buckets)


# A function at the gateway. Several gateways: add them up.

REQUESTS = _counter(
    "requests",
    "{request}",
    ("function", "outcome"),
    "gateway",
    "Requests that have ended, by outcome: in_time and late (answered inside and outside the objective), expired (no "
    "answer within the deadline), failed (an error, or the caller went away), refused (turned away at once).",
)
REQUEST_ITEMS = _counter(
    "request.items", "{item}", _FUNCTION, "gateway", "Items (rows of the batch dimension) of the requests that arrived."
)
REQUEST_DURATION = _histogram(
    "request.duration",
    "s",
    _FUNCTION,
    "gateway",
    LATENCY_BUCKETS_S,
    "From a request's arrival to its answer, of those answered.",
)
REQUEST_SLO_RATIO = _histogram(
    "request.slo.ratio",
    "1",
    _FUNCTION,
    "gateway",
    SLO_BUCKETS,
    "A request's time over its function's objective, of those answered; above 1 is a violation.",
)
FUNCTION_SLO = _gauge("function.slo", "s", _FUNCTION, "gateway", "The function's latency objective.")
FUNCTION_SLO_TARGET = _gauge(
    "function.slo.target.ratio", "1", _FUNCTION, "gateway", "The share of requests that is to be answered in time."
)
QUEUE_LENGTH = _gauge("queue.length", "{request}", _FUNCTION, "gateway", "Requests in line.")
QUEUE_ITEMS = _gauge("queue.items", "{item}", _FUNCTION, "gateway", "Items of the requests in line.")
QUEUE_OLDEST_WAIT = _gauge(
    "queue.oldest.wait", "s", _FUNCTION, "gateway", "For how long the oldest request in line has waited; 0: none waits."
)
IN_FLIGHT = _gauge("requests.in.flight", "{request}", _FUNCTION, "gateway", "Requests at workers.")
ROUTES_OPEN = _gauge("routes.open", "{instance}", _FUNCTION, "gateway", "Instances that batches may be sent to now.")
BATCH_ITEMS = _histogram("batch.items", "{item}", _FUNCTION, "gateway", BATCH_BUCKETS, "Items of a batch answered.")
BATCH_DURATION = _histogram(
    "batch.duration", "s", _FUNCTION, "gateway", LATENCY_BUCKETS_S, "Gate wait and execution of a batch answered."
)
BATCH_PREDICTION = _histogram(
    "batch.prediction.ratio",
    "1",
    _FUNCTION,
    "gateway",
    PREDICTION_BUCKETS,
    "Observed over predicted latency of a batch, gate wait included; the prediction is that of rapp's table with the "
    "gateway's own correction, as the batch was routed by.",
)

# A function at the scaler that leads.

DEMAND_RATE = _gauge(
    "demand.rate", "{item}/s", _FUNCTION, "scaler", "Items that arrived a second, as the last decision saw it."
)
DEMAND_PREDICTED = _gauge(
    "demand.predicted.rate", "{item}/s", _FUNCTION, "scaler", "The rate that the last decision expected."
)
DEMAND_NEEDED = _gauge(
    "demand.needed.rate", "{item}/s", _FUNCTION, "scaler", "The capacity that the last decision asked for."
)
CAPACITY = _gauge(
    "capacity", "{item}/s", _FUNCTION, "scaler", "What the ready instances sustain inside the objective, as predicted."
)
INSTANCES_DESIRED = _gauge(
    "instances.desired",
    "{instance}",
    ("function", "role"),
    "scaler",
    "Instances wanted, by role: serving or standby (ready, parked at the smallest quota).",
)
SCALE_ACTIONS = _counter(
    "scale.actions",
    "{action}",
    ("function", "kind", "origin"),
    "scaler",
    "Changes decided: vertical_up, vertical_down, horizontal_up, horizontal_down; origin policy or manual.",
)
SCALING_PAUSED = _gauge("scaling.paused", "", (), "scaler", "1 while all scaling is paused by hand.")

# Control loops.

LOOP_DURATION = _metric(
    Kind.HISTOGRAM,
    "loop.duration",
    "s",
    ("loop", "outcome"),
    _LOOPS,
    "One pass of a control loop; outcome done or failed (what it raised is in the log).",
    LOOP_BUCKETS_S,
)
LOOP_DONE_AGE = _metric(
    Kind.GAUGE,
    "loop.done.age",
    "s",
    ("loop",),
    _LOOPS,
    "Since the last pass that did not fail; since the start at first.",
)
LOOP_WAITING = _metric(
    Kind.GAUGE,
    "loop.waiting",
    "",
    ("loop",),
    ("scaler", "scheduler"),
    "1 while decisions wait because the bus or the store is away (the log says for what).",
)
LOOP_LEADING = _metric(
    Kind.GAUGE,
    "loop.leading",
    "",
    ("loop",),
    ("scaler", "scheduler"),
    "1 in the replica that decides, 0 in the others.",
)
LOOP_DATA_AGE = _metric(
    Kind.GAUGE,
    "loop.data.age",
    "s",
    ("loop", "source"),
    ("scaler", "scheduler"),
    "Age of the oldest input of the last pass, by source: demand (of the functions deployed), table (a prediction, "
    "since it was computed), node (heartbeats of live nodes). No series: there is no such input.",
)

# Nodes and placement, at the scheduler that leads.

NODE_ALIVE = _gauge("node.alive", "", ("node",), "scheduler", "1 while a node's heartbeat comes, 0 when it is lost.")
NODE_HEARTBEAT_AGE = _gauge(
    "node.heartbeat.age", "s", ("node",), "scheduler", "Since the last heartbeat of a node was received."
)
NODE_DRAINING = _gauge("node.draining", "", ("node",), "scheduler", "1 while a node takes no new instance.")
INSTANCES_UNPLACED = _gauge(
    "instances.unplaced", "{instance}", _FUNCTION, "scheduler", "Instances wanted for which no GPU has room."
)
PLANS_WRITTEN = _counter("plans.written", "{plan}", ("node",), "scheduler", "Plans stored, by the node they are for.")

# Instances and devices, at their node agent.

INSTANCES = _gauge(
    "instances",
    "{instance}",
    ("function", "node", "state"),
    "node-agent",
    "Instances by state: pending, loading, ready, draining, stopped, failed.",
)
ALLOCATION_SM = _gauge(
    "allocation.sm.ratio", "1", _INSTANCE, "node-agent", "SM share in force of an instance, of the whole GPU."
)
ALLOCATION_REQUEST = _gauge(
    "allocation.request.ratio", "1", _INSTANCE, "node-agent", "Share of the device's time guaranteed to an instance."
)
ALLOCATION_LIMIT = _gauge(
    "allocation.limit.ratio", "1", _INSTANCE, "node-agent", "Share of the device's time up to which it may borrow."
)
ALLOCATION_MEMORY = _gauge("allocation.memory", "By", _INSTANCE, "node-agent", "Device memory promised to an instance.")
INSTANCE_DEVICE_TIME = _counter(
    "instance.device.time",
    "s",
    _INSTANCE,
    "node-agent",
    "For how long the instance's worker held the device; its rate is the share of time delivered.",
)
INSTANCE_DEBT = _gauge(
    "instance.debt", "s", _INSTANCE, "node-agent", "Device time used beyond the quota and not yet made up for."
)
INSTANCE_BATCHES = _counter("instance.batches", "{batch}", _INSTANCE, "node-agent", "Batches that the worker has run.")
INSTANCE_RESTARTS = _counter(
    "instance.restarts",
    "{restart}",
    _INSTANCE,
    "node-agent",
    "Times that an instance's worker had to be started again.",
)
SHARE_APPLY_DURATION = _histogram(
    "share.apply.duration",
    "s",
    ("node", "outcome"),
    "node-agent",
    SHARE_BUCKETS_S,
    "From writing a new share for a worker to having it in force; outcome confirmed, or unconfirmed (the worker did "
    "not say so in time).",
)
FUNCTION_GPU_TIME = _counter(
    "function.gpu.time",
    "s",
    _SHARE,
    "node-agent",
    "GPU-seconds allocated to a function: the integral of SM share times request. This is what costs.",
)
FUNCTION_GPU_USED = _counter(
    "function.gpu.used.time",
    "s",
    _SHARE,
    "node-agent",
    "GPU-seconds used by a function: device time held, times SM share. Lent idle time counts too.",
)
FUNCTION_COST = _counter(
    "function.cost",
    "{currency}",
    _SHARE,
    "node-agent",
    "GPU-seconds allocated, at the price of HASGPU_GPU_PRICE_PER_HOUR; absent without a price.",
)
ROW_SM = _gauge("row.sm.ratio", "1", (*_GPU, "row"), "node-agent", "SM share of a row.")
ROW_REQUEST = _gauge(
    "row.request.ratio", "1", (*_GPU, "row"), "node-agent", "Sum of the requests in a row; 1: it is full."
)
GPU_ASKED = _gauge(
    "gpu.asked.ratio", "1", _GPU, "node-agent", "Part of a GPU that is reserved: the sum of SM share times request."
)
GPU_DELIVERED = _gauge(
    "gpu.delivered.ratio",
    "1",
    _GPU,
    "node-agent",
    "Part of a GPU that was held over the last half second, each instance weighted by its SM share.",
)
GPU_INFO = _gauge("gpu.info", "", (*_GPU, "model", "backend", "mode"), "node-agent", "1; tells what the device is.")
GPU_HEALTH = _gauge(
    "gpu.health", "", (*_GPU, "health"), "node-agent", "1 for the device's present health: ok, degraded or lost."
)
GPU_MEMORY_TOTAL = _gauge("gpu.memory.total", "By", _GPU, "node-agent", "Memory of a device.")
GPU_MEMORY_PROMISED = _gauge("gpu.memory.promised", "By", _GPU, "node-agent", "Memory promised to instances.")
GPU_MEMORY_USED = _gauge(
    "gpu.memory.used", "By", _GPU, "node-agent", "Memory in use by the driver's word; absent where it does not tell."
)
GPU_POWER = _gauge("gpu.power", "W", _GPU, "node-agent", "Power drawn; absent where the driver does not tell.")
GPU_UTILISATION = _gauge(
    "gpu.utilisation.ratio",
    "1",
    _GPU,
    "node-agent",
    "Part of the driver's last sample for which any kernel ran; absent where it does not tell.",
)
GPU_TEMPERATURE = _gauge(
    "gpu.temperature", "Cel", _GPU, "node-agent", "Of the GPU; absent where the driver does not tell."
)
GPU_SM_CLOCK = _gauge("gpu.sm.clock", "Hz", _GPU, "node-agent", "Of the SMs; absent where the driver does not tell.")

# Predictions, at rapp.

TABLE_AGE = _gauge(
    "prediction.table.age",
    "s",
    ("function", "device_model", "basis"),
    "rapp",
    "Since the capacity table in use was computed, by basis: profiled (measured) or static (a guess). A table is "
    "computed anew only when something it depends on has changed.",
)
PREDICTION_CORRECTION = _gauge(
    "prediction.correction.ratio",
    "1",
    ("function", "device_model", "part"),
    "rapp",
    "Factor of the online correction in force; part device (where the quota decides the latency) or run (where not).",
)
PREDICTION_DRIFT = _gauge(
    "prediction.drift", "", ("function", "device_model"), "rapp", "1 while a profile no longer describes its function."
)
PREDICTION_OBSERVED = _gauge(
    "prediction.observed",
    "{batch}",
    ("function", "device_model"),
    "rapp",
    "Observed batches that the correction rests on.",
)
PROFILES_RUNNING = _gauge("profiles.running", "{run}", (), "rapp", "Profile runs under way or waiting for a device.")

# Every service.

LOG_RECORDS = _metric(
    Kind.COUNTER, "log.records", "{record}", ("level",), _SERVICES, "Log records of level warning, error and critical."
)
SERIES_DROPPED = _metric(
    Kind.COUNTER,
    "series.dropped",
    "{series}",
    ("metric",),
    _SERVICES,
    "Values left out because their metric has too many series already.",
)
SPANS_DROPPED = _metric(
    Kind.COUNTER, "spans.dropped", "{span}", (), _SERVICES, "Recorded spans that never reached the collector of traces."
)

CATALOGUE: Mapping[str, MetricSpec] = MappingProxyType(_ALL)
"""Every metric, by its OpenTelemetry name, in the order of the documents."""

PROCESS_SERIES = (
    "process_cpu_seconds_total",
    "process_resident_memory_bytes",
    "process_virtual_memory_bytes",
    "process_start_time_seconds",
    "process_open_fds",
    "process_max_fds",
)
"""What prometheus_client adds of the process itself."""
EXTRA_SERIES = ("up", "target_info")
"""Made by Prometheus for each target, and by OpenTelemetry from the resource (service name and instance)."""


def series_names() -> frozenset[str]:
    """Returns every name that a query may ask for."""
    return frozenset({*EXTRA_SERIES, *PROCESS_SERIES, *(name for spec in _ALL.values() for name in spec.series)})
