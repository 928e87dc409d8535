"""HAS-GPU's controller as it was released, faults and all.

Source: KontonGu/HAS-GPU (fe7105e), as described in Gu et al., Euro-Par 2025. Every 2 s, on the rate of the last 10 s:

    Kalman filter A = H = 1, Q = 1, R = 10, P0 = 1; after each update the state grows by √P and is clamped to the
    measurement + 5 rps (the one filter of all functions is one a function here, since runs have one function mostly)
    capacity of an instance = 1000 / (latency_ms + 70) × (batch + 1) / 2
    up when predicted > 0.9 × capacity, by predicted - 0.9 × capacity: quotas by 10 % from the largest SM share down,
    then new instances on GPUs in use, then on a new GPU, with the most cost-efficient configuration
    down when predicted < 0.3 × capacity and nothing changed for 10 s: quotas from the smallest SM share up, then
    instances

It starts every function with SM 30 %, quota 30 %, batch 4. It reads no latency, no queue and no objective. What made
the released program crash or divide by zero (a new GPU, occupancy) is mended, or it would not run.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from hasgpu_core.capacity import CapacityTable
from hasgpu_core.policy._draft import Share
from hasgpu_core.policy.rivals._base import Rival, Scene
from hasgpu_core.resources import WHOLE_PERMILLE

_UP, _DOWN = 0.9, 0.3
_COOL_DOWN_S = 10.0
_STEP = 100
_BATCH = 4
_START_SM_PCT, _START_PERMILLE = 30, 300
_WINDOW_S = 10.0
_OVERHEAD_MS = 70.0
_CLAMP_RPS = 5.0


@dataclass(frozen=True, slots=True)
class _Memory:
    totals: tuple[tuple[float, int], ...] = ()
    rate_rps: float | None = None
    variance: float = 1.0
    changed_s: float = -math.inf


class ReleasedPolicy(Rival):
    """See the module."""

    name = "hasgpu-released"
    period_s = 2.0

    def observe(self, scene: Scene, memory: object) -> object:
        """Keeps totals, for the rate over 10 s."""
        known = memory if isinstance(memory, _Memory) else _Memory()
        total = scene.function.demand.arrived_items_count
        if total is None:
            return known
        if known.totals and total < known.totals[-1][1]:
            known = replace(known, totals=())
        cut_s = scene.now_s - _WINDOW_S
        kept = tuple(t for i, t in enumerate(known.totals) if t[0] >= cut_s or known.totals[i + 1 : i + 2] == ())
        return replace(known, totals=(*kept, (scene.now_s, total)))

    def scale(self, scene: Scene, memory: object) -> tuple[object, str]:
        """One tick of the loop."""
        known = memory if isinstance(memory, _Memory) else _Memory()
        draft, table = scene.draft, scene.table
        assert table is not None
        if not draft.active:
            scene.add(self._start_sm_pct(scene), _START_PERMILLE)
            return known, "a first instance"
        if len(known.totals) < 2:
            return known, "no rate yet"
        known = self._filtered(known)
        rate = known.rate_rps or 0.0
        capacity = sum(
            self._capacity_rps(table, s.allocation.sm_pct, s.allocation.request_permille) for s in draft.active
        )
        scene.predicted_rps, scene.capacity_rps = rate, capacity
        if rate > _UP * capacity:
            self._up(scene, table, rate - _UP * capacity)
        elif rate < _DOWN * capacity and scene.now_s - known.changed_s >= _COOL_DOWN_S:
            self._down(scene, table, _UP * capacity - rate)
        if draft.actions():
            known = replace(known, changed_s=scene.now_s)
        return known, f"rate {rate:.1f} rps predicted, capacity {capacity:.1f}"

    def fits(self, scene: Scene, share: Share) -> bool:
        """Its quotas are whole steps, and it borrows nothing."""
        allocation = share.allocation
        return (
            allocation.request_permille % _STEP == 0 and allocation.limit_permille == allocation.request_permille
        ) or allocation.request_permille == WHOLE_PERMILLE

    def first(self, scene: Scene) -> None:
        """What it starts every function with."""
        scene.add(self._start_sm_pct(scene), _START_PERMILLE)

    def _filtered(self, known: _Memory) -> _Memory:
        (start_s, start), (end_s, end) = known.totals[0], known.totals[-1]
        measured = (end - start) / max(end_s - start_s, 1e-3)
        if known.rate_rps is None:
            return replace(known, rate_rps=measured)
        variance = known.variance + 1.0
        gain = variance / (variance + 10.0)
        rate = known.rate_rps + gain * (measured - known.rate_rps)
        variance *= 1.0 - gain
        return replace(known, rate_rps=min(rate + math.sqrt(variance), measured + _CLAMP_RPS), variance=variance)

    def _up(self, scene: Scene, table: CapacityTable, missing: float) -> None:
        draft, room = scene.draft, scene.room
        for share in sorted(draft.ready, key=lambda s: (-s.allocation.sm_pct, s.instance)):
            view = share.view
            assert view is not None
            sm_pct, permille = share.allocation.sm_pct, share.allocation.request_permille
            own = self._capacity_rps(table, sm_pct, permille)
            free = room.free_permille(view.node, view.gpu, view.row)
            more = 0
            while missing > 0 and more + _STEP <= free and permille + more + _STEP <= WHOLE_PERMILLE:
                more += _STEP
                grown = self._capacity_rps(table, sm_pct, permille + more)
                missing -= grown - own
                own = grown
            if more:
                room.take(view.node, view.gpu, view.row, more)
                draft.set_request(share, permille + more)
        while missing > 0:
            sm_pct, permille = self._most_efficient(scene, table)
            if any(share.coming for share in draft.active) or scene.add(sm_pct, permille) is None:
                return
            missing -= self._capacity_rps(table, sm_pct, permille)

    def _down(self, scene: Scene, table: CapacityTable, surplus: float) -> None:
        draft = scene.draft
        floor = max(1, scene.function.spec.min_instances)
        for share in sorted(draft.ready, key=lambda s: (s.allocation.sm_pct, s.instance)):
            surplus = self._lower(scene, table, share, surplus)
            own = self._capacity_rps(table, share.allocation.sm_pct, share.allocation.request_permille)
            if share.allocation.request_permille <= _STEP and len(draft.active) > floor and own <= surplus:
                surplus -= own
                draft.remove(share)

    def _lower(self, scene: Scene, table: CapacityTable, share: Share, surplus: float) -> float:
        sm_pct, permille = share.allocation.sm_pct, share.allocation.request_permille
        own = self._capacity_rps(table, sm_pct, permille)
        while permille > _STEP:
            lower = self._capacity_rps(table, sm_pct, permille - _STEP)
            if own - lower > surplus:
                break
            surplus -= own - lower
            own, permille = lower, permille - _STEP
        if permille != share.allocation.request_permille:
            scene.draft.set_request(share, permille)
        return surplus

    def _most_efficient(self, scene: Scene, table: CapacityTable) -> tuple[int, int]:
        pairs = [(sm, q) for sm in scene.rungs_pct for q in scene.quotas_permille]
        return max(pairs, key=lambda p: (self._capacity_rps(table, *p) / (p[0] * p[1]), -p[0], -p[1]))

    def _start_sm_pct(self, scene: Scene) -> int:
        return min((r for r in scene.rungs_pct if r >= _START_SM_PCT), default=max(scene.rungs_pct))

    def _capacity_rps(self, table: CapacityTable, sm_pct: int, permille: int) -> float:
        latency_s = table.latency_s(_BATCH, sm_pct, permille) or math.inf
        return 1000.0 / (latency_s * 1e3 + _OVERHEAD_MS) * (_BATCH + 1) / 2
