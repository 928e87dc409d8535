"""An open-loop load generator: requests leave when they are due, whatever became of those before.

Latency counts from the due time, so a generator or a server that falls behind shows in it (no co-ordinated omission).
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field

OK = "OK"
UNSENT = "UNSENT"
MOST_IN_FLIGHT = 512


@dataclass(frozen=True, slots=True)
class Answer:
    """What became of one request, as its sender tells."""

    status: str
    """"OK", or the name of a gRPC status."""
    detail: str = ""
    wrong: bool = False
    """The answer came and is not the right one."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """One request. Times are seconds since the replay began."""

    index: int
    due_s: float
    sent_s: float
    done_s: float
    answer: Answer

    @property
    def latency_s(self) -> float:
        """From the due time to the answer."""
        return self.done_s - self.due_s

    @property
    def ok(self) -> bool:
        """Answered."""
        return self.answer.status == OK


@dataclass(frozen=True, slots=True)
class Summary:
    """A replay in numbers. Percentiles are of answered requests; None: none was answered."""

    requests: int
    ok: int
    wrong_outputs: int
    unsent: int
    """Not sent because too many were in flight; they count as requests that failed."""
    failures: Mapping[str, int]
    """By status."""
    first_failure: str
    p50_ms: float | None
    p95_ms: float | None
    p99_ms: float | None
    slo_ms: int
    slo_attainment: float | None
    """Share of all requests that were answered within the objective."""
    late_sends_p99_ms: float | None
    """How far behind its schedule the generator itself was."""
    duration_s: float


@dataclass(slots=True)
class Replay:
    """Collects outcomes while a load runs."""

    due_s: Sequence[float]
    outcomes: list[Outcome] = field(default_factory=list)
    sent_count: int = 0
    in_flight_count: int = 0

    def summary(self, slo_ms: int) -> Summary:
        """Sums up what has come in so far."""
        done = self.outcomes
        answered = [o for o in done if o.ok]
        failed = [o for o in done if not o.ok]
        latencies_ms = sorted(o.latency_s * 1e3 for o in answered)
        late_ms = sorted((o.sent_s - o.due_s) * 1e3 for o in done if o.answer.status != UNSENT)
        met = sum(latency <= slo_ms for latency in latencies_ms)
        first = min(failed, key=lambda o: o.done_s, default=None)
        return Summary(
            requests=len(done),
            ok=len(answered),
            wrong_outputs=sum(o.answer.wrong for o in answered),
            unsent=sum(o.answer.status == UNSENT for o in failed),
            failures=dict(Counter(o.answer.status for o in failed)),
            first_failure=f"{first.answer.status}: {first.answer.detail}" if first else "",
            p50_ms=percentile(latencies_ms, 50),
            p95_ms=percentile(latencies_ms, 95),
            p99_ms=percentile(latencies_ms, 99),
            slo_ms=slo_ms,
            slo_attainment=met / len(done) if done else None,
            late_sends_p99_ms=percentile(late_ms, 99),
            duration_s=max((o.done_s for o in done), default=0.0),
        )


async def run_open_loop(
    replay: Replay,
    send: Callable[[int], Awaitable[Answer]],
    *,
    most_in_flight: int = MOST_IN_FLIGHT,
    began_s: float | None = None,
    on_outcome: Callable[[Outcome], None] | None = None,
) -> None:
    """Sends request k at `replay.due_s[k]` and records what becomes of it; returns when the last one is settled.

    Args:
        replay: Due times ascending, seconds from the beginning; outcomes are added to it.
        send: Sends request k; must answer in bounded time and not raise for a failed request.
        most_in_flight: A request due while this many are unanswered is not sent, and counts as UNSENT.
        began_s: Monotonic time that due times count from, so that several loads share one beginning; None: now.
        on_outcome: Called for every settled request.
    """
    origin_s = time.monotonic() if began_s is None else began_s

    def settle(outcome: Outcome) -> None:
        replay.outcomes.append(outcome)
        if on_outcome:
            on_outcome(outcome)

    async def one(index: int, due_s: float) -> None:
        sent_s = time.monotonic() - origin_s
        try:
            answer = await send(index)
        finally:
            replay.in_flight_count -= 1
        settle(Outcome(index, due_s, sent_s, time.monotonic() - origin_s, answer))

    async with asyncio.TaskGroup() as group:
        for index, due_s in enumerate(replay.due_s):
            await asyncio.sleep(max(0.0, origin_s + due_s - time.monotonic()))  # 0 lets the requests before start
            if replay.in_flight_count >= most_in_flight:
                now_s = time.monotonic() - origin_s
                settle(Outcome(index, due_s, now_s, now_s, Answer(UNSENT, f"{most_in_flight} were in flight")))
                continue
            replay.sent_count += 1
            replay.in_flight_count += 1
            group.create_task(one(index, due_s))


def percentile(ascending: Sequence[float], pct: float) -> float | None:
    """Nearest rank; None for no values."""
    if not ascending:
        return None
    return ascending[min(len(ascending) - 1, max(0, math.ceil(pct / 100 * len(ascending)) - 1))]
