"""Spans of what the agent does on others' word: one trace goes from a scaling decision to the share in force."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from hasgpu_core.events import PlanEvent, VerticalScaleEvent
from hasgpu_core.ports import Clock
from hasgpu_runtime.telemetry import TRACEPARENT, Attribute, Span, Telemetry

from hasgpu_node_agent.instance import Instance, Worker
from hasgpu_node_agent.plan import ShareTarget

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
        wanted = instance.vertical
        by_event = wanted is not None and instance.planned is not None
        parent = self._telemetry.extract(instance.vertical_headers) if by_event else self._plan_parent
        now_unix_ns = self._clock.unix_ns()
        revision, heard_unix_ns = self._heard_unix_ns.get(instance.instance, (0, now_unix_ns))
        if wanted is None or revision != wanted.revision:
            heard_unix_ns = now_unix_ns
        attributes: dict[str, Attribute] = {
            "instance": instance.instance,
            "revision": wanted.revision if wanted else target.revision,
        }
        applying = self._telemetry.record(
            "agent.apply_vertical",
            start_unix_ns=heard_unix_ns,
            end_unix_ns=now_unix_ns,
            parent=parent,
            attributes={
                **attributes,
                "sm_pct": allocation.sm_pct,
                "request_permille": allocation.request_permille,
                "limit_permille": allocation.limit_permille,
            },
        )
        span = self._telemetry.start("agent.applied", parent=applying, attributes=attributes)
        self._open[instance.instance] = _Open(wanted.revision if wanted else target.revision, span)

    def applied(self, instance: Instance, worker: Worker, target: ShareTarget, *, confirmed: bool) -> None:
        """The share is in force."""
        if not confirmed:
            log.warning("%s did not confirm its new share in time", instance.instance)
        opened = self._open.get(instance.instance)
        # A change that lowers one thing and raises another is made in two steps; the first has the former revision.
        if opened is not None and target.revision >= opened.revision:
            del self._open[instance.instance]
            if not confirmed:
                opened.span.fail("the worker did not confirm in time")
            opened.span.end()
            self._headers[instance.instance] = {TRACEPARENT: opened.span.traceparent}
        self._changed(instance.instance)

    def refused(self, instance: Instance, reason: str) -> None:
        """The share does not fit now."""
        if reason:
            log.info("%s keeps its share: %s", instance.instance, reason)
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
        self._plan_parent = self._telemetry.extract(headers)
        self._plan_span = self._telemetry.start(
            "agent.apply_plan",
            parent=self._plan_parent,
            attributes={"revision": plan.revision, "instances_count": len(plan.instances)},
        )

    def settle_plan(self, settled: bool) -> None:
        """Ends the plan's span when it is carried out."""
        if settled and self._plan_span is not None:
            self._plan_span.end()
            self._plan_span = None
