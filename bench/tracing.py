"""What tracing costs, and whether traces are whole.

    python bench/tracing.py [--rounds 12] [--duration-s 3] [--output bench/results/cpu/tracing.json]

Runs three systems side by side, each of its own brokers, gateway and worker: one not traced, one that keeps 1 % of its
traces, one that keeps all. Only one is under load at a time, a closed loop of 16 callers of an echo function; cells are
measured round by round, in an order that turns with each round, so that what slows the machine for a while slows all
three. Told are medians over the rounds of what each system does, set against the untraced one in the same round:

    throughput   requests answered in a second
    CPU time     of gateway and worker together, per request: what a fuller machine would feel; the steadier figure

The untraced system has two cells in every round; their mean is what the others are set against, and what each of them
differs from it by is the noise: an overhead below that can't be told.

Then `--traced` requests are sent, each with a sampled trace context of its own, to the system that keeps everything, as
fast as 16 callers can; the spans that reached the collector are held against the chain that the catalogue expects
(`hasgpu_runtime.trace_catalogue.REQUEST_CHAIN`). The collector is a process of its own on the same cores: that of
`../shared/tools/compose-lab` where it is there, else the tests' own.
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
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent import futures
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
from gateway import METHOD, UNBOUNDED, announce, deploy, free_address, prepare_worker, request_of, worker_address
from hasgpu_runtime.brokers import NatsServer, RedisServer
from hasgpu_runtime.trace_catalogue import REQUEST_CHAIN, SeenSpan, chain_faults
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc

ROOT = Path(__file__).resolve().parents[1]
SHARED_SINK = ROOT.parent / "shared" / "tools" / "compose-lab" / "otlp_sink.py"
SAMPLERS = {"off": "", "1 %": "0.01", "100 %": "1"}
CELLS = ("off", "1 %", "100 %", "off again")
CALLERS = 16
SIZE_BYTES = 64
WARM_UP_S = 0.5
SETTLE_S = 20.0
"""How long the last spans may take to the collector."""
TICKS_PER_S = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Stack:
    """One system."""

    address: str
    pids: tuple[int, ...]
    gateway_log: Path

    def cpu_s(self) -> float:
        """CPU time of gateway and worker so far."""
        total = 0
        for pid in self.pids:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            total += int(fields[11]) + int(fields[12])
        return total / TICKS_PER_S


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


async def drive(address: str, duration_s: float, trace_ids: Sequence[str] = ()) -> dict[str, float]:
    """Runs closed loops for a time, or until each trace id has gone with one request."""
    wire_request = request_of(SIZE_BYTES).SerializeToString()
    left = list(trace_ids)
    counts = {"all": 0, "timed": 0}
    async with grpc.aio.insecure_channel(address, options=UNBOUNDED) as channel:
        call: Any = channel.unary_unary(METHOD)
        await call(wire_request, timeout=60, wait_for_ready=True)
        begin_s = time.perf_counter() + WARM_UP_S
        end_s = begin_s + duration_s

        async def caller() -> None:
            while left if trace_ids else time.perf_counter() < end_s:
                metadata = (("traceparent", f"00-{left.pop()}-{secrets.token_hex(8)}-01"),) if trace_ids else None
                await call(wire_request, timeout=60, metadata=metadata)
                counts["all"] += 1
                counts["timed"] += begin_s <= time.perf_counter() <= end_s

        await asyncio.gather(*(caller() for _ in range(CALLERS)))
    return {"rps": counts["timed"] / duration_s, "requests_count": counts["all"] + 1}


def cell(measured: Stack, duration_s: float) -> dict[str, float]:
    """Loads a system from a process of its own; returns throughput and CPU time."""
    before_s = measured.cpu_s()
    arguments = [sys.executable, __file__, "--role", "load", "--address", measured.address]
    done = subprocess.run(
        [*arguments, "--duration-s", str(duration_s)],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        timeout=duration_s + 120,
    )
    found = json.loads(done.stdout)
    cpu_us = (measured.cpu_s() - before_s) * 1e6 / found["requests_count"]
    return {"rps": round(found["rps"], 1), "cpu_us_per_request": round(cpu_us, 1)}


# The figures


def overheads(rounds: Sequence[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Returns, per system, medians, and medians and quartiles of its ratio to the untraced one of the same round."""
    result: dict[str, dict[str, float]] = {}

    def to_untraced(row: dict[str, dict[str, float]], name: str, figure: str) -> float:
        return row[name][figure] / statistics.mean(row[untraced][figure] for untraced in ("off", "off again"))

    for name in CELLS:
        rps_ratios = [1 - to_untraced(row, name, "rps") for row in rounds]
        cpu_ratios = [to_untraced(row, name, "cpu_us_per_request") - 1 for row in rounds]
        low, _, high = statistics.quantiles(rps_ratios, n=4) if len(rps_ratios) > 1 else (rps_ratios * 3)
        result[name] = {
            "rps": statistics.median(row[name]["rps"] for row in rounds),
            "cpu_us_per_request": statistics.median(row[name]["cpu_us_per_request"] for row in rounds),
            "throughput_lost_ratio": round(statistics.median(rps_ratios), 4),
            "throughput_lost_ratio_quartile_low": round(low, 4),
            "throughput_lost_ratio_quartile_high": round(high, 4),
            "cpu_added_ratio": round(statistics.median(cpu_ratios), 4),
        }
    return result


def completeness(traced: Stack, query_port: int, count: int) -> dict[str, Any]:
    """Sends requests with trace contexts of their own; returns how many of the traces came whole, and what others lack.

    The load comes from a thread of this process, since it needs no timing.
    """
    ids = [secrets.token_hex(16) for _ in range(count)]
    sender = threading.Thread(target=lambda: asyncio.run(drive(traced.address, 1.0, ids)))
    sender.start()
    sender.join()
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


def measure(rounds_count: int, duration_s: float, traced_count: int) -> dict[str, Any]:
    """Runs all; returns the report."""
    cores = len(os.sched_getaffinity(0))
    otlp_address, query_address = free_address(), free_address()
    query_port = int(query_address.rpartition(":")[2])
    rounds: list[dict[str, dict[str, float]]] = []
    with tempfile.TemporaryDirectory(prefix="hasgpu-bench-") as scratch, contextlib.ExitStack() as systems:
        folder = Path(scratch)
        sink = [__file__, "--role", "sink", "--address", otlp_address, "--query-port", str(query_port)]
        systems.enter_context(process(sink, folder / "sink.log", {}))
        stacks = {
            name: systems.enter_context(stack(folder / f"stack{number}", ratio, otlp_address))
            for number, (name, ratio) in enumerate(SAMPLERS.items())
        }
        print(f"{'round':>5} " + "".join(f"{name + ' rps':>14}{'CPU µs':>9}" for name in CELLS))
        for number in range(rounds_count):
            turned = [*CELLS[number % len(CELLS) :], *CELLS[: number % len(CELLS)]]
            row = {name: cell(stacks[name.removesuffix(" again")], duration_s) for name in turned}
            rounds.append(row)
            values = "".join(f"{row[name]['rps']:>14.1f}{row[name]['cpu_us_per_request']:>9.1f}" for name in CELLS)
            print(f"{number:>5} {values}", flush=True)
        whole = completeness(stacks["100 %"], query_port, traced_count)
        gateway_log = stacks["100 %"].gateway_log
        # The gateway tells at its end what it had to drop.
        systems.close()
        dropped = [line for line in gateway_log.read_text().splitlines() if "spans" in line and "traces go" not in line]
    return {
        "device": f"cpu-{cores}c",
        "duration_s": duration_s,
        "callers_count": CALLERS,
        "sink": "../shared/tools/compose-lab" if SHARED_SINK.exists() else "tests/support",
        "systems": overheads(rounds),
        "traces": whole,
        "told_of_lost_spans": dropped,
        "rounds": rounds,
    }


def main() -> None:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--duration-s", type=float, default=3.0, help="of each cell, after a warm-up of half a second")
    parser.add_argument("--traced", type=int, default=1000, help="requests whose traces are checked")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "cpu" / "tracing.json")
    parser.add_argument("--role", choices=("bench", "load", "sink"), default="bench", help=argparse.SUPPRESS)
    parser.add_argument("--address", default="", help=argparse.SUPPRESS)
    parser.add_argument("--query-port", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.role == "load":
        print(json.dumps(asyncio.run(drive(options.address, options.duration_s))))
        return
    if options.role == "sink":
        serve_sink(options.address, options.query_port)
        return
    report = measure(options.rounds, options.duration_s, options.traced)
    for name, figures in report["systems"].items():
        print(
            f"{name:>10}: {figures['rps']:.1f} rps, {figures['cpu_us_per_request']:.1f} µs CPU a request; "
            f"throughput lost {figures['throughput_lost_ratio']:+.1%} "
            f"(quartiles {figures['throughput_lost_ratio_quartile_low']:+.1%} to "
            f"{figures['throughput_lost_ratio_quartile_high']:+.1%}), CPU added {figures['cpu_added_ratio']:+.1%}"
        )
    print(f"whole traces: {report['traces']['whole_count']} of {report['traces']['requests_count']}")
    for lacking, count in report["traces"]["lacking"].items():
        print(f"  {count}: {lacking}")
    for line in report["told_of_lost_spans"]:
        print(f"  {line}")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    print(f"written to {options.output}")


if __name__ == "__main__":
    main()
