"""Arrival traces: files of every known shape, told apart by their columns, as arrival times from 0 on.

| columns | what it is |
|---|---|
| `t_s`, ... | one request a line (Azure LLM 2023) |
| `t_s`, `input_tokens`, ... | the same in batches of about 3 s (Mooncake): each is spread until the next one |
| `set`, `source_index`, `rps` | HAS-GPU's replays: stages of 5 s, several sets in a file |
| `count` | counts a second of one service (NASA) |
| `fn`, `c0`, `c1`, ... (`app`, `trigger` or not) | counts a minute, a function a line (Azure Functions, excerpts) |
| `fn`, `c0`, ..., `c1439`, without `app` and `trigger` | the same, summed over 14 days: divided by 14 |
| `HashOwner`, `HashApp`, `HashFunction`, `Trigger`, `1`, `2`, ... | the public Azure Functions 2019 file |

Counts say nothing of arrivals inside a bin; the process does (even or Poisson), and is told with every result. Inside a
bin of n requests even means n at equal distances, Poisson n uniformly distributed times (a Poisson process given its
count), except for HAS-GPU's stages, which are rates: there a Poisson process draws its count too.
"""

from __future__ import annotations

import csv
import difflib
import gzip
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from random import Random

from hasgpu_core.errors import InvalidError, NotFoundError

from hasgpu_sim.arrivals import Process, RateStep, arrival_times_s

CODE = "utf-8-sig"
"""What spreadsheets put before the first column does not belong to its name."""
STAGE_S = 5.0
MINUTE_S = 60.0
DAYS_SUMMED = 14
DAY_MINUTES = 1_440
MOST_SPREAD_S = 3.0
"""A batch of a trace whose times are those of batches is spread over the time until the next, at most this."""


@dataclass(frozen=True, slots=True)
class Trace:
    """Arrivals of one or more functions."""

    name: str
    duration_s: float
    arrivals_s: Mapping[str, Sequence[float]]
    """By function, ascending, from 0 on, below `duration_s`."""
    notes: tuple[str, ...] = ()
    """What was done with the file's numbers beyond reading them."""
    timed: bool = False
    """The file has single times: no process was needed to place requests inside bins."""

    @property
    def requests_count(self) -> int:
        """Of all functions."""
        return sum(len(times) for times in self.arrivals_s.values())

    def first(self, seconds: float) -> Trace:
        """Returns its first part."""
        kept = {name: array("d", (t for t in times if t < seconds)) for name, times in self.arrivals_s.items()}
        return replace(self, duration_s=min(seconds, self.duration_s), arrivals_s=kept)


def load_trace(
    path: Path, *, part: str = "", process: Process = Process.EVEN, rate_scale: float = 1.0, seed: int = 0
) -> Trace:
    """Reads a trace.

    Args:
        path: A CSV file, plain or gzipped.
        part: Of a file with several sets (HAS-GPU's replays): which, empty: the first. Of one with several functions:
            one of them, empty: all.
        process: How arrivals lie inside a bin.
        rate_scale: Rates and counts are multiplied by it; a trace of single times runs faster by it.
        seed: Of what is drawn.

    Raises:
        InvalidError: It is of no known shape, has gaps or a count that can't be; names file, line and column.
        NotFoundError: It has no such part.
    """
    if not 0 < rate_scale < 1e6:
        raise InvalidError("rate_scale", expected="more than 0", got=str(rate_scale))
    rng = Random(seed)  # noqa: S311  a simulation is reproduced from its seed
    try:
        with gzip.open(path, "rt", encoding=CODE) if path.suffix == ".gz" else path.open(encoding=CODE) as file:
            rows = csv.reader(file)
            header = [title.strip() for title in next(rows, [])]
            reader = _reader(header)
            if reader is None:
                raise InvalidError(
                    f"trace {path}",
                    expected="columns t_s, or set and rps, or count, or fn and c0 ..., or HashFunction and 1 ...",
                    got=repr(", ".join(header[:6])) if any(header) else "nothing",
                )
            if part and reader not in (_read_stages, _read_functions):
                raise NotFoundError("trace part", part, f"{path} is one trace, without parts")
            name = path.name.split(".")[0] + (f":{part}" if part else "")
            return reader(_Source(path, header, rows), name, part, process, rate_scale, rng)
    except (OSError, EOFError, UnicodeDecodeError, csv.Error) as error:
        raise InvalidError(f"trace {path}", expected="a CSV file, plain or gzipped", got=_why(error)) from error


def _why(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


@dataclass(frozen=True, slots=True)
class _Source:
    path: Path
    header: list[str]
    rows: Iterator[list[str]]

    def lines(self) -> Iterator[tuple[int, list[str]]]:
        """Numbered lines with as many values as there are columns."""
        for number, row in enumerate(self.rows, start=2):
            if len(row) != len(self.header):
                raise InvalidError(
                    f"trace {self.path}, line {number}", expected=f"{len(self.header)} values", got=f"{len(row)}"
                )
            yield number, row

    def number(self, line: int, column: str, text: str, *, whole: bool = False) -> float:
        """A number of 0 and up."""
        try:
            value = float(text)
        except ValueError:
            value = -1.0
        if not 0 <= value < 1e12 or (whole and value != int(value)):
            raise InvalidError(
                f"trace {self.path}, line {line}, column {column}",
                expected="a whole number of 0 or more" if whole else "a number of 0 or more",
                got=repr(text) if text else "a gap",
            )
        return value


_Reader = Callable[[_Source, str, str, Process, float, Random], Trace]


def _reader(header: Sequence[str]) -> _Reader | None:
    if "t_s" in header:
        return _read_times
    if "rps" in header:
        return _read_stages
    if list(header) == ["count"]:
        return _read_counts
    if "fn" in header or "HashFunction" in header:
        return _read_functions
    return None


def _read_times(source: _Source, name: str, part: str, process: Process, scale: float, rng: Random) -> Trace:
    at = source.header.index("t_s")
    times = sorted(source.number(line, "t_s", row[at]) for line, row in source.lines())
    if not times:
        raise InvalidError(f"trace {source.path}", expected="at least one request", got="none")
    notes: tuple[str, ...] = ()
    batched = "input_tokens" in source.header
    if batched:
        times = _spread(times, process, rng)
        notes = (
            f"requests with one time are spread ({process.value}) until the next time, {MOST_SPREAD_S:g} s at most",
        )
    arrivals = array("d", ((t - times[0]) / scale for t in times))
    return Trace(name, arrivals[-1] + 1.0, {"f": arrivals}, notes, timed=not batched)


def _spread(times: Sequence[float], process: Process, rng: Random) -> list[float]:
    """Spreads requests that came at one time over the time until the next one."""
    distinct = sorted(set(times))
    counts = Counter(times)
    out: list[float] = []
    for at_s, next_s in pairwise([*distinct, distinct[-1] + MOST_SPREAD_S]):
        count, length_s = counts[at_s], min(MOST_SPREAD_S, next_s - at_s)
        if process is Process.EVEN:
            out += [at_s + i * length_s / count for i in range(count)]
        else:
            out += sorted(at_s + rng.random() * length_s for _ in range(count))
    return out


def _read_stages(source: _Source, name: str, part: str, process: Process, scale: float, rng: Random) -> Trace:
    columns = source.header
    stages: dict[str, list[float]] = {}
    before: dict[str, int] = {}
    for line, row in source.lines():
        which = row[columns.index("set")] if "set" in columns else ""
        if "source_index" in columns:
            index = int(source.number(line, "source_index", row[columns.index("source_index")], whole=True))
            if before.setdefault(which, index - 1) + 1 != index:
                raise InvalidError(
                    f"trace {source.path}, line {line}, column source_index",
                    expected=f"{before[which] + 1}, the stage after the one before",
                    got=f"{index}: a gap",
                )
            before[which] = index
        stages.setdefault(which, []).append(source.number(line, "rps", row[columns.index("rps")]))
    if part and part not in stages:
        raise NotFoundError("trace part", part, f"the file has {', '.join(sorted(stages))}")
    if not stages:
        raise InvalidError(f"trace {source.path}", expected="at least one stage", got="none")
    rates = stages[part] if part else next(iter(stages.values()))
    steps = [RateStep(STAGE_S, rate * scale) for rate in rates]
    chosen = part or next(iter(stages))
    others = [which for which in stages if which != chosen]
    notes = (f"set {chosen}; FILE:SET takes another: {', '.join(others)}",) if others and not part else ()
    return Trace(name, STAGE_S * len(rates), {"f": array("d", arrival_times_s(steps, process, rng))}, notes)


def _read_counts(source: _Source, name: str, part: str, process: Process, scale: float, rng: Random) -> Trace:
    counts = [source.number(line, "count", row[0], whole=True) for line, row in source.lines()]
    if not counts:
        raise InvalidError(f"trace {source.path}", expected="at least one count", got="none")
    return Trace(name, float(len(counts)), {"f": times_of_counts(counts, 1.0, process, rng, scale=scale)})


def _read_functions(source: _Source, name: str, part: str, process: Process, scale: float, rng: Random) -> Trace:
    columns = source.header
    key = columns.index("fn") if "fn" in columns else columns.index("HashFunction")
    minutes = [
        (i, int(title.removeprefix("c"))) for i, title in enumerate(columns) if title.removeprefix("c").isdecimal()
    ]
    numbers = [minute for _, minute in minutes]
    if not numbers or numbers != list(range(numbers[0], numbers[0] + len(numbers))):
        raise InvalidError(f"trace {source.path}", expected="a column for each minute in a row", got="a gap")
    notes: tuple[str, ...] = ()
    if "fn" in columns and "app" not in columns and "trigger" not in columns and len(minutes) == DAY_MINUTES:
        scale /= DAYS_SUMMED
        notes = (f"each count is the sum of {DAYS_SUMMED} days: divided by {DAYS_SUMMED}",)
    arrivals: dict[str, Sequence[float]] = {}
    for line, row in source.lines():
        counts = [source.number(line, columns[i], row[i], whole=True) for i, _ in minutes]
        function = row[key]
        if function in arrivals:
            function = f"{function}-{line}"
        arrivals[function] = times_of_counts(counts, MINUTE_S, process, rng, scale=scale)
    if part and part not in arrivals:
        raise NotFoundError("function of the trace", part, f"nearest: {', '.join(_nearest(part, arrivals))}")
    if part:
        arrivals = {part: arrivals[part]}
    return Trace(name, MINUTE_S * len(minutes), arrivals, notes)


def _nearest(name: str, known: Iterable[str]) -> Sequence[str]:
    known = sorted(known)
    return difflib.get_close_matches(name, known, n=3, cutoff=0.0) or known[:3]


def times_of_counts(
    counts: Sequence[float], bin_s: float, process: Process, rng: Random, *, scale: float = 1.0
) -> array[float]:
    """Returns arrival times with so many in each bin; what scaling leaves of a request is carried to the next bin."""
    times = array("d")
    carried = 0.0
    for index, count in enumerate(counts):
        carried += count * scale
        whole = int(carried + 1e-9)
        carried -= whole
        start_s = index * bin_s
        if process is Process.EVEN:
            times.extend(start_s + i * bin_s / whole for i in range(whole))
        else:
            times.extend(sorted(start_s + rng.random() * bin_s for _ in range(whole)))
    return times
