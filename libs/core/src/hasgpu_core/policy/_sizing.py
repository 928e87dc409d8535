"""Which configuration a new instance gets."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from hasgpu_core.capacity import CapacityTable
from hasgpu_core.policy._draft import Draft, Room
from hasgpu_core.policy.placement import NoRoom, Placement
from hasgpu_core.policy.scaling import ScalingSettings
from hasgpu_core.resources import WHOLE_PCT, WHOLE_PERMILLE

_ENOUGH_SHARE = 0.5
"""A used GPU that gives at least this part of what is missing is taken before an empty one is opened."""
_BEST_LATENCY_TOLERANCE = 1.1
"""Where the SLO can't be met, latencies within this factor of the best are as good as the best."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A configuration that has a place."""

    device_model: str
    sm_pct: int
    request_permille: int
    capacity_rps: float
    ceiling_rps: float
    """What it could grow to in its row."""
    placement: Placement

    @property
    def share(self) -> float:
        """What it costs, in GPUs."""
        return self.sm_pct / WHOLE_PCT * self.request_permille / WHOLE_PERMILLE


def quotas_permille(settings: ScalingSettings) -> range:
    """Returns the quotas that the policy chooses from."""
    step = settings.quota_step_permille
    return range(step, WHOLE_PERMILLE + 1, step)


def smallest_quota_permille(table: CapacityTable, sm_pct: int, settings: ScalingSettings) -> int | None:
    """Returns the least quota at which an SM share meets the objective with the margin; None: at no quota."""
    for quota_permille in quotas_permille(settings):
        if in_objective(table, sm_pct, quota_permille, settings):
            return quota_permille
    return None


def in_objective(table: CapacityTable, sm_pct: int, quota_permille: int, settings: ScalingSettings) -> bool:
    """Whether a configuration sustains some rate and one request alone takes at most the margin's part of the SLO."""
    if table.capacity_rps(sm_pct, quota_permille) <= 0:
        return False
    latency_s = table.latency_s(1, sm_pct, quota_permille)
    return latency_s is not None and latency_s <= settings.latency_margin * table.slo_ms / 1e3


def meets_objective(draft: Draft, room: Room, settings: ScalingSettings) -> bool:
    """Whether any configuration of the devices at hand does."""
    return any(
        smallest_quota_permille(table, sm_pct, settings) is not None for table, sm_pct in _tables_and_rungs(draft, room)
    )


def best_new(draft: Draft, room: Room, missing_rps: float, settings: ScalingSettings) -> Candidate | NoRoom:
    """Returns the configuration for a new instance that should add `missing_rps`.

    GPUs in use come before empty ones. On either, of the configurations that cover what is missing each SM share
    enters with its smallest adequate quota, and the cheapest (SM times quota) wins; of those about as cheap, the one
    that can grow furthest in its row. When none covers it, the one with the most capacity. NoRoom: why there is none.
    """
    used = _choose(list(_candidates(draft, room, missing_rps, settings, used=True)), missing_rps, settings)
    if used is not None and used.capacity_rps >= missing_rps:
        return used
    empty = _choose(list(_candidates(draft, room, missing_rps, settings, used=False)), missing_rps, settings)
    if used is not None and (empty is None or used.capacity_rps >= _ENOUGH_SHARE * missing_rps):
        return used
    return empty or _why_none(draft, room, settings)


def best_effort(draft: Draft, room: Room, settings: ScalingSettings) -> tuple[Candidate, float] | NoRoom:
    """Returns, for an SLO that nothing meets, the cheapest of the fastest configurations and its latency in seconds."""
    found: list[tuple[float, Candidate]] = []
    for table, sm_pct in _tables_and_rungs(draft, room):
        asked = draft.allocation(sm_pct, settings.quota_step_permille)
        most = room.most_permille(asked, model=table.device_model)
        for quota_permille in quotas_permille(settings):
            if quota_permille > most:
                break
            latency_s = table.latency_s(1, sm_pct, quota_permille)
            placement = room.place(draft.allocation(sm_pct, quota_permille), model=table.device_model)
            if latency_s is not None and isinstance(placement, Placement):
                candidate = Candidate(table.device_model, sm_pct, quota_permille, 0.0, 0.0, placement)
                found.append((latency_s, candidate))
    if not found:
        return _why_none(draft, room, settings)
    best_s = min(latency_s for latency_s, _ in found)
    good = [(latency_s, c) for latency_s, c in found if latency_s <= _BEST_LATENCY_TOLERANCE * best_s]
    latency_s, candidate = min(good, key=lambda pair: (pair[1].share, pair[0], pair[1].device_model))
    return candidate, latency_s


def unpredicted(draft: Draft, room: Room, settings: ScalingSettings) -> Candidate | NoRoom:
    """Returns where a first instance of a function without any prediction goes: the fixed starting configuration."""
    refusals = []
    for model in sorted({device.info.model for device in room.devices}):
        rungs = sorted({r for d in room.devices if d.info.model == model for r in d.info.sm_rungs_pct})
        large = [rung for rung in rungs if rung >= settings.start_sm_pct] or rungs[-1:]
        for sm_pct in [*large, *(r for r in reversed(rungs) if r not in large)]:
            for permille in range(settings.start_permille, 0, -settings.quota_step_permille):
                placement = room.place(draft.allocation(sm_pct, permille), model=model)
                if isinstance(placement, Placement):
                    return Candidate(model, sm_pct, permille, 0.0, 0.0, placement)
                refusals.append(placement)
    return refusals[0] if refusals else NoRoom("no device is known")


def _tables_and_rungs(draft: Draft, room: Room) -> Iterator[tuple[CapacityTable, int]]:
    """The SM shares that live devices give, with the predictions for them."""
    pairs = {(device.info.model, rung) for device in room.devices for rung in device.info.sm_rungs_pct}
    for model, sm_pct in sorted(pairs):
        table = draft.function.tables.get(model)
        if table is not None and table.points:
            yield table, sm_pct


def _candidates(
    draft: Draft, room: Room, missing_rps: float, settings: ScalingSettings, *, used: bool
) -> Iterator[Candidate]:
    """For each SM share its smallest adequate quota that has a place, else the largest quota that has one."""
    for table, sm_pct in _tables_and_rungs(draft, room):
        quotas = [q for q in quotas_permille(settings) if in_objective(table, sm_pct, q, settings)]
        adequate = next((q for q in quotas if table.capacity_rps(sm_pct, q) >= missing_rps), None)
        asked = draft.allocation(sm_pct, adequate or settings.quota_step_permille)
        most = room.most_permille(asked, model=table.device_model, used=used)
        fitting = [q for q in quotas if q <= min(most, adequate or WHOLE_PERMILLE)]
        if not fitting:
            continue
        quota_permille = fitting[-1]
        placement = room.place(draft.allocation(sm_pct, quota_permille), model=table.device_model, used=used)
        if isinstance(placement, NoRoom):
            continue
        free = WHOLE_PERMILLE
        if not placement.new_row:
            free = room.free_permille(placement.node, placement.gpu, placement.row)
        capacity_rps = table.capacity_rps(sm_pct, quota_permille)
        ceiling_rps = max(capacity_rps, table.capacity_rps(sm_pct, free))
        yield Candidate(table.device_model, sm_pct, quota_permille, capacity_rps, ceiling_rps, placement)


def _choose(candidates: list[Candidate], missing_rps: float, settings: ScalingSettings) -> Candidate | None:
    if not candidates:
        return None
    covering = [c for c in candidates if c.capacity_rps >= missing_rps]
    if not covering:
        return max(candidates, key=lambda c: (c.capacity_rps, -c.share, c.device_model))
    cheapest = min(c.share for c in covering)
    cheap = [c for c in covering if c.share <= settings.ceiling_tolerance * cheapest]
    return max(cheap, key=lambda c: (c.ceiling_rps, -c.share, -c.sm_pct, c.device_model))


def _why_none(draft: Draft, room: Room, settings: ScalingSettings) -> NoRoom:
    """What stands in the way of one more instance at the smallest quota of the smallest SM share that would do."""
    for table, sm_pct in _tables_and_rungs(draft, room):
        quota_permille = smallest_quota_permille(table, sm_pct, settings)
        if quota_permille is not None:
            outcome = room.place(draft.allocation(sm_pct, quota_permille), model=table.device_model)
            if isinstance(outcome, NoRoom):
                return outcome
    return NoRoom("no device with a prediction for this function has room")
