"""What a scaling policy takes and gives. Policies are pure: a snapshot, a state and the time in; decisions out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

from hasgpu_core.cluster import ClusterSnapshot
from hasgpu_core.events import DesiredInstance
from hasgpu_core.policy.kalman import RateFilter


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
    queued_count: int = 0
    p95_s: float | None = None

    @property
    def horizontal(self) -> bool:
        """Whether the set of instances changes (or an instance turns from standby to active)."""
        return any(a.kind in (ActionKind.HORIZONTAL_UP, ActionKind.HORIZONTAL_DOWN) for a in self.actions)


@dataclass(frozen=True, slots=True)
class FunctionState:
    """What a policy remembers of one function."""

    filter: RateFilter
    filtered_at_s: float
    """When the filter took its last measurement."""
    below_since_s: float | None = None
    """Since when the load has been low enough to shrink; None: it is not."""
    scaled_up_at_s: float | None = None
    scaled_down_at_s: float | None = None


@dataclass(frozen=True, slots=True)
class PolicyState:
    """What a policy remembers between decisions; starts empty."""

    functions: Mapping[str, FunctionState] = field(default_factory=dict)


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
