"""Idle device time of a row, lent between its instances: the `table` physics with lending.

While batches run in a row, each has an effective quota: its request, and what the row has left beyond the requests of
the busy ones in equal parts, up to each one's limit. A batch runs at the measured latency of its effective quota; when
that changes, because another batch of the row starts or ends or a share is resized, the part that is left goes on at
the new one. Cost is the SM share times the larger of request and effective quota: what is borrowed is paid for while
it is used.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from hasgpu_core.resources import WHOLE_PERMILLE

from hasgpu_sim.event_queue import EventQueue

RowKey = tuple[str, str, int]
"""(node, gpu, row)"""


@dataclass(slots=True, eq=False)
class Run:
    """A batch that runs."""

    function: str
    sm_pct: int
    request_permille: int
    limit_permille: int
    latency_s: Callable[[int], float]
    """Of the whole batch, by effective quota in per mille."""
    done: Callable[[], None]
    left: float = 1.0
    """Part of it that has not run yet."""
    since_s: float = 0.0
    quota_permille: int = 0
    """Effective."""
    version: int = 0
    ends_s: float = 0.0


@dataclass(slots=True)
class _Row:
    runs: list[Run] = field(default_factory=list)


class Lender:
    """All rows. `charge(function, gpus)` changes what a function pays a second beyond its requests."""

    def __init__(self, events: EventQueue, charge: Callable[[str, float], None]) -> None:
        self._events = events
        self._charge = charge
        self._rows: dict[RowKey, _Row] = {}

    def start(self, key: RowKey, run: Run) -> None:
        """Begins a batch; `run.done` is called at its end."""
        row = self._rows.setdefault(key, _Row())
        run.since_s = self._events.now_s
        row.runs.append(run)
        self._share_out(key, row)

    def drop(self, key: RowKey, run: Run) -> None:
        """Ends a batch that is lost."""
        row = self._rows.get(key)
        if row is not None and run in row.runs:
            self._remove(key, row, run)

    def reshare(self, key: RowKey, run: Run, request_permille: int, limit_permille: int) -> None:
        """Its instance was resized while it runs."""
        row = self._rows.get(key)
        if row is None or run not in row.runs:
            return
        self._pay(run, -1)
        run.request_permille, run.limit_permille = request_permille, limit_permille
        self._pay(run, 1)
        self._share_out(key, row)

    def _share_out(self, key: RowKey, row: _Row) -> None:
        now_s = self._events.now_s
        quotas = effective_permille([(run.request_permille, run.limit_permille) for run in row.runs])
        for run, quota in zip(row.runs, quotas, strict=True):
            if quota == run.quota_permille:
                continue
            if run.quota_permille:
                run.left -= (now_s - run.since_s) / run.latency_s(run.quota_permille)
                self._pay(run, -1)
            run.since_s = now_s
            run.quota_permille = quota
            run.version += 1
            self._pay(run, 1)
            run.ends_s = now_s + max(0.0, run.left) * run.latency_s(quota)
            self._events.at(run.ends_s, partial(self._end, key, run, run.version))

    def _end(self, key: RowKey, run: Run, version: int) -> None:
        row = self._rows[key]
        if run.version != version or run not in row.runs:
            return
        self._remove(key, row, run)
        run.done()

    def _remove(self, key: RowKey, row: _Row, run: Run) -> None:
        self._pay(run, -1)
        row.runs.remove(run)
        if row.runs:
            self._share_out(key, row)

    def _pay(self, run: Run, sign: int) -> None:
        borrowed_permille = run.quota_permille - run.request_permille
        if borrowed_permille > 0:
            self._charge(run.function, sign * run.sm_pct / 100 * borrowed_permille / WHOLE_PERMILLE)


def effective_permille(shares: list[tuple[int, int]]) -> list[int]:
    """Returns the effective quotas of busy instances of one row, from their (request, limit)."""
    quotas = [request for request, _ in shares]
    free = WHOLE_PERMILLE - sum(quotas)
    wanting = [i for i, (request, limit) in enumerate(shares) if limit > request]
    while free >= len(wanting) > 0:
        part = free // len(wanting)
        for i in list(wanting):
            more = min(part, shares[i][1] - quotas[i])
            quotas[i] += more
            free -= more
            if quotas[i] >= shares[i][1]:
                wanting.remove(i)
        if part == 0:
            break
    return quotas
