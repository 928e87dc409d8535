"""rapp's own configuration, from environment variables; what all services share is `hasgpu_runtime.settings`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from hasgpu_predictor import TrainingSettings
from hasgpu_runtime.settings import integer, text


@dataclass(frozen=True, slots=True)
class RappSettings:
    """What rapp can be told."""

    state_dir: Path
    """HASGPU_STATE_DIR; profiles and models lie in `rapp` below it. Default: `$XDG_STATE_HOME/hasgpu`, else
    `~/.local/state/hasgpu`."""
    profile_files: tuple[str, ...]
    """HASGPU_RAPP_PROFILES, separated by colons: what functions without a profile are predicted from, beside what was
    measured here; see `hasgpu_rapp.adapters.profile_files`."""
    training: TrainingSettings
    """HASGPU_RAPP_THREADS (1): threads that a training may use. HASGPU_RAPP_SEED (0): of trainings."""


def load(environ: Mapping[str, str]) -> RappSettings:
    """Reads the settings; raises InvalidError naming the variable, the bound and what came."""
    state_home = text(environ, "XDG_STATE_HOME", str(Path(environ.get("HOME", "~")).expanduser() / ".local/state"))
    return RappSettings(
        state_dir=Path(text(environ, "HASGPU_STATE_DIR", str(Path(state_home) / "hasgpu"))).absolute(),
        profile_files=tuple(source for source in text(environ, "HASGPU_RAPP_PROFILES", "").split(":") if source),
        training=TrainingSettings(
            seed=integer(environ, "HASGPU_RAPP_SEED", 0, 0, 2**31 - 1),
            threads_count=integer(environ, "HASGPU_RAPP_THREADS", 1, 1, 256),
        ),
    )
