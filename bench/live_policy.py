"""The whole system on emulated GPUs under HAS-GPU's replay, and what the simulator says of the same arrivals.

    python bench/live_policy.py                       # 180 s of replay; about 6 minutes
    python bench/live_policy.py --seconds 60          # shorter
    python bench/live_policy.py --policies hybrid,hasgpu,kserve

Starts `hasgpu up --device emulated`, deploys three functions, and sends each its replay through the gateway, open loop.
Cost is read from the control blocks, from the start of each worker's process to its end: SM share x (request + device
time used beyond it), as the simulator counts it. Late and dropped requests are those that the gateways count. Then the
simulator runs the same arrivals, with the device times that the GPUs were emulated from, the capacity tables that rapp
had published, the cold starts that were seen, the periods of the live services, and what this host adds to a request
(measured on lone ones beforehand); its physics is `device-time`. Printed and written are both and their ratios.

The GPUs are emulated from the shipped profile with its times multiplied by `--slow-down`: requests then take some tens
of milliseconds, and what this host's two cores add to each (the gateway, RPC, waiting for a core) matters less.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import random
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil
from hasgpu_cli.client import Target
from hasgpu_cli.commands.policy import set_policy
from hasgpu_cli.home import Home
from hasgpu_cli.load import Replay, run_open_loop
from hasgpu_cli.recordings import fetch
from hasgpu_cli.sender import FunctionSender, random_samples
from hasgpu_cli.status import fetch_functions
from hasgpu_core.capacity import CapacityTable
from hasgpu_core.events import DemandEvent
from hasgpu_core.function import FunctionSpec, TensorSpec
from hasgpu_core.policy.choice import make_live_policy
from hasgpu_core.profile import Profile
from hasgpu_core.recording import RecordedInput, RecordedLoad
from hasgpu_device.control import ControlBlock
from hasgpu_device.errors import ControlBlockError
from hasgpu_sim.arrivals import Process
from hasgpu_sim.physics import Physics
from hasgpu_sim.recorded import RecordedScenario, scenario_of_recording
from hasgpu_sim.recording import read_recording_bytes
from hasgpu_sim.scenario import FunctionLoad, Moving, Scenario, Timing
from hasgpu_sim.simulate import simulate
from hasgpu_sim.surface import from_profile
from hasgpu_sim.traces import load_trace
from live_system import LiveSystem, control_path, live_system, write_results

ROOT = Path(__file__).resolve().parents[1]
SETTLE_S = 30.0
"""The functions are there for so long before the first request, in both."""
SAMPLE_S = 0.05
PROBES = 10
PROBE_HOLD_S = 20
LOOK_S = 0.5
FUNCTIONS = (("vision", "resnet50", "rps"), ("text", "minilm", "stress"), ("names", "distilbert", "rps"))
"""Name, model of the profile, set of the replay."""
FUNCTION = """
name: {name}
format: python
path: .
entry: handler.py
inputs:
  - {{name: x, datatype: FP32, shape: [-1, 4]}}
outputs:
  - {{name: y, datatype: FP32, shape: [-1, 4]}}
slo_ms: {slo_ms}
timeout_ms: 5000
max_batch: 8
memory_mib: 1024
instances: {{min: 1, max: 8}}
parameters: {{hasgpu.emulate: {model}}}
"""
TENSOR = TensorSpec("x", "FP32", (-1, 4))


@dataclass(slots=True)
class _Meter:
    """One worker's cost."""

    function: str
    pid: int
    block: ControlBlock
    at_s: float
    borrowed_ns: int
    reserved_gpu_s: float = 0.0
    borrowed_gpu_s: float = 0.0


@dataclass(slots=True)
class CostMeter:
    """Reads the control blocks of all instances while a load runs."""

    target: Target
    meters: dict[str, _Meter] = field(default_factory=dict)
    longest_gap_s: float = 0.0

    async def run(self) -> None:
        """Samples until cancelled."""
        looked_s = 0.0
        while True:
            now_s = time.monotonic()
            if now_s - looked_s >= LOOK_S:
                looked_s = now_s
                for function in await fetch_functions(self.target):
                    for instance in function["instances"]:
                        self._open(function["spec"]["name"], instance)
            self.sample()
            await asyncio.sleep(SAMPLE_S)

    def sample(self) -> None:
        """Adds what each instance cost since it was last looked at."""
        for meter in self.meters.values():
            now_s = time.monotonic()
            shares, borrowed_ns = meter.block.read_shares(), meter.block.read_counters().borrowed_ns
            passed_s, meter.at_s = now_s - meter.at_s, now_s
            part = shares.sm_pct / 100
            meter.borrowed_gpu_s += part * max(0, borrowed_ns - meter.borrowed_ns) / 1e9
            meter.borrowed_ns = borrowed_ns
            if psutil.pid_exists(meter.pid):
                self.longest_gap_s = max(self.longest_gap_s, passed_s)
                meter.reserved_gpu_s += part * shares.request_permille / 1e3 * passed_s

    def reset(self) -> None:
        """Begins to count anew."""
        self.sample()
        self.longest_gap_s = 0.0
        for meter in self.meters.values():
            meter.reserved_gpu_s = meter.borrowed_gpu_s = 0.0

    def by_function(self) -> dict[str, tuple[float, float]]:
        """GPU-seconds so far: of requests, and of what was borrowed beyond them."""
        self.sample()
        found: dict[str, tuple[float, float]] = {}
        for meter in self.meters.values():
            reserved, borrowed = found.get(meter.function, (0.0, 0.0))
            found[meter.function] = reserved + meter.reserved_gpu_s, borrowed + meter.borrowed_gpu_s
        return found

    def _open(self, function: str, instance: Mapping[str, Any]) -> None:
        name = f"{instance['instance']}/{instance['pid']}"
        if name in self.meters or not instance["pid"]:
            return
        with contextlib.suppress(psutil.Error, ControlBlockError, OSError, ValueError):
            block = ControlBlock.open(control_path(instance["pid"]))
            # Its share is taken from the start of its process on, and a worker borrows nothing while it loads.
            began_s = time.monotonic() - max(0.0, time.time() - psutil.Process(instance["pid"]).create_time())
            self.meters[name] = _Meter(function, instance["pid"], block, began_s, 0)


def deploy(system: LiveSystem, multiple: float) -> dict[str, int]:
    """Deploys the functions and waits until they are profiled and ready; returns their objectives."""
    slos_ms = {}
    for name, model, _ in FUNCTIONS:
        slos_ms[name] = round(multiple * from_profile(system.profile, model).reference_s * 1e3)
        text = FUNCTION.format(name=name, model=model, slo_ms=slos_ms[name])
        print(f"deploying {name}: {model}, SLO {slos_ms[name]} ms", file=sys.stderr, flush=True)
        system.call("deploy", system.write_function(name, text))
    return slos_ms


def arrivals(options: argparse.Namespace) -> dict[str, list[float]]:
    """Returns when each function's requests are due."""
    path = options.data / "traces" / "has_gpu_replay_5s.csv.gz"
    found = {}
    for index, (name, _, part) in enumerate(FUNCTIONS):
        trace = load_trace(
            path, part=part, process=Process(options.arrivals), rate_scale=options.rate_scale, seed=options.seed + index
        )
        found[name] = list(trace.first(options.seconds).arrivals_s["f"])
    return found


async def transport(system: LiveSystem, target: Target) -> float:
    """Returns what this host adds to a request, in seconds: the median of lone ones, less their device time."""
    rng, added_s = random.Random(1), []
    for name, _, _ in FUNCTIONS:
        # The smallest share with all of the row to borrow: a lone batch takes its device time.
        system.call("scale", name, "--quota", "5", "--limit", "100", "--hold", str(PROBE_HOLD_S))
    await asyncio.sleep(1.0)
    async with target.channel("gateway") as channel:
        samples = random_samples([TENSOR], rng)
        for function in await fetch_functions(target):
            name = function["spec"]["name"]
            model = next(model for other, model, _ in FUNCTIONS if other == name)
            surface = from_profile(system.profile, model, emulated=True)
            sm_pct = next(i["allocation"]["sm_pct"] for i in function["instances"] if i["state"] == "ready")
            sender = FunctionSender(channel, name, samples, timeout_s=10.0)
            for index in range(PROBES):
                began_s = time.monotonic()
                await sender.send(index)
                added_s.append(time.monotonic() - began_s - surface.device_s(1, sm_pct))
                await asyncio.sleep(0.2)
    await asyncio.sleep(PROBE_HOLD_S)
    return max(0.0, statistics.median(added_s))


async def live(
    target: Target, policy: str, due_s: Mapping[str, Sequence[float]], slos_ms: Mapping[str, int], seconds: float
) -> tuple[dict[str, dict[str, Any]], RecordedLoad, float]:
    """Sends the load under a policy; returns what came of it, the scaler's recording, and its begin (unix seconds)."""
    await set_policy(target, policy)
    meter = CostMeter(target)
    task = asyncio.create_task(meter.run())
    await asyncio.sleep(SETTLE_S)
    replays = {name: Replay(times) for name, times in due_s.items()}
    async with target.channel("gateway") as channel:
        rng = random.Random(1)
        samples = random_samples([TENSOR], rng)
        senders = {name: FunctionSender(channel, name, samples, timeout_s=10.0) for name in due_s}
        meter.reset()
        before = await counted(target)
        began_unix_s, began_s = time.time(), time.monotonic()
        async with asyncio.TaskGroup() as group:
            for name, replay in replays.items():
                group.create_task(run_open_loop(replay, senders[name].send, began_s=began_s))
        await asyncio.sleep(max(0.0, began_s + seconds - time.monotonic()))
    costs = meter.by_function()
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    await asyncio.sleep(2.0)  # the gateways' last reports
    after = await counted(target)
    load = read_recording_bytes(await fetch(target, round((began_unix_s - SETTLE_S) * 1e9), 0))
    found = {}
    for name, replay in replays.items():
        summary = replay.summary(slos_ms[name])
        violations = after[name] - before[name]
        good = summary.requests - violations
        found[name] = {
            "requests": summary.requests,
            "violations": violations,
            "violations_at_the_client": summary.requests - round((summary.slo_attainment or 0.0) * summary.requests),
            "p50_ms": summary.p50_ms,
            "p95_ms": summary.p95_ms,
            "p99_ms": summary.p99_ms,
            "late_sends_p99_ms": summary.late_sends_p99_ms,
            "gpu_seconds": sum(costs[name]),
            "borrowed_gpu_seconds": costs[name][1],
            "cost_per_good": sum(costs[name]) / max(1, good),
        }
    print(f"  longest gap between two samples of cost {meter.longest_gap_s:.2f} s", file=sys.stderr)
    return found, load, began_unix_s


async def counted(target: Target) -> dict[str, int]:
    """Returns late, refused and failed requests so far of each function, as the gateways count them."""
    load = read_recording_bytes(await fetch(target, time.time_ns(), 0))
    newest: dict[tuple[str, str, str], DemandEvent] = {}
    for entry in load.entries:
        if isinstance(entry, RecordedInput) and isinstance(entry.event, DemandEvent):
            event = entry.event
            newest[event.function, event.gateway, event.epoch] = event
    totals = {name: 0 for name, _, _ in FUNCTIONS}
    for (name, _, _), event in newest.items():
        totals[name] += event.late_count + event.refused_count + event.failed_count
    return totals


def predicted(
    load: RecordedLoad,
    profile: Profile,
    policy: str,
    due_s: Mapping[str, Sequence[float]],
    options: argparse.Namespace,
    began_unix_s: float,
    transport_s: float,
) -> dict[str, dict[str, Any]]:
    """Returns what the simulator says of the same arrivals."""
    found = scenario_of_recording(load, Process.EVEN)
    cold_s = options.cold_start_s or found.cold_start_s or 2.0
    loads = []
    for name, model, _ in FUNCTIONS:
        spec, tables = _known(found, load, name, began_unix_s)
        surface = replace(from_profile(profile, model, emulated=True), device_model=tables[0].device_model)
        loads.append(FunctionLoad(spec, tables, arrivals_s=due_s[name], surfaces={surface.device_model: surface}))
    scenario = Scenario(
        found.devices,
        tuple(loads),
        options.seconds,
        options.seed,
        Timing(
            tick_s=0.1,
            demand_period_s=0.25,
            cold_start_s=cold_s,
            resize_s=0.03,
            telemetry_period_s=0.5,
            transport_s=transport_s,
        ),
        Physics.DEVICE_TIME,
        lead_s=SETTLE_S,
        moving=Moving(),
    )
    outcome = simulate(scenario, make_live_policy(policy))
    answers = {}
    for name, result in outcome.functions.items():
        percentiles = {f"p{pct}_ms": (result.percentile_s(pct) or 0.0) * 1e3 for pct in (50, 95, 99)}
        answers[name] = {
            "requests": result.requests_count,
            "violations": result.violations_count,
            **percentiles,
            "gpu_seconds": result.gpu_seconds,
            "borrowed_gpu_seconds": result.borrowed_gpu_seconds,
            "cost_per_good": result.gpu_seconds / max(1, result.met_count),
        }
    return answers


def _known(
    found: RecordedScenario, load: RecordedLoad, name: str, began_unix_s: float
) -> tuple[FunctionSpec, tuple[CapacityTable, ...]]:
    """The spec and the tables in force when the load began."""
    spec = next(function.spec for function in found.functions if function.spec.name == name)
    tables: dict[str, CapacityTable] = {}
    for entry in load.entries:
        if load.unix_offset_ns / 1e9 + entry.at_s > began_unix_s:
            break
        event = entry.event if isinstance(entry, RecordedInput) else None
        if isinstance(event, CapacityTable) and event.function == name:
            tables[event.device_model] = event
    return spec, tuple(tables.values())


def compare(live_figures: Mapping[str, Any], simulated: Mapping[str, Any]) -> dict[str, Any]:
    """Returns both, summed over the functions, and their ratios."""
    both = {}
    for kind, figures in (("live", live_figures), ("simulated", simulated)):
        requests = sum(f["requests"] for f in figures.values())
        violations = sum(f["violations"] for f in figures.values())
        gpu_seconds = sum(f["gpu_seconds"] for f in figures.values())
        both[kind] = {
            "requests": requests,
            "violation_rate": violations / requests,
            "gpu_seconds": gpu_seconds,
            "cost_per_good": gpu_seconds / max(1, requests - violations),
        }
    cost = both["live"]["cost_per_good"] / both["simulated"]["cost_per_good"]
    difference = both["live"]["violation_rate"] - both["simulated"]["violation_rate"]
    return {**both, "cost_ratio": cost, "violation_rate_difference": difference}


async def run(options: argparse.Namespace) -> dict[str, Any]:
    """Runs every policy; returns the document."""
    due_s = arrivals(options)
    rows = []
    with live_system(options.gpus, options.slow_down) as system:
        profile = system.profile
        slos_ms = deploy(system, options.slo_multiple)
        target = Target(Home(system.home), {})
        async with target.session():
            transport_s = await transport(system, target)
            print(f"this host adds {transport_s * 1e3:.1f} ms to a request", file=sys.stderr, flush=True)
            for policy in options.policies.split(","):
                figures, load, began_unix_s = await live(target, policy, due_s, slos_ms, options.seconds)
                if options.keep is not None:
                    options.keep.mkdir(parents=True, exist_ok=True)
                    data = await fetch(target, round((began_unix_s - SETTLE_S) * 1e9), 0)
                    (options.keep / f"{policy}.jsonl.gz").write_bytes(data)
                simulated = predicted(load, profile, policy, due_s, options, began_unix_s, transport_s)
                row = {"policy": policy, "live": figures, "simulated": simulated, **_named(compare(figures, simulated))}
                rows.append(row)
                show(row)
    return {
        "device": f"emulated-{profile.header.device_model}",
        "gpus": options.gpus,
        "slow_down": options.slow_down,
        "slo_ms": slos_ms,
        "transport_ms": transport_s * 1e3,
        "seconds": options.seconds,
        "arrivals": options.arrivals,
        "rate_scale": options.rate_scale,
        "seed": options.seed,
        "host_cores": len(os.sched_getaffinity(0)),
        "load_average": os.getloadavg()[0],
        "rows": rows,
    }


def _named(compared: Mapping[str, Any]) -> dict[str, Any]:
    return {"totals": {key: compared[key] for key in ("live", "simulated")}} | {
        key: compared[key] for key in ("cost_ratio", "violation_rate_difference")
    }


def show(row: Mapping[str, Any]) -> None:
    """Prints one policy's figures."""
    for name in row["live"]:
        for kind in ("live", "simulated"):
            f = row[kind][name]
            print(
                f"{row['policy']:>10} {name:8} {kind:10} {f['requests']:5} requests, {f['violations']:4} late or "
                f"dropped, p50 {f['p50_ms']:6.1f} p95 {f['p95_ms']:6.1f} p99 {f['p99_ms']:6.1f} ms, "
                f"{f['gpu_seconds']:8.3f} GPU-s "
                f"({f['borrowed_gpu_seconds']:.3f} borrowed), {f['cost_per_good'] * 1e3:8.3f} GPU-ms a request in time"
            )
    totals = row["totals"]
    print(
        f"{row['policy']:>10} live / simulated: cost {row['cost_ratio']:.3f}; late or dropped "
        f"{totals['live']['violation_rate']:.3%} and {totals['simulated']['violation_rate']:.3%}",
        flush=True,
    )


def main() -> int:
    """Runs the benchmark and writes its figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=180.0)
    parser.add_argument("--policies", default="hybrid")
    parser.add_argument("--arrivals", choices=["even", "poisson"], default="poisson")
    parser.add_argument("--rate-scale", type=float, default=1.0)
    parser.add_argument("--slo-multiple", type=float, default=5.0)
    parser.add_argument("--slow-down", type=float, default=60.0)
    parser.add_argument("--cold-start-s", type=float, help="of the simulator [as recorded]")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--keep", type=Path, help="a folder for the scaler's recordings")
    parser.add_argument("--json", type=Path, default=ROOT / "bench" / "results" / "emulated" / "live_policy.json")
    options = parser.parse_args()
    if not (options.data / "traces").is_dir():
        print(f"skipped: no traces under {options.data} (--data)", file=sys.stderr)
        return 0
    document = asyncio.run(run(options))
    write_results(options.json, document)
    print(f"wrote {options.json}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
