"""KServe on Knative: the Knative pod autoscaler (KPA) on concurrency, a whole GPU a replica.

Source: knative/serving `pkg/autoscaler/scaling/autoscaler.go` and its configuration map, constants as in Knative's
documentation ("Configuring concurrency", "Additional autoscaling configuration").

    desired(window) = ceil(mean concurrency over the window / (target × utilisation)),
    at most max_scale_up times and at least 1 / max_scale_down times the ready replicas

Every 2 s. Panic begins when desired over the panic window (6 s) reaches twice the ready replicas, and lasts until it
has not for a stable window (60 s); while it lasts the larger of both desired counts holds and nothing goes down.

Tuned: `target` is the concurrency of a replica. KServe leaves it to the user; here it is the largest batch of which
two fit into the objective one after the other (who comes just after a batch began still meets it), which is what an
operator who knows the latencies would set. On the replay (three models, SLO 2x and 5x, Poisson, GPU-milliseconds per
request in time and late requests): as it is 96.8 and 0.050 %; target 1: 116 and 0.050 %; 2, 4 or 8: 93.3 and 0.075 %;
utilisation 0.5: 96.9 and 0.050 %; 0.9: 93.3 and 0.075 %. Nothing is cheaper at no more late requests; a whole GPU is
the least that it holds (92.9). `bench/policy.py --only rivals` prints these.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from hasgpu_core.policy._draft import Share
from hasgpu_core.policy.rivals._base import Rival, Scene, remove_surplus
from hasgpu_core.resources import WHOLE_PERMILLE


@dataclass(frozen=True, slots=True)
class KServeSettings:
    """Knative's defaults."""

    target: float | None = None
    """Concurrency of a replica; None: tuned, see the module."""
    utilisation: float = 0.7
    stable_window_s: float = 60.0
    panic_window_s: float = 6.0
    panic_threshold: float = 2.0
    max_scale_up: float = 1000.0
    max_scale_down: float = 2.0
    grace_to_zero_s: float = 30.0


@dataclass(frozen=True, slots=True)
class _Memory:
    samples: tuple[tuple[float, float], ...] = ()
    """(time, concurrency), a sample a second, as the queue-proxies are scraped."""
    panic_since_s: float | None = None
    panic_pods: int = 0
    idle_since_s: float | None = None


class KServePolicy(Rival):
    """See the module."""

    name = "kserve"
    period_s = 2.0
    observe_s = 1.0

    def __init__(self, settings: KServeSettings | None = None) -> None:
        self._settings = settings or KServeSettings()

    def observe(self, scene: Scene, memory: object) -> object:
        """Takes a sample of the concurrency a second."""
        known = memory if isinstance(memory, _Memory) else _Memory()
        demand = scene.function.demand
        if demand.rate_rps is None or (known.samples and scene.now_s - known.samples[-1][0] < 1.0 - 1e-6):
            return known
        concurrency = float(demand.queued_items_count + demand.in_flight_count)
        kept = tuple(s for s in known.samples if s[0] > scene.now_s - self._settings.stable_window_s)
        return replace(known, samples=(*kept, (scene.now_s, concurrency)))

    def scale(self, scene: Scene, memory: object) -> tuple[object, str]:
        """One tick of the KPA."""
        settings, draft = self._settings, scene.draft
        known = memory if isinstance(memory, _Memory) else _Memory()
        ready = max(1, len(draft.ready))
        target = (settings.target or self._tuned_target(scene)) * settings.utilisation
        stable = self._desired(known, settings.stable_window_s, target, ready, scene.now_s)
        panic = self._desired(known, settings.panic_window_s, target, ready, scene.now_s)
        since_s, pods = known.panic_since_s, known.panic_pods
        if panic >= settings.panic_threshold * ready:
            since_s = scene.now_s
        elif since_s is not None and scene.now_s - since_s > settings.stable_window_s:
            since_s, pods = None, 0
        desired = stable
        if since_s is not None:
            pods = max(pods, panic, stable, len(draft.ready))
            desired = pods
        floor = scene.function.spec.min_instances
        demand = scene.function.demand
        busy = demand.rate_rps != 0 or demand.queued_items_count or demand.in_flight_count or stable > 0
        idle_since_s = None if busy else known.idle_since_s if known.idle_since_s is not None else scene.now_s
        if not floor and busy:
            desired = max(desired, 1)
        if (
            desired == 0
            and draft.active
            and (idle_since_s is None or scene.now_s - idle_since_s < settings.grace_to_zero_s)
        ):
            desired = 1
        desired = max(floor, desired)
        remove_surplus(draft, desired, lambda share: (share.ready, -int(share.instance.rpartition("-")[2])))
        while len(draft.active) < desired and scene.add(max(scene.rungs_pct), WHOLE_PERMILLE) is not None:
            pass
        scene.capacity_rps = len(draft.ready) * self._throughput_rps(scene)
        mode = "panic" if since_s is not None else "stable"
        return (
            replace(known, panic_since_s=since_s, panic_pods=pods, idle_since_s=idle_since_s),
            f"{mode}: {stable} replicas by 60 s, {panic} by 6 s at a target of {target:.2g}",
        )

    def fits(self, scene: Scene, share: Share) -> bool:
        """A replica is a whole GPU."""
        allocation = share.allocation
        return (allocation.sm_pct, allocation.request_permille) == (max(scene.rungs_pct), WHOLE_PERMILLE)

    def first(self, scene: Scene) -> None:
        """A replica."""
        scene.add(max(scene.rungs_pct), WHOLE_PERMILLE)

    def _desired(self, memory: _Memory, window_s: float, target: float, ready: int, now_s: float) -> int:
        values = [value for at_s, value in memory.samples if at_s > now_s - window_s]
        mean = sum(values) / len(values) if values else 0.0
        raw = math.ceil(mean / target - 1e-9)
        return int(
            min(max(raw, math.floor(ready / self._settings.max_scale_down)), ready * self._settings.max_scale_up)
        )

    def _tuned_target(self, scene: Scene) -> float:
        table = scene.table
        assert table is not None
        slo_s, best = scene.function.spec.slo_s, 1
        for batch in range(1, scene.function.spec.max_batch + 1):
            latency_s = table.latency_s(batch, max(scene.rungs_pct), WHOLE_PERMILLE)
            if latency_s is not None and 2 * latency_s <= slo_s:
                best = batch
        return float(best)

    def _throughput_rps(self, scene: Scene) -> float:
        table = scene.table
        assert table is not None
        return table.capacity_rps(max(scene.rungs_pct), WHOLE_PERMILLE)
