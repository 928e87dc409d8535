"""Profiles, models and corrections as files, so that a restart needs no measurement and forgets nothing.

<state dir>/rapp/@operators/<workload>.json             of a workload's model
<state dir>/rapp/<device model>/profiles/<workload>.json
<state dir>/rapp/<device model>/model/{card.json, <sha256>.cbm}
<state dir>/rapp/<device model>/previous/...        the model before, for when the newest can't be read
<state dir>/rapp/<device model>/versions.json       cards of the newest models
<state dir>/rapp/<device model>/corrections/<function>.json
"""

from __future__ import annotations

import json
import logging
import shutil
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from hasgpu_core.errors import HasgpuError, InvalidError
from hasgpu_predictor import Correction, Known, LatencyModel, Profile, load_profile, parse_operator, save_profile
from hasgpu_predictor.profile import write_atomically

from hasgpu_rapp.adapters.profile_files import read_shipped
from hasgpu_rapp.predictions import FunctionOperators

_log = logging.getLogger(__name__)

VERSIONS_MAX = 20
"""Cards kept of one device model."""
NOTES_MAX = 20
CARD_FIELDS = (
    "device_model",
    "version",
    "sha256",
    "rows_count",
    "workloads",
    "features",
    "mape_pct",
    "physical_mape_pct",
    "seed",
    "train_s",
    "trained_unix_ns",
    "data_sha256",
)
"""Kept of each version."""
_CORRECTION_FORMAT = "hasgpu-rapp-correction-1"
_OPERATORS_FORMAT = "hasgpu-rapp-operators-1"
_OPERATORS = "@operators"
"""No device model's folder: their names are quoted, and `quote` leaves no @."""


@dataclass(frozen=True, slots=True)
class KeptCorrection:
    """A function's correction on a device model, as it is kept."""

    function: str
    device_model: str
    workload: str
    """That it belongs to; of no use for another."""
    correction: Correction
    batches_read: Mapping[str, int]
    """Batches of each instance that were taken in."""

    def content(self) -> dict[str, Any]:
        """Returns the file's content; the correction may change afterwards."""
        return {
            "format": _CORRECTION_FORMAT,
            "function": self.function,
            "workload": self.workload,
            "batches_read": dict(self.batches_read),
            "correction": self.correction.to_json(),
        }


@dataclass(frozen=True, slots=True)
class Kept:
    """What is kept of one device model."""

    model: LatencyModel
    profiles: Mapping[str, Profile]
    """By workload."""
    versions: tuple[Mapping[str, Any], ...] = ()
    """Cards, oldest first, each with `data_sha256`."""
    corrections: tuple[KeptCorrection, ...] = field(default=())


class Repository:
    """The files below one folder. Calls block: run them in a thread.

    Args:
        folder: Of rapp alone.
        shipped: Profile files to read beside (`profile_files`).
    """

    def __init__(self, folder: Path, shipped: Sequence[str] = ()) -> None:
        self._folder = folder
        self._shipped = tuple(shipped)
        self.notes: deque[str] = deque(maxlen=NOTES_MAX)
        """What could not be read or written, in words, newest last."""

    def load(self) -> dict[str, Kept]:
        """Returns what is kept, by device model.

        A file that can't be read is told and left out: its function is profiled, or the model trained, anew; until
        then the model before it serves.
        """
        found: dict[str, Kept] = {}
        if not self._folder.is_dir():
            return found
        for folder in sorted(path for path in self._folder.iterdir() if path.is_dir() and path.name != _OPERATORS):
            device_model = unquote(folder.name)
            found[device_model] = Kept(
                self._model(folder, device_model),
                self._profiles(folder / "profiles", device_model),
                self._versions(folder / "versions.json"),
                self._corrections(folder / "corrections", device_model),
            )
        return found

    def load_operators(self) -> dict[str, FunctionOperators]:
        """Returns the operators that are kept, by workload; a file that can't be read is told and left out."""
        found: dict[str, FunctionOperators] = {}
        for path in sorted((self._folder / _OPERATORS).glob("*.json")):
            try:
                content = json.loads(path.read_bytes())
                if content["format"] != _OPERATORS_FORMAT:
                    raise InvalidError("format", expected=_OPERATORS_FORMAT, got=repr(content["format"]))
                rows = tuple(parse_operator(fields) for fields in content["rows"])
                found[path.stem] = FunctionOperators(rows, str(content["reason"]))
            except (OSError, ValueError, KeyError, TypeError, AttributeError, InvalidError) as error:
                self.note(f"the operators in {path} are left out: {type(error).__name__}: {error}")
        return found

    def load_shipped(self) -> dict[str, dict[str, Known]]:
        """Returns the models of the profile files that were named, by device model and a key of their own."""
        return read_shipped(self._shipped, self.note)

    def save_operators(self, workload: str, operators: FunctionOperators) -> None:
        """Writes a workload's operators; raises OSError."""
        content = {"format": _OPERATORS_FORMAT, **asdict(operators)}
        write_atomically(self._folder / _OPERATORS / f"{workload}.json", json.dumps(content).encode())

    def save_profile(self, profile: Profile) -> None:
        """Writes a profile; raises OSError."""
        save_profile(self._of(profile.device_model) / "profiles" / f"{profile.workload}.json", profile)

    def save_model(self, model: LatencyModel, data_sha256: str) -> tuple[Mapping[str, Any], ...]:
        """Writes the model of its device model, keeps the one before, and returns the newest cards; raises OSError."""
        folder = self._of(model.card.device_model)
        if (folder / "model" / "card.json").exists():
            shutil.rmtree(folder / "previous", ignore_errors=True)
            shutil.copytree(folder / "model", folder / "previous")
        model.save(folder / "model")
        known = [card for card in self._versions(folder / "versions.json") if card["version"] != model.card.version]
        card = {**asdict(model.card), "data_sha256": data_sha256}
        versions = (*known, {name: card[name] for name in CARD_FIELDS})[-VERSIONS_MAX:]
        write_atomically(folder / "versions.json", json.dumps(versions, indent=1).encode())
        return versions

    def save_correction(self, device_model: str, function: str, content: Mapping[str, Any]) -> None:
        """Writes what `KeptCorrection.content` gave; raises OSError."""
        write_atomically(self._correction_path(device_model, function), json.dumps(content).encode())

    def delete_correction(self, device_model: str, function: str) -> None:
        """Removes a correction's file; it need not be there."""
        self._correction_path(device_model, function).unlink(missing_ok=True)

    def note(self, text: str) -> None:
        """Tells of a file in the log and remembers it."""
        _log.warning("%s", text)
        self.notes.append(text)

    def _of(self, device_model: str) -> Path:
        return self._folder / quote(device_model, safe="")

    def _correction_path(self, device_model: str, function: str) -> Path:
        return self._of(device_model) / "corrections" / f"{quote(function, safe='')}.json"

    def _profiles(self, folder: Path, device_model: str) -> dict[str, Profile]:
        profiles: dict[str, Profile] = {}
        for path in sorted(folder.glob("*.json")):
            try:
                profile = load_profile(path)
                if (profile.workload, profile.device_model) != (path.stem, device_model):
                    raise InvalidError(f"profile file {path}", expected=f"{path.stem} on {device_model}", got="another")
            except (HasgpuError, OSError) as error:
                self.note(f"a profile is left out: {error}")
                continue
            profiles[profile.workload] = profile
        return profiles

    def _model(self, folder: Path, device_model: str) -> LatencyModel:
        for name, which, otherwise in (
            ("model", "newest", "the one before it serves, or a new one is trained"),
            ("previous", "previous", "a new one is trained"),
        ):
            path = folder / name
            if not (path / "card.json").exists():
                continue
            try:
                model = LatencyModel.load(path)
                if model.card.device_model != device_model:
                    raise InvalidError(f"model in {path}", expected=device_model, got=model.card.device_model)
            except HasgpuError as error:
                self.note(f"the {which} model of {device_model} is left out, {otherwise}: {error}")
                continue
            return model
        return LatencyModel.untrained(device_model)

    def _versions(self, path: Path) -> tuple[Mapping[str, Any], ...]:
        if not path.exists():
            return ()
        try:
            versions = json.loads(path.read_bytes())
            return tuple(
                {name: card[name] for name in CARD_FIELDS} | {"version": int(card["version"])} for card in versions
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            self.note(f"{path} is left out: {type(error).__name__}: {error}")
            return ()

    def _corrections(self, folder: Path, device_model: str) -> tuple[KeptCorrection, ...]:
        found = []
        for path in sorted(folder.glob("*.json")):
            try:
                content = json.loads(path.read_bytes())
                if content["format"] != _CORRECTION_FORMAT:
                    raise InvalidError("format", expected=_CORRECTION_FORMAT, got=repr(content["format"]))
                batches_read = {str(name): int(count) for name, count in content["batches_read"].items()}
                correction = Correction.from_json(content["correction"])
                function, workload = str(content["function"]), str(content["workload"])
            except (OSError, ValueError, KeyError, TypeError, AttributeError, InvalidError) as error:
                self.note(f"the correction in {path} is left out: {type(error).__name__}: {error}")
                continue
            found.append(KeptCorrection(function, device_model, workload, correction, batches_read))
        return tuple(found)
