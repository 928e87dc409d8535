"""Who goes without when GPUs run out.

Room is given out in this order: the higher SLO class; within a class who has nothing ready; then who has the least part
of its need covered, by weight; then by name. Where a function of a higher class still finds none, instances of others
are given up for it, in this order and no more than it takes:

1. parked instances, of the lowest class first, down to its own class;
2. of lower classes, instances beyond their functions' first, of the lowest class first, least weight first;
3. of lower classes, first instances, and only for who has nothing ready itself.

Instances that are on their way go before those that serve. What is given up drains; for `reclaim_wait_s` no more is
given up for the same function.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from hasgpu_core.cluster import FunctionView
from hasgpu_core.policy._draft import Draft, Share
from hasgpu_core.resources import WHOLE_PCT, DeviceState


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a function found no room for."""

    sm_pct: int
    request_permille: int
    memory_bytes: int
    device_model: str


@dataclass(frozen=True, slots=True)
class Victim:
    """An instance that may be given up."""

    draft: Draft
    share: Share
    step: int
    """Of the order in the module: 1, 2 or 3."""

    @property
    def key(self) -> tuple[int, int, bool, int, str]:
        """Who goes first."""
        spec = self.draft.function.spec
        return (self.step, -spec.slo_class.rank, self.share.ready, spec.weight, self.share.instance)


def order(function: FunctionView, *, ready: bool, covered: float) -> tuple[int, bool, float, str]:
    """Returns the key by which functions get room; `covered` is the part of the need that is, 0..1."""
    spec = function.spec
    return (spec.slo_class.rank, ready, covered / spec.weight, spec.name)


def may_give(function: FunctionView) -> bool:
    """Whether instances of a function may be given up for others at all: it has some that hold room."""
    if function.held or function.spec.advisory:
        return False
    return any(view.node for view in function.instances)


def victims(mine: FunctionView, drafts: Iterable[Draft], *, ready: bool) -> list[Victim]:
    """Returns what may be given up for a function, in the order in which it is."""
    own_class = mine.spec.slo_class
    found: list[Victim] = []
    for draft in drafts:
        spec = draft.function.spec
        if spec.name == mine.spec.name or draft.function.held or spec.advisory:
            continue
        equal = spec.slo_class is own_class
        if not equal and spec.slo_class.rank < own_class.rank:
            continue
        found += [Victim(draft, share, 1) for share in draft.shares if share.standby]
        if equal:
            continue
        active = sorted(draft.active, key=lambda share: (not share.ready, share.instance))
        found += [Victim(draft, share, 2) for share in active[1:]]
        if not ready:
            found += [Victim(draft, share, 3) for share in active[:1]]
    return sorted((v for v in found if v.share.view is not None and v.share.view.node), key=lambda v: v.key)


def enough_of(candidates: Sequence[Victim], wanted: Wanted, devices: Sequence[DeviceState]) -> list[Victim]:
    """Returns the fewest that make room on one device, on that where the last of them comes first; none: none do."""
    on: dict[tuple[str, str], list[Victim]] = {}
    for victim in candidates:
        if victim.share.view is not None:
            on.setdefault((victim.share.view.node, victim.share.view.gpu), []).append(victim)
    if not on:
        return []
    best: tuple[tuple[object, ...], list[Victim]] | None = None
    for device in devices:
        info = device.info
        here = on.get((info.node, info.gpu))
        if here is None or info.model != wanted.device_model or wanted.sm_pct not in info.sm_rungs_pct:
            continue
        chosen = _on_device(here, wanted, device)
        if chosen:
            key = (*chosen[-1].key[:4], len(chosen), info.node, info.gpu)
            if best is None or key < best[0]:
                best = (key, chosen)
    return best[1] if best else []


def _on_device(candidates: Sequence[Victim], wanted: Wanted, device: DeviceState) -> list[Victim]:
    used = {row.index: [row.sm_pct, row.used_permille] for row in device.rows if row.used_permille > 0}
    free_sm = WHOLE_PCT - sum(sm_pct for sm_pct, _ in used.values())
    memory = device.free_memory_bytes
    chosen: list[Victim] = []
    for victim in candidates:
        view = victim.share.view
        assert view is not None
        row = used.get(view.row)
        if row is None:
            continue
        row[1] -= max(view.allocation.request_permille, view.in_force_permille or 0)
        if row[1] <= 0:
            free_sm += row[0]
            del used[view.row]
        memory += view.allocation.memory_bytes
        chosen.append(victim)
        shared = any(sm == wanted.sm_pct and 1000 - taken >= wanted.request_permille for sm, taken in used.values())
        if memory >= wanted.memory_bytes and (free_sm >= wanted.sm_pct or shared):
            return chosen
    return []
