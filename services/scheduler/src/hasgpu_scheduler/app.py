"""The scheduler's shell: feeds the core from the bus, stores what it decides, announces what is stored."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager

from hasgpu_core.errors import ConflictError, FencedError, InvalidError, UnavailableError
from hasgpu_core.events import PlanEvent, instance_subject, plan_subject
from hasgpu_core.ports import Bus, CaughtUp, Clock, Command, Fence, StateChange
from hasgpu_runtime import trace_catalogue as names
from hasgpu_runtime import wire
from hasgpu_runtime.bus.traced import messaging
from hasgpu_runtime.leader import NOT_LEADING
from hasgpu_runtime.logs import about
from hasgpu_runtime.replica import Replica
from hasgpu_runtime.tasks import end_task
from hasgpu_runtime.telemetry import Attribute, Span, Telemetry

from hasgpu_scheduler.adapters.plan_store import PlanStore
from hasgpu_scheduler.core import PassResult, SchedulerCore
from hasgpu_scheduler.moving import Happening

WATCHED = ("node.>", "instance.>", "plan.>")
COMMANDS = "scale.horizontal.>"
CONSUMER = "scheduler"
COMMAND_RETRY_S = 1.0
"""A command that could not be taken in (the store is away, another leads) comes again after this long."""

_log = logging.getLogger(__name__)


class SchedulerApp(Replica):
    """One scheduler process; `poke` asks for a pass soon, the other arguments of a replica are `Replica`'s."""

    def __init__(
        self,
        *,
        bus: Bus,
        plans: PlanStore,
        clock: Clock,
        core: SchedulerCore,
        telemetry: Telemetry,
        fence: Callable[[], Fence | None],
        fenced: Callable[[], None],
        poke: Callable[[], None],
    ) -> None:
        super().__init__(fence=fence, fenced=fenced, acts="plans", log=_log)
        self.core = core
        self.clock = clock
        self._bus = bus
        self._plans = plans
        self._telemetry = telemetry
        self._poke = poke
        self._headers: dict[str, Mapping[str, str]] = {}
        self._causes: dict[str, tuple[str, str]] = {}
        """By function: subject and traceparent of a command, or of a change of share, that no pass has followed yet."""
        self._leads = asyncio.Event()
        self._not_leads = asyncio.Event()
        self.leadership_changed()

    # What comes in.

    async def watch(self) -> None:
        """Feeds the core with last values, for ever."""
        async with self._bus.watch(*WATCHED) as changes:
            async for change in changes:
                now_s = self.clock.now_s()
                self.core.heard(now_s)
                if isinstance(change, CaughtUp):
                    self.core.grace(now_s)
                    self._caught_up.set()
                    self._poke()
                elif self._on_change(change, now_s):
                    self._poke()

    def _on_change(self, change: StateChange, now_s: float) -> bool:
        """Takes a last value in; returns whether a pass is due before its time."""
        kind, _, rest = change.subject.partition(".")
        try:
            match kind:
                case "node" if change.payload is None:
                    self.core.on_node_gone(rest)
                    return True
                case "node":
                    return self.core.on_node(wire.decode_node(change.payload or b""), now_s)
                case "instance" if change.payload is None:
                    return self.core.on_instance_gone(rest.partition(".")[2])
                case "instance":
                    event = wire.decode_instance(change.payload or b"")
                    cause = self._telemetry.extract(change.headers)
                    if cause:
                        self._causes.setdefault(event.function, (change.subject, cause))
                    return self.core.on_instance(event)
                case "plan":
                    plan = wire.decode_plan(change.payload) if change.payload is not None else None
                    self.core.on_announced(rest, plan)
        except InvalidError:
            _log.exception("%s can't be read and is left out", change.subject)
        return False

    def leadership_changed(self) -> None:
        """To be called whenever `fence` may have changed."""
        if self.leading:
            self._not_leads.clear()
            self._leads.set()
        else:
            self._leads.clear()
            self._not_leads.set()
        self._poke()

    async def take_commands(self) -> None:
        """Takes commands in, for ever, while this process leads: what another one took out would wait for its turn."""
        await self._caught_up.wait()
        while True:
            await self._leads.wait()
            reading = asyncio.create_task(self._read_commands(), name="commands")
            ending = asyncio.create_task(self._not_leads.wait(), name="leadership")
            try:
                await asyncio.wait({reading, ending}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                ending.cancel()
                await end_task(reading)

    async def _read_commands(self) -> None:
        async with self._bus.commands(COMMANDS, consumer=CONSUMER) as commands:
            async for command in commands:
                try:
                    await self._take(command)
                except UnavailableError as error:
                    # The bus went away with the command unsettled: it is delivered again.
                    self._wait_for(str(error))

    async def _take(self, command: Command) -> None:
        try:
            event = wire.decode_horizontal(command.payload)
        except InvalidError:
            _log.exception("%s: a command can't be read and is dropped", command.subject)
            await command.ack()
            return
        async with self._lock:
            try:
                fence = await self._lead()
                if fence is None:
                    await command.retry(COMMAND_RETRY_S)
                    return
                if self.core.is_stale(event):
                    _log.info(
                        "%s: revision %d is older than the last, left out",
                        event.function,
                        event.revision,
                        extra=about(function=event.function),
                    )
                else:
                    await self._plans.save_wanted(event, fence)
                    self.core.accept(event, self.clock.now_s())
                    cause = self._telemetry.extract(command.headers)
                    if cause:
                        self._causes[event.function] = (command.subject, cause)
                    _log.info(
                        "%s r%d: %d instances wanted: %s",
                        event.function,
                        event.revision,
                        len(event.instances),
                        event.reason,
                    )
            except (UnavailableError, ConflictError, FencedError) as error:
                self._on_failure(error)
                await command.retry(COMMAND_RETRY_S)
                return
        await command.ack()
        await self.run_pass()

    # The pass.

    async def run_pass(self) -> None:
        """Decides and acts once; while bus or store are away it says so and leaves everything as it is."""
        async with self._lock:
            try:
                await self._pass()
            except (UnavailableError, ConflictError, FencedError) as error:
                self._on_failure(error)

    async def _pass(self) -> None:
        fence = await self._lead()
        if fence is None:
            return
        now_s = self.clock.now_s()
        result = self.core.decide(now_s, fencing_token=fence.token)
        self._tell(result.happenings)
        if result.plans:
            with self._span(result):
                for plan in result.plans:
                    await self._plans.save_plan(plan, fence)
                    self.core.commit(plan)
                    self._headers[plan.node] = self._telemetry.inject()
                    _log.info("plan %s r%d: %s", plan.node, plan.revision, plan.reason, extra=about(node=plan.node))
        unplaced = {item.function for item in result.unplaced}
        self._causes = {name: cause for name, cause in self._causes.items() if name in unplaced}
        await self._announce()
        for function in self.core.to_forget(now_s):
            await self._plans.delete_wanted(function, fence)
            self.core.forget(function)
        await self._lay_ghosts(now_s)
        for plan in self.core.suspects(now_s):
            await self._put(plan)
        self._wait_for("")

    def _span(self, result: PassResult) -> AbstractContextManager[Span]:
        """A span in the trace of the first command that the plans follow, linked with those of the others."""
        attributes: dict[str, Attribute] = {
            names.NODES: [plan.node for plan in result.plans],
            names.UNPLACED_COUNT: len(result.unplaced),
            names.REASON: "; ".join(plan.reason for plan in result.plans),
        }
        causes = list(self._causes.values())
        if not causes:
            return self._telemetry.span("scheduler.plan", attributes=attributes)
        (subject, parent), *others = causes
        attributes |= messaging(subject, "process", "process")
        links = [traceparent for _, traceparent in others]
        return self._telemetry.span(
            "scheduler.plan", parent=parent, links=links, attributes=attributes, kind="consumer"
        )

    def _tell(self, happenings: Iterable[Happening]) -> None:
        """Logs what happened and keeps it to be shown."""
        for happening in happenings:
            level = logging.WARNING if happening.kind in ("node-lost", "unplaced", "move-given-up") else logging.INFO
            _log.log(level, "%s: %s", happening.kind, happening.reason)
            self.core.happenings.append((self.clock.unix_ns(), happening))

    async def _announce(self) -> None:
        """Puts the stored plans that the bus does not hold; raises UnavailableError, the next pass goes on."""
        for plan in self.core.unannounced():
            await self._put(plan)
            self.core.on_announced(plan.node, plan)
        for node in self.core.to_purge():
            await self._bus.delete(plan_subject(node))
            self.core.on_announced(node, None)

    async def _lay_ghosts(self, now_s: float) -> None:
        """Takes back what was said of instances by nodes that do not come back: the one subject of another's."""
        for event in self.core.ghosts(now_s):
            await self._bus.delete(instance_subject(event.function, event.instance))
            self.core.on_instance_gone(event.instance)
            _log.info(
                "%s is gone with node %s",
                event.instance,
                event.node,
                extra=about(function=event.function, instance=event.instance, node=event.node),
            )

    async def _put(self, plan: PlanEvent) -> None:
        await self._bus.put(plan_subject(plan.node), wire.encode(plan), self._headers.get(plan.node))

    async def _lead(self) -> Fence | None:
        """Returns the leadership, with the store's content read since it began; None: this process has to wait."""
        fence = self._fence()
        if fence is None:
            if self._loaded_token is not None:
                self._wait_for(NOT_LEADING)
            self._loaded_token = None
            if self.core.plans or self.core.wanted:
                self.core.load((), (), self.clock.now_s())  # what it knew as leader is another's to change now
            return None
        if not self._caught_up.is_set():
            return None
        if self._loaded_token != fence.token:
            plans, wanted = await self._plans.load()
            self.core.load(plans, wanted, self.clock.now_s())
            self._loaded_token = fence.token
            _log.info("leads with token %d; %d plans, %d functions", fence.token, len(plans), len(wanted))
        return fence
