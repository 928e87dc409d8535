"""FaST-GShare: fixed configurations with the best throughput per resource, whole instances added and removed.

Source: Gu et al., FaST-GShare, ICPP 2023, its heuristic scaling algorithm; KontonGu/FaST-GShare (788828f).

Of the configurations whose latency is inside the objective, `p_eff` has the best throughput per SM × quota. When the
predicted rate exceeds what runs by a gap, floor(gap / throughput(p_eff)) instances of it are added, and for the rest
the cheapest configuration that covers it. When less is needed, instances go, the least efficient first, while the
others cover the rate. An instance's share never changes.

The paper takes its throughputs from measured, saturated pods. Tuned: `fill`, the part of that throughput that is
planned with. On the replay of mean 10.8 rps (five models, SLO 2x, 3x, 5x, Poisson; GPU-milliseconds per request in
time, geometric mean, and late or dropped requests, mean): with nothing lent 0.3: 7.4 and 5.9 %; 0.5: 5.5 and 14 %;
0.7: 5.0 and 23 %; 1.0: 4.7 and 35 %; with idle time lent 0.3: 7.8 and 1.7 %; 0.5: 5.7 and 3.7 %; 0.7: 5.0 and 6.4 %;
1.0: 4.2 and 9.3 %. By cost per request in time 1.0, the published one, is best; who wants fewer late requests sets
less. `batches`: the release has batch 1. With idle time lent, throughputs of batches up to 8 (which the gateway here
forms for every policy) make it 12 % cheaper at as many late requests, so it has them there; with nothing lent they make
54 % late, so it has batch 1.
`hold_s`: 4 s is 1 % cheaper with more late requests, 30 s 3 % dearer. `bench/policy.py --only rivals` prints these.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from hasgpu_core.capacity import CapacityTable
from hasgpu_core.policy._draft import Share
from hasgpu_core.policy.rivals._base import Rival, Scene
from hasgpu_core.resources import WHOLE_PERMILLE


@dataclass(frozen=True, slots=True)
class FastGShareSettings:
    """What was tuned."""

    fill: float = 1.0
    """Part of an instance's throughput that is planned with."""
    batches: tuple[int, ...] | None = None
    """That configurations are chosen over; None: tuned, see the module."""
    lend: bool = False
    """Instances may borrow idle time up to the whole (the system has request and limit, set by its user)."""
    hold_s: float = 10.0
    """For so long less must have been needed before instances go."""


@dataclass(frozen=True, slots=True)
class _Configuration:
    sm_pct: int
    permille: int
    throughput_rps: float

    @property
    def efficiency(self) -> float:
        """Throughput per resource."""
        return self.throughput_rps / (self.sm_pct * self.permille)


def _best(configuration: _Configuration) -> tuple[float, int, int]:
    return configuration.efficiency, -configuration.sm_pct, -configuration.permille


def _cheapest(configuration: _Configuration) -> tuple[int, float]:
    return configuration.sm_pct * configuration.permille, -configuration.throughput_rps


@dataclass(frozen=True, slots=True)
class _Memory:
    peaks: tuple[tuple[float, float], ...] = ()
    """(time, rate) of the hold."""


class FastGSharePolicy(Rival):
    """See the module."""

    name = "fastgshare"
    period_s = 2.0

    def __init__(self, settings: FastGShareSettings | None = None) -> None:
        self._settings = settings or FastGShareSettings()
        self.headroom_permille = WHOLE_PERMILLE if self._settings.lend else 0

    def scale(self, scene: Scene, memory: object) -> tuple[object, str]:
        """One round of the heuristic."""
        known = memory if isinstance(memory, _Memory) else _Memory()
        demand, table, draft = scene.function.demand, scene.table, scene.draft
        assert table is not None
        configurations = list(self._configurations(scene, table))
        if not configurations:
            return known, "no configuration meets the objective"
        rate = demand.rate_rps
        if rate is None and draft.active:
            return known, "no demand data"
        rate = rate or 0.0
        backlog = demand.queued_items_count / self.period_s
        peaks = (*(p for p in known.peaks if p[0] > scene.now_s - self._settings.hold_s), (scene.now_s, rate))
        needed = rate + backlog
        have = sum(self._throughput_rps(share, table) for share in draft.active)
        scene.predicted_rps, scene.capacity_rps = rate, have
        floor = scene.function.spec.min_instances or int(rate > 0 or demand.queued_items_count > 0)
        if needed > have or len(draft.active) < floor:
            self._grow(scene, configurations, needed - have)
        else:
            self._shrink(scene, table, max(peak for _, peak in peaks), have, floor)
        return _Memory(peaks), f"rate {rate:.1f} rps, {have:.1f} provided"

    def fits(self, scene: Scene, share: Share) -> bool:
        """It chooses the most efficient configuration, or a cheaper one: the cheapest of that throughput."""
        table, allocation = scene.table, share.allocation
        assert table is not None
        if allocation != scene.draft.allocation(allocation.sm_pct, allocation.request_permille):
            return False
        configurations = list(self._configurations(scene, table))
        own = next(
            (c for c in configurations if (c.sm_pct, c.permille) == (allocation.sm_pct, allocation.request_permille)),
            None,
        )
        if own is None:
            return False
        best = max(configurations, key=_best)
        able = [c for c in configurations if c.throughput_rps >= own.throughput_rps]
        return own == best or (own == min(able, key=_cheapest) and _cheapest(own)[0] <= _cheapest(best)[0])

    def first(self, scene: Scene) -> None:
        """The one of best throughput per resource."""
        assert scene.table is not None
        configurations = list(self._configurations(scene, scene.table))
        if configurations:
            best = max(configurations, key=_best)
            scene.add(best.sm_pct, best.permille)

    def _grow(self, scene: Scene, configurations: list[_Configuration], gap: float) -> None:
        best = max(configurations, key=_best)
        for _ in range(int(max(0.0, gap) // best.throughput_rps)):
            if scene.add(best.sm_pct, best.permille) is None:
                return
            gap -= best.throughput_rps
        if gap > 0 or not scene.draft.active:
            able = [c for c in configurations if c.throughput_rps >= gap]
            rest = min(able, key=_cheapest) if able else best
            scene.add(rest.sm_pct, rest.permille)

    def _shrink(self, scene: Scene, table: CapacityTable, needed: float, have: float, floor: int) -> None:
        draft = scene.draft

        def efficiency(share: Share) -> tuple[float, str]:
            allocation = share.allocation
            cost = allocation.sm_pct * allocation.request_permille
            return self._throughput_rps(share, table) / cost, share.instance

        if any(share.coming for share in draft.active):
            return
        for share in sorted(draft.active, key=efficiency):
            rate = self._throughput_rps(share, table)
            if len(draft.active) > floor and have - rate >= needed:
                draft.remove(share)
                have -= rate

    def _configurations(self, scene: Scene, table: CapacityTable) -> Iterator[_Configuration]:
        for sm_pct in scene.rungs_pct:
            for permille in scene.quotas_permille:
                rate = self._rate_rps(table, sm_pct, permille, scene.function.spec.slo_s)
                if rate > 0:
                    yield _Configuration(sm_pct, permille, rate)

    def _throughput_rps(self, share: Share, table: CapacityTable) -> float:
        allocation = share.allocation
        return self._rate_rps(table, allocation.sm_pct, allocation.request_permille, table.slo_ms / 1e3)

    def _rate_rps(self, table: CapacityTable, sm_pct: int, permille: int, slo_s: float) -> float:
        best = 0.0
        tuned = (1, 2, 4, 8) if self._settings.lend else (1,)
        for batch in self._settings.batches or tuned:
            latency_s = table.latency_s(batch, sm_pct, permille)
            if latency_s is not None and latency_s <= slo_s:
                best = max(best, batch / latency_s)
        return self._settings.fill * best
