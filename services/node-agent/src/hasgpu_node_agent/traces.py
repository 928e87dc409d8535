"""Spans of what the agent does on others' word: one trace goes from a scaling decision to the share in force."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from hasgpu_core.events import PlanEvent, VerticalScaleEvent, plan_subject, vertical_subject
from hasgpu_core.ports import Clock
from hasgpu_core.resources import Allocation, InstanceState
from hasgpu_runtime import trace_catalogue as names
from hasgpu_runtime.bus.traced import messaging
from hasgpu_runtime.telemetry import TRACEPARENT, Attribute, Span, Telemetry

from hasgpu_node_agent.instance import Instance, Worker
from hasgpu_node_agent.plan import ShareTarget
from hasgpu_node_agent.row_guard import WorkerKey

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Open:
    revision: int
    span: Span


class ShareTraces:
    """Implements `hasgpu_node_agent.shares.ShareListener`: spans, log lines, and events of what changed.

    Args:
        telemetry: Where spans go.
        clock: For their times.
        changed: Called with the instance whose event is due.
    """

    def __init__(self, telemetry: Telemetry, clock: Clock, changed: Callable[[str], None]) -> None:
        self._telemetry = telemetry
        self._clock = clock
        self._changed = changed
        self._heard_unix_ns: dict[str, tuple[int, int]] = {}
        self._open: dict[str, _Open] = {}
        self._headers: dict[str, Mapping[str, str]] = {}
        self._plan_parent = ""
        self._plan_span: Span | None = None
        self._starting: dict[WorkerKey, Span] = {}
        self._started: set[WorkerKey] = set()
        self._confirming: dict[WorkerKey, Span] = {}

    def heard(self, event: VerticalScaleEvent) -> None:
        """A vertical change came in."""
        self._heard_unix_ns[event.instance] = (event.revision, self._clock.unix_ns())

    def headers(self, instance: str) -> Mapping[str, str]:
        """Returns the trace context of the change that an instance's next event tells of; {} for none."""
        return self._headers.pop(instance, {})

    def written(self, instance: Instance, worker: Worker, target: ShareTarget) -> None:
        """A share is in the control block."""
        allocation = target.allocation
        log.info(
            "%s: SM %d %%, request %d ‰, limit %d ‰ (revision %d)",
            instance.instance,
            allocation.sm_pct,
            allocation.request_permille,
            allocation.limit_permille,
            target.revision,
        )
        if not self._telemetry.enabled or instance.instance in self._open:
            return
        wanted, planned = instance.vertical, instance.planned
        by_event = wanted is not None and planned is not None and wanted.revision >= planned.allocation_revision
        parent = self._telemetry.extract(instance.vertical_headers) if by_event else self._plan_parent
        now_unix_ns = self._clock.unix_ns()
        revision, heard_unix_ns = self._heard_unix_ns.get(instance.instance, (0, now_unix_ns))
        if wanted is None or revision != wanted.revision:
            heard_unix_ns = now_unix_ns
        attributes: dict[str, Attribute] = {
            names.FUNCTION: instance.function,
            names.INSTANCE: instance.instance,
            names.REVISION: wanted.revision if wanted else target.revision,
        }
        received: Mapping[str, Attribute] = {}
        if by_event and wanted is not None:
            received = messaging(vertical_subject(wanted.node, wanted.instance), "process", "process")
        applying = self._telemetry.record(
            "agent.apply_vertical",
            start_unix_ns=heard_unix_ns,
            end_unix_ns=now_unix_ns,
            parent=parent,
            attributes={**attributes, **_share(allocation), **received},
        )
        span = self._telemetry.start("agent.applied", parent=applying, attributes=attributes)
        self._open[instance.instance] = _Open(wanted.revision if wanted else target.revision, span)

    def applied(self, instance: Instance, worker: Worker, target: ShareTarget, *, confirmed: bool) -> None:
        """The share is in force."""
        if not confirmed:
            log.warning("%s did not confirm its new share in time", instance.instance, extra=instance.about)
        opened = self._open.get(instance.instance)
        # A change that lowers one thing and raises another is made in two steps; the first has the former revision.
        if opened is not None and target.revision >= opened.revision:
            del self._open[instance.instance]
            opened.span.set(names.EPOCH, worker.process.applied_epoch())
            if not confirmed:
                opened.span.fail("the worker did not confirm in time")
            opened.span.end()
            self._headers[instance.instance] = {TRACEPARENT: opened.span.traceparent}
        self._changed(instance.instance)

    def refused(self, instance: Instance, reason: str) -> None:
        """The share does not fit now."""
        if reason:
            log.info("%s keeps its share: %s", instance.instance, reason, extra=instance.about)
        self._changed(instance.instance)

    def gone(self, instance: str) -> None:
        """Forgets an instance."""
        self._heard_unix_ns.pop(instance, None)
        self._headers.pop(instance, None)
        opened = self._open.pop(instance, None)
        if opened is not None:
            opened.span.fail("the instance went")
            opened.span.end()

    def plan(self, plan: PlanEvent, headers: Mapping[str, str]) -> None:
        """A plan is in force; its span lasts until it is carried out or another comes."""
        self.settle_plan(True)
        self._plan_span = self._telemetry.start(
            "agent.apply_plan",
            parent=self._telemetry.extract(headers),
            attributes={
                **messaging(plan_subject(plan.node), "process", "process"),
                names.NODE: plan.node,
                names.REVISION: plan.revision,
                names.INSTANCES_COUNT: len(plan.instances),
            },
        )
        self._plan_parent = self._plan_span.traceparent

    def starts(self, instances: Iterable[Instance]) -> None:
        """Looks whether workers have begun to start, are ready, run by their share or have gone since the last call."""
        if not self._telemetry.enabled:
            return
        seen: set[WorkerKey] = set()
        for instance in instances:
            for worker in instance.workers():
                seen.add(worker.key)
                self._follow(instance, worker)
        for key in self._started - seen:
            self._started.discard(key)
            for spans in (self._starting, self._confirming):
                ended = spans.pop(key, None)
                if ended is not None:
                    ended.fail("its worker ended before")
                    ended.end()

    def _follow(self, instance: Instance, worker: Worker) -> None:
        """agent.start, until the worker is ready; below it agent.applied, until it runs by the share given to it."""
        key = worker.key
        if key not in self._started:
            self._started.add(key)
            if worker.state is InstanceState.LOADING:
                self._starting[key] = self._start(instance, worker)
        if worker.state is InstanceState.READY and key in self._starting:
            start = self._starting.pop(key)
            start.end()
            self._confirming[key] = self._telemetry.start(
                "agent.applied",
                parent=start.traceparent,
                attributes={
                    names.FUNCTION: instance.function,
                    names.INSTANCE: instance.instance,
                    names.REVISION: worker.share.revision,
                },
            )
        if key in self._confirming and (epoch := worker.process.applied_epoch()) > 0:
            span = self._confirming.pop(key)
            span.set(names.EPOCH, epoch)
            span.end()

    def _start(self, instance: Instance, worker: Worker) -> Span:
        age_s = max(0.0, self._clock.now_s() - worker.started_at_s)
        return self._telemetry.start(
            "agent.start",
            parent=self._plan_parent,
            start_unix_ns=self._clock.unix_ns() - round(age_s * 1e9),
            attributes={
                names.FUNCTION: instance.function,
                names.INSTANCE: instance.instance,
                names.GPU: worker.device.gpu,
                **_share(worker.share.allocation),
            },
        )

    def settle_plan(self, settled: bool) -> None:
        """Ends the plan's span when it is carried out."""
        if settled and self._plan_span is not None:
            self._plan_span.end()
            self._plan_span = None


def _share(allocation: Allocation) -> dict[str, Attribute]:
    return {
        names.SM_PCT: allocation.sm_pct,
        names.REQUEST_PERMILLE: allocation.request_permille,
        names.LIMIT_PERMILLE: allocation.limit_permille,
    }
