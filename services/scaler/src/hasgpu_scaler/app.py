"""The scaler's shell: observes, lets the core decide, stores what it decided, announces what is stored."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable

from hasgpu_core.errors import ConflictError, FencedError, NotFoundError, UnavailableError
from hasgpu_core.events import horizontal_subject, vertical_subject
from hasgpu_core.policy.choice import make_live_policy
from hasgpu_core.policy.scaling import Decision, ScalingPolicy
from hasgpu_core.ports import Bus, CaughtUp, Clock, Fence
from hasgpu_runtime import wire
from hasgpu_runtime.leader import NOT_LEADING
from hasgpu_runtime.logs import about
from hasgpu_runtime.replica import Replica
from hasgpu_runtime.telemetry import Telemetry

from hasgpu_scaler.adapters.desired_store import DesiredStore
from hasgpu_scaler.adapters.recording_files import RecordingFiles
from hasgpu_scaler.announce import Announcement, Announcer, Horizontal, Purge, Vertical
from hasgpu_scaler.core import ScalerCore
from hasgpu_scaler.decisions import ADVISORY, DecisionLog, LoggedDecision
from hasgpu_scaler.inputs import SUBSCRIBED, WATCHED, Inputs
from hasgpu_scaler.manual import ManualRequest
from hasgpu_scaler.records import DesiredRecord
from hasgpu_scaler.tracing import DecisionTraces

SHORTEST_LOOK_S = 0.05

_log = logging.getLogger(__name__)


class ScalerApp(Replica):
    """One scaler process; `poke` asks for a pass soon, the other arguments of a replica are `Replica`'s."""

    def __init__(
        self,
        *,
        bus: Bus,
        desired: DesiredStore,
        clock: Clock,
        core: ScalerCore,
        telemetry: Telemetry,
        fence: Callable[[], Fence | None],
        fenced: Callable[[], None],
        poke: Callable[[], None],
        make_policy: Callable[[str], ScalingPolicy] = make_live_policy,
        recordings: RecordingFiles | None = None,
    ) -> None:
        super().__init__(fence=fence, fenced=fenced, acts="decisions", log=_log)
        self.core = core
        self.log = DecisionLog()
        self._announcer = Announcer()
        self._traces = DecisionTraces(telemetry)
        self._inputs = Inputs(core, self._announcer, self._traces)
        self._bus = bus
        self._desired = desired
        self._clock = clock
        self._poke = poke
        self._make_policy = make_policy
        self._configured = core.policy
        self.recordings = recordings
        self._changed = asyncio.Event()

    # What comes in.

    async def watch(self) -> None:
        """Feeds the core with last values, for ever."""
        async with self._bus.watch(*WATCHED) as changes:
            async for change in changes:
                if isinstance(change, CaughtUp):
                    self._caught_up.set()
                    self._poke()
                elif self._inputs.on_change(change, self._clock.now_s()):
                    self._poke()

    async def listen(self) -> None:
        """Feeds the core with demand and telemetry, for ever."""
        async with self._bus.subscribe(*SUBSCRIBED) as messages:
            async for message in messages:
                if self._inputs.on_message(message, self._clock.now_s()):
                    self._poke()

    # The pass.

    async def run_pass(self) -> float | None:
        """Observes, decides and acts once; while bus or store are away it says so and leaves everything as it is.

        Returns in how many seconds the policy wants to look again; None: it does not say.
        """
        async with self._lock:
            try:
                return await self._pass()
            except (UnavailableError, ConflictError, FencedError) as error:
                self._on_failure(error)
        return None

    async def _pass(self) -> float | None:
        fence = await self._lead()
        if fence is None:
            return None
        await self._announce(fence)
        for record in self.core.removals(self._clock.now_s()):
            with self._traces.deciding(record, "deleted", self._clock.unix_ns()):
                await self._commit(record, fence)
            _log.info(
                "%s: deleted, its instances are taken down", record.function, extra=about(function=record.function)
            )
            await self._announce(fence)
        decisions = self.core.tick(self._clock.now_s())
        for advice in self.core.advised:
            self._advise(advice)
        undone = {decision.function for decision in decisions}
        try:
            for decision in decisions:
                await self._act(decision, fence)
                undone.discard(decision.function)
                await self._announce(fence)
        finally:
            for function in undone:
                self.core.roll_back(function)
        for function in self.core.to_forget():
            await self._desired.delete(function, fence)
            self.core.forget(function)
            self._announcer.forget(function)
            self.log.forget(function)
            self._traces.forget(function)
        self._wait_for("")
        looks = [decision.look_again_s for decision in (*decisions, *self.core.advised)]
        return max(SHORTEST_LOOK_S, min(looks)) if looks else None

    async def _lead(self) -> Fence | None:
        """Returns the leadership, with the store's content read since it began; None: this process has to wait."""
        fence = self._fence()
        if fence is None:
            if self._loaded_token is not None:
                self._wait_for(NOT_LEADING)
                self.core.stop_recording()
            self._loaded_token = None
            return None
        if not self._caught_up.is_set():
            return None
        if self._loaded_token != fence.token:
            records, paused = await self._desired.load()
            self.core.load(records, paused=paused)
            self._use_policy(await self._desired.load_policy())
            self._announcer.reset()
            self._loaded_token = fence.token
            self._tell_watchers()
            _log.info("leads with token %d; %d functions have a desired state", fence.token, len(records))
        return fence

    def _advise(self, decision: Decision) -> None:
        """Keeps what would be done to be explained."""
        known = self.core.records.get(decision.function)
        self._log_decision(decision, known.revision if known else 0, self._clock.unix_ns(), ADVISORY)

    def _use_policy(self, name: str) -> None:
        """Lets a policy decide; empty, or a name that an older version stored: the configured one."""
        try:
            policy = self._make_policy(name) if name else self._configured
        except NotFoundError as error:
            _log.error("the policy set can't be had, the configured one decides: %s", error)
            policy = self._configured
        if policy.name != self.core.policy.name:
            _log.info("%s decides from now on, in the place of %s", policy.name, self.core.policy.name)
            self.core.set_policy(policy)

    async def _act(self, decision: Decision, fence: Fence) -> None:
        """Stores a decision and keeps it to be explained."""
        if decision.function not in self.core.functions:
            return  # deleted while the decisions before it were stored
        unix_ns = self._clock.unix_ns()
        record = self.core.next_record(decision, unix_ns)
        if record is not None:
            with self._traces.deciding(record, "policy", unix_ns, decision):
                await self._commit(record, fence)
                self._log_decision(decision, record.revision, unix_ns, "policy")
        else:
            known = self.core.records.get(decision.function)
            self._log_decision(decision, known.revision if known else 0, unix_ns, "policy")

    async def _commit(self, record: DesiredRecord, fence: Fence) -> None:
        with self._traces.storing(record):
            await self._desired.save(record, fence)
        self.core.commit(record)
        self._tell_watchers()

    async def _announce(self, fence: Fence) -> None:
        """Sends whatever the bus does not say yet; raises UnavailableError, and the next pass goes on from there."""
        now_s = self._clock.now_s()
        for item in self._announcer.due(self.core.records, now_s, fencing_token=fence.token):
            await self._send(item)
            self._announcer.sent(item, now_s)

    async def _send(self, item: Announcement) -> None:
        match item:
            case Vertical(event):
                await self._bus.put(
                    vertical_subject(event.node, event.instance),
                    wire.encode(event),
                    self._traces.headers(event.function),
                )
            case Horizontal(event, dedup_id):
                await self._bus.send_command(
                    horizontal_subject(event.function),
                    wire.encode(event),
                    dedup_id=dedup_id,
                    headers=self._traces.headers(event.function),
                )
            case Purge(node, instance):
                await self._bus.delete(vertical_subject(node, instance))

    # By hand.

    async def scale_by_hand(self, request: ManualRequest) -> DesiredRecord:
        """Stores and announces what was asked; returns the new desired state.

        What is stored and can't be announced now is announced later. Raises as `ScalerCore.decide_manual`;
        UnavailableError: this process does not lead, or the store is away.
        """
        async with self._lock:
            fence = await self._lead_or_refuse()
            decision, record = self.core.decide_manual(request, self._clock.now_s())
            with self._traces.deciding(record, "manual", self._clock.unix_ns(), decision):
                await self._commit(record, fence)
                self._log_decision(decision, record.revision, self._clock.unix_ns(), "manual")
            try:
                await self._announce(fence)
            except UnavailableError as error:
                self._wait_for(str(error))
        return record

    async def pause(self, function: str, *, paused: bool) -> None:
        """Stops or resumes deciding, for a function or ("") for all; raises NotFoundError, UnavailableError."""
        async with self._lock:
            fence = await self._lead_or_refuse()
            if not function:
                await self._desired.save_paused(paused, fence)
                self.core.set_paused(paused)
                self._tell_watchers()
            else:
                record = self.core.pause(function, paused=paused)
                if record is not None:
                    with self._traces.deciding(record, "paused", self._clock.unix_ns()):
                        await self._commit(record, fence)
        self._poke()

    async def set_policy(self, name: str) -> str:
        """Lets another policy decide from the next pass on, and keeps that; empty: the configured one.

        Returns the name of the one in force. Raises NotFoundError for an unknown name, UnavailableError.
        """
        if name:
            self._make_policy(name)
        async with self._lock:
            fence = await self._lead_or_refuse()
            await self._desired.save_policy(name, fence)
            self._use_policy(name)
        self._poke()
        return self.core.policy.name

    @property
    def configured_policy(self) -> str:
        """The policy that decides while none is set."""
        return self._configured.name

    async def _lead_or_refuse(self) -> Fence:
        fence = await self._lead()
        if fence is None:
            raise UnavailableError("this scaler does not lead now", retry_after_s=1.0)
        return fence

    # For those who look on.

    async def refresh(self) -> None:
        """Reads the stored state where another process leads; raises UnavailableError."""
        async with self._lock:
            if not self.leading:
                records, paused = await self._desired.load()
                self.core.load(records, paused=paused)
                self._use_policy(await self._desired.load_policy())

    async def changes(self) -> AsyncIterator[None]:
        """Yields at once and whenever a desired state may have changed."""
        while True:
            changed = self._changed
            yield
            await changed.wait()

    def _tell_watchers(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def _log_decision(self, decision: Decision, revision: int, unix_ns: int, origin: str) -> None:
        event = self.core.functions.get(decision.function)
        policy = self.core.policy.name if origin != "manual" else ""
        self.log.add(LoggedDecision(decision, unix_ns, revision, origin, policy, event.spec.slo_ms if event else 0))
        if decision.actions and origin != ADVISORY:
            acts = ", ".join(
                f"{a.kind.value} {a.instance} {a.from_permille}→{a.to_permille} ‰" for a in decision.actions
            )
            _log.info(
                "%s r%d (%s): %s: %s",
                decision.function,
                revision,
                origin,
                acts,
                decision.reason,
                extra=about(function=decision.function),
            )
