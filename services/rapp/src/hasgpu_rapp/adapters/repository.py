"""Profiles and models as files, so that a restart needs no measurement.

<state dir>/rapp/<device model>/profiles/<workload>.json
<state dir>/rapp/<device model>/model/{card.json, <sha256>.cbm}
"""

from __future__ import annotations

import logging
from pathlib import Path
from urllib.parse import quote, unquote

from hasgpu_core.errors import HasgpuError, InvalidError
from hasgpu_predictor import LatencyModel, Profile, load_profile, save_profile

_log = logging.getLogger(__name__)


class Repository:
    """The files below one folder. Calls block: run them in a thread."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def load(self) -> dict[str, tuple[LatencyModel, dict[str, Profile]]]:
        """Returns model and profiles (by workload) of each device model.

        A file that can't be read is told and left out: its function is profiled, or the model trained, anew.
        """
        found: dict[str, tuple[LatencyModel, dict[str, Profile]]] = {}
        if not self._folder.is_dir():
            return found
        for folder in sorted(path for path in self._folder.iterdir() if path.is_dir()):
            device_model = unquote(folder.name)
            profiles = self._profiles(folder / "profiles", device_model)
            found[device_model] = (self._model(folder / "model", device_model), profiles)
        return found

    def save_profile(self, profile: Profile) -> None:
        """Writes a profile; raises OSError."""
        folder = self._folder / quote(profile.device_model, safe="") / "profiles"
        save_profile(folder / f"{profile.workload}.json", profile)

    def save_model(self, model: LatencyModel) -> None:
        """Writes the model of its device model; raises OSError."""
        model.save(self._folder / quote(model.card.device_model, safe="") / "model")

    def _profiles(self, folder: Path, device_model: str) -> dict[str, Profile]:
        profiles: dict[str, Profile] = {}
        for path in sorted(folder.glob("*.json")):
            try:
                profile = load_profile(path)
                if (profile.workload, profile.device_model) != (path.stem, device_model):
                    raise InvalidError(f"profile file {path}", expected=f"{path.stem} on {device_model}", got="another")
            except (HasgpuError, OSError) as error:
                _log.warning("a profile is left out: %s", error)
                continue
            profiles[profile.workload] = profile
        return profiles

    def _model(self, folder: Path, device_model: str) -> LatencyModel:
        untrained = LatencyModel.untrained(device_model)
        if not (folder / "card.json").exists():
            return untrained
        try:
            model = LatencyModel.load(folder)
            if model.card.device_model != device_model:
                raise InvalidError(f"model in {folder}", expected=device_model, got=model.card.device_model)
        except HasgpuError as error:
            _log.warning("the model of %s is left out and will be trained anew: %s", device_model, error)
            return untrained
        return model
