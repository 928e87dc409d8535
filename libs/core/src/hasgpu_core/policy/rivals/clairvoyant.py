"""clairvoyant: lower bounds on cost for who knows all arrivals beforehand.

**Reserved shares** (nothing is lent: an instance pays SM × quota all the time). Time is cut into epochs of T seconds.
In each epoch consider the requests that arrive in it and are due before its end; whoever holds the same shares during
the whole epoch has to serve these with them. Leave out all other requests, let every epoch begin with idle instances,
let instances appear and go at no cost and at once between epochs: each of these only makes it cheaper. Then the least
cost of an epoch is the cheapest set of equal instances (SM, quota, count) that serves its requests in time, found by
trying sets in the order of their cost, with each request or batch going where it is done first. The sum over epochs
is the bound. It holds for those who keep shares for T or longer at a time (1 s here, half the window over which any
of the policies looks at its rate); of unequal sets, and of other orders of service, it is a close estimate and no
proof.

**Borrowed shares** (time is paid for as it is used). A batch of b that runs at (SM, quota) costs SM × quota × L(b)
GPU-seconds. Requests are alike, so batches may be taken to be runs of consecutive arrivals; one from t_i to t_j can't
begin before t_j and has to end by t_i + S, so L(b) <= S - (t_j - t_i). The least cost of b requests in so much time is
read off the lower convex hull of (L, cost) over all configurations, which also covers quotas that change meanwhile.
The cheapest way to cut all arrivals into batches follows by dynamic programming, and bounds everybody's cost,
whatever they do: standing shares, queues and cold starts are left out.

**Borrowed shares, sent at once** (`online=True`). Who does not know the future sends a request when an instance is
idle, as every gateway here does: a request waits only while the instances are busy. So the batch that a request waits
for began with an earlier one, at the latest the one before it, in t_(i-1), and ends by t_(i-1) + S if that is to be in
time; what goes together with request i has to have come by then: t_j <= t_(i-1) + S. The rest is as above. How many
instances there are, what they hold while idle, and that a batch of this kind waits for all that has come, is left out:
it stays a lower bound on who sends at once, and on nobody who holds requests back in the hope of more.

**Held shares, lent time, sent at once** (`held_bound`). The bounds above give instances away: the borrowed one counts
only the time that batches use. But a device gives no request below `PARKED_QUOTA_PERMILLE`, which an instance holds
while it idles, and a start takes seconds, so how many there are can't follow the arrivals of the moment. Here time is
cut into epochs of 5 s, about a cold start. In each a set of equal instances (SM share, quota, count) is held; every
request goes at once to an idle one, or with all who wait to the first that is free. Each set's cost and late requests
in the epoch are worked out from the very arrivals, so the best set is chosen knowing them. Which epochs the late ones
are spent in is relaxed (Lagrange): for every price of a late request the sum of the least (cost + price x late) less
price x allowed is a lower bound, and the largest of these is taken. Epochs begin with idle instances, sets change at no
cost. It is a bound for who holds equal sets for such an epoch or longer and sends at once, on nobody else.

In the other bounds, requests that may be late within the objective's 0.5 % are left out, the dearest first.
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from hasgpu_core.capacity import CapacityTable
from hasgpu_core.resources import PARKED_QUOTA_PERMILLE, WHOLE_PCT, WHOLE_PERMILLE

_HALVINGS = 50


@dataclass(frozen=True, slots=True)
class Bound:
    """What the arrivals cost at least."""

    gpu_seconds: float
    requests_count: int
    """That it counts as answered in time."""


def reserved_bound(
    arrivals_s: Sequence[float],
    table: CapacityTable,
    *,
    duration_s: float,
    max_batch: int,
    epoch_s: float = 1.0,
    most: int = 6,
    late_share: float = 0.005,
) -> Bound:
    """Returns the bound for shares that are kept for an epoch at least."""
    slo_s = table.slo_ms / 1e3
    sets = _sets(table, slo_s, max_batch, most)
    if not sets:
        return Bound(0.0, 0)
    costs: list[tuple[float, int]] = []
    start_s = 0.0
    while start_s < duration_s:
        end_s = start_s + epoch_s
        first, last = bisect_left(arrivals_s, start_s), bisect_right(arrivals_s, end_s - slo_s)
        inside = arrivals_s[first : max(first, last)]
        if len(inside):
            share = next((s for s, lat, count in sets if _serves(inside, lat, count, slo_s, max_batch)), sets[-1][0])
            costs.append((share * epoch_s, len(inside)))
        start_s = end_s
    spare = int(late_share * len(arrivals_s))
    costs.sort(key=lambda cost: cost[0] / cost[1], reverse=True)
    total = 0.0
    for cost, count in costs:
        if count <= spare:
            spare -= count
            continue
        total += cost
    return Bound(total, len(arrivals_s) - int(late_share * len(arrivals_s)))


def borrowed_bound(
    arrivals_s: Sequence[float],
    table: CapacityTable,
    *,
    max_batch: int,
    late_share: float = 0.005,
    online: bool = False,
) -> Bound:
    """Returns the bound for time that is paid for as it is used; `online`: for who sends at once."""
    slo_s = table.slo_ms / 1e3
    hulls = [_Hull(table, batch, slo_s) for batch in range(1, max_batch + 1)]
    if math.isinf(hulls[0].cost(slo_s)):
        return Bound(0.0, 0)
    best = [0.0]
    """Least cost of the first n requests."""
    cut = [0]
    for n in range(1, len(arrivals_s) + 1):
        ways = []
        for batch in range(1, min(max_batch, n) + 1):
            slack_s = slo_s - (arrivals_s[n - 1] - arrivals_s[n - batch])
            if slack_s <= 0:
                break
            if online and batch > 1 and not _waits(arrivals_s, n, batch, slo_s):
                continue
            ways.append((best[n - batch] + hulls[batch - 1].cost(slack_s), batch))
        cost, batch = min(ways)
        best.append(cost)
        cut.append(batch)
    shares: list[float] = []
    n = len(arrivals_s)
    while n:
        shares += [(best[n] - best[n - cut[n]]) / cut[n]] * cut[n]
        n -= cut[n]
    shares.sort()
    kept = len(shares) - int(late_share * len(shares))
    return Bound(sum(shares[:kept]), kept)


def held_bound(
    arrivals_s: Sequence[float],
    table: CapacityTable,
    *,
    duration_s: float,
    max_batch: int,
    epoch_s: float = 5.0,
    most: int = 6,
    late_share: float = 0.005,
) -> Bound:
    """Returns the bound for who holds a set of equal instances for an epoch, lends its idle time and sends at once."""
    slo_s = table.slo_ms / 1e3
    shares = _shares(table, slo_s, max_batch)
    if not shares:
        return Bound(0.0, 0)
    epochs = [
        _held_costs(
            arrivals_s[bisect_left(arrivals_s, at * epoch_s) : bisect_left(arrivals_s, (at + 1) * epoch_s)],
            shares,
            (slo_s, epoch_s, max_batch, most),
        )
        for at in range(math.ceil(duration_s / epoch_s - 1e-9))
    ]
    allowed = int(late_share * len(arrivals_s))
    low, high = 0.0, 1.0 + max(cost for costs in epochs for cost, _ in costs)
    best = 0.0
    for _ in range(_HALVINGS):
        price = (low + high) / 2
        chosen = [min((cost + price * late, late) for cost, late in costs) for costs in epochs]
        best = max(best, sum(cost for cost, _ in chosen) - price * allowed)
        low, high = (price, high) if sum(late for _, late in chosen) > allowed else (low, price)
    return Bound(best, len(arrivals_s) - allowed)


def _shares(table: CapacityTable, slo_s: float, max_batch: int) -> list[tuple[float, int, tuple[float, ...]]]:
    """(part of the SMs, quota, latencies by batch) of those that answer a request in time."""
    found = []
    for sm_pct in table.sm_pcts:
        for quota in table.quotas_permille:
            latencies = tuple(table.latency_s(b, sm_pct, quota) or 1e9 for b in range(1, max_batch + 1))
            if latencies[0] <= slo_s and quota > PARKED_QUOTA_PERMILLE:
                found.append((sm_pct / WHOLE_PCT, quota, latencies))
    return found


def _held_costs(
    arrivals_s: Sequence[float],
    shares: Sequence[tuple[float, int, tuple[float, ...]]],
    limits: tuple[float, float, int, int],
) -> list[tuple[float, int]]:
    """(GPU-seconds, late requests) of the sets for one epoch that no other beats in both.

    `limits` are the objective and the epoch in seconds, the largest batch and the most instances.
    """
    slo_s, epoch_s, max_batch, most = limits
    found = []
    for part, quota, latencies in shares:
        for count in range(1, most + 1):
            late, busy_s = _late_of(arrivals_s, latencies, count, slo_s, max_batch)
            held = count * PARKED_QUOTA_PERMILLE * epoch_s + (quota - PARKED_QUOTA_PERMILLE) * busy_s
            found.append((part * held / WHOLE_PERMILLE, late))
            if not late:
                break
    found.sort()
    kept = found[:1]
    for cost, late in found:
        if late < kept[-1][1]:
            kept.append((cost, late))
    return kept


def _late_of(
    arrivals_s: Sequence[float], latencies: Sequence[float], count: int, slo_s: float, max_batch: int
) -> tuple[int, float]:
    """(late requests, seconds of all batches): at once, or all who wait as far as the first of them is in time."""
    free = [-math.inf] * count
    at = late = 0
    busy_s = 0.0
    while at < len(arrivals_s):
        start_s = max(free[0], arrivals_s[at])
        last = bisect_right(arrivals_s, start_s, at, min(len(arrivals_s), at + max_batch))
        batch, left_s = last - at, slo_s - (start_s - arrivals_s[at]) + 1e-12
        while batch > 1 and latencies[0] <= left_s < latencies[batch - 1]:
            batch -= 1
        end_s = start_s + latencies[batch - 1]
        late += sum(end_s - arrived_s > slo_s + 1e-12 for arrived_s in arrivals_s[at : at + batch])
        busy_s += latencies[batch - 1]
        heapq.heapreplace(free, end_s)
        at += batch
    return late, busy_s


def _waits(arrivals_s: Sequence[float], n: int, batch: int, slo_s: float) -> bool:
    """Whether the last `batch` of the first n requests may wait together for an instance to be free again."""
    first = n - batch
    return first > 0 and arrivals_s[n - 1] <= arrivals_s[first - 1] + slo_s


class _Hull:
    """Least GPU-seconds of a batch by the time that it may take."""

    def __init__(self, table: CapacityTable, batch: int, slo_s: float) -> None:
        points = []
        for sm_pct in table.sm_pcts:
            for quota in table.quotas_permille:
                latency_s = table.latency_s(batch, sm_pct, quota)
                if latency_s is not None and latency_s <= slo_s:
                    points.append((latency_s, sm_pct / 100 * quota / 1000 * latency_s))
        hull: list[tuple[float, float]] = []
        for point in sorted(points):
            if hull and point[1] >= hull[-1][1]:
                continue
            while len(hull) > 1 and _above(hull[-2], hull[-1], point):
                hull.pop()
            hull.append(point)
        self._times_s = [time_s for time_s, _ in hull]
        self._costs = [cost for _, cost in hull]

    def cost(self, time_s: float) -> float:
        """Returns it; infinite where nothing is that fast."""
        at = bisect_right(self._times_s, time_s)
        if at == 0:
            return math.inf
        if at == len(self._times_s):
            return self._costs[-1]
        (t0, t1), (c0, c1) = self._times_s[at - 1 : at + 1], self._costs[at - 1 : at + 1]
        return c0 + (c1 - c0) * (time_s - t0) / (t1 - t0)


def _above(a: tuple[float, float], b: tuple[float, float], c: tuple[float, float]) -> bool:
    """Whether b lies on or above the line from a to c."""
    return (b[1] - a[1]) * (c[0] - a[0]) >= (c[1] - a[1]) * (b[0] - a[0])


def _sets(table: CapacityTable, slo_s: float, max_batch: int, most: int) -> list[tuple[float, tuple[float, ...], int]]:
    """(share, latencies by batch, count), cheapest first; without those that a cheaper one matches."""
    found = []
    for sm_pct in table.sm_pcts:
        for quota in table.quotas_permille:
            latencies = tuple(table.latency_s(b, sm_pct, quota) or 1e9 for b in range(1, max_batch + 1))
            if latencies[0] <= slo_s:
                found += [(c * sm_pct / 100 * quota / 1000, latencies, c) for c in range(1, most + 1)]
    found.sort(key=lambda f: (f[0], f[1][0]))
    kept: list[tuple[float, tuple[float, ...], int]] = []
    for share, latencies, count in found:
        better = any(c >= count and all(a <= b for a, b in zip(known, latencies, strict=True)) for _, known, c in kept)
        if not better:
            kept.append((share, latencies, count))
    return kept


def _serves(arrivals_s: Sequence[float], latencies: Sequence[float], count: int, slo_s: float, max_batch: int) -> bool:
    """Whether idle instances serve all in time: first come first served, who waits goes in one batch."""
    free = [float("-inf")] * count
    at = 0
    while at < len(arrivals_s):
        start_s = max(free[0], arrivals_s[at])
        batch = 1
        while at + batch < len(arrivals_s) and batch < max_batch and arrivals_s[at + batch] <= start_s:
            batch += 1
        end_s = start_s + latencies[batch - 1]
        if end_s - arrivals_s[at] > slo_s + 1e-12:
            return False
        heapq.heapreplace(free, end_s)
        at += batch
    return True
