"""One instance as a place to send batches to: its credits, its backlog and how long a batch will take there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from hasgpu_core.capacity import CapacityTable
from hasgpu_core.events import InstanceEvent
from hasgpu_core.resources import PARKED_QUOTA_PERMILLE, InstanceState

from hasgpu_gateway.calls import BatchAnswer
from hasgpu_gateway.pending import Pending
from hasgpu_gateway.tracing import NO_BATCH_TRACE, BatchTrace

_RATIO_WEIGHT = 0.2
"""Of a new observation in the running ratio of observed to predicted latency."""
_RATIO_BOUNDS = (0.1, 10.0)
_TRUSTED_OBSERVATIONS = 8
"""So many batches make even a static table, corrected by their ratio, good enough to refuse requests by."""
SHORT_BATCH_S = 0.005
"""Below it the trip to the worker is a large part of a batch, and the next batch should already lie there."""


@dataclass(frozen=True, slots=True)
class BatchOrder:
    """A batch to be sent."""

    batch: int
    """Unique in the gateway."""
    items: tuple[Pending, ...]
    deadline_unix_ns: int
    """Of the item that may wait longest."""
    traceparent: str = ""


class Link(Protocol):
    """The stream to a worker."""

    def send(self, order: BatchOrder) -> None:
        """Sends a batch; only while the link is up."""
        ...

    def close(self) -> None:
        """Ends the stream for good."""
        ...


@dataclass(slots=True, eq=False)
class Batch:
    """A batch at a worker."""

    order: BatchOrder
    rows: int
    sent_s: float
    predicted_s: float
    """0.0: unknown."""
    trace: BatchTrace = NO_BATCH_TRACE


class Route:
    """An instance's place in the dispatch."""

    def __init__(self, event: InstanceEvent, *, max_batches: int) -> None:
        self.event = event
        self.link: Link | None = None
        self.up = False
        """The stream is there."""
        self.draining = False
        """The worker itself said that it takes no more."""
        self.gone = False
        """The instance is no longer announced; kept for the batches that it still holds."""
        self.in_flight: dict[int, Batch] = {}
        self._max_batches = max_batches
        self._table: CapacityTable | None = None
        self.max_rows = 1
        """In one batch; the instance was started for so many."""
        self._table_rps: float | None = None
        self._ratio = 1.0
        self._observed_count = 0
        self._observed_s: float | None = None
        self._busy_until_s = 0.0

    @property
    def address(self) -> str:
        """Where its worker listens."""
        return self.event.address

    def update(self, event: InstanceEvent, table: CapacityTable | None, *, max_rows: int) -> None:
        """Takes note of the instance's newest state and of the prediction for its device."""
        if event.address != self.event.address or event.restarts_count != self.event.restarts_count:
            self.draining = False
        self.gone = False
        self.event = event
        self._table = table if table is not None and table.points else None
        self.max_rows = max_rows
        self._table_rps = self._throughput()

    @property
    def wants_link(self) -> bool:
        """Whether a stream is worth holding: standbys have one too, so that they can start at once."""
        return self.event.state is InstanceState.READY and bool(self.event.address)

    def is_open(self, code_revision: int) -> bool:
        """Tells whether batches may be sent to it, a free credit aside.

        A request of at most PARKED_QUOTA_PERMILLE means a standby: ready, but not routed to until the scaler makes it
        active. An instance that still runs code from before `code_revision` is not routed to either.
        """
        event = self.event
        return (
            self.up
            and not self.draining
            and event.state is InstanceState.READY
            and event.allocation.request_permille > PARKED_QUOTA_PERMILLE
            and event.function_revision >= code_revision
        )

    def has_credit(self, queued_rows: int) -> bool:
        """Tells whether to send now.

        A free instance always takes a batch. A busy one takes a further batch into its line only when that loses no
        chance of a larger one: the batch is full already, or batches are so short that the trip matters.
        """
        count = len(self.in_flight)
        if count == 0:
            return True
        if count >= self._max_batches:
            return False
        if queued_rows >= self.max_rows:
            return True
        predicted_s = self.latency_s(1)
        return predicted_s is None or predicted_s < SHORT_BATCH_S

    def latency_s(self, rows: int) -> float | None:
        """Returns the predicted time of a batch at the allocation in force, corrected by what was observed.

        It is that at the limit, which idle time lets it reach; what the neighbours take of it is in the correction.

        None: there is neither a table nor an observation.
        """
        if self._table is None:
            return self._observed_s
        allocation = self.event.allocation
        predicted_s = self._table.latency_s(rows, allocation.sm_pct, allocation.limit_permille)
        return None if predicted_s is None else predicted_s * self._ratio

    def trusted_rps(self) -> float | None:
        """Returns the full throughput, or None while nothing was measured that a refusal may rest on."""
        if self._table is None or self._table_rps is None:
            return None
        if self._table.basis != "profiled" and self._observed_count < _TRUSTED_OBSERVATIONS:
            return None
        return self._table_rps / self._ratio

    def backlog_s(self, now_s: float) -> float:
        """Returns the predicted time until the batches it holds are done."""
        return max(0.0, self._busy_until_s - now_s) if self.in_flight else 0.0

    def after_s(self, now_s: float, rows: int) -> float | None:
        """Returns in how long a batch sent now would be done, as predicted; None: nothing is known."""
        predicted_s = self.latency_s(rows)
        return None if predicted_s is None else self.backlog_s(now_s) + predicted_s

    def sent(self, batch: Batch, now_s: float) -> None:
        """Takes a credit."""
        self._busy_until_s = now_s + self.backlog_s(now_s) + batch.predicted_s
        self.in_flight[batch.order.batch] = batch

    def returned(self, answer: BatchAnswer, now_s: float) -> Batch | None:
        """Gives a credit back and learns from the batch's time; None for a batch that is not known (any more)."""
        batch = self.in_flight.pop(answer.batch, None)
        if batch is None:
            return None
        self._busy_until_s = now_s + sum(other.predicted_s for other in self.in_flight.values())
        took_s = (answer.gate_wait_ns + answer.execute_ns) / 1e9
        if took_s > 0:
            self._learn(batch.rows, took_s)
        return batch

    def take_all(self) -> list[Batch]:
        """Empties the list of batches in flight: the stream that held them is gone."""
        batches = list(self.in_flight.values())
        self.in_flight.clear()
        self._busy_until_s = 0.0
        return batches

    def _learn(self, rows: int, took_s: float) -> None:
        self._observed_count += 1
        weight = 1.0 if self._observed_s is None else _RATIO_WEIGHT
        self._observed_s = (self._observed_s or 0.0) * (1 - weight) + took_s * weight
        if self._table is None:
            return
        allocation = self.event.allocation
        predicted_s = self._table.latency_s(rows, allocation.sm_pct, allocation.limit_permille)
        if predicted_s:
            low, high = _RATIO_BOUNDS
            seen = min(high, max(low, took_s / predicted_s))
            self._ratio += _RATIO_WEIGHT * (seen - self._ratio)

    def _throughput(self) -> float | None:
        """The largest rows per second over the batch sizes allowed, as the table has it."""
        if self._table is None:
            return None
        allocation = self.event.allocation
        rates = []
        for rows in {1, self.max_rows, *(b for b in self._table.batches if b <= self.max_rows)}:
            latency_s = self._table.latency_s(rows, allocation.sm_pct, allocation.limit_permille)
            if latency_s:
                rates.append(rows / latency_s)
        return max(rates, default=None)
