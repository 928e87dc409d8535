"""The node agent: listens to plans and shares, keeps the workers to them, and tells what is so."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence

from hasgpu_core.errors import FencedError, HasgpuError, InvalidError, UnavailableError
from hasgpu_core.events import (
    DeviceEvent,
    InstanceEvent,
    NodeEvent,
    device_subject,
    function_subject,
    instance_subject,
    node_subject,
    plan_subject,
    vertical_subject,
)
from hasgpu_core.ports import Bus, CaughtUp, Clock, StateChange
from hasgpu_core.resources import InstanceState
from hasgpu_device.backends.cuda.fault_policy import FaultLimits
from hasgpu_runtime.loop import ReconcileLoop
from hasgpu_runtime.metrics import Metrics, Sink
from hasgpu_runtime.telemetry import Telemetry
from hasgpu_runtime.wire import decode_function, decode_instance, decode_plan, decode_vertical, encode

from hasgpu_node_agent.gpu_watch import GpuWatch
from hasgpu_node_agent.instance import Instance, Worker
from hasgpu_node_agent.metering import FunctionMeters, MeteredShares, collect_device, collect_instance
from hasgpu_node_agent.meters import AllocationMeter, BusyMeter
from hasgpu_node_agent.ports import Artifacts, Gauges, Gpu, Launcher, WorkerClient, WorkerProcess
from hasgpu_node_agent.profiling import Profiler
from hasgpu_node_agent.publisher import BusPublisher
from hasgpu_node_agent.reconciler import Reconciler
from hasgpu_node_agent.row_guard import RowGuard
from hasgpu_node_agent.shares import CONFIRM_TIMEOUT_S, ShareApplier
from hasgpu_node_agent.traces import ShareTraces

log = logging.getLogger(__name__)

PASS_PERIOD_S = 1.0
TICK_S = 0.05
"""How often a loading worker's own status is read."""
CONFIRM_TICK_S = 0.003
"""How often a worker's confirmation of its share is looked for."""
BEAT_PERIOD_S = 1.0
DEVICE_PERIOD_S = 0.5
INSTANCE_PERIOD_S = 1.0
REFRESH_EVERY = 3
"""Of so many periods, in one also what has not changed is told again, should another have written over it."""
RETRY_S = 0.5
"""While the bus is away."""
MAX_OBSERVATIONS = 64
"""Of one instance between two events."""
END_AGAIN_S = 0.2
ORPHAN_GRACE_S = 30.0
"""A bus that knows no plan of this node for so long (not even an empty one) means that it is to run nothing."""


class NodeAgent:
    """Everything of a node but its gRPC server. Start `run` in the task group that `spawn` belongs to."""

    def __init__(
        self,
        *,
        node: str,
        address: str,
        bus: Bus,
        clock: Clock,
        telemetry: Telemetry,
        guard: RowGuard,
        launcher: Launcher,
        artifacts: Artifacts,
        client: WorkerClient,
        gpus: Mapping[str, Gpu],
        gauges: Gauges,
        metrics: Metrics,
        gpu_price_per_hour: float,
        spawn: Callable[[Coroutine[object, object, None]], object],
    ) -> None:
        self._node = node
        self._address = address
        self._bus = bus
        self._clock = clock
        self._telemetry = telemetry
        self._guard = guard
        self._launcher = launcher
        self._artifacts = artifacts
        self._client = client
        self._loop = ReconcileLoop(clock, PASS_PERIOD_S, name="node-agent", metrics=metrics)
        self._publisher = BusPublisher(bus, node, self._event, self._published, self._speaks)
        self._gauges = gauges
        self.watch = GpuWatch(
            gpus, gauges, guard=guard, clock=clock, spawn=spawn, changed=self._device_changed, limits=FaultLimits()
        )
        """Of the GPUs and their daemons."""
        self.traces = ShareTraces(telemetry, clock, self._publisher.mark)
        self._reconciler = Reconciler(
            guard=guard,
            launcher=launcher,
            artifacts=artifacts,
            client=client,
            publisher=self._publisher,
            shares=ShareApplier(guard, MeteredShares(self.traces, metrics, node, clock), clock.now_s),
            sites=self.watch,
            clock=clock,
            spawn=spawn,
            poke=self._loop.poke,
        )
        self.profiler = Profiler(
            guard=guard,
            launcher=launcher,
            artifacts=artifacts,
            client=client,
            clock=clock,
            spawn=spawn,
            end=self._reconciler.retirer.end,
        )
        self._spawn = spawn
        self._meters = {d.gpu: (AllocationMeter(clock.now_s()), BusyMeter(clock.now_s())) for d in guard.devices}
        self._function_meters = FunctionMeters(clock.now_s())
        self._gpu_price_per_hour = gpu_price_per_hour
        metrics.collect_with(self._collect)
        self._device_events: dict[str, DeviceEvent] = {}
        self.caught_up = asyncio.Event()
        """Set once all that was said before has been heard."""

    # What is told

    def node_event(self) -> NodeEvent:
        """Returns the heartbeat, as it would be sent now."""
        return NodeEvent(
            node=self._node,
            address=self._address,
            devices=self._guard.devices,
            observed_unix_ns=self._clock.unix_ns(),
            plan_revision=self._reconciler.plan_revision,
            draining=self._reconciler.draining,
        )

    def instance_events(self) -> Sequence[InstanceEvent]:
        """Returns all instances, by id."""
        return [self._describe(found) for _, found in sorted(self._reconciler.instances.items())]

    def device_events(self) -> Sequence[DeviceEvent]:
        """Returns all devices, as last sent."""
        return [self._device_events.get(d.gpu) or self._measure_device(d.gpu) for d in self._guard.devices]

    def set_draining(self, draining: bool) -> None:
        """Takes no new worker from now on (or does again), and says so."""
        if self._reconciler.draining != draining:
            log.info("the node is %s", "draining" if draining else "taking new workers again")
            self._reconciler.draining = draining
            self._loop.poke()
            self._spawn(self._tell_node())

    def _device_changed(self) -> None:
        """A GPU's health changed, or whether workers can be started on it."""
        self._loop.poke()
        if self.caught_up.is_set():
            self._spawn(self._tell_node())

    def _event(self, instance: str) -> tuple[InstanceEvent, Mapping[str, str]] | None:
        found = self._reconciler.instances.get(instance)
        return (self._describe(found), self.traces.headers(instance)) if found is not None else None

    def _describe(self, instance: Instance) -> InstanceEvent:
        gpu = instance.planned.gpu if instance.planned else ""
        models = {d.gpu: d.model for d in self._guard.devices}
        return instance.event(
            node=self._node,
            device_model=models.get(gpu, ""),
            plan_revision=self._reconciler.plan_revision,
            unix_ns=self._clock.unix_ns(),
        )

    def _speaks(self, instance: str) -> bool:
        """Whether this node has the say on an instance: it is planned here, and not in a move to another node.

        Of an instance that comes from another node the old node tells until the new worker is ready; of one that goes
        to another, the new node tells as soon as its worker is.
        """
        found = self._reconciler.instances.get(instance)
        planned = found.planned if found is not None else None
        if found is None or planned is None or planned.moving_to:
            return False
        is_ready = found.current is not None and found.current.state is InstanceState.READY
        return is_ready or not planned.moving_from

    def _published(self, event: InstanceEvent) -> None:
        found = self._reconciler.instances.get(event.instance)
        if found is not None and found.observations is event.observations:
            found.observations = ()

    # The loops

    async def run(self, ready: Callable[[], Awaitable[None]]) -> None:
        """Adopts what runs, then follows the bus until it is cancelled or a loop fails; `ready` is called once."""
        self._adopt()
        loops = (
            self._listen(),
            self._announce(ready),
            self._reconcile(),
            self._tick(),
            self._publish(),
            self._beat(),
            self._beat_node(),
            self.watch.run(self._reconciler),
            self._measure_devices(),
            self._measure_instances(),
        )
        await run_until_one_fails(loops)

    def let_go(self) -> None:
        """Stops looking at the workers, which serve on; after `run` has ended."""
        for process in self._processes():
            process.let_go()

    async def stop_workers(self) -> None:
        """Drains and stops all workers; best while `run` runs, so that others learn of it at once."""
        await self._reconciler.stop_all()

    async def leave(self) -> None:
        """Takes the node's own subjects back; after `run` has ended."""
        try:
            await self._publisher.write_all()
            await self._bus.delete(node_subject(self._node))
        except UnavailableError as error:
            log.warning("the node's end can't be told: %s", error)

    def _adopt(self) -> None:
        found = self._launcher.adopt(self._loop.poke)
        for adopted in found:
            known = adopted.record.gpu in {d.gpu for d in self._guard.devices}
            if known and self._reconciler.adopt(adopted):
                log.info("adopted %s (pid %d)", adopted.record.key.instance, adopted.process.pid)
            elif not known:
                log.warning("%s runs on %s, which is not here", adopted.record.key.instance, adopted.record.gpu)
                self._spawn(_end(adopted.process))

    async def _listen(self) -> None:
        patterns = (function_subject(">"), plan_subject(self._node), vertical_subject(self._node, ">"))
        async with self._bus.watch(*patterns) as changes:
            async for change in changes:
                if isinstance(change, CaughtUp):
                    await self._heard_all()
                else:
                    self._hear(change)

    async def _heard_all(self) -> None:
        if not self.caught_up.is_set():
            self._spawn(self._sweep())
            self._spawn(self._await_plan())
        else:
            # The bus was away: it may have forgotten what was said before.
            for instance in self._reconciler.instances:
                self._publisher.mark(instance)
        self.caught_up.set()
        self._loop.poke()

    def _hear(self, change: StateChange) -> None:
        kind, _, rest = change.subject.partition(".")
        try:
            if kind == "function":
                if change.payload is None:
                    self._reconciler.forget_function(rest)
                else:
                    self._reconciler.set_function(decode_function(change.payload))
            elif kind == "plan":
                self._hear_plan(change)
            elif change.payload is None:
                self._reconciler.forget_vertical(change.subject.rpartition(".")[2])
            else:
                event = decode_vertical(change.payload)
                self.traces.heard(event)
                self._reconciler.set_vertical(event, change.headers)
        except InvalidError as error:
            log.warning("%s can't be read: %s", change.subject, error)
        except FencedError as error:
            log.warning("%s is ignored: %s", change.subject, error)

    def _hear_plan(self, change: StateChange) -> None:
        if change.payload is not None:
            plan = decode_plan(change.payload)
            self._reconciler.set_plan(plan)
            self.traces.plan(plan, change.headers)
        elif self._reconciler.plan_revision:
            log.info("the plan was deleted: all instances go")
            self._reconciler.clear_plan()

    async def _await_plan(self) -> None:
        """Ends what was adopted when nobody plans for this node at all."""
        await self._clock.sleep(ORPHAN_GRACE_S)
        if not self._reconciler.has_plan and self._reconciler.instances:
            log.warning("no plan for this node in %.0f s: what was adopted goes", ORPHAN_GRACE_S)
            self._reconciler.clear_plan()

    async def _sweep(self) -> None:
        """Deletes the subjects of instances that an earlier agent of this node left and that are no more."""
        async with self._bus.watch(instance_subject("*", "*")) as changes:
            async for change in changes:
                if isinstance(change, CaughtUp):
                    return
                if change.payload is None:
                    continue
                try:
                    event = decode_instance(change.payload)
                except InvalidError:
                    continue
                if event.node == self._node and event.instance not in self._reconciler.instances:
                    self._publisher.gone(event.function, event.instance)

    async def _announce(self, ready: Callable[[], Awaitable[None]]) -> None:
        await self.caught_up.wait()
        await ready()

    async def _reconcile(self) -> None:
        await self.caught_up.wait()
        await self._loop.run(self._pass)

    async def _pass(self) -> None:
        awaited = self._reconciler.reconcile()
        self._accrue()
        self.traces.starts(self._reconciler.instances.values())
        self.traces.settle_plan(self._reconciler.settled)
        self._prune()
        until_s = self._clock.now_s() + CONFIRM_TIMEOUT_S
        while awaited and self._clock.now_s() < until_s:
            await self._clock.sleep(CONFIRM_TICK_S)
            awaited = self._reconciler.step_shares()
            self._accrue()
        if awaited:
            # A worker may hang before it confirms its SMs: a whole pass finds that out.
            self._loop.poke()

    def _prune(self) -> None:
        """Takes artifacts away that no function, worker or profiling run needs any more."""
        try:
            taken = self._artifacts.prune(self._reconciler.artifacts_in_use() | self.profiler.artifacts_in_use())
        except OSError as error:
            log.warning("artifacts can't be taken away: %s", error)
            return
        if taken:
            log.info("artifacts taken away: %s", ", ".join(sha256[:12] for sha256 in taken))
            self._spawn(self._artifacts.sweep())

    async def _tick(self) -> None:
        while True:
            next_try_s = self._reconciler.next_try_s(self._clock.now_s())
            if self._reconciler.loading or (next_try_s is not None and next_try_s <= TICK_S):
                self._loop.poke()
            await self._clock.sleep(TICK_S)

    async def _publish(self) -> None:
        while True:
            await self._publisher.wait()
            try:
                await self._publisher.write_all()
            except UnavailableError as error:
                log.warning("instances can't be told now: %s", error)
                await self._clock.sleep(RETRY_S)

    async def _beat(self) -> None:
        while True:
            for process in self._processes():
                process.beat()
            await self._clock.sleep(BEAT_PERIOD_S)

    async def _beat_node(self) -> None:
        await self.caught_up.wait()
        while True:
            await self._tell_node()
            await self._clock.sleep(BEAT_PERIOD_S)

    async def _tell_node(self) -> None:
        try:
            await self._bus.put(node_subject(self._node), encode(self.node_event()))
        except UnavailableError as error:
            log.warning("the heartbeat can't be sent: %s", error)

    async def _measure_devices(self) -> None:
        while True:
            await self._clock.sleep(DEVICE_PERIOD_S)
            # Not awaited: a driver that hangs would hold up what is known without it.
            self._spawn(self._gauges.refresh())
            for device in self._guard.devices:
                event = self._measure_device(device.gpu)
                self._device_events[device.gpu] = event
                await self._bus.publish(device_subject(self._node, device.gpu), encode(event))

    async def _measure_instances(self) -> None:
        for period in itertools.count():
            await self._clock.sleep(INSTANCE_PERIOD_S)
            if period % REFRESH_EVERY == 0:
                for instance in self._reconciler.instances:
                    self._publisher.mark(instance)
            busy = [
                (instance, worker)
                for instance in self._reconciler.instances.values()
                for worker in instance.workers()
                if worker.state is InstanceState.READY
                and worker.process.counters().batches_count != worker.reported_batches_count
            ]
            await asyncio.gather(*(self._report(instance, worker) for instance, worker in busy))

    async def _report(self, instance: Instance, worker: Worker) -> None:
        worker.reported_batches_count = worker.process.counters().batches_count
        try:
            report = await self._client.report(worker.address)
        except HasgpuError as error:
            log.debug("%s does not answer: %s", instance.instance, error)
        else:
            instance.observations = (*instance.observations, *report.observations)[-MAX_OBSERVATIONS:]
        self._publisher.mark(instance.instance)

    # Measuring

    def _processes(self) -> list[WorkerProcess]:
        held = [w.process for i in self._reconciler.instances.values() for w in (*i.workers(), *i.leaving)]
        return [p for p in (*held, *self.profiler.processes.values()) if p.exit_reason is None]

    def _accrue(self) -> None:
        for gpu, (allocation, _) in self._meters.items():
            allocation.accrue(self._guard.gpu_share(gpu), self._clock.now_s())
        instances = self._reconciler.instances
        self._function_meters.accrue(
            (
                (instances[key.instance].function, reservation.gpu, reservation.gpu_share)
                for key, reservation in self._guard.reservations()
                if key.instance in instances
            ),
            self._clock.now_s(),
        )

    def _measure_device(self, gpu: str) -> DeviceEvent:
        self._accrue()
        allocation, busy = self._meters[gpu]
        workers = [
            (i.function, w.key, w.newest_lease.width_pct, w.process.counters().device_time_ns)
            for i in self._reconciler.instances.values()
            for w in (*i.workers(), *i.leaving)
            if w.device.gpu == gpu and w.process.exit_reason is None
        ]
        self._function_meters.use(gpu, workers)
        state = self._guard.state(gpu)
        reading = self._gauges.latest(state.info.uuid) if state.info.uuid else None
        return DeviceEvent(
            device=state.info,
            rows=state.rows,
            memory_used_bytes=state.memory_used_bytes,
            busy_permille=busy.take((worker[1:] for worker in workers), self._clock.now_s()),
            observed_unix_ns=self._clock.unix_ns(),
            allocated_gpu_ns=allocation.gpu_ns,
            measured_memory_bytes=reading.memory_used_bytes if reading is not None else None,
            power_mw=reading.power_mw if reading is not None else None,
            utilisation_pct=reading.busy_pct if reading is not None else None,
            temperature_c=reading.temperature_c if reading is not None else None,
            sm_clock_mhz=reading.sm_clock_mhz if reading is not None else None,
        )

    def _collect(self, sink: Sink) -> None:
        """Puts the node's metrics."""
        self._accrue()
        running = {worker.key for i in self._reconciler.instances.values() for worker in (*i.workers(), *i.leaving)}
        self._function_meters.keep_only(
            lambda function: self._reconciler.function(function) is not None, lambda key: key in running
        )
        self._function_meters.collect(sink, self._node, self._gpu_price_per_hour)
        for instance in self.instance_events():
            collect_instance(sink, instance)
        for device in self._device_events.values():
            collect_device(sink, device)


async def run_until_one_fails(coroutines: Iterable[Coroutine[object, object, None]]) -> None:
    """Runs all until one fails or this is cancelled, and ends the others.

    A task is cancelled again when it goes on: up to Python 3.11 `asyncio.wait_for`, which the NATS client uses,
    swallows a cancellation that arrives together with its result (https://github.com/python/cpython/issues/86296), and
    a TaskGroup, which cancels its tasks once, would then wait for ever.
    """
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
    finally:
        while pending := [task for task in tasks if not task.done()]:
            for task in pending:
                task.cancel()
            # Being cancelled again meanwhile changes nothing: this is the ending already.
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait(pending, timeout=END_AGAIN_S)
    failures = [error for task in tasks if not task.cancelled() and (error := task.exception()) is not None]
    if failures:
        raise failures[0]


async def _end(process: WorkerProcess) -> None:
    process.terminate()
    await process.wait()
    process.remove()
