"""What a set of equal instances sustains, and the cheapest set for a rate.

**Poisson arrivals.** c instances take batches of up to B; each takes `L(b)` for a batch of b. A request finds an idle
instance or waits for the first one to be free, and then goes with all that wait. With `b` the batch that comes of the
rate (the mean number of arrivals in a service and 2.6 standard deviations more), it is late when the first instance
becomes free later than `S - L(b)` from now; that is, when all c began a batch within the last `w = 2 L(b) - S`. No more
batches begin than requests arrive, so

    P(late) <= P(Poisson(rate w) >= c),        0 where w <= 0

and the set sustains the largest rate at which that is at most the share of late requests aimed at, and which fills at
most a part of the throughput c B / L(B). For w <= 0 (two services fit into the objective) one instance is enough
however often requests collide, since who waits goes with the next batch.

**Clumps.** Where a part q of the requests brings another one with it at once, j or more of its own clump came before a
request with probability q^j, and it is late when these and the N of the last w are too many:

    P(late) <= P(N + J >= k),        P(J >= j) = q^j

with k = c, or c (1 + b) where after a batch of one another of b still ends in time: 2 L(1) <= L(1) + L(b) <= S.

**Regular arrivals.** At distances of 1 / rate an instance is free again when `L(1) <= c / rate`; beyond that, batches
of b = rate L(b) / c form, and two services have to fit into the objective.

**Cost.** Where the devices lend idle time, an instance asks for little (`request`) and may use up to `quota`. It pays
for what it asks all the time, and for the rest while a batch runs: a set costs

    c SM request + min(c, rate L(b) / b) SM (quota - request)

GPUs. Where nothing is lent, request = quota.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from hasgpu_core.capacity import CapacityTable
from hasgpu_core.policy.hybrid.settings import HybridSettings
from hasgpu_core.resources import PARKED_QUOTA_PERMILLE, WHOLE_PCT, WHOLE_PERMILLE

_SIGMAS = 2.6
_STEPS = 14
_RATE_STEP = 0.02


@dataclass(frozen=True, slots=True)
class Option:
    """A set of equal instances."""

    sm_pct: int
    quota_permille: int
    count: int
    rate_rps: float
    """Items per second that it sustains."""
    request_permille: int
    """Of each instance; up to `quota_permille` is borrowed."""
    latency_s: float
    """Of one request."""

    def cost(self, rate_rps: float) -> float:
        """Returns the GPUs that it costs at a rate (batches of one: the most that it can be)."""
        borrowed = min(self.count, rate_rps * self.latency_s) * (self.quota_permille - self.request_permille)
        reserved = self.count * self.request_permille
        return self.sm_pct / WHOLE_PCT * (reserved + borrowed) / WHOLE_PERMILLE


def poisson_tail(mean: float, count: int) -> float:
    """Returns P(Poisson(mean) >= count)."""
    if mean <= 0:
        return 0.0 if count > 0 else 1.0
    term = below = math.exp(-mean)
    for k in range(1, count):
        term *= mean / k
        below += term
    return max(0.0, 1.0 - below) if count > 0 else 1.0


def clump_tail(mean: float, count: int, more: float) -> float:
    """Returns P(N + J >= count) of N Poisson with the mean and P(J >= j) = more^j."""
    term = math.exp(-mean)
    late = poisson_tail(mean, count)
    for k in range(count):
        late += term * more ** (count - k)
        term *= mean / (k + 1)
    return min(1.0, late)


def poisson_rps(
    latencies_s: Sequence[float], slo_s: float, count: int, settings: HybridSettings, *, clump: int = 0
) -> float:
    """Returns the Poisson rate that `count` instances sustain; `latencies_s[b - 1]` is a batch of b's.

    `clump` tenths of the requests bring another one with them.
    """
    if latencies_s[0] > settings.latency_margin * slo_s:
        return 0.0
    high = settings.fill * count * max((b + 1) / latency for b, latency in enumerate(latencies_s))
    low = 0.0
    for _ in range(_STEPS):
        rate = (low + high) / 2
        if _late_share(latencies_s, slo_s, count, rate, clump) <= settings.late_share:
            low = rate
        else:
            high = rate
    return low


def _late_share(latencies_s: Sequence[float], slo_s: float, count: int, rate_rps: float, clump: int) -> float:
    mean = rate_rps * latencies_s[0] / count
    batch = math.ceil(mean + _SIGMAS * math.sqrt(mean)) if count == 1 else math.ceil(mean)
    latency_s = latencies_s[min(max(batch, 1), len(latencies_s)) - 1]
    within = rate_rps * (2 * latency_s - slo_s)
    late = poisson_tail(within, count)
    if not clump:
        return late
    second = sum(latencies_s[0] + other_s <= slo_s for other_s in latencies_s)
    return max(late, clump_tail(max(0.0, within), count * (1 + second), clump / 10))


def regular_rps(latencies_s: Sequence[float], slo_s: float, count: int, settings: HybridSettings) -> float:
    """Returns the rate of evenly spaced arrivals that `count` instances sustain."""
    if latencies_s[0] > settings.latency_margin * slo_s:
        return 0.0
    best = count / latencies_s[0]
    for batch, latency_s in enumerate(latencies_s, start=1):
        if 2 * latency_s <= slo_s:
            best = max(best, count * batch / latency_s)
    return settings.regular_fill * best


class Ladder:
    """The options of one SM share."""

    def __init__(self, sm_pct: int, options: Sequence[Option]) -> None:
        self.sm_pct = sm_pct
        self.options = sorted(options, key=lambda o: (o.count, o.quota_permille))
        self._found: dict[tuple[int, int], Option] = {}

    def cheapest(self, rate_rps: float, mostly_rps: float | None = None) -> Option | None:
        """Returns the cheapest option that sustains a rate, else the one that sustains most; None: there is none.

        What they cost is compared at `mostly_rps`, where that is less: bursts are few. Rates are rounded up to steps of
        2 %.
        """
        if not self.options:
            return None
        step = math.ceil(math.log(max(rate_rps, 0.01)) / _RATE_STEP)
        at = step if mostly_rps is None else min(step, math.ceil(math.log(max(mostly_rps, 0.01)) / _RATE_STEP))
        found = self._found.get((step, at))
        if found is None:
            rate, often_rps = math.exp(step * _RATE_STEP), math.exp(at * _RATE_STEP)
            able = [option for option in self.options if option.rate_rps >= min(rate, rate_rps * 1.02)]
            if able:
                found = min(able, key=lambda o: (o.cost(often_rps), o.count, -o.rate_rps))
            else:
                found = max(self.options, key=lambda o: (o.rate_rps, -o.count))
            self._found[step, at] = found
        return found


class Planner:
    """The ladders of one function on one device model."""

    def __init__(
        self, table: CapacityTable, sm_rungs: Sequence[int], max_batch: int, most: int, settings: HybridSettings
    ) -> None:
        self.table = table
        self._settings = settings
        self._most = most
        self._slo_s = table.slo_ms / 1e3
        self._latencies: dict[tuple[int, int], tuple[float, ...]] = {}
        self._sustained: dict[tuple[int, int, int, bool, int], float] = {}
        self._ladders: dict[tuple[int, bool, int], Ladder] = {}
        self._chosen: dict[tuple[tuple[float, ...], bool], int | None] = {}
        self._sms = [sm for sm in sm_rungs if sm >= table.sm_pcts[0]] if table.points else []
        self._max_batch = max_batch

    def latencies_s(self, sm_pct: int, quota_permille: int) -> tuple[float, ...]:
        """Returns what batches of 1, 2, ... may take, their spread included; no larger one is faster than a smaller."""
        key = (sm_pct, quota_permille)
        known = self._latencies.get(key)
        if known is None:
            worst, out = 0.0, []
            for batch in range(1, self._max_batch + 1):
                latency_s = self.table.latency_s(batch, sm_pct, quota_permille) or math.inf
                worst = max(worst, latency_s * self.table.spread_permille / WHOLE_PERMILLE)
                out.append(worst)
            known = self._latencies[key] = tuple(out)
        return known

    def rate_rps(self, sm_pct: int, quota_permille: int, count: int, *, regular: bool, clump: int = 0) -> float:
        """Returns what `count` instances of a share sustain."""
        key = (sm_pct, quota_permille, count, regular, clump)
        rate = self._sustained.get(key)
        if rate is None:
            latencies = self.latencies_s(sm_pct, quota_permille)
            if not count:
                rate = 0.0
            elif regular:
                rate = regular_rps(latencies, self._slo_s, count, self._settings)
            else:
                rate = poisson_rps(latencies, self._slo_s, count, self._settings, clump=clump)
            self._sustained[key] = rate
        return rate

    def ladder(self, sm_pct: int, *, regular: bool, clump: int = 0) -> Ladder:
        """Returns the options of an SM share."""
        key = (sm_pct, regular, clump)
        known = self._ladders.get(key)
        if known is None:
            settings = self._settings
            options = [
                Option(
                    sm_pct,
                    quota,
                    count,
                    rate,
                    min(quota, settings.request_permille) if settings.lend else quota,
                    self.latencies_s(sm_pct, quota)[0],
                )
                for quota in self.table.quotas_permille
                if quota > PARKED_QUOTA_PERMILLE  # who has no more than that counts as parked
                for count in range(1, self._most + 1)
                if (rate := self.rate_rps(sm_pct, quota, count, regular=regular, clump=clump)) > 0
            ]
            known = self._ladders[key] = Ladder(sm_pct, options)
        return known

    def best_sm_pct(self, rates_rps: Sequence[float], *, regular: bool) -> int | None:
        """Returns the SM share whose cheapest options for some rates cost least, on the geometric mean.

        An SM share that can't sustain a rate is charged in proportion to what is missing, thrice. None: none meets the
        objective.
        """
        key = (tuple(rates_rps), regular)
        if key in self._chosen:
            return self._chosen[key]
        best: tuple[float, int] | None = None
        for sm_pct in self._sms:
            ladder = self.ladder(sm_pct, regular=regular)
            if not ladder.options:
                continue
            cost = 0.0
            for rate in rates_rps:
                option = ladder.cheapest(rate)
                assert option is not None
                missing = max(1.0, rate / option.rate_rps)
                cost += math.log(option.cost(rate) * missing**3)
            if best is None or (cost, sm_pct) < best:
                best = (cost, sm_pct)
        self._chosen[key] = best[1] if best else None
        return self._chosen[key]
