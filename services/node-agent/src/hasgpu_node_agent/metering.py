"""The node's metrics: what each function was given and has used, and what is so now when somebody asks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from hasgpu_core.events import DeviceEvent, InstanceEvent
from hasgpu_core.ports import Clock
from hasgpu_core.resources import WHOLE_PCT, WHOLE_PERMILLE
from hasgpu_runtime import metric_catalogue as names
from hasgpu_runtime.metrics import Metrics, Sink

from hasgpu_node_agent.instance import Instance, Worker
from hasgpu_node_agent.plan import ShareTarget
from hasgpu_node_agent.row_guard import WorkerKey
from hasgpu_node_agent.shares import ShareListener

HOUR_S = 3_600.0
NS = 1e9


@dataclass(slots=True)
class _Account:
    """What one function had of one device."""

    share: float = 0.0
    """Reserved now, 0..1 of the device."""
    allocated_gpu_s: float = 0.0
    used_gpu_s: float = 0.0


@dataclass(slots=True)
class FunctionMeters:
    """GPU-seconds by function and device, since the agent started; one kept for each function that is deployed."""

    _at_s: float
    _accounts: dict[tuple[str, str], _Account] = field(default_factory=dict)
    _used_ns: dict[WorkerKey, int] = field(default_factory=dict)

    def accrue(self, shares: Iterable[tuple[str, str, float]], now_s: float) -> None:
        """Counts what was reserved until now.

        Args:
            shares: (function, device, share of the device 0..1) of each worker, reserved from now on.
            now_s: Monotonic.
        """
        passed_s = max(0.0, now_s - self._at_s)
        self._at_s = now_s
        for account in self._accounts.values():
            account.allocated_gpu_s += account.share * passed_s
            account.share = 0.0
        for function, gpu, share in shares:
            self._accounts.setdefault((function, gpu), _Account()).share += share

    def use(self, gpu: str, workers: Iterable[tuple[str, WorkerKey, int, int]]) -> None:
        """Counts what a device's workers have used since the last call.

        Args:
            gpu: The device.
            workers: Function, key, SM share in per cent and cumulative device time in ns of each worker that runs. The
                first time that one is seen, what it used before does not count.
        """
        for function, key, sm_pct, used_ns in workers:
            delta_ns = max(0, used_ns - self._used_ns.get(key, used_ns))
            self._used_ns[key] = used_ns
            account = self._accounts.setdefault((function, gpu), _Account())
            account.used_gpu_s += delta_ns / NS * sm_pct / WHOLE_PCT

    def keep_only(self, functions: Callable[[str], bool], workers: Callable[[WorkerKey], bool]) -> None:
        """Drops the accounts of functions that are not deployed any more, and workers that have gone."""
        for key in [key for key, account in self._accounts.items() if not account.share and not functions(key[0])]:
            del self._accounts[key]
        for worker in [worker for worker in self._used_ns if not workers(worker)]:
            del self._used_ns[worker]

    def collect(self, sink: Sink, node: str, price_per_hour: float) -> None:
        """Puts what was counted; the cost only where a GPU has a price."""
        for (function, gpu), account in self._accounts.items():
            sink.put(names.FUNCTION_GPU_TIME, account.allocated_gpu_s, function, node, gpu)
            sink.put(names.FUNCTION_GPU_USED, account.used_gpu_s, function, node, gpu)
            if price_per_hour > 0:
                cost = account.allocated_gpu_s * price_per_hour / HOUR_S
                sink.put(names.FUNCTION_COST, cost, function, node, gpu)


class MeteredShares:
    """Implements `hasgpu_node_agent.shares.ShareListener`: measures, and tells another one."""

    def __init__(self, listener: ShareListener, metrics: Metrics, node: str, clock: Clock) -> None:
        self._listener = listener
        self._clock = clock
        self._confirmed = metrics.histogram(names.SHARE_APPLY_DURATION, node, "confirmed")
        self._unconfirmed = metrics.histogram(names.SHARE_APPLY_DURATION, node, "unconfirmed")
        self._written_at_s: dict[WorkerKey, float] = {}

    def written(self, instance: Instance, worker: Worker, target: ShareTarget) -> None:
        """A share is in the control block."""
        self._written_at_s = {key: at_s for key, at_s in self._written_at_s.items() if key != worker.key}
        self._written_at_s[worker.key] = self._clock.now_s()
        self._listener.written(instance, worker, target)

    def applied(self, instance: Instance, worker: Worker, target: ShareTarget, *, confirmed: bool) -> None:
        """The share is in force."""
        written_at_s = self._written_at_s.pop(worker.key, None)
        if written_at_s is not None:
            (self._confirmed if confirmed else self._unconfirmed).record(self._clock.now_s() - written_at_s)
        self._listener.applied(instance, worker, target, confirmed=confirmed)

    def refused(self, instance: Instance, reason: str) -> None:
        """The share does not fit now."""
        self._listener.refused(instance, reason)


def collect_instance(sink: Sink, event: InstanceEvent) -> None:
    """Puts what is so of an instance."""
    sink.put(names.INSTANCES, 1, event.function, event.node, event.state.value)
    if not event.pid:
        return
    labels = (event.function, event.instance, event.node, event.gpu, str(event.row))
    allocation = event.allocation
    sink.put(names.ALLOCATION_SM, allocation.sm_pct / WHOLE_PCT, *labels)
    sink.put(names.ALLOCATION_REQUEST, allocation.request_permille / WHOLE_PERMILLE, *labels)
    sink.put(names.ALLOCATION_LIMIT, allocation.limit_permille / WHOLE_PERMILLE, *labels)
    sink.put(names.ALLOCATION_MEMORY, allocation.memory_bytes, *labels)
    sink.put(names.INSTANCE_DEVICE_TIME, event.device_time_ns / NS, *labels)
    sink.put(names.INSTANCE_DEBT, event.debt_ns / NS, *labels)
    sink.put(names.INSTANCE_BATCHES, event.batches_count, *labels)
    sink.put(names.INSTANCE_RESTARTS, event.restarts_count, *labels)


def collect_device(sink: Sink, event: DeviceEvent) -> None:
    """Puts what is so of a device."""
    info = event.device
    labels = (info.node, info.gpu)
    sink.put(names.GPU_INFO, 1, *labels, info.model, info.backend, info.mode)
    sink.put(names.GPU_HEALTH, 1, *labels, info.health.value)
    asked = 0.0
    for row in event.rows:
        sink.put(names.ROW_SM, row.sm_pct / WHOLE_PCT, *labels, str(row.index))
        sink.put(names.ROW_REQUEST, row.used_permille / WHOLE_PERMILLE, *labels, str(row.index))
        asked += row.sm_pct / WHOLE_PCT * row.used_permille / WHOLE_PERMILLE
    sink.put(names.GPU_ASKED, asked, *labels)
    sink.put(names.GPU_DELIVERED, event.busy_permille / WHOLE_PERMILLE, *labels)
    sink.put(names.GPU_MEMORY_TOTAL, info.memory_bytes, *labels)
    sink.put(names.GPU_MEMORY_PROMISED, event.memory_used_bytes, *labels)
    for spec, value, factor in (
        (names.GPU_MEMORY_USED, event.measured_memory_bytes, 1.0),
        (names.GPU_POWER, event.power_mw, 1e-3),
        (names.GPU_UTILISATION, event.utilisation_pct, 1 / WHOLE_PCT),
        (names.GPU_TEMPERATURE, event.temperature_c, 1.0),
        (names.GPU_SM_CLOCK, event.sm_clock_mhz, 1e6),
    ):
        if value is not None:
            sink.put(spec, value * factor, *labels)
