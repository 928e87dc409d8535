"""Brings what runs to what is planned.

One pass looks at everything and does what can be done at once; what takes time (fetching an artifact, draining and
stopping a worker) runs beside it and wakes the next pass. A pass may be repeated at any time.

| instance | what a pass does |
|---|---|
| planned, no worker | fetch the artifact, reserve its share, start; a refusal becomes its reason and is tried again |
| worker loading | read what it says of itself; ready: show it |
| worker silent or loading for too long | kill it; it counts as ended |
| worker ended | FAILED with the reason; start again after a back-off |
| other artifact, GPU or row planned | start a successor, or drain first where there is no room for both |
| other SM share wanted, where it can't change live | likewise; a successor under way is let finish first |
| successor ready | show it, drain the old one |
| not planned | show DRAINING, drain, stop, delete its subject |
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Collection, Coroutine, Mapping

from hasgpu_core.errors import CapacityError, HasgpuError, InvalidError, NotFoundError
from hasgpu_core.events import FunctionEvent, PlanEvent, PlannedInstance, VerticalScaleEvent
from hasgpu_core.ports import Clock
from hasgpu_core.resources import InstanceState

from hasgpu_node_agent.instance import Instance, Worker
from hasgpu_node_agent.places import adopt_lease
from hasgpu_node_agent.plan import PlanFence, ShareTarget, load_digest, share_target
from hasgpu_node_agent.ports import Adopted, Artifacts, Launcher, LaunchRequest, Sites, WorkerClient
from hasgpu_node_agent.pulse import allowed_silence_s
from hasgpu_node_agent.retirer import Publisher, Retirer
from hasgpu_node_agent.row_guard import RowGuard, WorkerKey
from hasgpu_node_agent.row_layout import WHOLE, Lease
from hasgpu_node_agent.shares import ShareApplier, takes_alive, workers_that_run

log = logging.getLogger(__name__)

LOAD_TIMEOUT_S = 300.0
"""A worker that is not ready by then is taken for hung."""


class Reconciler:
    """The instances of a node."""

    def __init__(
        self,
        *,
        guard: RowGuard,
        launcher: Launcher,
        artifacts: Artifacts,
        client: WorkerClient,
        publisher: Publisher,
        shares: ShareApplier,
        sites: Sites,
        clock: Clock,
        spawn: Callable[[Coroutine[object, object, None]], object],
        poke: Callable[[], None],
    ) -> None:
        self._guard = guard
        self._launcher = launcher
        self._artifacts = artifacts
        self._client = client
        self._publisher = publisher
        self._shares = shares
        self._sites = sites
        self.retirer = Retirer(guard=guard, client=client, publisher=publisher, sites=sites, clock=clock, poke=poke)
        """Ends the workers that leave."""
        self._clock = clock
        self._spawn = spawn
        self._poke = poke
        self._fence = PlanFence()
        self._functions: dict[str, FunctionEvent] = {}
        self._verticals: dict[str, tuple[VerticalScaleEvent, Mapping[str, str]]] = {}
        self._stopping = False
        self.instances: dict[str, Instance] = {}
        """By id."""
        self.draining = False
        """Takes no new worker while set."""

    # What is wanted

    @property
    def plan_revision(self) -> int:
        """Of the plan in force; 0 before the first."""
        return self._fence.revision

    def set_plan(self, plan: PlanEvent) -> None:
        """Puts a plan in force; raises FencedError when a newer one has been."""
        if self._fence.accept(plan):
            log.info("plan %d: %d instances", plan.revision, len(plan.instances))
            self._poke()

    def clear_plan(self) -> None:
        """Nothing is to run here any more, until a plan comes."""
        self._fence.clear()
        self._poke()

    @property
    def has_plan(self) -> bool:
        """Whether it is known what is to run here (nothing may be)."""
        return self._fence.plan is not None

    @property
    def settled(self) -> bool:
        """Whether all that the plan names is ready and nothing else is there."""
        return all(
            i.planned is not None
            and i.current is not None
            and i.current.state is InstanceState.READY
            and i.successor is None
            and not i.leaving
            for i in self.instances.values()
        )

    def set_function(self, event: FunctionEvent) -> None:
        """Notes a function's newest revision; an older one is ignored."""
        present = self._functions.get(event.spec.name)
        if present is None or present.revision < event.revision:
            self._functions[event.spec.name] = event
            self._poke()

    def forget_function(self, function: str) -> None:
        """The function was deleted; its instances go with the plan."""
        self._functions.pop(function, None)

    def function(self, name: str) -> FunctionEvent | None:
        """Returns the newest revision known of a function."""
        return self._functions.get(name)

    def artifacts_in_use(self) -> frozenset[str]:
        """Returns the digests that a known function has or a worker runs."""
        known = (event.spec.artifact.sha256 for event in self._functions.values())
        running = (w.artifact_sha256 for i in self.instances.values() for w in (*i.workers(), *i.leaving))
        return frozenset((*known, *running))

    def set_vertical(self, event: VerticalScaleEvent, headers: Mapping[str, str]) -> None:
        """Notes a vertical change; an older one than the last is ignored."""
        try:
            event.allocation.validate()
        except InvalidError as error:
            log.warning("vertical change of %s refused: %s", event.instance, error)
            return
        present = self._verticals.get(event.instance)
        if present is None or present[0].revision < event.revision:
            self._verticals[event.instance] = (event, headers)
            self._poke()

    def forget_vertical(self, instance: str) -> None:
        """The vertical change was purged; the share in force stays until something newer comes."""
        self._verticals.pop(instance, None)

    def adopt(self, found: Adopted) -> bool:
        """Takes over a worker that an earlier agent started; False when it does not fit and must go."""
        record = found.record
        instance = self._instance(record.key.instance, record.function)
        worker = Worker(
            key=record.key,
            process=found.process,
            function=record.function,
            function_revision=record.function_revision,
            load_digest=record.load_digest,
            artifact_sha256=record.artifact_sha256,
            execution_timeout_ms=record.execution_timeout_ms,
            device=self._guard.device(record.gpu),
            row=record.row,
            share=ShareTarget(record.allocation, record.allocation_revision),
            lease=WHOLE,
            started_at_s=self._clock.now_s(),
        )
        adopt_lease(worker)
        instance.generation = max(instance.generation, record.key.generation)
        try:
            self._guard.reserve(worker.key, record.gpu, record.row, record.allocation)
        except HasgpuError as error:
            log.warning("worker %d of %s can't be adopted: %s", worker.process.pid, record.key.instance, error)
            self._leave(instance, worker)
            return False
        self._look(instance, worker)
        former = instance.current
        instance.current = worker
        if former is not None:
            better = former.state is InstanceState.READY and worker.state is not InstanceState.READY
            instance.current, other = (former, worker) if better else (worker, former)
            self._leave(instance, other)
        self._publisher.mark(instance.instance)
        return True

    async def stop_all(self) -> None:
        """Drains and stops every worker; for a graceful end of the node."""
        self._stopping = True
        self._poke()
        while self.instances:
            self.reconcile()
            await self._clock.sleep(0.02)

    # One pass

    @property
    def loading(self) -> bool:
        """Whether a worker's own status is worth reading often."""
        return any(w.state is InstanceState.LOADING for i in self.instances.values() for w in i.workers())

    def next_try_s(self, now_s: float) -> float | None:
        """Returns the seconds until the next worker may be tried again after a failure; None: none waits."""
        waits = [i.backoff.wait_s(now_s) for i in self.instances.values() if i.planned and i.failure]
        return min((wait for wait in waits if wait > 0), default=None)

    def reconcile(self) -> bool:
        """Makes one pass; returns whether a worker's confirmation of its share is awaited."""
        self._match_plan()
        self._shares.places.begin_pass()
        now_s = self._clock.now_s()
        for instance in self.in_order():
            try:
                self._observe(instance, now_s)
                if instance.planned is not None:
                    self._bring_up(instance, instance.planned, now_s)
                elif self._fence.plan is not None or self._stopping:
                    self._take_down(instance)
            except (HasgpuError, OSError) as error:
                # One instance's trouble (a full disk, a damaged file) must not keep the others waiting.
                self._failed(instance, str(error))
        return self._shares.step(self.instances.values())

    def step_shares(self) -> bool:
        """The part of a pass that applies shares; returns whether a confirmation is awaited."""
        awaited = self._shares.step(self.instances.values())
        if not awaited and self._shares.places.awaited:
            # The others have moved: a worker that waited for its place can be started.
            self._poke()
        return awaited

    def in_order(self) -> list[Instance]:
        """All instances, in the order of the plan, those that it does not have first: what they hold may be needed."""
        plan = self._fence.plan
        order = {p.instance: number for number, p in enumerate(plan.instances if plan is not None else ())}
        return sorted(self.instances.values(), key=lambda i: order.get(i.instance, -1))

    def _match_plan(self) -> None:
        plan = self._fence.plan
        if self._stopping:
            for instance in self.instances.values():
                instance.planned = None
            return
        if plan is None:
            return
        planned = {p.instance: p for p in plan.instances}
        for p in plan.instances:
            instance = self._instance(p.instance, p.function)
            before = instance.planned
            if before is None or before.moving_from != p.moving_from:
                self._publisher.mark(p.instance)
            if before is not None and (before.gpu, before.row) != (p.gpu, p.row):
                instance.backoff.reset()
                if before.gpu != p.gpu:
                    # What it met on one device says nothing of another, whose watch would act on it.
                    instance.is_held, instance.fault = False, ""
            instance.planned = p
        for instance in self.instances.values():
            instance.planned = planned.get(instance.instance)
            vertical = self._verticals.get(instance.instance)
            instance.vertical, instance.vertical_headers = vertical if vertical else (None, {})

    def _instance(self, name: str, function: str) -> Instance:
        if name not in self.instances:
            self.instances[name] = Instance(instance=name, function=function)
        return self.instances[name]

    # Looking

    def _observe(self, instance: Instance, now_s: float) -> None:
        for worker in tuple(instance.workers()):
            ended = worker.process.exit_reason
            if ended is not None:
                self._ended(instance, worker, ended, now_s)
            elif worker.state is InstanceState.LOADING:
                self._look(instance, worker)
                if worker.state is InstanceState.LOADING and now_s - worker.started_at_s > LOAD_TIMEOUT_S:
                    self._kill(instance, worker, f"its worker was not ready within {LOAD_TIMEOUT_S:.0f} s")
            else:
                self._listen(instance, worker, now_s)
                if worker.function_revision < self._revision_for(worker):
                    worker.function_revision = self._revision_for(worker)
                    self._publisher.mark(instance.instance)

    def _listen(self, instance: Instance, worker: Worker, now_s: float) -> None:
        """Kills a worker that serves and has given no sign of life for too long; loading has its own bound."""
        silent_s = worker.pulse.look(worker.process.counters().heartbeat_ns, now_s)
        if silent_s > allowed_silence_s(worker.execution_timeout_ms):
            reason = (
                f"its worker gave no sign of life for {silent_s:.0f} s: stopped, or hung in the function's own code"
            )
            self._kill(instance, worker, reason)

    def _kill(self, instance: Instance, worker: Worker, reason: str) -> None:
        if not worker.killed_because:
            log.warning(
                "%s (pid %d) is killed: %s", instance.instance, worker.process.pid, reason, extra=instance.about
            )
            worker.killed_because = reason
        if worker.device.uuid:
            # With work on a GPU, a client is terminated before it is killed: its device's supervisor does both.
            self._sites.ended(worker.device.gpu)
        else:
            worker.process.kill()

    def _revision_for(self, worker: Worker) -> int:
        """The newest revision of its function that the worker serves as well as the one it was started for."""
        event = self._functions.get(worker.function)
        if event is None or load_digest(event.spec) != worker.load_digest:
            return worker.function_revision
        return event.revision

    def _look(self, instance: Instance, worker: Worker) -> None:
        status = worker.process.status()
        if status is None:
            return
        if status.state is InstanceState.READY and status.address:
            worker.state = InstanceState.READY
            worker.address = status.address
            worker.note = status.reason
            instance.failure = ""
            instance.refusal = ""
            instance.backoff.ready(self._clock.now_s())
            self._publisher.mark(instance.instance)
            log.info(
                "%s is ready at %s (pid %d)",
                instance.instance,
                worker.address,
                worker.process.pid,
                extra=instance.about,
            )
        elif status.state in (InstanceState.FAILED, InstanceState.DRAINING, InstanceState.STOPPED):
            # It says why and ends by itself; one that has not will be sent off, and its end is what counts.
            worker.process.terminate()

    def _ended(self, instance: Instance, worker: Worker, ended: str, now_s: float) -> None:
        status = worker.process.status()
        said = status.reason if status is not None and status.state is InstanceState.FAILED else ""
        reason = said or worker.killed_because or f"its worker {ended}"
        if worker.device.uuid:
            is_planned_here = instance.planned is None or instance.planned.gpu == worker.device.gpu
            met_fault = is_planned_here and worker.process.has_device_fault
            instance.fault = fault_name(reason) if met_fault else ""
            instance.is_held = bool(instance.fault)
            self._sites.ended(worker.device.gpu)
        self._guard.release(worker.key)
        worker.process.remove()
        instance.last_share = worker.share
        if worker.address:
            self._spawn(self._client.forget(worker.address))
        if worker is instance.successor:
            instance.successor = None
            reason = f"its successor failed: {reason}"
        else:
            instance.current = None
        instance.failure = reason
        instance.restarts_count += 1
        delay_s = instance.backoff.failed(now_s)
        log.warning("%s: %s; next try in %.1f s", instance.instance, reason, delay_s, extra=instance.about)
        self._publisher.mark(instance.instance)

    # Acting

    def _bring_up(self, instance: Instance, planned: PlannedInstance, now_s: float) -> None:
        current, successor = instance.current, instance.successor
        # A successor with yesterday's SM share takes over all the same: shares may change faster than workers load.
        if successor is not None and self._is_other(successor, planned):
            instance.successor = None
            self._leave(instance, successor)
            successor = None
        if successor is not None and (current is None or successor.state is InstanceState.READY):
            instance.current, instance.successor = successor, None
            self._publisher.mark(instance.instance)
            if current is not None:
                self._leave(instance, current)
            return
        if current is None:
            if successor is None:
                instance.current = self._launch(instance, planned, now_s)
        elif (
            successor is None
            and (self._is_other(current, planned) or _wants_other_sms(instance, planned, current))
            and self._can_replace(instance, planned, now_s)
        ):
            instance.successor = self._launch(instance, planned, now_s)
            if instance.successor is None and instance.refusal and not self.draining:
                log.info("%s is replaced without overlap: %s", instance.instance, instance.refusal)
                instance.current = None
                self._leave(instance, current)

    def _is_other(self, worker: Worker, planned: PlannedInstance) -> bool:
        """Whether a worker loaded something else, or runs elsewhere, than the plan or its function say by now."""
        event = self._functions.get(planned.function)
        if event is not None and load_digest(event.spec) != worker.load_digest:
            return True
        return (worker.device.gpu, worker.row) != (planned.gpu, planned.row)

    def _can_replace(self, instance: Instance, planned: PlannedInstance, now_s: float) -> bool:
        """Whether all that a successor needs is here, but perhaps room; otherwise the present worker stays."""
        event = self._functions.get(planned.function)
        if self.draining or event is None or instance.backoff.wait_s(now_s) > 0:
            return False
        if planned.gpu not in {device.gpu for device in self._guard.devices}:
            self._refuse(instance, f"this node has no device {planned.gpu!r}")
            return False
        return self._artifact_here(instance, event)

    def _launch(self, instance: Instance, planned: PlannedInstance, now_s: float) -> Worker | None:
        event = self._functions.get(planned.function)
        if self.draining:
            self._refuse(instance, "the node is draining and takes no new worker")
            return None
        if event is None:
            self._refuse(instance, f"function {planned.function!r} is not known here yet")
            return None
        if instance.is_held:
            # Its failure says why.
            return None
        if instance.backoff.wait_s(now_s) > 0 or not self._artifact_here(instance, event):
            return None
        artifact = self._artifacts.unpacked(event.spec)
        assert artifact is not None, "looked up just now"
        target = share_target(planned, instance.vertical)
        last = instance.current.share if instance.current is not None else instance.last_share
        if last is not None and last.revision > target.revision:
            target = last
        key = WorkerKey(instance.instance, instance.generation + 1)
        try:
            self._guard.reserve(key, planned.gpu, planned.row, target.allocation)
        except (CapacityError, NotFoundError, InvalidError) as error:
            # While its former worker leaves, the room that lacks may be its own.
            self._refuse(instance, "" if instance.leaving else str(error))
            return None
        lease = self._site(instance, key)
        if lease is None:
            self._guard.release(key)
            return None
        request = LaunchRequest(
            key=key,
            function=event,
            device=self._guard.device(planned.gpu),
            row=planned.row,
            allocation=target.allocation,
            lease=lease,
            allocation_revision=target.revision,
            artifact=artifact,
        )
        try:
            process = self._launcher.launch(request, self._poke)
        except OSError as error:
            self._guard.release(key)
            self._failed(instance, f"its worker can't be started: {error}")
            return None
        instance.generation = key.generation
        instance.refusal = ""
        self._publisher.mark(instance.instance)
        log.info("%s: worker %d started on %s row %d", instance.instance, process.pid, planned.gpu, planned.row)
        return Worker(
            key=key,
            process=process,
            function=planned.function,
            function_revision=event.revision,
            load_digest=load_digest(event.spec),
            artifact_sha256=event.spec.artifact.sha256,
            execution_timeout_ms=event.spec.execution_timeout_ms,
            device=request.device,
            row=planned.row,
            share=target,
            lease=lease,
            started_at_s=now_s,
        )

    def _site(self, instance: Instance, key: WorkerKey) -> Lease | None:
        """Returns the SMs with which a worker that has a reservation may begin; None: its device is not ready for it.

        A worker that the instance has already serves on meanwhile.
        """
        reserved = self._guard.get(key)
        assert reserved is not None, "reserved just now"
        hindrance = self._sites.hindrance(reserved.gpu, reserved.row, reserved.width_pct)
        if hindrance is not None:
            if hindrance.is_failure and instance.failure != hindrance.reason:
                self._note_failure(instance, hindrance.reason)
            elif not hindrance.is_failure and (hindrance.lacks_room or instance.current is None):
                self._refuse(instance, hindrance.reason)
            return None
        lease = self._shares.places.find(key, workers_that_run(self.instances.values()))
        if lease is None and instance.current is None:
            self._refuse(instance, f"the rows of {reserved.gpu} are moved together to make room")
        return lease

    def _artifact_here(self, instance: Instance, event: FunctionEvent) -> bool:
        if self._artifacts.unpacked(event.spec) is not None:
            return True
        if not instance.fetching:
            instance.fetching = True
            self._spawn(self._fetch(instance, event))
        return False

    async def _fetch(self, instance: Instance, event: FunctionEvent) -> None:
        try:
            await self._artifacts.fetch(event.spec)
        except (HasgpuError, OSError) as error:
            self._failed(instance, f"its artifact can't be had: {error}")
        finally:
            instance.fetching = False
            self._poke()

    def _note_failure(self, instance: Instance, reason: str) -> None:
        instance.failure = reason
        self._publisher.mark(instance.instance)

    def _failed(self, instance: Instance, reason: str) -> None:
        instance.failure = reason
        delay_s = instance.backoff.failed(self._clock.now_s())
        log.warning("%s: %s; next try in %.1f s", instance.instance, reason, delay_s, extra=instance.about)
        self._publisher.mark(instance.instance)

    def _refuse(self, instance: Instance, reason: str) -> None:
        if instance.refusal != reason:
            instance.refusal = reason
            if reason:
                log.info("%s can't be started now: %s", instance.instance, reason, extra=instance.about)
            self._publisher.mark(instance.instance)

    def _take_down(self, instance: Instance) -> None:
        for worker in tuple(instance.workers()):
            self._leave(instance, worker)
        instance.current = instance.successor = None
        if not instance.leaving and not instance.fetching:
            del self.instances[instance.instance]
            self._launcher.forget(instance.instance)
            self._publisher.gone(instance.function, instance.instance)
            log.info("%s is gone", instance.instance, extra=instance.about)

    # Leaving

    def _leave(self, instance: Instance, worker: Worker) -> None:
        """Sends a worker off in the background; its share stays reserved until it has ended."""
        instance.leaving.append(worker)
        instance.last_share = worker.share
        self._spawn(self.retirer.retire(instance, worker))

    def evict(self, gpu: str, names: Collection[str], reason: str) -> list[tuple[Instance, Worker]]:
        """Takes workers off a device that failed; the caller ends them, and then calls `Retirer.clear_away`.

        Their instances are FAILED for the reason, and start again as soon as the device takes workers.

        Args:
            gpu: The device.
            names: Of the instances.
            reason: In words.

        Returns:
            Those that have to be ended; those that leave already are ended by whoever sent them off.
        """
        found: list[tuple[Instance, Worker]] = []
        for instance in self.instances.values():
            if instance.instance not in names:
                continue
            here = [worker for worker in instance.workers() if worker.device.gpu == gpu]
            for worker in here:
                instance.leaving.append(worker)
                instance.last_share = worker.share
            if instance.current in here:
                instance.current = None
                instance.restarts_count += 1
                self._note_failure(instance, instance.leaving[-1].killed_because or reason)
            if instance.successor in here:
                instance.successor = None
            found += [(instance, worker) for worker in here]
        return found

    def resume(self, name: str) -> None:
        """Lets an instance that a fault ended be started again."""
        instance = self.instances.get(name)
        if instance is not None and (instance.is_held or instance.fault):
            instance.is_held, instance.fault = False, ""
            self._poke()


def _wants_other_sms(instance: Instance, planned: PlannedInstance, worker: Worker) -> bool:
    """Whether a newer share has an SM part that a running worker can't be brought to."""
    target = share_target(planned, instance.vertical)
    return target.revision > worker.share.revision and not takes_alive(worker, target.allocation)


def fault_name(reason: str) -> str:
    """Returns the name of the fault with which a worker's status begins ("CUDA_ERROR_ILLEGAL_ADDRESS (700): ...")."""
    found = re.match(r"[A-Z][A-Z0-9_]+(?=[ :])", reason)
    return found[0] if found else "CUDA_ERROR_UNKNOWN"
