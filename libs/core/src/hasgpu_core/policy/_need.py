"""How much capacity a function needs: the predicted rate, the backlog, and what the SLO feedback asks for."""

from __future__ import annotations

from dataclasses import dataclass, replace

from hasgpu_core.cluster import DemandView, FunctionView
from hasgpu_core.policy.kalman import RateFilter
from hasgpu_core.policy.scaling import FunctionState, ScalingSettings

_STALE_FILTER_S = 10.0
"""A belief older than this is given up for the measurement."""
_TREND_SHARE = 0.05
"""A slope below this part of the rate a second is taken for noise."""
_SLOPE_WEIGHT = 0.5
"""Of the newest slope in the smoothed one."""
_LEAST_NOISE_RPS2 = 0.5
"""A window without arrivals is no proof of a rate of zero."""


@dataclass(frozen=True, slots=True)
class Need:
    """What a function needs, in capacity (items per second inside the SLO; requests per second where each has one)."""

    observed_rps: float
    predicted_rps: float
    need_rps: float
    """Now: what quotas should cover."""
    lasting_rps: float
    """Over the time that a new instance takes to start: what instances should cover."""
    feedback: str = ""
    """In words, when the SLO feedback raised the need."""


def predict(demand: DemandView, state: FunctionState, settings: ScalingSettings, now_s: float) -> FunctionState:
    """Returns the state with the measured rate taken into the filter; unchanged without data or too soon."""
    if demand.rate_rps is None:
        return state
    before = state.filter
    elapsed_s = now_s - state.filtered_at_s
    if before is None or elapsed_s > _STALE_FILTER_S:
        return replace(state, filter=RateFilter.start(demand.rate_rps), filtered_at_s=now_s, slope_rps_per_s=0.0)
    if elapsed_s < settings.filter_period_s:
        return state
    # The variance of a rate counted over the window when requests of so many items come as a Poisson process; the
    # larger of belief and measurement, so that neither an idle past nor an empty window makes the filter too sure.
    larger_rps = max(before.rate_rps, demand.rate_rps)
    noise_variance = max(_LEAST_NOISE_RPS2, demand.items_per_request * larger_rps / settings.rate_window_s)
    after = before.update(demand.rate_rps, noise_variance=noise_variance)
    slope = (after.rate_rps - before.rate_rps) / elapsed_s
    return replace(
        state,
        filter=after,
        filtered_at_s=now_s,
        slope_rps_per_s=_SLOPE_WEIGHT * slope + (1 - _SLOPE_WEIGHT) * state.slope_rps_per_s,
    )


def predicted_rps(state: FunctionState, settings: ScalingSettings) -> float | None:
    """Returns the filtered rate, or where it is rising its extrapolation, bounded; None before any measurement."""
    if state.filter is None:
        return None
    rate = state.filter.rate_rps
    if state.slope_rps_per_s <= _TREND_SHARE * rate:
        return rate
    return min(rate + state.slope_rps_per_s * settings.trend_lead_s, settings.trend_limit * rate)


def need_of(
    function: FunctionView,
    state: FunctionState,
    settings: ScalingSettings,
    *,
    ready_capacity_rps: float,
    coming: bool,
    now_s: float,
) -> tuple[Need | None, FunctionState]:
    """Returns the need, and the state with the SLO feedback's part; None without data.

    need = predicted / target utilisation + backlog / horizon, and at least the feedback's floor. The backlog is what
    waits beyond the items that may wait at this rate inside half the SLO. It counts only once something is ready:
    before, it is the consequence of the start and not of too few instances.
    """
    demand = function.demand
    predicted = predicted_rps(state, settings)
    if demand.rate_rps is None or predicted is None:
        return None, state
    slo_s = function.spec.slo_s
    serving = ready_capacity_rps > 0
    backlog = max(0.0, demand.queued_items_count - predicted * slo_s / 2) if serving else 0.0
    rate_need_rps = predicted / settings.target_utilisation
    need_rps = rate_need_rps + backlog / max(settings.backlog_horizon_s, 2 * slo_s)
    lasting_rps = rate_need_rps + backlog / max(settings.lasting_horizon_s, 2 * slo_s)
    state = _feedback(function, state, settings, rate_need_rps, ready_capacity_rps, coming=coming, now_s=now_s)
    feedback = ""
    # Bounded here too, not only when it is raised: a floor from a high load must not outlive that load.
    floor_rps = min(state.floor_rps, settings.feedback_limit * need_rps)
    if state.floor_until_s is not None and floor_rps > need_rps:
        feedback = f"latency over the SLO of {function.spec.slo_ms} ms asks for {floor_rps:.1f}"
        need_rps = floor_rps
        lasting_rps = max(lasting_rps, floor_rps)
    return Need(demand.rate_rps, predicted, need_rps, lasting_rps, feedback), state


def violated(function: FunctionView) -> bool:
    """Whether requests miss the SLO, or wait so long that they are going to."""
    demand, slo_s = function.demand, function.spec.slo_s
    return (demand.p95_s is not None and demand.p95_s > slo_s) or demand.oldest_wait_s > slo_s / 2


def _feedback(
    function: FunctionView,
    state: FunctionState,
    settings: ScalingSettings,
    rate_need_rps: float,
    ready_capacity_rps: float,
    *,
    coming: bool,
    now_s: float,
) -> FunctionState:
    """Raises the floor while the SLO is missed although the prediction claims enough, and lets it lapse after that.

    Enough is what the rate needs: a backlog is what too little capacity looks like, and asks for quotas by itself, but
    where they are at their ceiling only the floor asks for more instances. It is a bounded multiple of the need, and is
    raised only when the capacity has not changed for a while, since latencies measured before that tell of the past.
    """
    if not violated(function):
        if state.floor_until_s is not None and now_s >= state.floor_until_s:
            return replace(state, floor_rps=0.0, floor_until_s=None)
        return state
    if state.floor_until_s is not None:
        state = replace(state, floor_until_s=now_s + settings.feedback_hold_s)
    settled = state.settled_at_s is not None and now_s - state.settled_at_s >= settings.feedback_after_s
    if not settled or coming or not 0 < rate_need_rps <= ready_capacity_rps:
        return state
    floor_rps = min(settings.feedback_factor * ready_capacity_rps, settings.feedback_limit * rate_need_rps)
    if floor_rps <= max(state.floor_rps, ready_capacity_rps):
        return state
    return replace(state, floor_rps=floor_rps, floor_until_s=now_s + settings.feedback_hold_s)
