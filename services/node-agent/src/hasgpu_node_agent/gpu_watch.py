"""Watches the node's GPUs and carries out what the device layer's fault table says (`backends.cuda.fault_policy`).

One loop a GPU: look at its MPS daemon, at what NVML says and at its workers; decide; act; look again. While a GPU is
being mended no worker is started on it. A GPU that is lost fails its instances with the reason and takes no more; the
others go on. All that may block is called in a thread of the GPU's own.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field

from hasgpu_core.ports import Clock
from hasgpu_core.resources import DeviceHealth
from hasgpu_device.backends.cuda.fault_policy import (
    Action,
    ActionKind,
    Decision,
    FaultClass,
    FaultLimits,
    Observation,
    ObservedWorker,
    class_of,
    decide,
)
from hasgpu_device.backends.cuda.mps import MpsHealth, MpsState
from hasgpu_device.backends.cuda.nvml import Health
from hasgpu_device.errors import MpsError
from hasgpu_runtime.logs import about

from hasgpu_node_agent.adapters.side_thread import SideThread
from hasgpu_node_agent.instance import Instance, Worker
from hasgpu_node_agent.ports import Gauges, Gpu, Hindrance
from hasgpu_node_agent.reconciler import Reconciler
from hasgpu_node_agent.row_guard import RowGuard

log = logging.getLogger(__name__)

LOOK_PERIOD_S = 1.0
START_TIMEOUT_S = 30.0
QUIT_TIMEOUT_S = 20.0
TERMINATE_TIMEOUT_S = 10.0
SHOWN_S = 10.0
"""For so long after a fault was mended the device's health tells of it."""
PREPARE_AGAIN_S = 2.0
SERVING = (None, MpsState.ACTIVE, MpsState.IDLE)
"""States of MPS in which workers may be started."""


@dataclass(slots=True)
class _Watched:
    """One GPU, as it was last seen."""

    gpu: Gpu
    thread: SideThread
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    hindrance: Hindrance | None = None
    state: MpsState | None = None
    since_s: float = 0.0
    recoveries_s: list[float] = field(default_factory=list)
    is_unhealthy: bool = False
    """By the last decision."""
    trouble: str = ""
    """The last fault, in words."""
    trouble_at_s: float = 0.0
    was_turned_away: dict[str, int] = field(default_factory=dict)
    """Instances for which MPS had no room, and how many workers ran then."""
    unprepared: dict[tuple[int, int], tuple[str, float]] = field(default_factory=dict)
    """Why (row, width) could not be prepared, and when that was."""
    preparing: set[tuple[int, int]] = field(default_factory=set)


class GpuWatch:
    """Implements `hasgpu_node_agent.ports.Sites`; a node may have no GPU at all.

    Args:
        gpus: By the device's name.
        gauges: NVML.
        guard: Told of the devices' health.
        clock: Time.
        spawn: Starts work in the background.
        changed: Called when a device's health or what can be started on it changed.
        limits: How much is tried, and how long is waited.
    """

    def __init__(
        self,
        gpus: Mapping[str, Gpu],
        gauges: Gauges,
        *,
        guard: RowGuard,
        clock: Clock,
        spawn: Callable[[Coroutine[object, object, None]], object],
        changed: Callable[[], None],
        limits: FaultLimits,
    ) -> None:
        self._gauges = gauges
        self._guard = guard
        self._clock = clock
        self._spawn = spawn
        self._changed = changed
        self._limits = limits
        self._watched = {
            name: _Watched(gpu, SideThread(f"mps {name}"), hindrance=Hindrance(f"{name} is not ready yet"))
            for name, gpu in gpus.items()
        }

    # Sites

    def hindrance(self, gpu: str, row: int, width_pct: int) -> Hindrance | None:
        """Returns what stands in the way of a worker; begins to prepare its place where that is needed."""
        watched = self._watched.get(gpu)
        if watched is None or watched.hindrance is not None:
            return watched.hindrance if watched is not None else None
        place = row, width_pct
        if watched.gpu.is_prepared(row, width_pct):
            watched.unprepared.pop(place, None)
            return None
        reason, at_s = watched.unprepared.get(place, ("", 0.0))
        if place not in watched.preparing and (not reason or self._clock.now_s() - at_s >= PREPARE_AGAIN_S):
            watched.preparing.add(place)
            self._spawn(self._prepare(watched, row, width_pct))
        if reason:
            return Hindrance(reason, lacks_room=True)
        return Hindrance(f"an SM partition of {width_pct} % is being made on {gpu}")

    def ended(self, gpu: str) -> None:
        """A worker ended by itself or is silent: looks at the GPU at once."""
        if gpu in self._watched:
            self._watched[gpu].wake.set()

    async def before_kill(self, gpu: str, pid: int) -> None:
        """Terminates a worker's MPS client."""
        watched = self._watched.get(gpu)
        if watched is not None and watched.state not in (None, MpsState.GONE):
            await self._terminate_client(watched, pid, TERMINATE_TIMEOUT_S)

    async def _prepare(self, watched: _Watched, row: int, width_pct: int) -> None:
        try:
            await watched.thread.run(lambda: watched.gpu.prepare(row, width_pct))
        except MpsError as error:
            log.warning(
                "%s: an SM partition of %d %% can't be made: %s",
                watched.gpu.info.gpu,
                width_pct,
                error,
                extra=about(gpu=watched.gpu.info.gpu),
            )
            reason = f"an SM partition of {width_pct} % can't be made on {watched.gpu.info.gpu}: {error}"
            watched.unprepared[row, width_pct] = reason, self._clock.now_s()
        finally:
            watched.preparing.discard((row, width_pct))
        self._changed()

    # Life

    async def start(self) -> None:
        """Starts the daemons, or adopts them; one that can't be started is tried again by `run`."""
        await asyncio.gather(*(self._start(watched) for watched in self._watched.values()))

    async def _start(self, watched: _Watched) -> None:
        name = watched.gpu.info.gpu
        try:
            await watched.thread.run(lambda: watched.gpu.start_daemon(START_TIMEOUT_S))
            health = await watched.thread.run(watched.gpu.look)
        except MpsError as error:
            log.error("the MPS daemon of %s can't be started: %s", name, error, extra=about(gpu=name))
            self._hold(watched, Hindrance(f"the MPS daemon of {name} can't be started: {error}"))
        else:
            self._note_state(watched, health)
            if watched.state in SERVING:
                self._hold(watched, None)

    async def stop(self) -> None:
        """Quits the daemons, after all workers have ended."""

        async def quit_one(watched: _Watched) -> None:
            await watched.thread.run(lambda: watched.gpu.quit_daemon(QUIT_TIMEOUT_S))

        await asyncio.gather(*map(quit_one, self._watched.values()))

    def let_go(self) -> None:
        """Leaves the daemons running for the next agent."""
        for watched in self._watched.values():
            watched.gpu.let_go()
            watched.thread.close()

    async def run(self, reconciler: Reconciler) -> None:
        """Watches all GPUs until it is cancelled."""
        if self._watched:
            await asyncio.gather(*(self._watch(watched, reconciler) for watched in self._watched.values()))

    async def _watch(self, watched: _Watched, reconciler: Reconciler) -> None:
        while True:
            watched.wake.clear()
            again_s = await self.look(watched.gpu.info.gpu, reconciler)
            timer = asyncio.ensure_future(self._clock.sleep(min(again_s, LOOK_PERIOD_S)))
            woken = asyncio.ensure_future(watched.wake.wait())
            try:
                await asyncio.wait({timer, woken}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                timer.cancel()
                woken.cancel()

    # One look

    async def look(self, name: str, reconciler: Reconciler) -> float:
        """Looks at a GPU once and does what is to be done; returns the seconds after which to look again."""
        watched = self._watched[name]
        self._note_state(watched, await watched.thread.run(watched.gpu.look))
        seen = self._observe(watched, reconciler)
        decision = decide(seen, self._limits)
        now_s = self._clock.now_s()
        if decision.reason and any(a.kind is not ActionKind.START_WORKER for a in decision.actions):
            log.warning("%s: %s", name, decision.reason, extra=about(gpu=name))
        stops = any(a.kind in (ActionKind.DRAIN, ActionKind.KILL) for a in decision.actions)
        if decision.is_unhealthy or watched.state not in SERVING or stops:
            self._hold(watched, Hindrance(_told(name, decision), is_failure=decision.is_unhealthy))
        if decision.is_recovery:
            watched.recoveries_s = [*watched.recoveries_s[-9:], now_s]
        if (stops or any(worker.fault for worker in seen.workers)) and decision.reason:
            watched.trouble, watched.trouble_at_s = decision.reason, now_s
        await self._act(watched, decision, reconciler)
        if any(a.kind is ActionKind.START_DAEMON for a in decision.actions):
            self._note_state(watched, await watched.thread.run(watched.gpu.look))
        watched.is_unhealthy = decision.is_unhealthy
        if not decision.is_unhealthy and watched.state in SERVING:
            self._hold(watched, None)
        self._tell_health(watched, decision)
        return decision.look_again_s or LOOK_PERIOD_S

    def _note_state(self, watched: _Watched, health: MpsHealth | None) -> None:
        state = health.state if health is not None else None
        if state is not watched.state:
            level = logging.INFO if state in SERVING else logging.WARNING
            log.log(level, "MPS of %s: %s", watched.gpu.info.gpu, health.reason if health is not None else "not used")
            watched.since_s = self._clock.now_s()
        watched.state = state

    def _observe(self, watched: _Watched, reconciler: Reconciler) -> Observation:
        name = watched.gpu.info.gpu
        reading = self._gauges.latest(watched.gpu.info.uuid)
        planned = [i for i in reconciler.in_order() if i.planned is not None and i.planned.gpu == name]
        running_count = sum(_is_running(worker) for i in planned for worker in i.workers())
        workers = []
        for instance in planned:
            here = [worker for worker in instance.workers() if worker.device.gpu == name and _is_running(worker)]
            if instance.fault and class_of(instance.fault) is FaultClass.FULL:
                watched.was_turned_away.setdefault(instance.instance, running_count)
            elif here:
                watched.was_turned_away.pop(instance.instance, None)
            workers.append(
                ObservedWorker(
                    instance.instance,
                    bool(here),
                    fault=instance.fault,
                    is_silent=any(worker.killed_because for worker in here),
                    knew_full=watched.was_turned_away.get(instance.instance, -1) == running_count,
                )
            )
        return Observation(
            self._clock.now_s(),
            watched.state,
            watched.since_s,
            tuple(workers),
            is_static=watched.gpu.info.mode == "mps+static",
            lost_reason=reading.reason if reading is not None and reading.health is Health.LOST else "",
            recoveries_s=tuple(watched.recoveries_s),
            is_unhealthy=watched.is_unhealthy,
        )

    def _tell_health(self, watched: _Watched, decision: Decision) -> None:
        info = watched.gpu.info
        reading = self._gauges.latest(info.uuid)
        health, reason = DeviceHealth.OK, ""
        if decision.is_unhealthy:
            health, reason = DeviceHealth.LOST, _told(info.gpu, decision)
        elif watched.state not in SERVING:
            health, reason = DeviceHealth.DEGRADED, _told(info.gpu, decision)
        elif watched.trouble and self._clock.now_s() - watched.trouble_at_s < SHOWN_S:
            health, reason = DeviceHealth.DEGRADED, watched.trouble
        elif reading is not None and reading.health is not Health.OK:
            health, reason = DeviceHealth.DEGRADED, reading.reason
        if self._guard.set_health(info.gpu, health, reason):
            level = logging.INFO if health is DeviceHealth.OK else logging.WARNING
            log.log(level, "%s is %s: %s", info.gpu, health.value, reason or "all is well")
            self._changed()

    def _hold(self, watched: _Watched, hindrance: Hindrance | None) -> None:
        if hindrance != watched.hindrance:
            watched.hindrance = hindrance
            self._changed()

    # Acting

    async def _act(self, watched: _Watched, decision: Decision, reconciler: Reconciler) -> None:
        """Carries the actions out, in order; those of one kind that follow each other at once, together."""
        name = watched.gpu.info.gpu
        stopped = {a.instance for a in decision.actions if a.kind in (ActionKind.DRAIN, ActionKind.KILL)}
        evicted = reconciler.evict(name, stopped, decision.reason)
        for kind, group in itertools.groupby(decision.actions, key=lambda action: action.kind):
            actions = tuple(group)
            workers = [(i, w) for i, w in evicted if i.instance in {action.instance for action in actions}]
            timeout_s = max(action.timeout_s for action in actions)
            if kind is ActionKind.DRAIN:
                await asyncio.gather(*(self._drain(reconciler, i, w, timeout_s) for i, w in workers))
            elif kind is ActionKind.TERMINATE_CLIENT:
                for _, worker in workers:
                    if _is_running(worker):
                        await self._terminate_client(watched, worker.process.pid, timeout_s)
            elif kind is ActionKind.KILL:
                await asyncio.gather(*(self._kill(reconciler, i, w) for i, w in workers))
            else:
                await self._act_on_device(watched, kind, actions, reconciler)

    async def _act_on_device(
        self, watched: _Watched, kind: ActionKind, actions: Sequence[Action], reconciler: Reconciler
    ) -> None:
        name = watched.gpu.info.gpu
        timeout_s = max(action.timeout_s for action in actions)
        try:
            if kind is ActionKind.QUIT_DAEMON:
                await watched.thread.run(lambda: watched.gpu.quit_daemon(timeout_s))
            elif kind is ActionKind.START_DAEMON:
                await watched.thread.run(lambda: watched.gpu.start_daemon(timeout_s))
        except MpsError as error:
            log.error("%s of %s: %s", kind, name, error, extra=about(gpu=name))
        if kind is ActionKind.START_WORKER:
            for action in actions:
                reconciler.resume(action.instance)

    async def _drain(self, reconciler: Reconciler, instance: Instance, worker: Worker, timeout_s: float) -> None:
        """A worker that met the fault itself ends by itself; the others finish what they can."""
        try:
            async with asyncio.timeout(timeout_s):
                await reconciler.retirer.drain(instance, worker, timeout_s)
                await reconciler.retirer.ask(worker, timeout_s)
        except TimeoutError:
            log.warning("%s did not drain within %.0f s", instance.instance, timeout_s, extra=instance.about)

    async def _kill(self, reconciler: Reconciler, instance: Instance, worker: Worker) -> None:
        if _is_running(worker):
            worker.process.kill()
            await worker.process.wait()
        await reconciler.retirer.clear_away(instance, worker)

    async def _terminate_client(self, watched: _Watched, pid: int, timeout_s: float) -> None:
        try:
            await watched.thread.run(lambda: watched.gpu.terminate_client(pid, timeout_s))
        except MpsError as error:
            log.warning(
                "client %d of %s can't be terminated: %s",
                pid,
                watched.gpu.info.gpu,
                error,
                extra=about(gpu=watched.gpu.info.gpu),
            )


def _is_running(worker: Worker) -> bool:
    return worker.process.exit_reason is None


def _told(name: str, decision: Decision) -> str:
    return decision.reason or f"{name} is not ready"
