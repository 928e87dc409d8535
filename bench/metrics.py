"""What metrics cost: recording a value in a cell of ours and in OpenTelemetry's own instrument, and a scrape.

python bench/metrics.py [--out FILE]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import socket
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from urllib.request import urlopen

from hasgpu_runtime.metric_catalogue import CATALOGUE, QUEUE_LENGTH, REQUEST_DURATION, Kind
from hasgpu_runtime.metrics import Metrics, Sink
from hasgpu_runtime.metrics_export import Exporters
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader

CALLS_COUNT = 20_000
ROUNDS_COUNT = 15
FUNCTIONS_COUNT = 100
VALUE_S = 0.12


def measure(call: Callable[[], object]) -> dict[str, float]:
    """Returns the median and the least time of a call in microseconds, over rounds."""
    rounds = []
    for _ in range(ROUNDS_COUNT):
        began = time.perf_counter()
        for _ in range(CALLS_COUNT):
            call()
        rounds.append((time.perf_counter() - began) / CALLS_COUNT * 1e6)
    return {"median_us": round(statistics.median(rounds), 3), "least_us": round(min(rounds), 3)}


async def measure_scrape() -> dict[str, float]:
    """Returns what one scrape of a gateway with FUNCTIONS_COUNT functions takes, and how large it is."""
    metrics = Metrics()
    for number in range(FUNCTIONS_COUNT):
        for spec in CATALOGUE.values():
            if spec.services == ("gateway",) and spec.kind is Kind.HISTOGRAM:
                metrics.histogram(spec, f"function-{number}").record(VALUE_S)

    def collect(sink: Sink) -> None:
        for number in range(FUNCTIONS_COUNT):
            sink.put(QUEUE_LENGTH, 1, f"function-{number}")

    metrics.collect_with(collect)
    loop_s = []
    for _ in range(ROUNDS_COUNT):
        began = time.perf_counter()
        list(metrics.collect())
        loop_s.append(time.perf_counter() - began)
    port = free_port()
    exporters = Exporters(metrics, service="gateway", instance="b", environ={}, listen="127.0.0.1:0", port=port)
    async with exporters.running(time.time_ns):
        rounds, size = [], 0
        for _ in range(ROUNDS_COUNT):
            began = time.perf_counter()
            size = len(await asyncio.to_thread(lambda: urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60).read()))
            rounds.append(time.perf_counter() - began)
    return {
        "functions_count": FUNCTIONS_COUNT,
        "bytes": size,
        "median_ms": round(statistics.median(rounds) * 1e3, 1),
        "of_it_collecting_ms": round(statistics.median(loop_s) * 1e3, 1),
    }


def free_port() -> int:
    """Returns a port nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    out = parser.parse_args().out
    cell = Metrics().histogram(REQUEST_DURATION, "minilm")
    provider = MeterProvider([InMemoryMetricReader()])
    instrument = provider.get_meter("bench").create_histogram(
        "request.duration", "s", explicit_bucket_boundaries_advisory=REQUEST_DURATION.buckets
    )
    attributes = {"function": "minilm"}
    result = {
        "calls_count": CALLS_COUNT * ROUNDS_COUNT,
        "cell": measure(lambda: cell.record(VALUE_S)),
        "opentelemetry": measure(lambda: instrument.record(VALUE_S, attributes)),
        "nothing": measure(lambda: None),
        "scrape": asyncio.run(measure_scrape()),
    }
    provider.shutdown()
    print(json.dumps(result, indent=1))
    if out is not None:
        out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
