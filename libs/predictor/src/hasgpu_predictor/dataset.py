"""Published profiles as files: latencies, operators, graph probes. Every refusal names file, line and column.

| file | columns |
|---|---|
| latency | model, batch, sm_pct, quota_pct, latency_ms |
| ops | model, op_index, op, flops, input_bytes, weight_bytes, output_bytes, groups, output_shape (as 1x64x55x55) |
| probes | model, batch, sm_pct, graph_latency_ms |

Comma-separated with a header, in any order of columns, further columns are ignored; `.gz` or plain.
"""

from __future__ import annotations

import csv
import gzip
import math
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np
from hasgpu_core.errors import InvalidError

from hasgpu_predictor.operators import Array, Operator

_Key = TypeVar("_Key", bound=tuple[object, ...])

LATENCY_COLUMNS = ("model", "batch", "sm_pct", "quota_pct", "latency_ms")
OPERATOR_COLUMNS = (
    "model", "op_index", "op", "flops", "input_bytes", "weight_bytes", "output_bytes", "groups", "output_shape",
)  # fmt: skip
PROBE_COLUMNS = ("model", "batch", "sm_pct", "graph_latency_ms")
AGREE = 1e-6
"""Relative difference up to which two rows of one configuration say the same."""
LATENCY_MAX_MS = 3_600_000.0


@dataclass(frozen=True, slots=True)
class Measured:
    """Latencies of one model."""

    configurations: Array
    """Shape (n, 3): batch, SM share and quota in per cent."""
    latency_ms: Array


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a file."""

    path: Path
    line: int
    values: Mapping[str, str] = field(repr=False)

    def where(self, column: str) -> str:
        """Names a cell."""
        return f"{self.path}, line {self.line}, column {column}"

    def number(self, column: str, low: float, high: float, *, above: bool = False) -> float:
        """Returns a cell's number; raises InvalidError unless it is finite and in the bounds (`above`: over `low`)."""
        text = self.values[column]
        expected = f"a number {'above' if above else 'of'} {low:g} {'up to' if above else 'to'} {high:g}"
        try:
            value = float(text)
        except ValueError as error:
            raise InvalidError(self.where(column), expected=expected, got=repr(text)) from error
        if not math.isfinite(value) or not low <= value <= high or (above and value == low):
            raise InvalidError(self.where(column), expected=expected, got=repr(text))
        return value

    def integer(self, column: str, low: int, high: int) -> int:
        """Returns a cell's whole number; raises InvalidError as `number`."""
        value = self.number(column, low, high)
        if value != int(value):
            raise InvalidError(self.where(column), expected="a whole number", got=repr(self.values[column]))
        return int(value)

    def text(self, column: str) -> str:
        """Returns a cell that must not be empty."""
        if not (value := self.values[column].strip()):
            raise InvalidError(self.where(column), expected="a text", got="nothing")
        return value


def read_latencies(path: Path) -> dict[str, Measured]:
    """Returns the latencies by model, in the file's order; raises InvalidError for a file that can't be."""
    seen: dict[tuple[str, int, float, float], tuple[float, int]] = {}
    for row in rows_of(path, LATENCY_COLUMNS):
        key = (
            row.text("model"),
            row.integer("batch", 1, 65_536),
            row.number("sm_pct", 0, 100, above=True),
            row.number("quota_pct", 0, 100, above=True),
        )
        latency_ms = row.number("latency_ms", 0, LATENCY_MAX_MS, above=True)
        _once(seen, key, latency_ms, row, "latency_ms")
    by_model: dict[str, list[tuple[float, ...]]] = {}
    for (model, *place), (latency_ms, _) in seen.items():
        by_model.setdefault(model, []).append((*place, latency_ms))
    tables = {model: np.array(entries, float) for model, entries in by_model.items()}
    return {model: Measured(table[:, :3], table[:, 3]) for model, table in tables.items()}


def read_operators(path: Path) -> dict[str, list[Operator]]:
    """Returns the operators of each model in order of `op_index`; raises InvalidError for a file that can't be."""
    found: dict[str, dict[int, Operator]] = {}
    for row in rows_of(path, OPERATOR_COLUMNS):
        index = row.integer("op_index", 0, 10_000_000)
        flops, given, weight, out = (
            row.number(c, 0, 1e18) for c in ("flops", "input_bytes", "weight_bytes", "output_bytes")
        )
        shape = row.values["output_shape"].strip()
        try:
            sizes = tuple(int(size) for size in shape.split("x")) if shape else ()
        except ValueError as error:
            raise InvalidError(row.where("output_shape"), expected="sizes as 1x64x55x55", got=repr(shape)) from error
        operator = Operator(row.text("op"), flops, given, weight, out, row.integer("groups", 0, 1_000_000), sizes)
        operators = found.setdefault(row.text("model"), {})
        if operators.get(index, operator) != operator:
            raise InvalidError(row.where("op_index"), expected="one row an operator", got=f"{index} again, otherwise")
        operators[index] = operator
    return {model: [operators[index] for index in sorted(operators)] for model, operators in found.items()}


def read_graph_probes(path: Path) -> dict[str, dict[float, float]]:
    """Returns graph time in ms by SM share for each model, of batch 1; raises InvalidError for a file that can't be."""
    seen: dict[tuple[str, float], tuple[float, int]] = {}
    for row in rows_of(path, PROBE_COLUMNS):
        if row.integer("batch", 1, 65_536) != 1:
            continue
        key = (row.text("model"), row.number("sm_pct", 0, 100, above=True))
        _once(seen, key, row.number("graph_latency_ms", 0, LATENCY_MAX_MS, above=True), row, "graph_latency_ms")
    found: dict[str, dict[float, float]] = {}
    for (model, sm_pct), (ms, _) in seen.items():
        found.setdefault(model, {})[sm_pct] = ms
    return found


def _once(seen: dict[_Key, tuple[float, int]], key: _Key, value: float, row: Row, column: str) -> None:
    before = seen.get(key)
    if before is not None and abs(value - before[0]) > AGREE * max(value, before[0]):
        raise InvalidError(
            row.where(column),
            expected=f"{before[0]:g} as in line {before[1]} for the same configuration",
            got=f"{value:g}",
        )
    seen.setdefault(key, (value, row.line))


def rows_of(path: Path, columns: tuple[str, ...]) -> Iterator[Row]:
    """Yields the rows of a file; raises InvalidError when it is unreadable, empty, or lacks a column."""
    try:
        with gzip.open(path, "rt", newline="") if path.suffix == ".gz" else path.open(newline="") as file:
            reader = csv.DictReader(file)
            names = reader.fieldnames or []
            for column in columns:
                if column not in names:
                    raise InvalidError(
                        f"{path}, line 1, column {column}", expected=_expected(column), got=_near(column, names)
                    )
            count = 0
            for values in reader:
                count += 1
                for column in columns:
                    if values[column] is None:
                        raise InvalidError(
                            f"{path}, line {reader.line_num}, column {column}", expected="a value", got="a short line"
                        )
                yield Row(path, reader.line_num, values)
            if not count:
                raise InvalidError(f"{path}, line 2", expected="at least one row", got="none")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError, csv.Error) as error:
        raise InvalidError(
            f"file {path}", expected="a readable CSV file", got=f"{type(error).__name__}: {error}"
        ) from error


def _expected(column: str) -> str:
    stem, _, unit = column.rpartition("_")
    return f"{stem} in {unit}, as column {column}" if unit in ("ms", "pct", "bytes") else f"the column {column}"


def _near(column: str, names: object) -> str:
    """The columns there are; one of another unit is named first."""
    present = [str(name) for name in names] if isinstance(names, list | tuple) else []
    stem = column.rpartition("_")[0]
    other = [name for name in present if stem and name.startswith(stem)]
    if other:
        return f"{other[0]}, a unit that is not known here"
    return "columns " + ", ".join(present) if present else "no header"
