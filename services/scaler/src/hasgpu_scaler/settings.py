"""The scaler's own configuration, from environment variables; what all services share is `hasgpu_runtime`'s."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from hasgpu_core.errors import InvalidError
from hasgpu_core.function import MIB
from hasgpu_core.policy.choice import DEFAULT_POLICY, LIVE_POLICIES
from hasgpu_runtime.settings import choice, integer, number, text

SMALLEST_RECORDING_MIB = 32


@dataclass(frozen=True, slots=True)
class ScalerSettings:
    """What a scaler can be told."""

    period_s: float = 0.5
    """HASGPU_SCALER_PERIOD_S; the longest time between two passes, 0.05..60."""
    idle_to_zero_s: float | None = None
    """HASGPU_SCALER_IDLE_TO_ZERO_S; idle time after which a function with `min: 0` has no instance, 1..86400; not set:
    the policy's own."""
    retire_s: float | None = None
    """HASGPU_SCALER_RETIRE_S; after how long a parked instance that nobody needed goes, 1..86400; not set: the policy's
    own."""
    policy: str = DEFAULT_POLICY
    """HASGPU_SCALER_POLICY; what decides while no other policy is set (`hasgpu policy set`)."""
    recording_dir: Path | None = None
    """`scaler/recording` below HASGPU_STATE_DIR (default: `hasgpu` in the user's folder for state); None: nothing is
    recorded."""
    recording_bytes: int = 256 * MIB
    """HASGPU_SCALER_RECORDING_MIB; room that recordings may take, 32..1048576; 0: nothing is recorded."""


def load(environ: Mapping[str, str]) -> ScalerSettings:
    """Reads the settings; raises InvalidError naming the variable, the bound and what came."""
    idle = text(environ, "HASGPU_SCALER_IDLE_TO_ZERO_S", "")
    retire = text(environ, "HASGPU_SCALER_RETIRE_S", "")
    recording_mib = integer(environ, "HASGPU_SCALER_RECORDING_MIB", 256, 0, 1 << 20)
    if 0 < recording_mib < SMALLEST_RECORDING_MIB:
        raise InvalidError(
            "HASGPU_SCALER_RECORDING_MIB", expected=f"0 or {SMALLEST_RECORDING_MIB}..1048576", got=str(recording_mib)
        )
    state_home = environ.get("XDG_STATE_HOME") or str(Path.home() / ".local" / "state")
    state = text(environ, "HASGPU_STATE_DIR", str(Path(state_home) / "hasgpu"))
    return ScalerSettings(
        period_s=number(environ, "HASGPU_SCALER_PERIOD_S", 0.5, 0.05, 60.0),
        idle_to_zero_s=number(environ, "HASGPU_SCALER_IDLE_TO_ZERO_S", 1.0, 1.0, 86_400.0) if idle else None,
        retire_s=number(environ, "HASGPU_SCALER_RETIRE_S", 1.0, 1.0, 86_400.0) if retire else None,
        policy=choice(environ, "HASGPU_SCALER_POLICY", DEFAULT_POLICY, LIVE_POLICIES),
        recording_dir=Path(state).absolute() / "scaler" / "recording" if recording_mib else None,
        recording_bytes=recording_mib * MIB,
    )
