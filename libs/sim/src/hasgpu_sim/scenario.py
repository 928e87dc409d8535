"""What is simulated, and what came of it."""

from __future__ import annotations

import math
from array import array
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from hasgpu_core.capacity import CapacityTable
from hasgpu_core.events import DesiredInstance
from hasgpu_core.function import FunctionSpec
from hasgpu_core.policy.scaling import ActionKind, Decision
from hasgpu_core.resources import DeviceInfo

from hasgpu_sim.arrivals import Process, RateStep
from hasgpu_sim.physics import Physics
from hasgpu_sim.recording import RecordedLoad
from hasgpu_sim.surface import Surface


@dataclass(frozen=True, slots=True)
class FunctionLoad:
    """One function, what its device models make of it, and what is asked of it."""

    spec: FunctionSpec
    tables: tuple[CapacityTable, ...]
    """What the policy and the gateway are told; without a surface also what the simulated devices do."""
    steps: tuple[RateStep, ...] = ()
    process: Process = Process.EVEN
    desired: tuple[DesiredInstance, ...] = ()
    """Instances wanted at the start."""
    held: bool = False
    """The policy leaves it at that."""
    rows: int = 1
    """Of each request."""
    arrivals_s: Sequence[float] = ()
    """Times of single requests, ascending, beside those of `steps`."""
    surfaces: Mapping[str, Surface] = field(default_factory=dict)
    """What devices really take, by device model."""


@dataclass(frozen=True, slots=True)
class Timing:
    """How long things take in the simulated system."""

    tick_s: float = 0.25
    """Between two decisions."""
    demand_period_s: float = 0.25
    """Between two reports of the gateway."""
    telemetry_period_s: float = 1.0
    """Between two heartbeats."""
    bind_s: float = 0.05
    """From a decision to the plan."""
    cold_start_s: float = 4.0
    """From the plan to READY."""
    resize_s: float = 0.02
    """From a decision to the quota in force."""
    window_s: float = 5.0
    """Over which the gateway takes its percentiles."""
    transport_s: float = 0.0
    """What the way to an instance and back adds to a batch, beside what the device takes."""


@dataclass(frozen=True, slots=True)
class NodeLoss:
    """A node goes, and perhaps comes back (empty)."""

    node: str
    at_s: float
    back_s: float | None = None


@dataclass(frozen=True, slots=True)
class NodeDrain:
    """From then on a node takes nothing new, and what serves there is moved away."""

    node: str
    at_s: float


@dataclass(frozen=True, slots=True)
class Moving:
    """How the scheduler moves instances; values as its own settings have them."""

    at_once: int = 2
    """Moves under way at a time."""
    period_s: float = 30.0
    """Between two looks for a GPU to free or room to make."""
    cooldown_s: float = 600.0
    """After it was placed, and after a move, an instance stays for so long, unless it must leave."""
    headroom_permille: int = 100
    """Left free in a row that gets an instance beside others."""
    most_moves: int = 16
    """Of one plan."""


@dataclass(frozen=True, slots=True)
class Scenario:
    """All that a simulation depends on: equal scenarios give equal results."""

    devices: tuple[DeviceInfo, ...]
    functions: tuple[FunctionLoad, ...]
    duration_s: float
    seed: int = 0
    timing: Timing = field(default_factory=Timing)
    physics: Physics = Physics.TABLE
    lend: bool = False
    """With `table`: idle time of a row is lent between request and limit, and paid for (see `lending`)."""
    lead_s: float = 0.0
    """The functions are deployed this long before time 0 of their arrivals; cost and actions count from then on."""
    losses: tuple[NodeLoss, ...] = ()
    drains: tuple[NodeDrain, ...] = ()
    moving: Moving | None = None
    """None: nothing is moved."""
    sparse: bool = False
    """For many functions over hours: a function is looked at when its last decision asked for it, or when requests wait
    or its instances change, and its gateway reports then; nothing is recorded. Otherwise at every tick."""
    sample_s: float = 0.25
    """Between two samples of shares; 0: none are taken."""


@dataclass(frozen=True, slots=True)
class FunctionResult:
    """What came of one function's requests."""

    requests_count: int
    refused_count: int
    expired_count: int
    unanswered_count: int
    """Still waiting or running at the end."""
    latencies_s: Sequence[float]
    """Of the answered, ascending."""
    waits_s: Sequence[float]
    """From arrival to the start of execution, of the answered, ascending."""
    slo_s: float
    gpu_seconds: float
    """Integral of SM share times request over its instances, from binding to the end of each, and what was borrowed."""
    actions: Mapping[ActionKind, int]
    borrowed_gpu_seconds: float = 0.0
    """What of them was borrowed beyond the requests."""
    violated_s: Sequence[float] = ()
    """Times of arrival of those answered late, refused or lost, counted from the end of the lead, ascending."""

    @property
    def met_count(self) -> int:
        """Requests answered inside the SLO."""
        return bisect_right(self.latencies_s, self.slo_s)

    @property
    def attainment(self) -> float:
        """Part of all requests that was answered inside the SLO; 1.0 when there was none."""
        return self.met_count / self.requests_count if self.requests_count else 1.0

    @property
    def violations_count(self) -> int:
        """Requests answered late, refused or lost; those still under way at the end are left out."""
        late = len(self.latencies_s) - self.met_count
        return late + self.refused_count + self.expired_count

    def percentile_s(self, pct: float) -> float | None:
        """Returns a latency percentile by nearest rank; None when nothing was answered."""
        if not self.latencies_s:
            return None
        rank = max(1, math.ceil(pct / 100 * len(self.latencies_s)))
        return self.latencies_s[rank - 1]


@dataclass(frozen=True, slots=True)
class ShareSample:
    """The shares in force at one tick."""

    at_s: float
    function: str
    instance: str
    sm_pct: int
    request_permille: int
    ready: bool


@dataclass(frozen=True, slots=True)
class SimResult:
    """What a simulation gives."""

    functions: Mapping[str, FunctionResult]
    decisions: Sequence[tuple[float, Decision]]
    """Those with actions, with their time."""
    shares: Sequence[ShareSample]
    recording: RecordedLoad
    moves: Sequence[tuple[float, str, str, str]] = ()
    """(time, instance, "node/gpu" before, "node/gpu" after) of each that was completed."""
    gpus_peak: int = 0
    """Most GPUs that held an instance at once."""
    decide_s: Sequence[float] = field(default_factory=lambda: array("d"), compare=False)
    """Wall-clock time of each pass of the policy, ascending; empty without a stopwatch."""
