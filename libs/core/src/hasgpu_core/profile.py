"""Profile files: what models cost on a device, by batch, SM share and quota.

One text file. The first line is `# ` and a JSON object, the header; then comma-separated values under `COLUMNS`:

```
# {"format": "hasgpu-profile", "version": 1, "device_model": "NVIDIA-H100-80GB-HBM3", "backend": "cuda", ...}
model,batch,sm_pct,quota_permille,latency_us,device_time_us,longest_segment_us,repetitions
resnet50,1,25,1000,2210.5,2180.25,2180.25,50
```

Whole-quota rows (1000 ‰) say how long a batch holds the device; rows at smaller quotas say what latency the gate makes
of it. Written by `hasgpu profile` and `make gpu-lab`, read by rapp, the simulator and the emulated backend.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from hasgpu_core.device_times import DeviceTimes
from hasgpu_core.errors import NotFoundError, ProfileFileError
from hasgpu_core.resources import WHOLE_PCT, WHOLE_PERMILLE

__all__ = [
    "COLUMNS",
    "Basis",
    "DeviceTimes",
    "Profile",
    "ProfileFileError",
    "ProfileHeader",
    "ProfileModel",
    "ProfileRow",
]

FORMAT = "hasgpu-profile"
VERSION = 1
COLUMNS = (
    "model",
    "batch",
    "sm_pct",
    "quota_permille",
    "latency_us",
    "device_time_us",
    "longest_segment_us",
    "repetitions",
)
MAX_BATCH = 65_536
MAX_TIME_US = 3_600e6
MAX_REPETITIONS = 1_000_000_000
_INTEGERS = {
    "batch": MAX_BATCH,
    "sm_pct": WHOLE_PCT,
    "quota_permille": WHOLE_PERMILLE,
    "repetitions": MAX_REPETITIONS,
}
_MAX_NAMED = 8
"""Missing cells that an error names; of more it tells the number."""


class Basis(Enum):
    """Where the figures come from."""

    MEASURED = "measured"
    MODELLED = "modelled"
    """Computed, e.g. from a roofline model of public data sheets."""


@dataclass(frozen=True, slots=True)
class ProfileModel:
    """One model of a profile."""

    digest: str
    """Of its weights and code (sha256, hex), or another name of its origin where it is modelled."""
    memory_bytes: int
    """Device memory that an instance of it needs, 0: not known."""
    max_batch: int | None = None
    """The largest batch that fits; None: not known."""
    note: str = ""


@dataclass(frozen=True, slots=True)
class ProfileHeader:
    """What the figures hold for."""

    device_model: str
    """As in `DeviceInfo.model`."""
    backend: str
    """Of the device measured: "cuda", "cpu", "emulated"."""
    basis: Basis
    memory_bytes: int
    """Of the device."""
    sm_rungs_pct: tuple[int, ...]
    """SM shares that the device can give, ascending, 1..100."""
    driver: str
    """Version of the device's driver; empty: there is none."""
    versions: Mapping[str, str]
    """Of what ran on it, e.g. "torch": "2.8.0"."""
    created_unix_s: int
    source: str
    """How the figures were come by, in words."""
    models: Mapping[str, ProfileModel]
    complete: bool = True
    """Each model has a whole-quota row for all of its batches at all of its SM shares. A sweep that was interrupted, or
    that left cells out, writes false."""


@dataclass(frozen=True, slots=True)
class ProfileRow:
    """One configuration of one model: means over the repetitions, batches run back to back."""

    model: str
    batch: int
    sm_pct: int
    quota_permille: int
    latency_us: float
    """Gate wait and execution."""
    device_time_us: float
    """For which the batch held the device."""
    longest_segment_us: float
    """Longest stretch between two gate passes."""
    repetitions: int

    @property
    def cell(self) -> tuple[str, int, int, int]:
        """(model, batch, sm_pct, quota_permille)."""
        return self.model, self.batch, self.sm_pct, self.quota_permille


@dataclass(frozen=True, slots=True)
class Profile:
    """A profile file's content, made by `parse` or of values (which `format` checks); `rows` are sorted by cell."""

    header: ProfileHeader
    rows: tuple[ProfileRow, ...]
    _times: dict[str, DeviceTimes] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "rows", tuple(sorted(self.rows, key=lambda row: row.cell)))

    @classmethod
    def parse(cls, text: str) -> Profile:
        """Reads a profile file.

        Args:
            text: The whole file.

        Raises:
            ProfileFileError: It is not one, is of another version, or a figure can't be; says line and column.
        """
        lines = text.splitlines()
        header = _parse_header(lines[0] if lines else "")
        titles = lines[1].split(",") if len(lines) > 1 else []
        if tuple(titles) != COLUMNS:
            absent = [name for name in COLUMNS if name not in titles]
            got = f"no column {', '.join(absent)}" if absent else ",".join(titles)
            raise ProfileFileError(2, absent[0] if absent else "model", expected=",".join(COLUMNS), got=got)
        cells: dict[tuple[str, int, int, int], ProfileRow] = {}
        for number, line in enumerate(lines[2:], start=3):
            if not line.strip():
                continue
            row = _parse_row(number, line, header)
            known = cells.setdefault(row.cell, row)
            if known != row:
                raise ProfileFileError(
                    number,
                    "device_time_us" if known.device_time_us != row.device_time_us else "latency_us",
                    expected=f"one row for {_named(row)}",
                    got=f"a second one that disagrees: {_format_row(known)!r} and {line!r}",
                )
        _check_cells(header, cells)
        return cls(header, tuple(cells.values()))

    def format(self) -> str:
        """Returns the file's text; `parse` of it gives an equal profile, and `format` of that the same text.

        Raises:
            ProfileFileError: The profile could not be read again.
        """
        text = "\n".join([_format_header(self.header), ",".join(COLUMNS), *(_format_row(row) for row in self.rows), ""])
        Profile.parse(text)
        return text

    def device_times(self, model: str) -> DeviceTimes:
        """Returns how long the model's batches hold the device.

        Raises:
            NotFoundError: The profile has no such model; says which it has.
        """
        if model not in self.header.models:
            raise NotFoundError("profile model", model, f"the profile has {', '.join(sorted(self.header.models))}")
        if model not in self._times:
            self._times[model] = DeviceTimes(
                {
                    (row.batch, row.sm_pct): row.device_time_us
                    for row in self.rows
                    if row.model == model and row.quota_permille == WHOLE_PERMILLE
                }
            )
        return self._times[model]


def _parse_header(line: str) -> ProfileHeader:
    if not line.startswith("# "):
        raise ProfileFileError(1, "header", expected="'# ' and a JSON object", got=repr(line[:60]))
    try:
        document = json.loads(line[2:])
    except ValueError as error:
        raise ProfileFileError(1, "header", expected="a JSON object", got=str(error)) from error
    if not isinstance(document, dict):
        raise ProfileFileError(1, "header", expected="a JSON object", got=type(document).__name__)
    for key, wanted in (("format", FORMAT), ("version", VERSION)):
        if document.get(key) != wanted or isinstance(document.get(key), bool):
            raise ProfileFileError(1, key, expected=repr(wanted), got=repr(document.get(key)))
    take = _Taker(document)
    basis = take.text("basis")
    if basis not in {one.value for one in Basis}:
        raise ProfileFileError(1, "basis", expected=" or ".join(repr(b.value) for b in Basis), got=repr(basis))
    models = take.mapping("models")
    if not models:
        raise ProfileFileError(1, "models", expected="one model or more", got="none")
    header = ProfileHeader(
        device_model=take.text("device_model", allow_empty=False),
        backend=take.text("backend", allow_empty=False),
        basis=Basis(basis),
        memory_bytes=take.integer("memory_bytes", 1),
        sm_rungs_pct=_parse_rungs(document.get("sm_rungs_pct")),
        driver=take.text("driver"),
        versions={name: take.within("versions", name) for name in take.mapping("versions")},
        created_unix_s=take.integer("created_unix_s", 0),
        source=take.text("source"),
        models={name: _parse_model(name, value) for name, value in models.items()},
        complete=take.flag("complete"),
    )
    known = {"format", "version", "sm_rungs_pct"} | take.taken
    if unknown := sorted(set(document) - known):
        raise ProfileFileError(1, unknown[0], expected=f"no other keys than {', '.join(sorted(known))}", got=unknown[0])
    return header


class _Taker:
    """Takes typed values out of a JSON object and remembers which."""

    def __init__(self, document: Mapping[str, Any], prefix: str = "") -> None:
        self._document = document
        self._prefix = prefix
        self.taken: set[str] = set()

    def _take(self, key: str, kind: type, expected: str) -> Any:
        self.taken.add(key)
        value = self._document.get(key)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            got = repr(value) if key in self._document else "nothing"
            raise ProfileFileError(1, self._prefix + key, expected=expected, got=got)
        return value

    def text(self, key: str, *, allow_empty: bool = True) -> str:
        """A string."""
        value: str = self._take(key, str, "a text")
        if not value and not allow_empty:
            raise ProfileFileError(1, self._prefix + key, expected="a text", got="an empty one")
        return value

    def integer(self, key: str, low: int) -> int:
        """An integer of `low` and up."""
        value: int = self._take(key, int, f"an integer of {low} or more")
        if value < low:
            raise ProfileFileError(1, self._prefix + key, expected=f"an integer of {low} or more", got=str(value))
        return value

    def flag(self, key: str) -> bool:
        """True or false."""
        value: bool = self._take(key, bool, "true or false")
        return value

    def mapping(self, key: str) -> Mapping[str, Any]:
        """An object."""
        value: Mapping[str, Any] = self._take(key, dict, "an object")
        return value

    def within(self, key: str, name: str) -> str:
        """A string of an object of strings."""
        value = self._document[key][name]
        if not isinstance(value, str):
            raise ProfileFileError(1, f"{key}.{name}", expected="a text", got=repr(value))
        return value


def _parse_rungs(value: object) -> tuple[int, ...]:
    good = isinstance(value, list) and value and all(type(rung) is int and 1 <= rung <= WHOLE_PCT for rung in value)
    if not good or not isinstance(value, list) or sorted(set(value)) != value:
        raise ProfileFileError(1, "sm_rungs_pct", expected="a list of 1..100, ascending", got=repr(value))
    return tuple(value)


def _parse_model(name: str, value: object) -> ProfileModel:
    where = f"models.{name}"
    if not name or name != name.strip() or any(bad in name for bad in ',"\n\r'):
        raise ProfileFileError(1, "models", expected="names without commas, quotes and line breaks", got=repr(name))
    if not isinstance(value, dict):
        raise ProfileFileError(1, where, expected="an object", got=repr(value))
    take = _Taker(value, f"{where}.")
    model = ProfileModel(
        take.text("digest"),
        take.integer("memory_bytes", 0),
        take.integer("max_batch", 1) if "max_batch" in value else None,
        take.text("note") if "note" in value else "",
    )
    if unknown := sorted(set(value) - {"digest", "memory_bytes", "max_batch", "note"}):
        raise ProfileFileError(
            1, f"{where}.{unknown[0]}", expected="digest, memory_bytes, max_batch, note", got=unknown[0]
        )
    return model


def _parse_row(number: int, line: str, header: ProfileHeader) -> ProfileRow:
    values = line.split(",")
    if len(values) != len(COLUMNS):
        missing = COLUMNS[len(values)] if len(values) < len(COLUMNS) else COLUMNS[-1]
        raise ProfileFileError(number, missing, expected=f"{len(COLUMNS)} values", got=f"{len(values)}: {line!r}")
    named = dict(zip(COLUMNS, values, strict=True))
    if named["model"] not in header.models:
        raise ProfileFileError(
            number,
            "model",
            expected=f"a model of the header ({', '.join(sorted(header.models))})",
            got=repr(named["model"]),
        )
    whole = {name: _integer(number, name, named[name], most) for name, most in _INTEGERS.items()}
    times = {
        name: _time_us(number, name, named[name]) for name in ("latency_us", "device_time_us", "longest_segment_us")
    }
    return ProfileRow(
        named["model"],
        whole["batch"],
        whole["sm_pct"],
        whole["quota_permille"],
        times["latency_us"],
        times["device_time_us"],
        times["longest_segment_us"],
        whole["repetitions"],
    )


def _integer(line: int, column: str, text: str, most: int) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= len(str(most)) and 1 <= int(text) <= most):
        raise ProfileFileError(line, column, expected=f"an integer in 1..{most}", got=repr(text))
    return int(text)


def _time_us(line: int, column: str, text: str) -> float:
    try:
        value_us = float(text)
    except ValueError:
        value_us = math.nan
    if not (math.isfinite(value_us) and 0 < value_us <= MAX_TIME_US) or "_" in text:
        raise ProfileFileError(
            line, column, expected=f"microseconds, above 0, at most {MAX_TIME_US:.0f}", got=repr(text)
        )
    return value_us


def _check_cells(header: ProfileHeader, cells: Mapping[tuple[str, int, int, int], ProfileRow]) -> None:
    """A model needs a whole-quota row; of a profile that says it is complete, all of its grid."""
    for model in sorted(header.models):
        rows = [row for row in cells.values() if row.model == model]
        whole = {(row.batch, row.sm_pct) for row in rows if row.quota_permille == WHOLE_PERMILLE}
        asked = rows if rows and not whole else [row for row in rows if (row.batch, row.sm_pct) in whole]
        batches = sorted({row.batch for row in asked}) or [1]
        sms_pct = sorted({row.sm_pct for row in asked} if rows else header.sm_rungs_pct)
        missing = [(batch, sm_pct) for batch in batches for sm_pct in sms_pct if (batch, sm_pct) not in whole]
        if not missing or (whole and not header.complete):
            continue
        names = ", ".join(f"(batch {batch}, sm {sm_pct} %)" for batch, sm_pct in missing[:_MAX_NAMED])
        more = f" and {len(missing) - _MAX_NAMED} more" if len(missing) > _MAX_NAMED else ""
        raise ProfileFileError(
            1,
            f"models.{model}",
            expected="the whole-quota (1000) row of each cell, as the header says complete"
            if whole
            else "a whole-quota (1000) row",
            got=f"missing cells: {names}{more}",
        )


def _format_header(header: ProfileHeader) -> str:
    models: dict[str, dict[str, str | int]] = {}
    for name, model in header.models.items():
        models[name] = {"digest": model.digest, "memory_bytes": model.memory_bytes}
        if model.max_batch is not None:
            models[name]["max_batch"] = model.max_batch
        if model.note:
            models[name]["note"] = model.note
    document = {
        "format": FORMAT,
        "version": VERSION,
        "device_model": header.device_model,
        "backend": header.backend,
        "basis": header.basis.value,
        "memory_bytes": header.memory_bytes,
        "sm_rungs_pct": list(header.sm_rungs_pct),
        "driver": header.driver,
        "versions": dict(header.versions),
        "created_unix_s": header.created_unix_s,
        "source": header.source,
        "models": models,
        "complete": header.complete,
    }
    return f"# {json.dumps(document)}"


def _format_row(row: ProfileRow) -> str:
    times = (row.latency_us, row.device_time_us, row.longest_segment_us)
    return ",".join(
        [
            row.model,
            str(row.batch),
            str(row.sm_pct),
            str(row.quota_permille),
            *(_number(value_us) for value_us in times),
            str(row.repetitions),
        ]
    )


def _number(value: float) -> str:
    value = float(value)
    return str(int(value)) if value.is_integer() else repr(value)


def _named(row: ProfileRow) -> str:
    return f"{row.model} batch {row.batch} sm {row.sm_pct} % quota {row.quota_permille} ‰"
