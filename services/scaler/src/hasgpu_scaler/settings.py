"""The scaler's own configuration, from environment variables; what all services share is `hasgpu_runtime`'s."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from hasgpu_core.policy.scaling import ScalingSettings
from hasgpu_runtime.settings import number

_DEFAULTS = ScalingSettings()


@dataclass(frozen=True, slots=True)
class ScalerSettings:
    """What a scaler can be told."""

    period_s: float = 0.5
    """HASGPU_SCALER_PERIOD_S; the longest time between two passes, 0.05..60."""
    idle_to_zero_s: float = _DEFAULTS.idle_to_zero_s
    """HASGPU_SCALER_IDLE_TO_ZERO_S; idle time after which a function with `min: 0` has no instance, 1..86400."""


def load(environ: Mapping[str, str]) -> ScalerSettings:
    """Reads the settings; raises InvalidError naming the variable, the bound and what came."""
    return ScalerSettings(
        period_s=number(environ, "HASGPU_SCALER_PERIOD_S", 0.5, 0.05, 60.0),
        idle_to_zero_s=number(environ, "HASGPU_SCALER_IDLE_TO_ZERO_S", _DEFAULTS.idle_to_zero_s, 1.0, 86_400.0),
    )
