"""When requests are due: from a list of rates, or from a trace file."""

from __future__ import annotations

import csv
import gzip
import io
import itertools
import math
import random
from collections.abc import Sequence
from pathlib import Path

from hasgpu_core.errors import InvalidError

HASGPU_RATES_RPS = (
    *(8, 5, 5, 5, 5, 5, 5, 5, 7, 15, 14, 5, 15, 15, 15, 13, 5, 6, 15, 5, 5, 5, 5, 5, 15),
    *(15, 15, 15, 10, 5, 8, 15, 9, 15, 15, 15, 14, 13, 15, 15, 13, 15, 15, 15, 15, 15, 15, 15, 12, 6),
)
"""The 50 stages of the published HAS-GPU evaluation (5 s each there), requests a second."""
LARGEST_ARRIVALS_COUNT = 10_000_000


def parse_rates(text: str) -> tuple[float, ...]:
    """Parses rates in requests a second, separated by spaces or commas. Raises InvalidError."""
    rates = []
    for word in text.replace(",", " ").split():
        try:
            rate = float(word)
        except ValueError:
            rate = math.nan
        if not 0 <= rate < math.inf:
            raise InvalidError("--rates", expected='numbers of 0 or more, as "8 5 5"', got=repr(word))
        rates.append(rate)
    if not any(rates):
        raise InvalidError("--rates", expected="at least one rate above 0", got=repr(text))
    return tuple(rates)


def spread(rates_rps: Sequence[float], stage_s: float) -> list[float]:
    """Spaces requests evenly at each stage's rate; returns the due times in seconds.

    Fractions carry over from stage to stage: request k is due where the integral of the rate passes k + 1/2, so that
    the number of requests is the integral, rounded.
    """
    due_s: list[float] = []
    total = 0.0
    for index, rate in enumerate(rates_rps):
        end = total + rate * stage_s
        if end > LARGEST_ARRIVALS_COUNT:
            raise InvalidError("the load", expected=f"at most {LARGEST_ARRIVALS_COUNT} requests", got=f"{end:.0f}")
        while (k := len(due_s) + 0.5) < end:
            due_s.append(index * stage_s + (k - total) / rate)
        total = end
    return due_s


def poisson(rates_rps: Sequence[float], stage_s: float, rng: random.Random) -> list[float]:
    """Draws a Poisson process with each stage's rate; returns the due times in seconds."""
    due_s: list[float] = []
    for index, rate in enumerate(rates_rps):
        at_s = 0.0
        while rate > 0 and (at_s := at_s + rng.expovariate(rate)) < stage_s:
            due_s.append(index * stage_s + at_s)
    return due_s


def read_trace(path: Path, *, bin_s: float) -> list[float]:
    """Reads a CSV trace, gzipped or not; returns the due times in seconds from its first row.

    A column `t_s` gives one request a row; a column `counts` gives the number of requests in each bin of `bin_s`.

    Raises:
        InvalidError: Naming the file, the line and what came.
    """
    try:
        data = path.read_bytes()
        text = (gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data).decode("utf-8")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise InvalidError(f"cannot read the trace {path}", got=str(error)) from error
    rows = csv.DictReader(io.StringIO(text))
    columns = rows.fieldnames or []
    column = next((name for name in ("t_s", "counts") if name in columns), None)
    if column is None:
        raise InvalidError(f"{path}: header", expected="a column t_s or counts", got=", ".join(columns) or "nothing")
    values = []
    for line, row in enumerate(rows, start=2):
        try:
            value = float(row[column])
        except (TypeError, ValueError):
            value = math.nan
        if not 0 <= value < math.inf:
            raise InvalidError(f"{path}:{line}: {column}", expected="a number of 0 or more", got=repr(row[column]))
        values.append(value)
    if not values:
        raise InvalidError(str(path), expected="at least one row", got="none")
    if column == "counts":
        return spread([count / bin_s for count in values], bin_s)
    values.sort()
    return [value - values[0] for value in values]


def rescale(due_s: Sequence[float], *, speed: float, scale: float) -> list[float]:
    """Compresses time by `speed` and multiplies the number of requests by `scale`, repeating or dropping evenly."""
    if speed <= 0 or scale <= 0:
        raise InvalidError("--speed and --scale", expected="numbers above 0", got=f"{speed} and {scale}")
    scaled: list[float] = []
    for index, (at_s, next_s) in enumerate(itertools.pairwise([*due_s, *due_s[-1:]])):
        count = math.floor((index + 1) * scale) - math.floor(index * scale)
        scaled.extend((at_s + (next_s - at_s) * k / count) / speed for k in range(count))
    return scaled


def rate_curve(due_s: Sequence[float], bin_s: float) -> list[tuple[float, float]]:
    """Counts due times in bins; returns (start in seconds, requests a second), empty bins included."""
    if not due_s:
        return []
    counts = [0] * (int(max(due_s) / bin_s) + 1)
    for at_s in due_s:
        counts[int(at_s / bin_s)] += 1
    return [(index * bin_s, count / bin_s) for index, count in enumerate(counts)]
