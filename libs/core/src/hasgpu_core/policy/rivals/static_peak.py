"""static-peak: the cheapest fixed set that sustains the peak, never changed. What a careful operator without an
autoscaler would run.

The peak is told (the simulator takes the largest rate over 5 s of the trace, which a policy could not know). The set is
found with the planner of `hybrid`, over the whole surface, for Poisson arrivals.
"""

from __future__ import annotations

from collections.abc import Mapping

from hasgpu_core.policy._draft import Share
from hasgpu_core.policy.hybrid.plan import Option, Planner
from hasgpu_core.policy.hybrid.settings import HybridSettings
from hasgpu_core.policy.rivals._base import Rival, Scene


class StaticPeakPolicy(Rival):
    """See the module; `peaks_rps` by function."""

    name = "static-peak"

    def __init__(self, peaks_rps: Mapping[str, float]) -> None:
        self._peaks_rps = peaks_rps
        self._options: dict[str, Option | None] = {}

    def scale(self, scene: Scene, memory: object) -> tuple[object, str]:
        """Starts what is missing; nothing else."""
        spec = scene.function.spec
        option = self._option(scene)
        if option is None:
            return memory, "no configuration meets the objective"
        while len(scene.draft.active) < option.count and scene.add(option.sm_pct, option.quota_permille) is not None:
            pass
        scene.capacity_rps = option.rate_rps
        return memory, f"{option.count} for a peak of {self._peaks_rps.get(spec.name, 0.0):.1f} rps"

    def fits(self, scene: Scene, share: Share) -> bool:
        """All of its set are the same."""
        option, allocation = self._option(scene), share.allocation
        return option is None or (allocation.sm_pct, allocation.request_permille) == (
            option.sm_pct,
            option.quota_permille,
        )

    def first(self, scene: Scene) -> None:
        """One of the set."""
        option = self._option(scene)
        if option is not None:
            scene.add(option.sm_pct, option.quota_permille)

    def _option(self, scene: Scene) -> Option | None:
        name, table = scene.function.spec.name, scene.table
        assert table is not None
        if name not in self._options:
            spec, settings = scene.function.spec, HybridSettings(lend=False)
            most = min(spec.max_instances, settings.most_instances)
            planner = Planner(table, scene.rungs_pct, spec.max_batch, most, settings)
            rate = self._peaks_rps.get(name, 0.0)
            ladders = [planner.ladder(sm, regular=False) for sm in scene.rungs_pct if sm >= table.sm_pcts[0]]
            options = [option for ladder in ladders if (option := ladder.cheapest(rate)) is not None]
            able = [option for option in options if option.rate_rps >= rate]
            chosen = (
                min(able, key=lambda o: o.cost(rate)) if able else max(options, key=lambda o: o.rate_rps, default=None)
            )
            self._options[name] = chosen
        return self._options[name]
