"""What a simulation is made of: profiles, traces and the YAML of functions."""

from __future__ import annotations

import csv
import difflib
import gzip
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml
from hasgpu_core.errors import InvalidError, NotFoundError
from hasgpu_core.function import NAME_PATTERN, slo_class_of
from hasgpu_core.profile import Profile
from hasgpu_sim.arrivals import Process
from hasgpu_sim.surface import Surface, load_surfaces
from hasgpu_sim.traces import Trace, load_trace

FUNCTION_KEYS = (
    "name",
    "model",
    "slo",
    "trace",
    "rate_scale",
    "memory_mib",
    "max_batch",
    "instances",
    "class",
    "weight",
)
SPEC_KEYS = ("functions", "gpus", "gpu_memory_mib")
INSTANCE_KEYS = ("min", "max", "standby")


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """How traces are read."""

    process: Process
    rate_scale: float
    seed: int
    seconds: float | None
    """Only the first so many; None: all."""


@dataclass(frozen=True, slots=True)
class FunctionEntry:
    """One function of SPEC.yaml."""

    name: str
    model: str
    slo_multiple: float | None
    slo_ms: float | None
    """One of the two."""
    arrivals_s: Sequence[float]
    duration_s: float
    trace: str
    memory_mib: int
    """0: not said."""
    fields: Mapping[str, Any] = field(default_factory=dict)
    """Others of FunctionSpec."""


@dataclass(frozen=True, slots=True)
class SpecFile:
    """What a SPEC.yaml says."""

    functions: tuple[FunctionEntry, ...]
    gpus: int | None
    gpu_memory_mib: int | None
    notes: tuple[str, ...] = ()


def split(option: str, text: str) -> list[str]:
    """Returns the parts of a list as `a,b`; raises InvalidError when one is empty."""
    parts = [part.strip() for part in text.split(",")]
    if not all(parts):
        raise InvalidError(option, expected="values with commas between them", got=repr(text))
    return parts


def parse_multiples(text: str) -> list[float]:
    """Returns SLO multiples; raises InvalidError."""
    out = []
    for part in split("--slo-multiples", text):
        try:
            value = float(part)
        except ValueError:
            value = 0.0
        if not 0 < value < 1e4:
            raise InvalidError("--slo-multiples", expected="numbers above 0, as 2,3,5", got=repr(part))
        out.append(value)
    return out


# Profiles


def profile_models(path: Path) -> list[str]:
    """Returns the models of a profile of either kind, in order of name; raises InvalidError when it can't be read."""
    try:
        table = path / "latency.csv.gz" if path.is_dir() else path
        if table.suffix == ".gz":
            with gzip.open(table, "rt", encoding="utf-8") as file:
                rows = csv.DictReader(file)
                return sorted({row["model"] for row in rows if row.get("model")})
        text = path.read_text(encoding="utf-8")
        if not text.startswith("#"):
            raise InvalidError(
                f"--profile {path}",
                expected="a hasgpu profile file (`hasgpu profile` writes them), or a folder or .csv.gz of HAS-GPU's",
                got=text[:40].splitlines()[0] if text.strip() else "an empty file",
            )
        return sorted(Profile.parse(text).header.models)
    except (OSError, EOFError, UnicodeDecodeError, csv.Error) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise InvalidError(f"--profile {path}", expected="a profile", got=why) from error


def load_models(paths: Sequence[Path], models: Sequence[str]) -> dict[str, Surface]:
    """Returns each model's surface, from the first profile that has it.

    Raises:
        NotFoundError: No profile has a model; names the nearest.
        InvalidError: A profile can't be read or is wrong.
    """
    known = {path: profile_models(path) for path in paths}
    every = sorted({model for names in known.values() for model in names})
    wanted: dict[Path, list[str]] = {}
    for model in dict.fromkeys(models):
        path = next((path for path in paths if model in known[path]), None)
        if path is None:
            nearest = difflib.get_close_matches(model, every, n=3, cutoff=0.3) or every[:3]
            raise NotFoundError(
                "model", model, f"nearest in the profile: {', '.join(nearest)} (it has {len(every)} models)"
            )
        wanted.setdefault(path, []).append(model)
    found: dict[str, Surface] = {}
    for path, names in wanted.items():
        found |= load_surfaces(path, names)
    return {model: found[model] for model in dict.fromkeys(models)}


def profile_memory_mib(paths: Sequence[Path]) -> int | None:
    """Returns what the first hasgpu profile file says of its device's memory; None: none says anything."""
    for path in paths:
        if path.is_file() and path.suffix != ".gz":
            memory_bytes = Profile.parse(path.read_text(encoding="utf-8")).header.memory_bytes
            if memory_bytes:
                return memory_bytes >> 20
    return None


# Traces


def read_trace(text: str, options: LoadOptions, *, rate_scale: float = 1.0, folder: Path | None = None) -> Trace:
    """Reads FILE or FILE:PART. Raises InvalidError, NotFoundError."""
    path, part = Path(text), ""
    if folder is not None and not path.is_absolute():
        path = folder / path
    if not path.exists() and ":" in text:
        whole, _, part = str(path).rpartition(":")
        path = Path(whole)
    scale = options.rate_scale * rate_scale
    trace = load_trace(path, part=part, process=options.process, rate_scale=scale, seed=options.seed)
    return trace if options.seconds is None else trace.first(options.seconds)


# SPEC.yaml


def read_spec(path: Path, traces: Sequence[str], options: LoadOptions) -> SpecFile:
    """Reads SPEC.yaml. Functions without a trace of their own take those of --trace in turn.

    Raises:
        InvalidError: Names file, function and key.
        NotFoundError: A trace has no such part.
    """
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InvalidError(f"--functions {path}", expected="YAML", got=" ".join(str(error).split())) from error
    top = _mapping(str(path), document)
    _refuse_unknown(str(path), top, SPEC_KEYS)
    entries = top.get("functions")
    if not isinstance(entries, list) or not entries:
        raise InvalidError(f"{path}: functions", expected="a list of functions", got=_kind(entries))
    read: dict[tuple[str, float, int], Trace] = {}
    functions: list[FunctionEntry] = []
    for index, raw in enumerate(entries):
        keys = _mapping(f"{path}: functions[{index}]", raw)
        own = keys.get("trace", traces[index % len(traces)] if traces else None)
        where = f"{path}: {keys.get('name', f'functions[{index}]')}"
        if not isinstance(own, str):
            raise InvalidError(f"{where}: trace", expected="a file here, or --trace", got=_kind(own))
        scale = _number(where, keys, "rate_scale", 1.0)
        # Functions of one trace draw their arrivals apart.
        key = (own, scale, index if options.process is Process.POISSON else 0)
        if key not in read:
            folder = path.parent if "trace" in keys else None
            drawn = replace(options, seed=options.seed + key[2])
            read[key] = read_trace(own, drawn, rate_scale=scale, folder=folder)
        functions += _entries(where, keys, read[key], f"f-{index}")
    names = [function.name for function in functions]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InvalidError(f"{path}: functions", expected="distinct names", got=f"{twice[0]} twice")
    notes = tuple(dict.fromkeys(note for trace in read.values() for note in trace.notes))
    return SpecFile(tuple(functions), _count(path, top, "gpus"), _count(path, top, "gpu_memory_mib"), notes)


def _entries(where: str, keys: Mapping[str, Any], trace: Trace, default_name: str) -> list[FunctionEntry]:
    """One function, or one for each function of its trace, named `<name>-<n>`."""
    _refuse_unknown(where, keys, FUNCTION_KEYS)
    name = str(keys.get("name", default_name))
    if not NAME_PATTERN.fullmatch(name):
        raise InvalidError(f"{where}: name", expected="1 to 63 of a-z, 0-9 and -, not at an end", got=repr(name))
    model = keys.get("model")
    if not isinstance(model, str):
        raise InvalidError(f"{where}: model", expected="a model of the profile", got=_kind(model))
    multiple, slo_ms = _slo(where, keys.get("slo"))
    instances = _mapping(f"{where}: instances", keys.get("instances", {}))
    _refuse_unknown(f"{where}: instances", instances, INSTANCE_KEYS)
    numbers: dict[str, Any] = {}
    for key, field_name, source in (
        ("max_batch", "max_batch", keys),
        ("min", "min_instances", instances),
        ("max", "max_instances", instances),
        ("standby", "standby", instances),
    ):
        if key in source:
            numbers[field_name] = _whole(where, source, key)
    if "class" in keys:
        try:
            numbers["slo_class"] = slo_class_of(str(keys["class"]))
        except InvalidError as error:
            raise InvalidError(f"{where}: class", expected=error.expected, got=error.got) from error
    if "weight" in keys:
        numbers["weight"] = _whole(where, keys, "weight")
    memory_mib = _whole(where, keys, "memory_mib") if "memory_mib" in keys else 0
    many = len(trace.arrivals_s) > 1
    return [
        FunctionEntry(
            f"{name}-{index}" if many else name,
            model,
            multiple,
            slo_ms,
            times,
            trace.duration_s,
            trace.name,
            memory_mib,
            numbers,
        )
        for index, times in enumerate(trace.arrivals_s.values())
    ]


def _slo(where: str, value: Any) -> tuple[float | None, float | None]:
    """(multiple, ms): `3x` or 3 is a multiple, `120ms` a time."""
    text = str(value).strip().lower()
    number, is_ms = (text.removesuffix("ms"), True) if text.endswith("ms") else (text.removesuffix("x"), False)
    try:
        amount = float(number)
    except ValueError:
        amount = 0.0
    if not 0 < amount < 1e7:
        raise InvalidError(f"{where}: slo", expected="a multiple as 3x, or a time as 120ms", got=_kind(value))
    return (None, amount) if is_ms else (amount, None)


def _mapping(where: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise InvalidError(where, expected="a mapping of keys to values", got=_kind(value))
    return value


def _refuse_unknown(where: str, keys: Mapping[str, Any], known: Sequence[str]) -> None:
    for key in keys:
        if key not in known:
            raise InvalidError(where, expected=f"keys {', '.join(known)}", got=repr(key))


def _number(where: str, keys: Mapping[str, Any], key: str, default: float) -> float:
    value = keys.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise InvalidError(f"{where}: {key}", expected="a number above 0", got=_kind(value))
    return float(value)


def _whole(where: str, keys: Mapping[str, Any], key: str) -> int:
    value = keys[key]
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise InvalidError(f"{where}: {key}", expected="a whole number of 0 or more", got=_kind(value))
    return value


def _count(path: Path, keys: Mapping[str, Any], key: str) -> int | None:
    return _whole(str(path), keys, key) if key in keys else None


def _kind(value: Any) -> str:
    return "nothing" if value is None else f"{type(value).__name__} {value!r}"
