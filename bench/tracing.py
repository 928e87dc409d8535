"""What tracing costs, and whether traces are whole.

    python bench/tracing.py [--blocks 16] [--rounds 15] [--requests 200] [--ratio 0.01]
                            [--output bench/results/cpu/tracing.json]

A block starts three systems side by side, each of its own brokers, gateway and worker: one that keeps 1 % of its traces
(`--ratio`) and two that are not traced. Only one is under load at a time, a closed loop of 16 callers of an echo
function. A round measures each twice, the second time in the opposite order, so that what gets faster or slower
steadily meanwhile does so for all three; the order itself turns from round to round. A cell is a number of requests,
few, so that the cells set against each other lie within a second. A block's figure is the median over its rounds of the
traced system's value over the mean of the two others'; told are the mean over the blocks and its 95 % confidence
interval (Student's t), so that what differs from process to process (ports, memory layout, who shares a core) lies
inside the interval too:

    CPU time     of gateway and worker together (all threads, to the nanosecond, by their processes' clocks), per
                 request: the main figure, since what else runs on the machine counts for little
    throughput   requests answered in a second: what CPU time costs callers, and the collector's part too

The second untraced system is held against the first in the same way: an interval that leaves out 0 there says that the
machine was not fit to measure on. No node agent runs: none is on a request's way.

Beside that stands what the code of tracing alone takes, by this process's CPU time, the least of many repetitions:
a request that is not kept (its RPC's span, the gateway's spans), a span that is, and its encoding. It leaves out what
they do to caches and to the rest of the process, but is told to a tenth of a microsecond on any machine.

Then one block compares a system that keeps every trace, and `--traced` requests are sent to it, each with a sampled
trace context of its own, as fast as 16 callers can; the spans that reached the collector are held against the chain
that the catalogue expects (`hasgpu_runtime.trace_catalogue.REQUEST_CHAIN`). The collector is a process of its own on
the same cores: that of `../shared/tools/compose-lab` where it is there, else the tests' own.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib.util
import json
import os
import secrets
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent import futures
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
from gateway import (
    FUNCTION,
    METHOD,
    UNBOUNDED,
    announce,
    deploy,
    free_address,
    prepare_worker,
    ready_event,
    request_of,
    worker_address,
)
from hasgpu_gateway.calls import BatchAnswer
from hasgpu_gateway.tracing import trace_batch, trace_request
from hasgpu_runtime.brokers import NatsServer, RedisServer
from hasgpu_runtime.rpc import wrap_handler
from hasgpu_runtime.sampling import Sampler
from hasgpu_runtime.telemetry import Telemetry
from hasgpu_runtime.trace_catalogue import REQUEST_CHAIN, SeenSpan, chain_faults
from hasgpu_runtime.tracer import ExportingTelemetry
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor

ROOT = Path(__file__).resolve().parents[1]
SHARED_SINK = ROOT.parent / "shared" / "tools" / "compose-lab" / "otlp_sink.py"
OFF, AGAIN, TRACED = "off", "off again", "traced"
CALLERS = 16
SIZE_BYTES = 64
INSTANCE = ready_event("127.0.0.1:50001", cores=2)
WARM_UP_COUNT = 2_000
"""Requests before a system's first cell."""
AWAKE_COUNT = 32
"""Requests before each cell."""
T_95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18, 2.16, 2.14, 2.13)
"""Student's t for a two-sided interval of 95 %, by degrees of freedom from 1; 2.1 beyond."""
SETTLE_S = 20.0
"""How long the last spans may take to the collector."""


@dataclass(frozen=True)
class Stack:
    """One system."""

    address: str
    pids: tuple[int, ...]
    gateway_log: Path

    def cpu_s(self) -> float:
        """CPU time of gateway and worker so far, by the clocks of their processes (see clock_getcpuclockid(3))."""
        return sum(time.clock_gettime_ns((~pid << 3) | 2) for pid in self.pids) / 1e9


# The collector, in a process of its own


def serve_sink(otlp_address: str, query_port: int) -> None:
    """Serves OTLP, and `/api/traces` as Jaeger does, for ever."""
    if SHARED_SINK.exists():
        spec = importlib.util.spec_from_file_location("shared_sink", SHARED_SINK)
        assert spec is not None
        assert spec.loader is not None
        module: Any = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        otlp: Any = trace_service_pb2_grpc
        server = grpc.server(futures.ThreadPoolExecutor(4))
        otlp.add_TraceServiceServicer_to_server(module.Sink(), server)
        server.add_insecure_port(otlp_address)
        server.start()
        ThreadingHTTPServer(("127.0.0.1", query_port), module.Query).serve_forever()
        return
    sys.path.insert(0, str(ROOT / "tests" / "support"))
    sink: Any = __import__("otlp_sink").OtlpSink(otlp_address)

    class Query(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            found = [
                {
                    "traceID": trace_id,
                    "spans": [
                        {
                            "spanID": span.span_id,
                            "parentSpanID": span.parent_id,
                            "operationName": span.name,
                            "service": span.service,
                            "tags": span.attributes,
                        }
                        for span in spans
                    ],
                }
                for trace_id, spans in sink.traces().items()
            ]
            body = json.dumps({"data": found}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: Any) -> None:
            pass

    ThreadingHTTPServer(("127.0.0.1", query_port), Query).serve_forever()


def traces_of(query_port: int) -> dict[str, list[SeenSpan]]:
    """Asks the collector for all it has."""
    url = f"http://127.0.0.1:{query_port}/api/traces?limit=1000000"
    with urllib.request.urlopen(url, timeout=60) as answer:
        data = json.load(answer)["data"]
    return {
        trace["traceID"]: [
            SeenSpan(s["operationName"], s["service"], s["spanID"], s["parentSpanID"], tuple(s["tags"]))
            for s in trace["spans"]
        ]
        for trace in data
    }


# The systems


@contextlib.contextmanager
def process(arguments: Sequence[str], log: Path, environ: dict[str, str]) -> Iterator[int]:
    """Runs a process while the block lasts and yields its id; its output goes to a file."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("OTEL_")}
    with log.open("wb") as output:
        running = subprocess.Popen([sys.executable, *arguments], stdout=output, stderr=output, env=kept | environ)
        try:
            yield running.pid
        except BaseException:
            print(f"--- {log.name}\n{log.read_text(errors='replace')[-4000:]}", file=sys.stderr)
            raise
        finally:
            running.terminate()
            running.wait(20)


@contextlib.contextmanager
def stack(folder: Path, ratio: str, otlp_address: str) -> Iterator[Stack]:
    """Runs brokers, gateway and worker; `ratio` is "" for one that is not traced."""
    folder.mkdir()
    cores = len(os.sched_getaffinity(0))
    address = free_address()
    traced = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://{otlp_address}",
        "OTEL_TRACES_SAMPLER": "parentbased_traceidratio",
        "OTEL_TRACES_SAMPLER_ARG": ratio,
        "OTEL_METRICS_EXPORTER": "none",
    }
    environ = traced if ratio else {}
    with NatsServer(folder / "nats") as nats, RedisServer(folder / "redis") as redis:
        brokers = {"HASGPU_NATS_URL": nats.url, "HASGPU_REDIS_URL": redis.url, "HASGPU_LISTEN": address}
        with process(["-m", "hasgpu_gateway"], folder / "gateway.log", environ | brokers) as gateway:
            spec = asyncio.run(deploy(address))
            config = prepare_worker(folder, spec, cores)
            arguments = ["-m", "hasgpu_node_agent.worker", "--config", str(config)]
            with process(arguments, folder / "worker.log", environ) as worker:
                asyncio.run(announce(nats.url, asyncio.run(worker_address(folder)), cores))
                yield Stack(address, (gateway, worker), folder / "gateway.log")


# The load


async def drive(channel: grpc.aio.Channel, count: int, trace_ids: Sequence[str] = ()) -> None:
    """Runs closed loops until so many requests are answered, or each trace id has gone with one."""
    wire_request = request_of(SIZE_BYTES).SerializeToString()
    left = list(trace_ids) or [""] * count
    call: Any = channel.unary_unary(METHOD)

    async def caller() -> None:
        while left:
            trace_id = left.pop()
            metadata = (("traceparent", f"00-{trace_id}-{secrets.token_hex(8)}-01"),) if trace_id else None
            await call(wire_request, timeout=60, metadata=metadata, wait_for_ready=True)

    await asyncio.gather(*(caller() for _ in range(CALLERS)))


async def cell(measured: Stack, channel: grpc.aio.Channel, count: int) -> Figures:
    """Loads a system with so many requests."""
    await drive(channel, AWAKE_COUNT)
    before_s, began_s = measured.cpu_s(), time.perf_counter()
    await drive(channel, count)
    took_s, cpu_s = time.perf_counter() - began_s, measured.cpu_s() - before_s
    return Figures(cpu_us=cpu_s * 1e6 / count, rps=count / took_s)


async def block(stacks: Mapping[str, Stack], rounds_count: int, count: int) -> list[Row]:
    """Measures the systems in turn; returns for each round the mean of a system's two cells."""
    rows: list[Row] = []
    async with contextlib.AsyncExitStack() as open_channels:
        channels = {}
        for name, measured in stacks.items():
            channel = grpc.aio.insecure_channel(measured.address, options=UNBOUNDED)
            channels[name] = await open_channels.enter_async_context(channel)
            await drive(channels[name], WARM_UP_COUNT)
        for number in range(rounds_count):
            turn = number % len(stacks)
            order = [*list(stacks)[turn:], *list(stacks)[:turn]]
            cells: dict[str, list[Figures]] = {name: [] for name in stacks}
            for name in [*order, *reversed(order)]:
                cells[name].append(await cell(stacks[name], channels[name], count))
            rows.append({name: Figures.mean(found) for name, found in cells.items()})
    for name in stacks:
        shown = Figures.median([row[name] for row in rows])
        print(f"  {name:>12} {shown.cpu_us:7.1f} µs CPU a request, {shown.rps:7.1f} requests/s", flush=True)
    return rows


# The code alone


class _Nowhere(SpanProcessor):
    """Keeps the spans of the newest repetition."""

    def __init__(self) -> None:
        self.spans: list[ReadableSpan] = []

    def on_end(self, span: ReadableSpan) -> None:
        self.spans.append(span)


class _Context:
    """As much of a call's context as tracing looks at."""

    def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
        return (("user-agent", "grpc-python-asyncio/1.85.1"),)

    def peer(self) -> str:
        return "ipv4:127.0.0.1:50000"


def least_us(work: Callable[[int], None], count: int = 2_000, repetitions: int = 40) -> float:
    """Returns the CPU time of one of `count` pieces of work, in the fastest of some repetitions."""
    taken_s = []
    for _ in range(repetitions):
        began_s = time.process_time()
        work(count)
        taken_s.append(time.process_time() - began_s)
    return round(min(taken_s) / count * 1e6, 2)


def request_work(telemetry: Telemetry) -> Callable[[int], None]:
    """Returns what runs the tracing of so many requests that are batched singly."""

    async def behavior(request: Any, context: Any) -> Any:
        trace = trace_request(telemetry, FUNCTION)
        trace.queued()
        trace.dispatched()
        trace_batch(telemetry, [trace], instance=INSTANCE, rows=1, predicted_s=0.001).ended(BatchAnswer(1, ()))
        trace.ended("")
        return request

    plain: Any = grpc.unary_unary_rpc_method_handler(behavior)
    call: Any = wrap_handler(plain, METHOD, telemetry if telemetry.enabled else None).unary_unary
    context = _Context()

    async def requests(count: int) -> None:
        for _ in range(count):
            await call(None, context)

    return lambda count: asyncio.run(requests(count))


def code_costs() -> dict[str, float]:
    """Returns what tracing takes in the gateway's code, per request, and per span."""
    nowhere = _Nowhere()

    def kept(count: int) -> None:
        nowhere.spans.clear()
        request_work(ExportingTelemetry(nowhere))(count)

    off_us = least_us(request_work(Telemetry()))
    not_kept_us = least_us(request_work(ExportingTelemetry(nowhere, sampler=Sampler(ratio=0.0))))
    kept_us = least_us(kept, count=200)
    spans = nowhere.spans

    def encoded(_: int) -> None:
        encode_spans(spans).SerializeToString()

    return {
        "not_kept_us_per_request": round(not_kept_us - off_us, 2),
        "kept_us_per_span": round((kept_us - off_us) * 200 / len(spans), 2),
        "encode_us_per_span": least_us(encoded, count=len(spans)),
    }


# The figures


@dataclass(frozen=True)
class Figures:
    """What a system did."""

    cpu_us: float
    """Of gateway and worker, per request."""
    rps: float

    @staticmethod
    def mean(several: Sequence[Figures]) -> Figures:
        """Returns the mean of both."""
        return Figures(statistics.mean(f.cpu_us for f in several), statistics.mean(f.rps for f in several))

    @staticmethod
    def median(several: Sequence[Figures]) -> Figures:
        """Returns the median of both."""
        return Figures(statistics.median(f.cpu_us for f in several), statistics.median(f.rps for f in several))


Row = dict[str, Figures]


def ratios(rows: Sequence[Row], name: str, base: Sequence[str]) -> Figures:
    """Returns a system's figures over those of others: medians over a block's rounds."""
    others = [Figures.mean([row[other] for other in base]) for row in rows]
    return Figures.median(
        [
            Figures(row[name].cpu_us / other.cpu_us, row[name].rps / other.rps)
            for row, other in zip(rows, others, strict=True)
        ]
    )


def estimate(values: Sequence[float]) -> dict[str, Any]:
    """Returns the mean over the blocks and its interval; no interval of a single block."""
    mean = statistics.mean(values)
    told: dict[str, Any] = {"ratio": round(mean, 5), "by_block": [round(value, 5) for value in values]}
    if len(values) > 1:
        degrees = len(values) - 1
        t = T_95[degrees - 1] if degrees <= len(T_95) else 2.1
        half = t * statistics.stdev(values) / len(values) ** 0.5
        told |= {"low": round(mean - half, 5), "high": round(mean + half, 5)}
    return told


def overhead(blocks: Sequence[Sequence[Row]], name: str, base: Sequence[str]) -> dict[str, Any]:
    """Returns what a system costs beside others: CPU time added, throughput lost, and the medians behind them."""
    found = [ratios(rows, name, base) for rows in blocks]
    told: dict[str, Any] = {
        "cpu_added": estimate([ratio.cpu_us - 1 for ratio in found]),
        "throughput_lost": estimate([1 - ratio.rps for ratio in found]),
    }
    for system in (name, *base):
        median = Figures.median([row[system] for rows in blocks for row in rows])
        told[system] = {"cpu_us_per_request": round(median.cpu_us, 1), "rps": round(median.rps, 1)}
    return told


def completeness(traced: Stack, query_port: int, count: int) -> dict[str, Any]:
    """Sends requests with contexts of their own; returns how many of the traces came whole, and what others lack."""
    ids = [secrets.token_hex(16) for _ in range(count)]

    async def send() -> None:
        async with grpc.aio.insecure_channel(traced.address, options=UNBOUNDED) as channel:
            await drive(channel, count, ids)

    asyncio.run(send())
    end_s = time.monotonic() + SETTLE_S
    while True:
        seen = traces_of(query_port)
        lacking = {i: found for i in ids if (found := chain_faults(seen.get(i, ()), REQUEST_CHAIN))}
        if not lacking or time.monotonic() > end_s:
            break
        time.sleep(0.5)
    return {
        "requests_count": count,
        "whole_count": count - len(lacking),
        "whole_ratio": round(1 - len(lacking) / count, 5),
        "lacking": dict(Counter("; ".join(found) for found in lacking.values())),
        "spans_count": sum(len(seen.get(i, ())) for i in ids),
    }


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Runs all; returns the report."""
    otlp_address, query_address = free_address(), free_address()
    query_port = int(query_address.rpartition(":")[2])
    blocks: list[list[Row]] = []
    code = code_costs()
    with tempfile.TemporaryDirectory(prefix="hasgpu-bench-") as scratch, contextlib.ExitStack() as collector:
        folder = Path(scratch)
        sink = [__file__, "--role", "sink", "--address", otlp_address, "--query-port", str(query_port)]
        collector.enter_context(process(sink, folder / "sink.log", {}))

        @contextlib.contextmanager
        def systems(label: str, ratios: Mapping[str, str]) -> Iterator[dict[str, Stack]]:
            with contextlib.ExitStack() as running:
                yield {
                    name: running.enter_context(stack(folder / f"{label}-{number}", ratio, otlp_address))
                    for number, (name, ratio) in enumerate(ratios.items())
                }

        for number in range(options.blocks):
            print(f"block {number}", flush=True)
            with systems(f"block{number}", {OFF: "", TRACED: str(options.ratio), AGAIN: ""}) as stacks:
                blocks.append(asyncio.run(block(stacks, options.rounds, options.requests)))
        print("every trace kept", flush=True)
        with systems("all", {OFF: "", TRACED: "1"}) as stacks:
            full = asyncio.run(block(stacks, options.rounds, options.requests))
            whole = completeness(stacks[TRACED], query_port, options.traced)
            gateway_log = stacks[TRACED].gateway_log
        # The gateway tells at its end what it had to drop.
        dropped = [line for line in gateway_log.read_text().splitlines() if "spans" in line and "traces go" not in line]
    return {
        "device": f"cpu-{len(os.sched_getaffinity(0))}c",
        "callers_count": CALLERS,
        "requests_by_cell_count": options.requests,
        "rounds_by_block_count": options.rounds,
        "sink": "../shared/tools/compose-lab" if SHARED_SINK.exists() else "tests/support",
        f"kept {options.ratio:g}": overhead(blocks, TRACED, (OFF, AGAIN)),
        "kept 1": overhead([full], TRACED, (OFF,)),
        "untraced against untraced": overhead(blocks, AGAIN, (OFF,)),
        "code": code,
        "traces": whole,
        "told_of_lost_spans": dropped,
    }


def tell(report: Mapping[str, Any]) -> None:
    """Prints the figures."""
    for title, found in report.items():
        if isinstance(found, dict) and "cpu_added" in found:
            line = f"{title:>26}:"
            for figure, words in (("cpu_added", "CPU time"), ("throughput_lost", "throughput")):
                sign = 1 if figure == "cpu_added" else -1
                shown = [sign * found[figure][key] for key in ("ratio", "low", "high") if key in found[figure]]
                line += f"  {words} {shown[0]:+.2%}"
                if len(shown) > 1:
                    line += f" (95 %: {min(shown[1:]):+.2%} to {max(shown[1:]):+.2%})"
            print(line)
    print(f"{'the code alone':>26}:  " + ", ".join(f"{name} {value}" for name, value in report["code"].items()))
    print(f"whole traces: {report['traces']['whole_count']} of {report['traces']['requests_count']}")
    for lacking, count in report["traces"]["lacking"].items():
        print(f"  {count}: {lacking}")
    for line in report["told_of_lost_spans"]:
        print(f"  {line}")


def main() -> None:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=16, help="each with processes of its own")
    parser.add_argument("--rounds", type=int, default=15, help="in a block")
    parser.add_argument("--requests", type=int, default=200, help="in a cell")
    parser.add_argument("--ratio", type=float, default=0.01, help="of the traces that are kept")
    parser.add_argument("--traced", type=int, default=1000, help="requests whose traces are checked")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "cpu" / "tracing.json")
    parser.add_argument("--role", choices=("bench", "sink"), default="bench", help=argparse.SUPPRESS)
    parser.add_argument("--address", default="", help=argparse.SUPPRESS)
    parser.add_argument("--query-port", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.role == "sink":
        serve_sink(options.address, options.query_port)
        return
    report = measure(options)
    tell(report)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    print(f"written to {options.output}")


if __name__ == "__main__":
    main()
