"""What the live system costs on emulated GPUs: CPU cores of the agent, the workers (gate) and the services; shares got.

    python bench/emulated.py [--gpus 16] [--instances 64] [--seconds 20] [--json bench/results/emulated/system.json]

Starts `hasgpu up --device emulated`, deploys functions of 8 instances each until there are `--instances`, gives all
the same quota (four of 25 % fill a row), and measures three times: idle; saturated, when every worker runs batches
back to back (RPC `Measure`: the gate and nothing else); and load through the gateway, closed loops of full batches.
CPU time is read from /proc, of each process; device time from the control blocks.

Two cores can't make the requests that saturate 16 modern GPUs. So the GPUs are emulated from the shipped profile with
its times multiplied by `--slow-down`: segments stay as long as they are (5 ms), so the gate has as much to do as on
the real ones, and requests become fewer.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import psutil
from hasgpu.inference.v2 import inference_pb2 as oip
from hasgpu.inference.v2 import inference_pb2_grpc
from hasgpu.node_agent.v1 import node_agent_pb2 as pb
from hasgpu.node_agent.v1 import node_agent_pb2_grpc
from hasgpu_device.control import ControlBlock
from hasgpu_device.errors import ControlBlockError
from live_system import LiveSystem, live_system, write_results

INSTANCES_PER_FUNCTION = 8
MODEL = "segformer-b0"
BATCH = 32
READY_WITHIN_S = 600.0
SETTLE_S = 3.0
FUNCTION = """
name: {name}
format: python
path: .
entry: handler.py
inputs:
  - {{name: x, datatype: FP32, shape: [-1, 4]}}
outputs:
  - {{name: y, datatype: FP32, shape: [-1, 4]}}
slo_ms: 30000
timeout_ms: 60000
max_batch: {batch}
memory_mib: {memory}
instances: {{min: {count}, max: {count}}}
parameters: {{hasgpu.emulate: {model}}}
"""


def deploy(system: LiveSystem, gpus: int, count: int, quota_pct: float, gpu_bytes: int) -> list[str]:
    """Deploys functions with `count` instances in all, and gives each instance the quota; waits until all have it.

    The scheduler packs instances; that each asks for its part of a GPU's memory is what spreads them over all GPUs.
    """
    names = []
    memory_mib = int(gpu_bytes / 2**20 / -(-count // gpus) * 0.99)
    for index in range(-(-count // INSTANCES_PER_FUNCTION)):
        name = f"load-{index}"
        share = min(INSTANCES_PER_FUNCTION, count - index * INSTANCES_PER_FUNCTION)
        text = FUNCTION.format(name=name, count=share, model=MODEL, batch=BATCH, memory=memory_mib)
        system.call("deploy", system.write_function(name, text), "--no-wait")
        names.append(name)
    wait(system, count, lambda instance: instance["state"] == "ready", "ready")
    for name in names:
        quota = f"{quota_pct:g}"
        system.call("scale", name, "--quota", quota, "--limit", quota, "--hold", "3600")
    permille = round(quota_pct * 10)
    wait(system, count, lambda instance: instance["allocation"]["request_permille"] == permille, "at their quota")
    return names


def wait(system: LiveSystem, count: int, is_done: Any, what: str) -> None:
    """Waits until all instances are so; SystemExit with what is not."""
    until_s = time.monotonic() + READY_WITHIN_S
    while time.monotonic() < until_s:
        found = system.instances()
        done = sum(instance["state"] == "ready" and is_done(instance) for instance in found)
        if len(found) == count and done == count:
            return
        print(f"  {done} of {count} instances are {what}", file=sys.stderr, flush=True)
        time.sleep(2)
    raise SystemExit(f"not all instances are {what}: {[(i['instance'], i['state'], i['reason']) for i in found]}")


def used_ns(paths: dict[str, Path]) -> dict[str, int]:
    """Returns the device time of each instance so far, as its worker tells."""
    used = {}
    for name, path in paths.items():
        with contextlib.suppress(ControlBlockError), ControlBlock.open(path) as control:
            used[name] = control.read_counters().used_ns
    return used


def cpu_s(roles: dict[str, list[int]]) -> dict[str, dict[int, float]]:
    """Returns the CPU time so far of each role's processes that live."""
    spent: dict[str, dict[int, float]] = {}
    for role, pids in {**roles, "bench": [os.getpid()]}.items():
        spent[role] = {}
        for pid in pids:
            with contextlib.suppress(psutil.NoSuchProcess):
                times = psutil.Process(pid).cpu_times()
                spent[role][pid] = times.user + times.system
    return spent


async def phase(system: LiveSystem, title: str, seconds: float, work: Any) -> dict[str, Any]:
    """Runs `work` and measures meanwhile; returns one row."""
    roles, paths = system.roles(), system.control_paths()
    task = asyncio.create_task(work(SETTLE_S + seconds + 2 * SETTLE_S))
    await asyncio.sleep(SETTLE_S)
    before, began_s = cpu_s(roles), time.monotonic()
    used_before_ns = used_ns(paths)
    await asyncio.sleep(seconds)
    after, took_s = cpu_s(roles), time.monotonic() - began_s
    used_after_ns = used_ns(paths)
    found = await asyncio.to_thread(system.instances)
    answered, latencies_s = await task
    shares = []
    gpus: dict[str, float] = defaultdict(float)
    for instance in found:
        name = instance["instance"]
        if name not in used_before_ns or name not in used_after_ns:
            continue  # its worker was replaced meanwhile: `processes_ended` tells
        got = (used_after_ns[name] - used_before_ns[name]) / 1e9 / took_s
        shares.append(1_000 * got)
        allocation = instance["allocation"]
        gpus[f"{instance['node']}/{instance['gpu']}"] += got * allocation["sm_pct"] / 100
    cores = {
        role: sum(spent - before[role].get(pid, spent) for pid, spent in pids.items()) / took_s
        for role, pids in after.items()
    }
    ended = [f"{role} {pid}" for role, pids in before.items() for pid in pids if pid not in after[role]]
    if ended:
        told = [f"{i['instance']}: {i['reason']}" for i in found if i["restarts_count"]]
        print(f"  ended meanwhile: {ended}; restarted: {told}", file=sys.stderr, flush=True)
        print(system.call("logs", "node-agent-0", "-n", "20"), file=sys.stderr, flush=True)
    row = {
        "phase": title,
        "seconds": round(took_s, 1),
        "cores": {role: round(value, 4) for role, value in sorted(cores.items())},
        "agent_and_gate_cores": round(cores["node-agent"] + cores["workers"], 3),
        "instances": len(found),
        "gpus_in_use": sum(busy > 0 for busy in gpus.values()),
        "request_permille": found[0]["allocation"]["request_permille"],
        "got_permille": {
            "least": round(min(shares), 1),
            "median": round(statistics.median(shares), 1),
            "most": round(max(shares), 1),
        },
        "gpu_busy_permille": round(1_000 * statistics.mean(gpus.values()), 1),
        "batches": answered,
        "processes_ended": len(ended),
    }
    if latencies_s:
        ordered = sorted(latencies_s)
        row["p50_ms"] = round(1e3 * ordered[len(ordered) // 2], 1)
        row["p95_ms"] = round(1e3 * ordered[len(ordered) * 95 // 100], 1)
    print(json.dumps(row), flush=True)
    return row


async def idle(seconds: float) -> tuple[int, list[float]]:
    """No load."""
    await asyncio.sleep(seconds)
    return 0, []


def saturate(system: LiveSystem) -> Any:
    """Returns work in which each worker runs full batches back to back."""
    addresses = [instance["address"] for instance in system.instances()]

    async def measure(address: str, seconds: float) -> int:
        async with grpc.aio.insecure_channel(address) as channel:
            stub = node_agent_pb2_grpc.WorkerServiceStub(channel)
            request = pb.MeasureRequest(batch=BATCH, repetitions_count=1_000_000, budget_ms=round(seconds * 1e3))
            answer = await stub.Measure(request, timeout=seconds + 60)
        return int(answer.repetitions_count)

    async def work(seconds: float) -> tuple[int, list[float]]:
        return sum(await asyncio.gather(*(measure(address, seconds) for address in addresses))), []

    return work


def load(address: str, names: Sequence[str], callers: int) -> Any:
    """Returns work in which `callers` closed loops a function send full batches through the gateway."""

    async def caller(stub: Any, name: str, end_s: float, latencies_s: list[float]) -> None:
        request = oip.ModelInferRequest(model_name=name)
        request.inputs.add(name="x", datatype="FP32", shape=[BATCH, 4])
        request.raw_input_contents.append(os.urandom(BATCH * 16))
        while time.monotonic() < end_s:
            began_s = time.monotonic()
            answer = await stub.ModelInfer(request, timeout=120)
            latencies_s.append(time.monotonic() - began_s)
            if not answer.parameters["emulated"].bool_param:
                raise SystemExit("an answer does not say that it was emulated")

    async def work(seconds: float) -> tuple[int, list[float]]:
        latencies_s: list[float] = []
        end_s = time.monotonic() + seconds
        async with grpc.aio.insecure_channel(address) as channel:
            stub = inference_pb2_grpc.GRPCInferenceServiceStub(channel)
            await asyncio.gather(
                *(caller(stub, name, end_s, latencies_s) for name in names for _ in range(callers)),
            )
        return len(latencies_s), latencies_s

    return work


async def run(options: argparse.Namespace) -> dict[str, Any]:
    """Runs the three phases; returns the document."""
    with live_system(options.gpus, options.slow_down) as system:
        profile = system.profile
        names = deploy(system, options.gpus, options.instances, options.quota, profile.header.memory_bytes)
        address = system.json("up")["endpoints"]["gateway"]
        callers = round(1.5 * INSTANCES_PER_FUNCTION)
        rows = [
            await phase(system, "idle", options.seconds, idle),
            await phase(system, "saturated", options.seconds, saturate(system)),
            await phase(system, "gateway", options.seconds, load(address, names, callers)),
        ]
        memory = [psutil.Process(pid).memory_full_info() for pid in system.roles()["workers"]]
    return {
        "device": f"emulated-{profile.header.device_model}",
        "gpus": options.gpus,
        "slow_down": options.slow_down,
        "model": MODEL,
        "batch": BATCH,
        "host_cores": len(os.sched_getaffinity(0)),
        "worker_rss_mib": round(statistics.median(one.rss for one in memory) / 2**20, 1),
        "worker_pss_mib": round(statistics.median(one.pss for one in memory) / 2**20, 1),
        "rows": rows,
    }


def main() -> None:
    """Runs the benchmark and writes its figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, default=16)
    parser.add_argument("--instances", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--quota", type=float, default=25.0, help="of each instance, in per cent")
    parser.add_argument("--slow-down", type=float, default=20.0)
    parser.add_argument("--json", type=Path, metavar="OUT")
    options = parser.parse_args()
    document = asyncio.run(run(options))
    if options.json is not None:
        write_results(options.json, document)


if __name__ == "__main__":
    main()
