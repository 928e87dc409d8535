"""What the order of a function's queue is worth under overload: requests in time, the product's queue and plain EDF.

    python bench/queue_order.py --json bench/results/queue_order.json

One server in virtual time (no clock, no noise; the seed decides), Poisson arrivals at a part of what the server can do
at most, with a stretch of overload in the middle. "late last" is `hasgpu_core.policy.batching.EdfQueue`; "plain EDF"
serves the earliest due first, late or not, in the largest batch that ends before it is due, or the largest at all
when it is late already.
"""

from __future__ import annotations

import argparse
import json
import math
import pathlib
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Protocol

from hasgpu_core.policy.batching import EdfQueue, Waiting

OUT = pathlib.Path(__file__).parent / "results" / "queue_order.json"
SLO_S = 0.4
DEADLINE_S = 30.0
MAX_ROWS = 8


class Queue(Protocol):
    """What both orders offer."""

    def push(self, item: Waiting[object]) -> None:
        """Adds a request."""
        ...

    def expired(self, now_s: float) -> list[Waiting[object]]:
        """Takes out what is past its deadline."""
        ...

    def form_batch(
        self, now_s: float, *, max_rows: int, latency_s: Callable[[int], float | None]
    ) -> list[Waiting[object]]:
        """Takes out the next batch."""
        ...


class PlainEdf:
    """Earliest due first, late or not."""

    def __init__(self) -> None:
        self._items: list[Waiting[object]] = []

    def push(self, item: Waiting[object]) -> None:
        """Adds a request."""
        self._items.append(item)  # all have the same objective: arrival order is due order

    def expired(self, now_s: float) -> list[Waiting[object]]:
        """Takes out what is past its deadline."""
        gone = [item for item in self._items if item.deadline_s <= now_s]
        self._items = [item for item in self._items if item.deadline_s > now_s]
        return gone

    def form_batch(
        self, now_s: float, *, max_rows: int, latency_s: Callable[[int], float | None]
    ) -> list[Waiting[object]]:
        """Takes out the next batch."""
        if not self._items:
            return []
        due_s = self._items[0].due_s
        sizes = [n for n in range(1, min(max_rows, len(self._items)) + 1) if now_s + (latency_s(n) or 0.0) <= due_s]
        count = max(sizes, default=min(max_rows, len(self._items)))
        batch, self._items = self._items[:count], self._items[count:]
        return batch


@dataclass(frozen=True)
class Row:
    """One run."""

    model: str
    overload: float
    order: str
    requests: int
    in_time: float
    late_count: int
    expired_count: int
    p50_ms: float
    p99_ms: float
    longest_ms: float


def arrivals(rng: random.Random, steps: Sequence[tuple[float, float]]) -> list[float]:
    """Poisson arrivals; steps of (seconds, requests a second)."""
    times, start_s = [], 0.0
    for length_s, rate_rps in steps:
        at_s = start_s
        while (at_s := at_s + rng.expovariate(rate_rps)) < start_s + length_s:
            times.append(at_s)
        start_s += length_s
    return times


def run(queue: Queue, times: Sequence[float], latency_s: Callable[[int], float]) -> tuple[list[float], int]:
    """Serves all arrivals; returns latencies and how many expired."""
    latencies: list[float] = []
    expired, at, now_s, waiting = 0, 0, 0.0, 0
    while at < len(times) or waiting:
        if not waiting:
            now_s = max(now_s, times[at])
        while at < len(times) and times[at] <= now_s:
            queue.push(Waiting(object(), 1, None, times[at] + SLO_S, times[at] + DEADLINE_S, at))
            at, waiting = at + 1, waiting + 1
        gone = len(queue.expired(now_s))
        expired, waiting = expired + gone, waiting - gone
        batch = queue.form_batch(now_s, max_rows=MAX_ROWS, latency_s=latency_s)
        if batch:
            now_s += latency_s(len(batch))
            waiting -= len(batch)
            latencies += [now_s - (item.due_s - SLO_S) for item in batch]
    return latencies, expired


MODELS: dict[str, Callable[[int], float]] = {
    "batches hardly help": lambda n: 0.005 + 0.05 * n,
    "batches help": lambda n: 0.010 + 0.003 * n,
}


def main() -> None:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=pathlib.Path, default=OUT)
    options = parser.parse_args()
    rows = []
    print(f"{'model':<20} {'middle load':>11} {'order':<10} {'in time':>8} {'late':>6} {'expired':>8} {'p99 ms':>8}")
    for model, latency_s in MODELS.items():
        most_rps = max(n / latency_s(n) for n in range(1, MAX_ROWS + 1))
        for overload in (0.9, 1.1, 1.3, 1.6):
            steps = [(60.0, 0.7 * most_rps), (20.0, overload * most_rps), (60.0, 0.7 * most_rps)]
            times = arrivals(random.Random(options.seed), steps)
            orders: dict[str, Queue] = {"late last": EdfQueue(max_count=1_000_000), "plain EDF": PlainEdf()}
            for order, queue in orders.items():
                latencies, expired = run(queue, times, latency_s)
                in_time = sum(latency <= SLO_S for latency in latencies)
                cuts = statistics.quantiles(latencies, n=100)
                row = Row(
                    model,
                    overload,
                    order,
                    len(times),
                    round(in_time / len(times), 4),
                    len(latencies) - in_time,
                    expired,
                    round(cuts[49] * 1e3, 1),
                    round(cuts[98] * 1e3, 1),
                    round(max(latencies, default=math.nan) * 1e3, 1),
                )
                rows.append(row)
                print(
                    f"{model:<20} {overload:>11} {order:<10} {row.in_time:>8.1%} {row.late_count:>6} "
                    f"{row.expired_count:>8} {row.p99_ms:>8.0f}"
                )
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(
        json.dumps({"device": "none (virtual time)", "seed": options.seed, "rows": [asdict(r) for r in rows]}, indent=1)
    )
    print(f"written to {options.json}")


if __name__ == "__main__":
    main()
