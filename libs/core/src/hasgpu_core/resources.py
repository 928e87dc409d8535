"""Shares of a GPU, and what they are shares of."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from hasgpu_core.errors import InvalidError

WHOLE_PERMILLE = 1_000
WHOLE_PCT = 100
QUOTA_STEP_PERMILLE = 100
"""Quotas that policies choose are multiples of it (HAS-GPU's released code: 10 %)."""
SMALLEST_QUOTA_PERMILLE = 10
"""The smallest request that a device accepts; a standby is parked at PARKED_QUOTA_PERMILLE."""
PARKED_QUOTA_PERMILLE = 10


@dataclass(frozen=True, slots=True)
class Allocation:
    """What an instance may use of one GPU."""

    sm_pct: int
    """Share of the SMs, 1..100."""
    request_permille: int
    """Device time guaranteed in every window, 1..1000."""
    limit_permille: int
    """Device time that may be used while it is idle otherwise, request..1000."""
    memory_bytes: int

    def validate(self) -> None:
        """Raises InvalidError, naming the field, the bound and what came."""
        if not 1 <= self.sm_pct <= WHOLE_PCT:
            raise InvalidError("sm_pct", expected="1..100", got=str(self.sm_pct))
        if not 1 <= self.request_permille <= WHOLE_PERMILLE:
            raise InvalidError("request_permille", expected="1..1000", got=str(self.request_permille))
        if not self.request_permille <= self.limit_permille <= WHOLE_PERMILLE:
            raise InvalidError(
                "limit_permille",
                expected=f"{self.request_permille} (the request)..1000",
                got=str(self.limit_permille),
            )

    @property
    def gpu_share(self) -> float:
        """The part of a GPU that this costs: SM share times requested time, 0..1."""
        return self.sm_pct / WHOLE_PCT * self.request_permille / WHOLE_PERMILLE


class InstanceState(Enum):
    """Where an instance is in its life."""

    PENDING = "pending"
    """Planned; the worker process is not there yet."""
    LOADING = "loading"
    """The process runs and loads its model."""
    READY = "ready"
    DRAINING = "draining"
    """Accepts no new batch, finishes those it has."""
    STOPPED = "stopped"
    FAILED = "failed"
    """Not running; the reason says why. It is retried from the plan with back-off."""


class DeviceHealth(Enum):
    """Whether a device can be used."""

    OK = "ok"
    DEGRADED = "degraded"
    """It serves, or will again shortly: its sharing daemon is being restarted, or it can't be watched."""
    LOST = "lost"
    """It has gone or can't be used any more; its instances have failed, and nothing is placed on it."""


@dataclass(frozen=True, slots=True)
class DeviceInfo:
    """One GPU (or CPU device) of a node."""

    node: str
    gpu: str
    """Its name within the node: "cpu0", "gpu0", ..."""
    model: str
    """What predictions are keyed by: "cpu-2c", "NVIDIA-H100", ..."""
    backend: str
    """"cpu", "cuda" or "emulated"."""
    memory_bytes: int
    sm_rungs_pct: tuple[int, ...]
    """SM shares that the device can really give, ascending."""
    capabilities: tuple[str, ...] = ()
    """What the agent proved that it can enforce, in words."""
    mode: str = ""
    """How a CUDA device is shared: "mps+green", "mps+pct", "mps+static" or "timeshare"; "" on other devices."""
    uuid: str = ""
    """"GPU-..." of a CUDA device."""
    sm_count: int = 0
    """Streaming multiprocessors of a CUDA device; 0: it has none."""
    sm_granule_pct: int = 1
    """The smallest SM share that it can give, 1..100. At 1 it gives any share, and its rungs are a choice of them; else
    the rungs are all that it gives."""
    health: DeviceHealth = DeviceHealth.OK
    health_reason: str = ""
    """In words, unless it is OK."""

    def given_sm_pct(self, asked_pct: int) -> int:
        """Returns the SM share, in per cent, that the device gives when one is asked for: the next rung up.

        A device that gives any share, or has no rung as wide, gives what was asked for.
        """
        if self.sm_granule_pct <= 1:
            return asked_pct
        return min((rung for rung in self.sm_rungs_pct if rung >= asked_pct), default=asked_pct)


@dataclass(frozen=True, slots=True)
class Row:
    """An SM range of a GPU whose instances share it in time."""

    index: int
    sm_pct: int
    used_permille: int
    """Sum of its instances' requests, 0..1000."""

    @property
    def free_permille(self) -> int:
        """Request that still fits."""
        return WHOLE_PERMILLE - self.used_permille


@dataclass(frozen=True, slots=True)
class DeviceState:
    """A device and what is taken of it."""

    info: DeviceInfo
    rows: tuple[Row, ...] = field(default_factory=tuple)
    memory_used_bytes: int = 0

    @property
    def free_sm_pct(self) -> int:
        """SM share in no row."""
        return WHOLE_PCT - sum(row.sm_pct for row in self.rows)

    @property
    def free_memory_bytes(self) -> int:
        """Memory promised to no instance."""
        return self.info.memory_bytes - self.memory_used_bytes
