"""A request between its arrival and its answer."""

from __future__ import annotations

import asyncio

from hasgpu_core.errors import DeadlineError, HasgpuError

from hasgpu_gateway.calls import Answer, InferCall
from hasgpu_gateway.errors import TIMEOUT_EXPIRED, ExpiredError
from hasgpu_gateway.tracing import RequestTrace


class Pending:
    """One request on its way. Lives in the queue, then in a batch; settled once, through its future."""

    __slots__ = (
        "alone",
        "arrived_s",
        "by_caller",
        "call",
        "deadline_s",
        "due_s",
        "future",
        "queued",
        "retried",
        "sequence",
        "trace",
    )

    def __init__(
        self,
        call: InferCall,
        future: asyncio.Future[Answer],
        *,
        arrived_s: float,
        due_s: float,
        deadline_s: float,
        by_caller: bool,
        sequence: int,
        trace: RequestTrace,
    ) -> None:
        self.call = call
        self.future = future
        self.arrived_s = arrived_s
        self.due_s = due_s
        """Arrival plus objective."""
        self.deadline_s = deadline_s
        self.by_caller = by_caller
        """The deadline is the caller's gRPC deadline, not a timeout of ours."""
        self.sequence = sequence
        self.queued = False
        self.retried = False
        """Its instance was lost once."""
        self.alone = False
        """A batch that it was in failed; it is run by itself, so that only the guilty one fails."""
        self.trace = trace

    def expired(self, where: str) -> HasgpuError:
        """Returns the error of a request whose time is up: the status that its caller sets by itself, or ours."""
        how = f"{1e3 * (self.deadline_s - self.arrived_s):.0f} ms passed {where}"
        return DeadlineError(f"{TIMEOUT_EXPIRED}: {how}") if self.by_caller else ExpiredError(how)

    def settle(self, outcome: Answer | Exception) -> bool:
        """Gives the outcome to whoever waits; False when that happened already or nobody waits any more."""
        if self.future.done():
            return False
        if isinstance(outcome, Answer):
            self.future.set_result(outcome)
        else:
            self.future.set_exception(outcome)
        return True
