"""What a scaling policy takes and gives. Policies are pure: a snapshot, a state and the time in; decisions out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

from hasgpu_core.cluster import ClusterSnapshot
from hasgpu_core.errors import InvalidError
from hasgpu_core.events import DesiredInstance
from hasgpu_core.policy.kalman import RateFilter
from hasgpu_core.resources import WHOLE_PERMILLE


class ActionKind(Enum):
    """The four ways to change a function's share."""

    VERTICAL_UP = "vertical_up"
    VERTICAL_DOWN = "vertical_down"
    HORIZONTAL_UP = "horizontal_up"
    HORIZONTAL_DOWN = "horizontal_down"


@dataclass(frozen=True, slots=True)
class Action:
    """One change of one instance."""

    kind: ActionKind
    instance: str
    sm_pct: int
    from_permille: int
    """Request before; 0 for a new instance."""
    to_permille: int
    """Request after; 0 for a removed instance."""


@dataclass(frozen=True, slots=True)
class Decision:
    """What a policy wants of one function, and why."""

    function: str
    desired: tuple[DesiredInstance, ...]
    """The whole set wanted, sorted by id; equal to the present one when there are no actions."""
    actions: tuple[Action, ...]
    reason: str
    """In words, with the numbers; also when nothing is to be done."""
    look_again_s: float
    """When the decision should be looked at again at the latest."""
    next_ordinal: int
    """For the function's next new instance."""
    observed_rps: float | None
    predicted_rps: float | None
    """None: no data."""
    capacity_rps: float
    """Of the ready instances, inside the objective."""
    queued_items_count: int = 0
    """Items of the requests in line."""
    p95_s: float | None = None
    standby_changed: bool = False
    """Whether an instance turned from standby to active (a VERTICAL_UP) or back (a VERTICAL_DOWN)."""
    needed_rps: float | None = None
    """The capacity asked for: prediction over target utilisation, backlog and SLO feedback included; None: no data."""

    @property
    def horizontal(self) -> bool:
        """Whether the set of instances changes (or an instance turns from standby to active, or back)."""
        horizontal = (ActionKind.HORIZONTAL_UP, ActionKind.HORIZONTAL_DOWN)
        return self.standby_changed or any(action.kind in horizontal for action in self.actions)


@dataclass(frozen=True, slots=True)
class FunctionState:
    """What a policy remembers of one function. Losing it (a restart) delays shrinking and does no other harm."""

    filter: RateFilter | None = None
    """None: no measurement yet."""
    filtered_at_s: float = 0.0
    """When the filter took its last measurement."""
    slope_rps_per_s: float = 0.0
    """Smoothed change of the filtered rate."""
    below_since_s: float | None = None
    """Since when some quota could come down; None: none can."""
    below_peak_rps: float = 0.0
    """The largest need since then."""
    spare_since_s: float | None = None
    """Since when one instance fewer would do; None: all are needed."""
    spare_peak_rps: float = 0.0
    """The largest need since then."""
    short_since_s: float | None = None
    """Since when vertical growth alone has not covered the need; None: it does."""
    idle_since_s: float | None = None
    """Since when nothing arrived, waited or ran; None: something did, or there is no data."""
    scaled_up_at_s: float | None = None
    scaled_down_at_s: float | None = None
    """When instances were last added and removed."""
    ready_capacity_rps: float = 0.0
    """At the last look."""
    settled_at_s: float | None = None
    """When the ready capacity last changed; before it has settled, latencies tell of the past."""
    floor_rps: float = 0.0
    """Capacity that the SLO feedback asks for."""
    floor_until_s: float | None = None
    """Until when; None: no feedback."""
    coming_since_s: Mapping[str, float] = field(default_factory=dict)
    """By instance: since when it has been on its way to READY."""
    refused_since_s: Mapping[str, float] = field(default_factory=dict)
    """By instance: since when its agent has been refusing the quota desired."""
    foreign: frozenset[str] | None = None
    """Instances of another policy's shape that a rival found there, and replaces; None: it has not looked yet."""
    own: object = None
    """What policies other than HasGpuPolicy remember, a frozen value of their own; None: nothing yet."""


@dataclass(frozen=True, slots=True)
class PolicyState:
    """What a policy remembers between decisions; starts empty."""

    functions: Mapping[str, FunctionState] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ScalingSettings:
    """The constants of HasGpuPolicy; `docs/scaling.md` says why each has its value."""

    target_utilisation: float = 0.9
    """Part of the capacity that the predicted rate may fill (HAS-GPU's released constant)."""
    rate_window_s: float = 2.0
    """Over which the rates handed in are taken; tells the filter how noisy they are."""
    filter_period_s: float = 0.45
    """Shortest time between two measurements taken into the filter."""
    trend_lead_s: float = 0.5
    """How far ahead a rising rate is extrapolated."""
    trend_limit: float = 1.2
    """At most so many times the filtered rate."""
    backlog_horizon_s: float = 0.5
    """Time in which vertical growth should drain a backlog; at least twice the SLO."""
    lasting_horizon_s: float = 10.0
    """The same for new instances, which need seconds to start."""
    quota_step_permille: int = 100
    """Quotas move in steps of this (HAS-GPU's released constant)."""
    latency_margin: float = 0.8
    """A quota is only chosen where a single request is predicted to take at most this part of the SLO."""
    limit_headroom_permille: int = 1_000
    """limit = min(1000, request + this): how much idle device time an instance may borrow."""
    shrink_margin: float = 0.85
    """Quotas come down only where the need fills at most this part of what remains."""
    quota_hold_s: float = 3.0
    """For how long that must have been so; at least the rate window."""
    remove_margin: float = 0.7
    """An instance goes only where the need fills at most this part of what the others can reach in their rows."""
    remove_hold_s: float = 10.0
    """For how long that must have been so, and the time between two removals (HAS-GPU's released constant)."""
    add_hold_s: float = 1.0
    """For how long vertical growth must have fallen short before an instance is added ..."""
    add_at_once_share: float = 0.2
    """... unless what is missing exceeds this part of the need."""
    ceiling_tolerance: float = 1.2
    """Of new configurations at most so many times as dear as the cheapest, the one that can grow furthest is taken."""
    idle_to_zero_s: float = 30.0
    """Idle time after which a function with min_instances = 0 gives its last instance up (Knative: 30 s)."""
    feedback_after_s: float = 8.0
    """The SLO feedback acts when the ready capacity has not changed for this long; percentiles look back less far."""
    feedback_factor: float = 1.2
    """By how much it raises the capacity each time ..."""
    feedback_limit: float = 3.0
    """... and at most how many times the need without it."""
    feedback_hold_s: float = 15.0
    """How long its demand stays after the last violation."""
    start_timeout_s: float = 60.0
    """An instance that has waited for its worker for longer is taken for failed; loading is bounded by its agent."""
    refused_after_s: float = 1.0
    """A quota that has been refused for longer is no capacity."""
    start_sm_pct: int = 50
    """Without any prediction a first instance gets the smallest SM rung of at least this ..."""
    start_permille: int = 500
    """... and this quota."""
    look_again_s: float = 0.25
    """Between two looks at a function with traffic."""
    look_again_idle_s: float = 2.0
    """Between two looks at one without."""

    def __post_init__(self) -> None:
        for name in ("target_utilisation", "latency_margin", "shrink_margin", "remove_margin"):
            if not 0 < getattr(self, name) <= 1:
                raise InvalidError(name, expected="more than 0, at most 1", got=str(getattr(self, name)))
        for name in ("quota_hold_s", "remove_hold_s"):
            if getattr(self, name) < self.rate_window_s:
                raise InvalidError(
                    name, expected=f"at least rate_window_s ({self.rate_window_s})", got=str(getattr(self, name))
                )
        if not 1 <= self.quota_step_permille <= WHOLE_PERMILLE:
            raise InvalidError("quota_step_permille", expected="1..1000", got=str(self.quota_step_permille))


class ScalingPolicy(Protocol):
    """A way to scale."""

    @property
    def name(self) -> str:
        """As shown with its decisions: "hasgpu", ..."""
        ...

    def decide(
        self, snapshot: ClusterSnapshot, state: PolicyState, now_s: float
    ) -> tuple[tuple[Decision, ...], PolicyState]:
        """Returns one decision a function of the snapshot (in its order) and the state to pass next time.

        A function without demand data, or held by hand, keeps its shares. Equal arguments give equal results.
        """
        ...
