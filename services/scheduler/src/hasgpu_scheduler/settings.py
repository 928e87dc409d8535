"""The scheduler's own configuration, from environment variables; what all services share is `hasgpu_runtime`'s."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from hasgpu_core.errors import InvalidError
from hasgpu_runtime.settings import integer, number

from hasgpu_scheduler.moving import MovingSettings


@dataclass(frozen=True, slots=True)
class SchedulerSettings:
    """What a scheduler can be told."""

    period_s: float = 1.0
    """HASGPU_SCHEDULER_PERIOD_S; the longest time between two passes, 0.05..60, at most a third of the time-out."""
    node_timeout_s: float = 6.0
    """HASGPU_NODE_TIMEOUT_S; a node without a new heartbeat for this long is lost, 1..3600."""
    moving: MovingSettings = field(default_factory=MovingSettings)
    """HASGPU_MOVES_AT_ONCE, 0..100 (0: nothing is moved); HASGPU_DEFRAGMENT_PERIOD_S, 1..86400;
    HASGPU_MOVE_COOLDOWN_S, 0..86400; HASGPU_MOVE_TIMEOUT_S, 1..3600; HASGPU_MOVE_HEADROOM_PERMILLE, 0..1000;
    HASGPU_DEGRADED_AFTER_S, 0..86400."""

    @property
    def silence_s(self) -> float:
        """When nothing at all was heard for this long, it is the bus that was away, not a node."""
        return self.node_timeout_s / 2


def load(environ: Mapping[str, str]) -> SchedulerSettings:
    """Reads the settings; raises InvalidError naming the variable, the bound and what came."""
    settings = SchedulerSettings(
        period_s=number(environ, "HASGPU_SCHEDULER_PERIOD_S", 1.0, 0.05, 60.0),
        node_timeout_s=number(environ, "HASGPU_NODE_TIMEOUT_S", 6.0, 1.0, 3_600.0),
        moving=MovingSettings(
            at_once=integer(environ, "HASGPU_MOVES_AT_ONCE", 2, 0, 100),
            period_s=number(environ, "HASGPU_DEFRAGMENT_PERIOD_S", 30.0, 1.0, 86_400.0),
            cooldown_s=number(environ, "HASGPU_MOVE_COOLDOWN_S", 600.0, 0.0, 86_400.0),
            timeout_s=number(environ, "HASGPU_MOVE_TIMEOUT_S", 300.0, 1.0, 3_600.0),
            headroom_permille=integer(environ, "HASGPU_MOVE_HEADROOM_PERMILLE", 100, 0, 1_000),
            degraded_after_s=number(environ, "HASGPU_DEGRADED_AFTER_S", 30.0, 0.0, 86_400.0),
        ),
    )
    longest_s = settings.node_timeout_s / 3
    if settings.period_s > longest_s:
        raise InvalidError(
            "HASGPU_SCHEDULER_PERIOD_S",
            expected=f"at most {longest_s:g} (a third of HASGPU_NODE_TIMEOUT_S)",
            got=f"{settings.period_s:g}",
        )
    return settings
