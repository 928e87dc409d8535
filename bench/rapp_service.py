"""rapp as a process on a real NATS: how long its calls take, and how fast observed batches mend a wrong start.

    python bench/rapp_service.py [--profiles ../shared/data/profiles/v100] [--json bench/results/cpu/rapp_service.json]

An agent in this process answers rapp's profiling run from the measured latencies of one model, at the configurations
that rapp's own probe plan asks for. Then

- calls of RappService are timed from a client on the same machine, one after the other (medians);
- rapp is given all that was measured of the model, which then is taken to have become 1.5 times slower: batches of an
  instance are published as a node agent does, at partial quotas, with waits at the gate, 5 % noise and 5 % outliers,
  and the tables that rapp publishes are compared with 1.5 times the measured latencies, as batches come in.

Without the profiles a formula stands in for them, and the JSON says so.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import csv
import gzip
import itertools
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc.aio
import numpy as np
from hasgpu.node_agent.v1 import node_agent_pb2, node_agent_pb2_grpc
from hasgpu.rapp.v1 import rapp_pb2, rapp_pb2_grpc
from hasgpu_core.capacity import CapacityTable
from hasgpu_core.events import (
    BatchObservation,
    FunctionEvent,
    InstanceEvent,
    NodeEvent,
    capacity_subject,
    function_subject,
    instance_subject,
    node_subject,
)
from hasgpu_core.function import Artifact, FunctionSpec, ModelFormat, TensorSpec
from hasgpu_core.ports import CaughtUp
from hasgpu_core.resources import Allocation, DeviceInfo, InstanceState
from hasgpu_runtime import wire
from hasgpu_runtime.brokers import NatsServer
from hasgpu_runtime.bus.nats import NatsBus
from hasgpu_runtime.clock import SystemClock
from hasgpu_runtime.rpc import create_server, open_channel

ROOT = Path(__file__).resolve().parents[1]
FUNCTION, DEVICE_MODEL = "resnet50", "V100"
BATCHES, SM_PCTS = (1, 2, 4, 8), tuple(range(10, 101, 10))
QUOTAS = tuple(range(50, 1_001, 50))
SURFACE_COUNT = len(BATCHES) * len(SM_PCTS) * len(QUOTAS)
CALLS, WARM_UP_CALLS = 200, 20
SLOWER = 1.5
OBSERVED_COUNTS = (20, 40, 80, 120, 200)
START_TIMEOUT_S = 90.0
Cell = tuple[int, int, int]


def read_latencies(folder: Path) -> dict[Cell, float]:
    """Returns seconds by configuration; a formula's when there is no such folder."""
    path = folder / "latency.csv.gz"
    if not path.exists():
        grid = [(b, s, q) for b in BATCHES for s in SM_PCTS for q in range(100, 1_001, 100)]
        return {(b, s, q): max(d := 0.002 + 0.004 * b * 100 / s, 0.3 * d * 1e3 / q) for b, s, q in grid}
    with gzip.open(path, "rt", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["model"] == FUNCTION]
    cells = {(int(r["batch"]), int(r["sm_pct"]), 10 * int(r["quota_pct"])): float(r["latency_ms"]) / 1e3 for r in rows}
    return {cell: latency_s for cell, latency_s in cells.items() if cell[0] in BATCHES and cell[1] in SM_PCTS}


class Agent(node_agent_pb2_grpc.NodeAgentServiceServicer):
    """Measures by looking up."""

    def __init__(self, latencies_s: dict[Cell, float]) -> None:
        self.latencies_s = latencies_s
        self.measured: list[Cell] = []

    async def Profile(self, request: Any, context: Any) -> AsyncIterator[node_agent_pb2.ProfileResponse]:  # noqa: N802
        """Answers what it is asked for while the budget would have lasted."""
        left_s = request.budget_ms / 1e3
        for c in request.configurations:
            latency_s = self.latencies_s.get((c.batch, c.sm_pct, c.quota_permille))
            if latency_s is None:
                continue
            if (left_s := left_s - 12 * latency_s) < 0 and self.measured:
                return
            self.measured.append((c.batch, c.sm_pct, c.quota_permille))
            yield node_agent_pb2.ProfileResponse(
                point=node_agent_pb2.ProfilePoint(
                    batch=c.batch,
                    sm_pct=c.sm_pct,
                    quota_permille=c.quota_permille,
                    latency_ns=round(latency_s * 1e9),
                    repetitions_count=12,
                )
            )


@contextlib.asynccontextmanager
async def rapp(nats_url: str, folder: Path) -> AsyncIterator[grpc.aio.Channel]:
    """Runs the service; gives a channel to it."""
    log = folder / "rapp.log"
    environ = os.environ | {"HASGPU_NATS_URL": nats_url, "HASGPU_STATE_DIR": str(folder)}
    with log.open("wb") as output:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "hasgpu_rapp", stdout=output, stderr=output, env=environ
        )
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                while "rapp listens on " not in (text := log.read_text()):  # noqa: ASYNC110  its log is all it tells
                    await asyncio.sleep(0.05)
            async with open_channel(text.split("rapp listens on ")[1].split()[0]) as channel:
                yield channel
        except BaseException:
            print(log.read_text()[-4_000:], file=sys.stderr)
            raise
        finally:
            process.terminate()
            await asyncio.wait_for(process.wait(), 30)


def function_event() -> FunctionEvent:
    """The function, as the gateway would publish it."""
    tensor = TensorSpec("x", "FP32", (-1, 3))
    spec = FunctionSpec(
        name=FUNCTION,
        format=ModelFormat.TORCH_EXPORT,
        artifact=Artifact("a" * 64, 100 << 20),
        entry="model.pt2",
        inputs=(tensor,),
        outputs=(tensor,),
        slo_ms=500,
        max_batch=max(BATCHES),
    )
    return FunctionEvent(spec, 1, time.time_ns())


async def table(bus: NatsBus, wanted: Callable[[CapacityTable], bool], timeout_s: float) -> CapacityTable | None:
    """Returns the table in force as soon as it fits; after the time what there is, which may be None."""
    last = None
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(timeout_s), bus.watch(capacity_subject(FUNCTION, DEVICE_MODEL)) as changes:
            async for change in changes:
                if not isinstance(change, CaughtUp) and change.payload is not None:
                    last = wire.decode_capacity(change.payload)
                    if wanted(last):
                        break
    return last


async def timed(call: Callable[[], Awaitable[Any]]) -> dict[str, float]:
    """Median and 95th percentile of a call, in ms."""
    times_ms = []
    for index in range(CALLS + WARM_UP_CALLS):
        began_s = time.perf_counter()
        await call()
        if index >= WARM_UP_CALLS:
            times_ms.append(1e3 * (time.perf_counter() - began_s))
    times_ms.sort()
    return {"median_ms": round(statistics.median(times_ms), 3), "p95_ms": round(times_ms[len(times_ms) * 95 // 100], 3)}


async def measure_calls(channel: grpc.aio.Channel) -> dict[str, Any]:
    """Times the calls."""
    stub = rapp_pb2_grpc.RappServiceStub(channel)
    surface = rapp_pb2.PredictSurfaceRequest(
        function=FUNCTION, device_model=DEVICE_MODEL, batches=BATCHES, sm_pcts=SM_PCTS, quotas_permille=QUOTAS
    )
    grid = itertools.product(BATCHES, SM_PCTS, QUOTAS)
    cells = [rapp_pb2.Configuration(batch=b, sm_pct=sm, quota_permille=q) for b, sm, q in grid]
    names = {"function": FUNCTION, "device_model": DEVICE_MODEL}
    began_s = time.perf_counter()
    first = await stub.PredictSurface(surface, timeout=60)
    first_ms = 1e3 * (time.perf_counter() - began_s)
    assert len(first.points) == SURFACE_COUNT == len(first.low_us)
    asked: dict[str, Callable[[], Awaitable[Any]]] = {
        f"surface_{SURFACE_COUNT}": lambda: stub.PredictSurface(surface, timeout=60),
        "predict_1": lambda: stub.Predict(rapp_pb2.PredictRequest(**names, configurations=cells[:1]), timeout=60),
        f"predict_{SURFACE_COUNT}": lambda: stub.Predict(
            rapp_pb2.PredictRequest(**names, configurations=cells), timeout=60
        ),
        "capacity_100": lambda: stub.Capacity(
            rapp_pb2.CapacityRequest(function=FUNCTION, device_model=DEVICE_MODEL, configurations=cells[:100]),
            timeout=60,
        ),
        "describe": lambda: stub.Describe(rapp_pb2.DescribeRequest(), timeout=60),
    }
    return {"first_surface_ms": round(first_ms, 2)} | {name: await timed(call) for name, call in asked.items()}


def observations(latencies_s: dict[Cell, float], count: int, rng: np.random.Generator) -> tuple[BatchObservation, ...]:
    """Batches of an instance whose model has become slower."""
    whole = sorted(cell for cell in latencies_s if cell[2] == 1_000)
    made = []
    for _ in range(count):
        batch, sm_pct, _ = whole[int(rng.integers(len(whole)))]
        run_s = SLOWER * latencies_s[batch, sm_pct, 1_000] * float(np.exp(0.05 * rng.standard_normal()))
        if rng.random() < 0.05:
            run_s *= float(rng.uniform(3, 15))
        quota, wait_ns = int(rng.choice((200, 400, 600))), round(1e9 * rng.exponential(2 * run_s))
        made.append(BatchObservation(batch, sm_pct, quota, round(1e9 * run_s) + wait_ns, 0, gate_wait_ns=wait_ns))
    return tuple(made)


def error_pct(found: CapacityTable, latencies_s: dict[Cell, float], factor: float) -> float:
    """Mean absolute error over the measured configurations of the table's grid, in per cent."""
    at = {(p.batch, p.sm_pct, p.quota_permille): p.latency_s for p in found.points}
    both = [(at[cell], factor * latency_s) for cell, latency_s in latencies_s.items() if cell in at]
    return 100 * statistics.fmean(abs(predicted / truth - 1) for predicted, truth in both)


async def know_all(bus: NatsBus, channel: grpc.aio.Channel, latencies_s: dict[Cell, float]) -> CapacityTable:
    """Hands all measurements to rapp, so that what is left to mend is the wrong start; returns the table of them."""
    request = rapp_pb2.IngestRequest(function=FUNCTION, device_model=DEVICE_MODEL)
    for (batch, sm_pct, quota), latency_s in sorted(latencies_s.items()):
        request.points.add(batch=batch, sm_pct=sm_pct, quota_permille=quota, latency_ns=round(latency_s * 1e9))
    await rapp_pb2_grpc.RappServiceStub(channel).Ingest(request, timeout=60)
    found = await table(bus, lambda t: t.version >= 2, START_TIMEOUT_S)
    assert found is not None
    assert found.version >= 2
    return found


async def converge(bus: NatsBus, latencies_s: dict[Cell, float], start: CapacityTable) -> list[dict[str, float]]:
    """Publishes batches and tells the table's error after each portion."""
    rng = np.random.default_rng(1)
    curve = [{"batches": 0, "error_pct": round(error_pct(start, latencies_s, SLOWER), 2), "correction": 1.0}]
    done = 0
    for until in OBSERVED_COUNTS:
        while done < until:
            made = observations(latencies_s, min(20, until - done), rng)
            done += len(made)
            event = InstanceEvent(
                function=FUNCTION,
                instance=f"{FUNCTION}-0",
                node="bench",
                gpu="gpu0",
                row=0,
                state=InstanceState.READY,
                reason="",
                address="",
                allocation=Allocation(100, 400, 400, 1),
                allocation_revision=1,
                function_revision=1,
                device_model=DEVICE_MODEL,
                plan_revision=1,
                batches_count=done,
                observed_unix_ns=time.time_ns(),
                observations=made,
            )
            await bus.put(instance_subject(FUNCTION, f"{FUNCTION}-0"), wire.encode(event))
            await asyncio.sleep(0.2)
        now_ns = time.time_ns()
        # a correction within its dead band is not published again: then the table in force is the one that counts
        found = await table(bus, lambda t, now_ns=now_ns: t.computed_unix_ns > now_ns, 7.0)  # type: ignore[misc]  # bound
        assert found is not None
        point = {"batches": done, "error_pct": round(error_pct(found, latencies_s, SLOWER), 2)}
        curve.append(point | {"correction": found.run_correction_permille / 1e3})
    return curve


async def bench(arguments: argparse.Namespace) -> dict[str, Any]:
    """Runs all of it."""
    latencies_s = read_latencies(arguments.profiles)
    agent = Agent(latencies_s)  # type: ignore[abstract]  # the other calls are not made
    server = create_server(address="127.0.0.1:0")
    node_agent_pb2_grpc.add_NodeAgentServiceServicer_to_server(agent, server)
    await server.start()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        broker = NatsServer(folder / "nats")
        broker.start()
        try:
            async with (
                NatsBus.connect(broker.url, name="bench", clock=SystemClock()) as bus,
                rapp(broker.url, folder) as channel,
            ):
                device = DeviceInfo("bench", "gpu0", DEVICE_MODEL, "cuda", 16 << 30, SM_PCTS)
                node = NodeEvent("bench", server.address, (device,), time.time_ns(), 0)
                await bus.put(node_subject("bench"), wire.encode(node))
                began_s = time.perf_counter()
                await bus.put(function_subject(FUNCTION), wire.encode(function_event()))
                static = await table(bus, lambda _table: True, START_TIMEOUT_S)
                static_s = time.perf_counter() - began_s
                start = await table(bus, lambda t: t.basis == "profiled", START_TIMEOUT_S)
                profiled_s = time.perf_counter() - began_s
                assert static is not None
                assert start is not None
                assert start.basis == "profiled"
                calls = await measure_calls(channel)
                whole = await know_all(bus, channel, latencies_s)
                curve = await converge(bus, latencies_s, whole)
        finally:
            broker.stop()
            await server.stop(0)
    return {
        "data": f"profiles/{arguments.profiles.name}"
        if (arguments.profiles / "latency.csv.gz").exists()
        else "formula",
        "machine": {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        "surface_configurations": SURFACE_COUNT,
        "calls_count": CALLS,
        "calls": calls,
        "static_table_after_s": round(static_s, 3),
        "profiled_table_after_s": round(profiled_s, 3),
        "probes_in_budget": len(agent.measured),
        "error_pct": {
            "static": round(error_pct(static, latencies_s, 1.0), 2),
            "profiled": round(error_pct(start, latencies_s, 1.0), 2),
            "all_measured": round(error_pct(whole, latencies_s, 1.0), 2),
        },
        "slower_by": SLOWER,
        "correction": curve,
    }


def main() -> None:
    """Parses, measures, prints, writes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--profiles", type=Path, default=ROOT.parent / "shared/data/profiles/v100")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    result = asyncio.run(bench(arguments))
    text = json.dumps(result, indent=1)
    print(text)
    if arguments.json is not None:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
