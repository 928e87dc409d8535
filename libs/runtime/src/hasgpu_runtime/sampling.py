"""Which traces are kept, decided before anything of a span is made, from the standard variables of OpenTelemetry.

https://opentelemetry.io/docs/specs/otel/configuration/sdk-environment-variables/
"""

from __future__ import annotations

import logging
import math
import random
import re
from collections.abc import Mapping
from dataclasses import dataclass

_log = logging.getLogger(__name__)

SAMPLER = "OTEL_TRACES_SAMPLER"
SAMPLER_ARGUMENT = "OTEL_TRACES_SAMPLER_ARG"
DEFAULT_SAMPLER = "parentbased_always_on"
_SAMPLERS = ("always_on", "always_off", "traceidratio")
_PARENT_BASED = "parentbased_"
_ID_RANGE = 1 << 64
"""The ratio is taken of the low 64 bits of a trace's id, as OpenTelemetry's TraceIdRatioBased does."""
_SAMPLED_FLAG = 1
_TRACEPARENT = re.compile(r"(?!ff)([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")


@dataclass(frozen=True, slots=True)
class TraceContext:
    """A W3C traceparent, read."""

    trace_id: int
    span_id: int
    flags: int

    @property
    def sampled(self) -> bool:
        """Whether its sender records the trace."""
        return bool(self.flags & _SAMPLED_FLAG)


def parse_traceparent(value: str) -> TraceContext | None:
    """Returns the context; None for what is none (https://www.w3.org/TR/trace-context/#traceparent-header)."""
    found = _TRACEPARENT.fullmatch(value)
    if found is None or (found[1] == "00" and found[5] is not None):
        return None
    trace_id, span_id = int(found[2], 16), int(found[3], 16)
    return TraceContext(trace_id, span_id, int(found[4], 16)) if trace_id and span_id else None


def format_traceparent(trace_id: int, span_id: int, flags: int) -> str:
    """Returns the header's value."""
    return f"00-{trace_id:032x}-{span_id:016x}-{flags:02x}"


class Sampler:
    """Decides whether a trace is recorded."""

    def __init__(self, *, ratio: float = 1.0, parent_based: bool = True, decisions: bool = True) -> None:
        """Makes a sampler.

        Args:
            ratio: Of the traces that begin here, 0..1.
            parent_based: Whether one that began elsewhere is recorded as its sender says; else the ratio decides.
            decisions: Whether scaling decisions are recorded whatever the ratio.
        """
        self.ratio = ratio
        self.parent_based = parent_based
        self.decisions = decisions
        self._bound = round(ratio * _ID_RANGE)
        self._random = random.Random()  # noqa: S311  ids, not secrets

    def new_trace_id(self) -> int:
        """Returns the id of a trace that begins here."""
        return self._random.getrandbits(128) or 1

    def keeps(self, trace_id: int) -> bool:
        """Whether the ratio keeps the trace."""
        return (trace_id & (_ID_RANGE - 1)) < self._bound


def sampler_of(environ: Mapping[str, str]) -> Sampler:
    """Reads OTEL_TRACES_SAMPLER and OTEL_TRACES_SAMPLER_ARG.

    As the specification demands, a value that can't be is named in a warning and the default taken in its place.
    Scaling decisions are recorded with every sampler but plain `always_off`.
    """
    asked = environ.get(SAMPLER, "").strip().lower() or DEFAULT_SAMPLER
    kind = asked.removeprefix(_PARENT_BASED)
    if kind not in _SAMPLERS:
        known = ", ".join([*_SAMPLERS, *(_PARENT_BASED + name for name in _SAMPLERS)])
        _log.warning("%s: expected one of %s, got %r; taken as %s", SAMPLER, known, asked, DEFAULT_SAMPLER)
        asked, kind = DEFAULT_SAMPLER, "always_on"
    ratio = {"always_on": 1.0, "always_off": 0.0}.get(kind)
    if ratio is None:
        ratio = _ratio_of(environ.get(SAMPLER_ARGUMENT, "").strip())
    return Sampler(ratio=ratio, parent_based=asked.startswith(_PARENT_BASED), decisions=asked != "always_off")


def _ratio_of(given: str) -> float:
    if not given:
        return 1.0
    try:
        ratio = float(given)
    except ValueError:
        ratio = math.nan
    if 0.0 <= ratio <= 1.0:
        return ratio
    _log.warning("%s: expected a ratio 0..1, got %r; taken as 1", SAMPLER_ARGUMENT, given)
    return 1.0
