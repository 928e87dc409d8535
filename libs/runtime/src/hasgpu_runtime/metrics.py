"""Metrics of one process: cells that cost next to nothing to write, read when somebody scrapes.

OpenTelemetry's own instruments hash their attributes and take a lock at each measurement, and keep a series for ever.
Here a cell is bound to its attribute values once and then is a plain number, what is known anyway is read by a
collector only when a scrape asks, and what belongs to a deleted function is dropped. From there on it is
OpenTelemetry's data model, translated by its exporters (`metrics_export`).

Everything happens on the event loop's thread: a scrape is brought there. Cells may be written from elsewhere only where
losing a count now and then does no harm.
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from hasgpu_runtime.metric_catalogue import CATALOGUE, SERIES_DROPPED, Kind, MetricSpec

_log = logging.getLogger(__name__)

MAX_SERIES: Final = 4_096
"""Of one metric; what comes beyond is left out and counted, so that no mistake fills a monitoring system."""

Labels = tuple[str, ...]
"""Attribute values, in the order of `MetricSpec.attributes`."""


class Counter:
    """One series of a counter."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 0.0

    def add(self, amount: float = 1.0) -> None:
        """Adds an amount of zero or more."""
        self.value += amount


class Histogram:
    """One series of a histogram."""

    __slots__ = ("_bounds", "counts", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        """By bucket; an upper bound belongs to its bucket, the last has none."""
        self.total = 0.0

    def record(self, value: float) -> None:
        """Takes a value."""
        self.counts[bisect_left(self._bounds, value)] += 1
        self.total += value


@dataclass(frozen=True, slots=True)
class Point:
    """One series as collected."""

    labels: Labels
    value: float
    """Of a histogram: the sum of its values."""
    counts: tuple[int, ...] = ()
    """By bucket, of a histogram."""


class Sink:
    """Takes what collectors find during one collection."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self.points: dict[str, dict[Labels, Point]] = {}

    def put(self, spec: MetricSpec, value: float, *labels: str) -> None:
        """Gives a gauge's or counter's value now; one for the same labels again adds to it."""
        _check(spec, labels, Kind.GAUGE, Kind.COUNTER)
        series = self.points.setdefault(spec.name, {})
        before = series.get(labels)
        if before is None and len(series) >= MAX_SERIES:
            self._metrics.dropped(spec)
            return
        series[labels] = Point(labels, value + (before.value if before is not None else 0.0))


Collector = Callable[[Sink], None]


class Metrics:
    """All metrics of a process."""

    def __init__(self) -> None:
        self._counters: dict[str, dict[Labels, Counter]] = {}
        self._histograms: dict[str, dict[Labels, Histogram]] = {}
        self._collectors: list[Collector] = []

    def counter(self, spec: MetricSpec, *labels: str) -> Counter:
        """Returns the cell of a counter with these attribute values; the same one each time."""
        _check(spec, labels, Kind.COUNTER)
        series = self._counters.setdefault(spec.name, {})
        cell = series.get(labels)
        if cell is None:
            cell = Counter()
            if self._has_room(spec, len(series)):
                series[labels] = cell
        return cell

    def histogram(self, spec: MetricSpec, *labels: str) -> Histogram:
        """Returns the cell of a histogram with these attribute values; the same one each time."""
        _check(spec, labels, Kind.HISTOGRAM)
        series = self._histograms.setdefault(spec.name, {})
        cell = series.get(labels)
        if cell is None:
            cell = Histogram(spec.buckets)
            if self._has_room(spec, len(series)):
                series[labels] = cell
        return cell

    def collect_with(self, collector: Collector) -> None:
        """Has a function called at each collection, which puts what is so then; it must not block."""
        self._collectors.append(collector)

    def forget(self, attribute: str, value: str) -> None:
        """Drops every cell with this attribute value, that of a deleted function for instance.

        A cell still held elsewhere can be written to, and is not seen any more.
        """
        for family in (self._counters, self._histograms):
            for name, series in family.items():
                attributes = CATALOGUE[name].attributes
                if attribute in attributes:
                    place = attributes.index(attribute)
                    for labels in [labels for labels in series if labels[place] == value]:
                        del series[labels]

    def collect(self) -> Iterator[tuple[MetricSpec, tuple[Point, ...]]]:
        """Yields every metric that has a series now, in the order of the catalogue; on the event loop's thread."""
        sink = Sink(self)
        for collector in self._collectors:
            try:
                collector(sink)
            except Exception:  # noqa: BLE001  a mistake in one collector must not hide what the others have
                _log.exception("a collector of metrics failed")
        for name, counters in self._counters.items():
            found = {labels: Point(labels, cell.value) for labels, cell in counters.items()}
            sink.points[name] = found | sink.points.get(name, {})
        for name, histograms in self._histograms.items():
            sink.points[name] = {
                labels: Point(labels, cell.total, tuple(cell.counts)) for labels, cell in histograms.items()
            }
        for name, spec in CATALOGUE.items():
            if series := sink.points.get(name):
                yield spec, tuple(series.values())

    def dropped(self, spec: MetricSpec) -> None:
        """Counts a value that was left out."""
        if spec is not SERIES_DROPPED:
            cell = self.counter(SERIES_DROPPED, spec.name)
            if not cell.value:
                _log.warning("%s has %d series; further ones are left out", spec.name, MAX_SERIES)
            cell.add()

    def _has_room(self, spec: MetricSpec, count: int) -> bool:
        if count < MAX_SERIES:
            return True
        self.dropped(spec)
        return False


def _check(spec: MetricSpec, labels: Labels, *kinds: Kind) -> None:
    """Raises TypeError for a use that the catalogue does not allow: a mistake in the program."""
    if spec.kind not in kinds or len(labels) != len(spec.attributes):
        expected = f"a {' or '.join(kind.value for kind in kinds)} with {len(labels)} attributes"
        raise TypeError(f"{spec.name}: expected {expected}, it is a {spec.kind.value} with {spec.attributes}")
