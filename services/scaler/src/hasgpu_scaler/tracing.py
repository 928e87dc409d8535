"""Spans of scaling decisions: demand, decision, desired state; what announces a decision carries its trace on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from hasgpu_core.events import DemandEvent, DesiredInstance
from hasgpu_core.policy.scaling import Decision
from hasgpu_runtime import trace_catalogue as names
from hasgpu_runtime.telemetry import Attribute, Telemetry

from hasgpu_scaler.records import DesiredRecord


class DecisionTraces:
    """Spans of what is decided, and the trace context of each function's last decision.

    Decisions are recorded whatever the sampler's ratio (see `hasgpu_runtime.sampling`).
    """

    def __init__(self, telemetry: Telemetry) -> None:
        self._telemetry = telemetry
        self._demand: dict[str, DemandEvent] = {}
        self._headers: dict[str, Mapping[str, str]] = {}

    def heard(self, demand: DemandEvent) -> None:
        """A gateway reported; its report is what the next decision on the function begins with."""
        if self._telemetry.enabled:
            self._demand[demand.function] = demand

    def headers(self, function: str) -> Mapping[str, str] | None:
        """Returns the trace context of the function's last decision; None: there is none."""
        return self._headers.get(function)

    def forget(self, function: str) -> None:
        """A function is gone."""
        self._headers.pop(function, None)
        self._demand.pop(function, None)

    @contextmanager
    def deciding(
        self, record: DesiredRecord, origin: str, unix_ns: int, decision: Decision | None = None
    ) -> Iterator[None]:
        """A span around the storing of a decision; a policy's begins its trace with the demand it rests on.

        Args:
            record: What is to be stored.
            origin: "policy", "manual", "deleted" or "paused".
            unix_ns: Now.
            decision: None: nothing was weighed.
        """
        if not self._telemetry.enabled:
            yield
            return
        parent = self._record_demand(record.function, unix_ns) if origin == "policy" else ""
        attributes = _attributes(record, origin, decision)
        with self._telemetry.span("scaler.decide", parent=parent, attributes=attributes):
            yield
            self._headers[record.function] = self._telemetry.inject()

    @contextmanager
    def storing(self, record: DesiredRecord) -> Iterator[None]:
        """A span around the write."""
        if not self._telemetry.enabled:
            yield
            return
        attributes: dict[str, Attribute] = {
            names.FUNCTION: record.function,
            names.REVISION: record.revision,
            names.INSTANCES: [_in_words(item) for item in record.instances],
            names.DB_SYSTEM: "redis",
            names.DB_OPERATION: "compare-and-set",
        }
        with self._telemetry.span("scaler.store_desired", attributes=attributes):
            yield

    def _record_demand(self, function: str, unix_ns: int) -> str:
        """Returns the span's context; "" when nobody has reported demand yet."""
        demand = self._demand.get(function)
        if demand is None:
            return ""
        attributes: dict[str, Attribute] = {
            names.FUNCTION: function,
            names.GATEWAY: demand.gateway,
            names.ARRIVED_COUNT: demand.arrived_count,
            names.QUEUED_COUNT: demand.queued_count,
            names.IN_FLIGHT_COUNT: demand.in_flight_count,
        }
        if demand.p95_ms is not None:
            attributes[names.P95_MS] = demand.p95_ms
        return self._telemetry.record(
            "scaler.demand",
            # Another host's clock may be ahead.
            start_unix_ns=min(demand.observed_unix_ns, unix_ns),
            end_unix_ns=unix_ns,
            attributes=attributes,
        )


def _in_words(item: DesiredInstance) -> str:
    share = item.allocation
    standby = ", standby" if item.standby else ""
    return f"{item.instance}: {share.sm_pct} % SM, {share.request_permille} of {share.limit_permille} ‰{standby}"


def _attributes(record: DesiredRecord, origin: str, decision: Decision | None) -> dict[str, Attribute]:
    attributes: dict[str, Attribute] = {
        names.FUNCTION: record.function,
        names.REVISION: record.revision,
        names.REASON: decision.reason if decision is not None else record.reason,
        names.ORIGIN: origin,
        names.INSTANCES_COUNT: len(record.instances),
    }
    if decision is None:
        return attributes
    attributes[names.ACTIONS] = [
        f"{action.kind.value} {action.instance} {action.from_permille}→{action.to_permille} ‰"
        for action in decision.actions
    ]
    attributes[names.CAPACITY_RPS] = decision.capacity_rps
    attributes[names.QUEUED_ITEMS_COUNT] = decision.queued_items_count
    rates = {
        names.OBSERVED_RPS: decision.observed_rps,
        names.PREDICTED_RPS: decision.predicted_rps,
        names.NEEDED_RPS: decision.needed_rps,
    }
    attributes.update((name, rate_rps) for name, rate_rps in rates.items() if rate_rps is not None)
    return attributes
