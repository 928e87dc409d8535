"""What a scaler saw and decided, as values and as lines of a file: made in the simulator, kept by the live scaler.

A file is lines of JSON. The first one, and each that begins a new segment, is a header; then come inputs and passes in
their order. A segment begins with all that was known then (`base`), so that the oldest ones can be thrown away.

| line | keys |
|---|---|
| header | `format`, `version`, `unix_offset_ns` (unix time of `at` 0), `fresh` (a process began here), `policy` |
| input | `at` (monotonic seconds), `k` (its kind), `v` (the event), `base` (1: known before the segment) |
| pass | `at`, `k` = "tick", `v` (decisions acted on), `advised` (in advisory mode), `policy` |

Passes name a function's decision where it acts, and at least every few seconds where it does not; in the simulator's
own recordings all decisions are there.
"""

from __future__ import annotations

import json
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from enum import Enum
from typing import Any

from hasgpu_core.capacity import CapacityTable
from hasgpu_core.errors import InvalidError
from hasgpu_core.events import DemandEvent, DesiredInstance, DeviceEvent, FunctionEvent, InstanceEvent, NodeEvent
from hasgpu_core.policy.scaling import Decision

FORMAT = "hasgpu-recording"
VERSION = 1


@dataclass(frozen=True, slots=True)
class InstanceGone:
    """The subject of an instance was deleted."""

    function: str
    instance: str


@dataclass(frozen=True, slots=True)
class FunctionGone:
    """A function was deleted."""

    function: str


@dataclass(frozen=True, slots=True)
class NodeGone:
    """A node left."""

    node: str


@dataclass(frozen=True, slots=True)
class TableGone:
    """A prediction was taken back."""

    function: str
    device_model: str


@dataclass(frozen=True, slots=True)
class InitialDesired:
    """What is desired of a function other than by a decision of the policy: found in the store, or set by hand."""

    function: str
    instances: tuple[DesiredInstance, ...]
    next_ordinal: int
    held: bool


RecordedEvent = (
    FunctionEvent
    | FunctionGone
    | DemandEvent
    | InstanceEvent
    | InstanceGone
    | DeviceEvent
    | NodeEvent
    | NodeGone
    | CapacityTable
    | TableGone
    | InitialDesired
)

_KINDS: Mapping[str, type[Any]] = {
    "function": FunctionEvent,
    "function-gone": FunctionGone,
    "demand": DemandEvent,
    "instance": InstanceEvent,
    "instance-gone": InstanceGone,
    "device": DeviceEvent,
    "node": NodeEvent,
    "node-gone": NodeGone,
    "capacity": CapacityTable,
    "capacity-gone": TableGone,
    "desired": InitialDesired,
}
_NAMES = {kind: name for name, kind in _KINDS.items()}


@dataclass(frozen=True, slots=True)
class RecordedInput:
    """An event and when it came in."""

    at_s: float
    event: RecordedEvent


@dataclass(frozen=True, slots=True)
class RecordedTick:
    """A pass of the loop: what it decided from all inputs before it."""

    at_s: float
    decisions: tuple[Decision, ...]
    advised: tuple[Decision, ...] = ()
    """Of functions in advisory mode: shown, not done."""
    policy: str = ""
    """Its name; empty: not told."""


@dataclass(frozen=True, slots=True)
class RecordedLoad:
    """Inputs and ticks in their order.

    To replay: go through `entries`; set the clock to each one's time; hand inputs over; at a tick let the loop make
    one pass and compare its decisions. The decisions' desired sets become the desired state, as in any live loop.
    """

    entries: tuple[RecordedInput | RecordedTick, ...]
    unix_offset_ns: int = 0
    """Unix time of `at_s` 0; 0: it is no live recording."""

    @property
    def ticks(self) -> Iterator[RecordedTick]:
        """The passes alone."""
        return (entry for entry in self.entries if isinstance(entry, RecordedTick))


def header_line(*, unix_offset_ns: int, policy: str, fresh: bool) -> str:
    """Returns the line that begins a segment."""
    head = {"format": FORMAT, "version": VERSION, "unix_offset_ns": unix_offset_ns, "policy": policy, "fresh": fresh}
    return json.dumps(head)


def entry_line(entry: RecordedInput | RecordedTick, *, base: bool = False) -> str:
    """Returns the line of an input or a pass; `base`: known before the segment began."""
    at_s = entry.at_s
    if isinstance(entry, RecordedInput):
        line: dict[str, Any] = {"at": at_s, "k": _NAMES[type(entry.event)], "v": plain(entry.event)}
        if base:
            line["base"] = 1
    else:
        line = {"at": at_s, "k": "tick", "v": [plain(decision) for decision in entry.decisions]}
        if entry.advised:
            line["advised"] = [plain(decision) for decision in entry.advised]
        if entry.policy:
            line["policy"] = entry.policy
    return json.dumps(line, separators=(",", ":"))


def parse(lines: Iterable[str], source: str = "recording") -> RecordedLoad:
    """Reads a recording of one or more segments; what later ones knew before they began is left out.

    A process that began anew is taken as knowing what its predecessor did not: its base is read too, except for what
    was desired. An incomplete last line (the process died while writing) is left out.

    Raises:
        InvalidError: It is no recording, or a line can't be; names source and line.
    """
    entries: list[RecordedInput | RecordedTick] = []
    offset_ns: int | None = None
    shift_s, fresh, first = 0.0, True, True
    pending: tuple[int, str] | None = None
    for number, text in enumerate(lines, start=1):
        if pending is not None and offset_ns is None:
            raise InvalidError(source, expected=f"a header of format {FORMAT}", got=pending[1][:60].strip())
        if pending is not None:
            raise InvalidError(f"{source}, line {pending[0]}", expected="a line of JSON", got=pending[1][:60])
        if not text.strip():
            continue
        try:
            line = json.loads(text)
        except ValueError:
            pending = (number, text)
            continue
        try:
            if "format" in line:
                own_ns = _header(line, source, number)
                first = offset_ns is None
                offset_ns = own_ns if offset_ns is None else offset_ns
                fresh = bool(line.get("fresh"))
                drift_s = (own_ns - offset_ns) / 1e9
                # Clocks that are adjusted drift a little; only another boot's monotonic clock is moved.
                shift_s = drift_s if abs(drift_s) > 1.0 else 0.0
                continue
            if offset_ns is None:
                raise InvalidError(f"{source}", expected=f"a header of format {FORMAT}", got=text[:60])
            entry = _entry(line, shift_s)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            if isinstance(error, InvalidError):
                raise
            raise InvalidError(f"{source}, line {number}", expected="an input or a pass", got=repr(error)) from error
        known = not first and line.get("base")
        desired = isinstance(entry, RecordedInput) and isinstance(entry.event, InitialDesired)
        if not known or (fresh and not desired):
            entries.append(entry)
    if offset_ns is None:
        raise InvalidError(
            source, expected=f"a header of format {FORMAT}", got=pending[1][:60] if pending else "nothing"
        )
    return RecordedLoad(tuple(entries), offset_ns)


def lines_of(load: RecordedLoad, policy: str = "") -> Iterator[str]:
    """Yields a recording as lines, one segment."""
    yield header_line(unix_offset_ns=load.unix_offset_ns, policy=policy, fresh=True)
    for entry in load.entries:
        yield entry_line(entry)


def _header(line: Mapping[str, Any], source: str, number: int) -> int:
    if line["format"] != FORMAT or line.get("version") != VERSION:
        raise InvalidError(
            f"{source}, line {number}",
            expected=f"format {FORMAT} version {VERSION}",
            got=f"{line['format']} version {line.get('version')}",
        )
    return int(line["unix_offset_ns"])


def _entry(line: Mapping[str, Any], shift_s: float) -> RecordedInput | RecordedTick:
    at_s = float(line["at"]) + shift_s
    if line["k"] == "tick":
        decisions = tuple(_decode(Decision, value) for value in line["v"])
        advised = tuple(_decode(Decision, value) for value in line.get("advised", ()))
        return RecordedTick(at_s, decisions, advised, str(line.get("policy", "")))
    return RecordedInput(at_s, _decode(_KINDS[line["k"]], line["v"]))


# Values and JSON

_known_defaults: dict[type[Any], tuple[tuple[str, Any], ...]] = {}
_known_readers: dict[type[Any], Mapping[str, Callable[[Any], Any]]] = {}


def plain(value: Any) -> Any:
    """Returns a value as JSON has it: dataclasses by field (defaults left out), enums by value, tuples as lists."""
    if isinstance(value, Enum):
        return value.value
    if is_dataclass(value) and not isinstance(value, type):
        if isinstance(value, CapacityTable):
            return _plain_fields(replace(value, points=())) | {"points": [list(_point(p)) for p in value.points]}
        return _plain_fields(value)
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    return value


def _point(point: Any) -> tuple[float, ...]:
    return point.batch, point.sm_pct, point.quota_permille, point.latency_s, point.capacity_rps


def _plain_fields(value: Any) -> dict[str, Any]:
    out = {}
    for name, default in _defaults(type(value)):
        item = getattr(value, name)
        if item != default:
            out[name] = plain(item)
    return out


def _defaults(kind: type[Any]) -> tuple[tuple[str, Any], ...]:
    """The fields that make a value, with their defaults (a marker where there is none)."""
    if kind not in _known_defaults:
        _known_defaults[kind] = tuple((f.name, f.default) for f in fields(kind) if f.init)
    return _known_defaults[kind]


def _readers(kind: type[Any]) -> Mapping[str, Callable[[Any], Any]]:
    if kind not in _known_readers:
        hints = typing.get_type_hints(kind)
        _known_readers[kind] = {field.name: _reader(hints[field.name]) for field in fields(kind) if field.init}
    return _known_readers[kind]


def _decode(kind: type[Any], value: Mapping[str, Any]) -> Any:
    readers = _readers(kind)
    # What a newer version added is left out.
    return kind(**{name: readers[name](item) for name, item in value.items() if name in readers})


def _reader(hint: Any) -> Callable[[Any], Any]:
    """Returns what makes a field's value of its JSON."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is types.UnionType or origin is typing.Union:
        inner = _reader(next(part for part in arguments if part is not types.NoneType))
        return lambda value: None if value is None else inner(value)
    if origin is tuple:
        item = _reader(arguments[0])
        return lambda value: tuple(item(part) for part in value)
    if origin is not None and isinstance(origin, type) and issubclass(origin, Mapping):
        item = _reader(arguments[1])
        return lambda value: {key: item(part) for key, part in value.items()}
    if isinstance(hint, type) and issubclass(hint, Enum):
        return hint
    if isinstance(hint, type) and is_dataclass(hint):
        # A table's points come as lists: there are thousands of them.
        return lambda value: hint(*value) if isinstance(value, list) else _decode(hint, value)
    return lambda value: value
