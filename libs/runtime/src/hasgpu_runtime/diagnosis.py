"""What a service says of itself when `hasgpu doctor` asks, and how a gateway asks everybody.

The question goes over core NATS to all; who answers is there, connected, and tells its version and its clock. What is
looked at more closely (brokers, streams) is in `broker_checks`.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import logging
import platform
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from enum import Enum

from google.protobuf.message import DecodeError
from hasgpu.system.v1 import system_pb2 as pb
from hasgpu_core.errors import HasgpuError
from hasgpu_core.events import QUESTION_SUBJECT, NodeEvent, node_subject, report_subject
from hasgpu_core.ports import Bus, CaughtUp, Clock, StateChange

from hasgpu_runtime import wire

_log = logging.getLogger(__name__)

CHECK_TIMEOUT_S = 2.0
"""How long one look may take before it counts as one without an answer."""
CAUGHT_UP_TIMEOUT_S = 3.0


class Level(Enum):
    """How a check came out."""

    OK = pb.LEVEL_OK
    WARNING = pb.LEVEL_WARNING
    """Works, and is not as it should be."""
    FAULT = pb.LEVEL_FAULT


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at."""

    level: Level
    subject: str
    """"NATS", "Redis", "stream COMMANDS", ..."""
    found: str
    """In words."""
    advice: str = ""
    """What to do; empty when it is well."""

    def to_proto(self) -> pb.Check:
        """Returns its message."""
        return pb.Check(level=self.level.value, subject=self.subject, found=self.found, advice=self.advice)


@dataclass(frozen=True, slots=True)
class Look:
    """Something to look at for every report."""

    subject: str
    take: Callable[[], Awaitable[Sequence[Check]]]
    """Raises HasgpuError when it can't look, which is a fault of the subject."""


@dataclass(frozen=True, slots=True)
class Reporter:
    """One process, as it tells of itself.

    Args:
        service: "gateway", "scaler", ...
        instance: host-pid.
        clock: Of the process.
        started_unix_ns: When it began.
        looks: What it looks at for every report; one that fails becomes a fault of the report.
    """

    service: str
    instance: str
    clock: Clock
    started_unix_ns: int
    looks: tuple[Look, ...] = ()

    async def report(self) -> pb.ServiceReport:
        """Looks, and returns what it found."""
        checks = await look_at(self.looks)
        return pb.ServiceReport(
            service=self.service,
            instance=self.instance,
            version=version(),
            python=platform.python_version(),
            started_unix_ns=self.started_unix_ns,
            answered_unix_ns=self.clock.unix_ns(),
            checks=[check.to_proto() for check in checks],
        )

    async def answer(self, bus: Bus) -> None:
        """Answers questions for as long as the process runs."""
        async with bus.subscribe(QUESTION_SUBJECT) as questions:
            async for message in questions:
                try:
                    question = pb.Question.FromString(message.payload)
                    report = await self.report()
                    await bus.publish(report_subject(question.nonce), report.SerializeToString())
                except (DecodeError, HasgpuError) as error:
                    _log.warning("a question on %s can't be answered: %s", QUESTION_SUBJECT, error)


def version() -> str:
    """Returns the version of hasgpu that runs."""
    return importlib.metadata.version("hasgpu-runtime")


async def look_at(looks: Sequence[Look]) -> list[Check]:
    """Takes all looks side by side; one that fails or takes too long is a fault that says so."""
    found = await asyncio.gather(*(_bounded(look) for look in looks))
    return [check for checks in found for check in checks]


async def _bounded(look: Look) -> Sequence[Check]:
    advice = "see the log of the service"
    try:
        async with asyncio.timeout(CHECK_TIMEOUT_S):
            return await look.take()
    except TimeoutError:
        return [Check(Level.FAULT, look.subject, f"no answer within {CHECK_TIMEOUT_S:g} s", advice)]
    except HasgpuError as error:
        return [Check(Level.FAULT, look.subject, str(error), advice)]


async def ask_all(bus: Bus, clock: Clock, *, wait_s: float) -> list[pb.ServiceReport]:
    """Asks everybody and collects what comes within `wait_s` seconds, by service and instance.

    Each report bears when it was asked for and when it came, by this process's clock.
    """
    nonce = secrets.token_hex(8)
    reports: dict[str, pb.ServiceReport] = {}
    async with bus.subscribe(report_subject(nonce)) as answers:
        asked_unix_ns = clock.unix_ns()
        await bus.publish(QUESTION_SUBJECT, pb.Question(nonce=nonce).SerializeToString())
        try:
            async with asyncio.timeout(wait_s):
                async for message in answers:
                    try:
                        report = pb.ServiceReport.FromString(message.payload)
                    except DecodeError as error:
                        _log.warning("an answer that can't be read: %s", error)
                        continue
                    report.asked_unix_ns = asked_unix_ns
                    report.received_unix_ns = clock.unix_ns()
                    reports[report.instance] = report
        except TimeoutError:
            pass
    return sorted(reports.values(), key=lambda report: (report.service, report.instance))


async def nodes(bus: Bus, clock: Clock) -> list[pb.NodeReport]:
    """Returns the nodes whose heartbeats the bus holds, by name; raises UnavailableError when it can't be asked."""
    found: list[NodeEvent] = []
    try:
        async with asyncio.timeout(CAUGHT_UP_TIMEOUT_S), bus.watch(node_subject("*")) as changes:
            found = [event async for event in _last_values(changes)]
    except TimeoutError:
        _log.warning("the nodes' heartbeats could not be read within %.0f s", CAUGHT_UP_TIMEOUT_S)
    return [_node_report(event, clock.unix_ns()) for event in sorted(found, key=lambda event: event.node)]


async def _last_values(changes: AsyncIterator[StateChange | CaughtUp]) -> AsyncIterator[NodeEvent]:
    async for change in changes:
        if isinstance(change, CaughtUp):
            return
        if change.payload is not None:
            yield wire.decode_node(change.payload)


def _node_report(event: NodeEvent, now_unix_ns: int) -> pb.NodeReport:
    return pb.NodeReport(
        node=event.node,
        address=event.address,
        heartbeat_age_ms=max(0, now_unix_ns - event.observed_unix_ns) // 1_000_000,
        draining=event.draining,
        devices=[
            pb.DeviceReport(
                gpu=device.gpu,
                model=device.model,
                backend=device.backend,
                mode=device.mode,
                health=device.health.value,
                health_reason=device.health_reason,
                capabilities=device.capabilities,
            )
            for device in event.devices
        ],
    )
