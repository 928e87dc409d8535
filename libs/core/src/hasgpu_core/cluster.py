"""The snapshot that scaling and placement decide from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from hasgpu_core.capacity import CapacityTable
from hasgpu_core.function import FunctionSpec
from hasgpu_core.resources import Allocation, DeviceState, InstanceState


@dataclass(frozen=True, slots=True)
class InstanceView:
    """An instance: wanted, bound, running, or several of these."""

    instance: str
    allocation: Allocation
    """As desired."""
    state: InstanceState
    node: str = ""
    """Empty until it is bound."""
    gpu: str = ""
    row: int = 0
    device_model: str = ""
    standby: bool = False
    reason: str = ""
    """Of a failure or a refusal."""
    in_force_permille: int | None = None
    """Request in force, as the agent reports it; None: not bound yet."""

    @property
    def refused_permille(self) -> int | None:
        """The request in force while the agent refuses the larger one desired; None: it does not."""
        in_force = self.in_force_permille
        if self.state is not InstanceState.READY or not self.reason or in_force is None:
            return None
        return in_force if in_force < self.allocation.request_permille else None


@dataclass(frozen=True, slots=True)
class DemandView:
    """What all gateways together saw of a function."""

    rate_rps: float | None
    """Items that arrived, a second, over the last observation period: the requests per second where each has one item.
    None: no data (which is not zero)."""
    queued_items_count: int = 0
    """Items of the requests in line."""
    in_flight_count: int = 0
    """Requests at instances."""
    oldest_wait_s: float = 0.0
    p95_s: float | None = None
    """Over the last few seconds; None: nothing was answered."""
    age_s: float = 0.0
    """Since the newest report."""
    items_per_request: float = 1.0
    """Mean over the last observation period. The more come at once, the noisier is a rate counted in items."""
    arrived_items_count: int | None = None
    """Items that have arrived so far, from some start on: differences of it give rates over any period. It falls when a
    gateway leaves the sum. None: no data."""
    late_count: int | None = None
    """Requests that have been answered later than the objective so far, likewise."""


@dataclass(frozen=True, slots=True)
class FunctionView:
    """A function and all that is known of it."""

    spec: FunctionSpec
    revision: int
    demand: DemandView
    instances: tuple[InstanceView, ...]
    """Sorted by id."""
    tables: Mapping[str, CapacityTable] = field(default_factory=dict)
    """By device model."""
    held: bool = False
    """Set by hand: the policy leaves it alone."""
    next_ordinal: int = 0
    """New instances are named `<function>-<ordinal>` from here on, so that no id is used twice."""


@dataclass(frozen=True, slots=True)
class ClusterSnapshot:
    """All that a decision may look at."""

    functions: tuple[FunctionView, ...]
    """Sorted by name."""
    devices: tuple[DeviceState, ...]
    """Sorted by (node, gpu); only those of live nodes."""
