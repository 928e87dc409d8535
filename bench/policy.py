"""Scaling policies side by side in the simulator: cost, violations and actions, on the V100 profile and real traces.

    python bench/policy.py                    # everything; about 25 minutes on one core
    python bench/policy.py --only replays     # or: bursty, constant, step, scale, many
    python bench/policy.py --models resnet50,densenet121 --slo-multiples 2,5 --seed 7

Needs the measured profile and traces beside the checkout (`--data`, by default ../shared/data); says so and does
nothing without them. Writes JSON and an HTML page. Cost is GPU-seconds per request answered inside its SLO; ratios
are geometric means over models and multiples. Runs come twice: with idle device time lent between request and limit
and paid for by who uses it (as the system's gate lends it), and with nothing lent.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import resource
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from hasgpu_core.cluster import ClusterSnapshot, DemandView, FunctionView
from hasgpu_core.policy.hybrid import HybridPolicy
from hasgpu_core.policy.scaling import PolicyState
from hasgpu_core.resources import DeviceState
from hasgpu_sim.arrivals import Process, RateStep, arrival_times_s
from hasgpu_sim.evaluate import (
    LEAD_S,
    POLICIES,
    RunResult,
    Settings,
    devices,
    function_load,
    geometric_mean,
    make_policy,
    result_of,
    run_one,
    scenario_of,
)
from hasgpu_sim.page import Chart, Table, render
from hasgpu_sim.scenario import SimResult
from hasgpu_sim.simulate import simulate
from hasgpu_sim.surface import Surface, load_v100
from hasgpu_sim.traces import Trace, load_trace

ROOT = pathlib.Path(__file__).resolve().parents[1]
OUT = ROOT / "bench" / "results"
MODELS = "resnet50,mobilenet_v3_large,convnext_base,densenet121,efficientnet_b4"
PARTS = ("replays", "bursty", "constant", "step", "scale", "many")
HOUR_S = 3600.0


@dataclass(slots=True)
class Bench:
    """What is measured with, and what was found."""

    traces: pathlib.Path
    surfaces: Mapping[str, Surface]
    multiples: Sequence[float]
    policies: Sequence[str]
    seed: int
    runs: list[RunResult]
    figures: dict[str, float | str]
    charts: list[Chart]

    def each(
        self, trace: Trace, arrivals: str, settings: Settings, policies: Sequence[str]
    ) -> Iterator[tuple[RunResult, SimResult | None]]:
        """Runs policies on all models and multiples."""
        for policy in policies:
            mine = []
            for surface in self.surfaces.values():
                for multiple in self.multiples:
                    found, outcome = run_one(
                        surface, multiple, trace, arrivals, policy, settings, stopwatch=time.perf_counter
                    )
                    self.runs.append(found)
                    mine.append(found)
                    yield found, outcome
            cost = geometric_mean([run.cost_per_good for run in mine])
            rates = [run.violation_rate for run in mine]
            print(
                f"{trace.name:24} {arrivals:8} {'lent' if settings.lend else 'reserved':9} {policy:16} "
                f"{cost * 1e3:9.3f} mGPU-s a good request, violations mean {sum(rates) / len(rates):8.4%} "
                f"max {max(rates):8.4%}, {sum(run.actions for run in mine):4} actions",
                flush=True,
            )


def replays(bench: Bench) -> None:
    """HAS-GPU's two replays, evenly spaced and Poisson, lent and reserved."""
    for lend in (True, False):
        for part in ("rps", "stress"):
            for process in (Process.EVEN, Process.POISSON):
                trace = load_trace(
                    bench.traces / "has_gpu_replay_5s.csv.gz", part=part, process=process, seed=bench.seed
                )
                settings = Settings(lend=lend, seed=bench.seed)
                kept: dict[str, SimResult] = {}
                for run, outcome in bench.each(trace, process.value, settings, bench.policies):
                    wanted = (run.model, run.slo_multiple) == (next(iter(bench.surfaces)), bench.multiples[0])
                    if outcome is not None and wanted and part == "rps" and process is Process.POISSON:
                        kept[run.policy] = outcome
                if kept:
                    _over_time(bench, trace, kept, "lent" if lend else "reserved")


def _over_time(bench: Bench, trace: Trace, outcomes: Mapping[str, SimResult], kind: str) -> None:
    """Rate, shares and capacity of one model over time."""
    where = f"{next(iter(bench.surfaces))}, SLO {bench.multiples[0]:g}x, Poisson, {kind}"
    if not any(chart.title.startswith("Rate") for chart in bench.charts):
        counts = [0.0] * (int(trace.duration_s) + 1)
        for at_s in trace.arrivals_s["f"]:
            counts[int(at_s)] += 1
        bench.charts.append(Chart("Rate", "requests a second", {"arrivals": list(enumerate(counts))}))
    shares: dict[str, list[tuple[float, float]]] = {}
    for policy, outcome in outcomes.items():
        totals: dict[float, float] = {}
        for sample in outcome.shares:
            share = sample.sm_pct * sample.request_permille / 1e5
            totals[sample.at_s] = totals.get(sample.at_s, 0.0) + share
        shares[policy] = sorted(totals.items())
    small = {name: line for name, line in shares.items() if name != "kserve"}
    bench.charts.append(Chart(f"Shares requested: {where}", "GPUs; kserve holds whole ones", small))
    capacity = {
        policy: [(at_s, d.capacity_rps) for at_s, d in outcome.decisions if at_s >= 0]
        for policy, outcome in outcomes.items()
        if policy in ("hybrid", "hasgpu", "fastgshare")
    }
    bench.charts.append(Chart(f"Capacity as each policy reckons it: {where}", "rps", capacity))


def bursty(bench: Bench) -> None:
    """The Azure code trace, at half and full speed."""
    for scale in (0.5, 1.0):
        trace = load_trace(bench.traces / "azure_llm_2023_code_part1.csv.gz", rate_scale=scale)
        trace = replace(trace, name=f"azure_code x{scale:g}")
        some = [p for p in bench.policies if p in ("hybrid", "hasgpu", "fastgshare", "kserve", "clairvoyant")]
        for _ in bench.each(trace, "times", Settings(lend=True, seed=bench.seed), some):
            pass


def constant(bench: Bench) -> None:
    """A constant Poisson load for an hour: actions after the first ten minutes."""
    for lend in (True, False):
        settings = Settings(lend=lend, seed=bench.seed)
        worst = 0.0
        for index, surface in enumerate(bench.surfaces.values()):
            times = _steps([RateStep(HOUR_S, 10.0)], Process.POISSON, bench.seed + index)
            load = function_load("f", surface, 3.0, times, settings)
            outcome = simulate(scenario_of([load], surface, HOUR_S, settings), make_policy("hybrid", settings))
            after = sum(len(decision.actions) for at_s, decision in outcome.decisions if at_s > 600)
            rate = outcome.functions["f"].violations_count / len(times)
            print(f"constant 10 rps, {surface.model}: {after} actions in the last 50 min, violations {rate:.3%}")
            worst = max(worst, after / 10)
        bench.figures[f"constant_actions_per_5_min{'' if lend else '_reserved'}"] = worst


def step(bench: Bench) -> None:
    """A step from 8 to 24 rps: how long until the capacity in force, as the policy reckons it, covers it."""
    for lend in (True, False):
        settings = Settings(lend=lend, seed=bench.seed)
        for process in (Process.EVEN, Process.POISSON):
            worst = 0.0
            for surface in bench.surfaces.values():
                times = _steps([RateStep(120, 8), RateStep(60, 24)], process, bench.seed)
                load = function_load("f", surface, 3.0, times, settings)
                outcome = simulate(scenario_of([load], surface, 180.0, settings), make_policy("hybrid", settings))
                covered = (
                    tick.at_s - 120 - LEAD_S
                    for tick in outcome.recording.ticks
                    if tick.at_s >= 120 + LEAD_S and tick.decisions[0].capacity_rps >= 24
                )
                first_s = next(covered, float("inf"))
                worst = max(worst, first_s)
            kind = f"{process.value}_{'lent' if lend else 'reserved'}"
            print(f"step x3, {kind}: the capacity in force covers it after {worst:.2f} s at the worst of the models")
            bench.figures[f"step_covered_s_{kind}"] = worst


def _steps(steps: Sequence[RateStep], process: Process, seed: int) -> Sequence[float]:
    import random

    return arrival_times_s(steps, process, random.Random(seed))


def scale(bench: Bench) -> None:
    """One pass of the policy over 10,000 functions on 1,000 GPUs."""
    settings = Settings(gpus=1000, instance_memory_mib=200)
    surfaces = list(bench.surfaces.values())
    states = tuple(DeviceState(info) for info in devices(settings, surfaces[0]))
    loads = [function_load(f"f-{i:05d}", surfaces[i % len(surfaces)], 3.0, (), settings) for i in range(10_000)]
    views = []
    for index, load in enumerate(loads):
        demand = DemandView(rate_rps=float(index % 7), arrived_items_count=index % 7)
        tables = {load.tables[0].device_model: load.tables[0]}
        views.append(FunctionView(load.spec, 1, demand, (), tables))
    policy, state = HybridPolicy(), PolicyState()
    policy.decide(ClusterSnapshot(tuple(views[:100]), states), state, 0.0)
    started = time.perf_counter()
    decisions, _ = policy.decide(ClusterSnapshot(tuple(views), states), state, 0.0)
    took = time.perf_counter() - started
    actions = sum(len(decision.actions) for decision in decisions)
    print(f"10,000 functions on 1,000 GPUs, all to be started: {took:.2f} s a pass, {actions} actions")
    bench.figures["pass_10000_functions_s"] = took


def many(bench: Bench) -> None:
    """313 functions over 8 h."""
    trace = load_trace(bench.traces / "azure2019_raw_8h.csv.gz", process=Process.POISSON, seed=bench.seed)
    settings = Settings(gpus=60, tick_s=1.0, max_instances=8, instance_memory_mib=200, seed=bench.seed)
    surfaces = list(bench.surfaces.values())
    loads = [
        function_load(f"f-{i:03d}", surfaces[i % len(surfaces)], 3.0, times, settings)
        for i, times in enumerate(trace.arrivals_s.values())
    ]
    started = time.process_time()
    scenario = scenario_of(loads, surfaces[0], trace.duration_s, settings, sparse=True)
    outcome = simulate(scenario, make_policy("hybrid", settings), stopwatch=time.perf_counter)
    took = time.process_time() - started
    run = result_of("five models", 3.0, trace.name, "poisson", "hybrid", settings, outcome)
    bench.runs.append(run)
    memory_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(
        f"313 functions x 8 h: {run.requests} requests in {took:.0f} s of processor time and {memory_mib:.0f} MiB; "
        f"{run.gpu_seconds:.0f} GPU-s, violations {run.violation_rate:.4%}, {run.actions} actions"
    )
    bench.figures |= {"many_s": took, "many_mib": memory_mib, "many_violation_rate": run.violation_rate}


def ratios(bench: Bench) -> list[Sequence[str]]:
    """The figures of the issue: costs of rivals over ours, and violations."""
    rows: list[Sequence[str]] = [("trace", "arrivals", "time", "policy", "cost / hybrid's", "violations", "worst run")]
    groups: dict[tuple[str, str, bool], list[RunResult]] = {}
    for run in bench.runs:
        groups.setdefault((run.trace, run.arrivals, run.lend), []).append(run)
    for (trace, arrivals, lend), runs in groups.items():
        ours = {(r.model, r.slo_multiple): r for r in runs if r.policy == "hybrid"}
        for policy in bench.policies:
            mine = [r for r in runs if r.policy == policy and (r.model, r.slo_multiple) in ours]
            if not mine:
                continue
            ratio = geometric_mean([r.cost_per_good / ours[r.model, r.slo_multiple].cost_per_good for r in mine])
            rate = sum(r.violations for r in mine) / max(1, sum(r.requests for r in mine))
            kind = "lent" if lend else "reserved"
            worst = max(r.violation_rate for r in mine)
            rows.append((trace, arrivals, kind, policy, f"{ratio:.3g}", f"{rate:.3%}", f"{worst:.3%}"))
            bench.figures[f"{trace}/{arrivals}/{kind}/{policy}: cost over hybrid's"] = ratio
            bench.figures[f"{trace}/{arrivals}/{kind}/{policy}: violations"] = rate
    return rows


def main() -> int:
    """Runs what was asked for; 0 also when there is nothing to run it on."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=pathlib.Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--models", default=MODELS)
    parser.add_argument("--slo-multiples", default="2,3,5")
    parser.add_argument("--policies", default=",".join(POLICIES))
    parser.add_argument("--only", default=",".join(PARTS), help=f"of {', '.join(PARTS)}")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=pathlib.Path, default=OUT / "policy.json")
    parser.add_argument("--html", type=pathlib.Path, default=OUT / "policy.html")
    args = parser.parse_args()
    profile, traces = args.data / "profiles" / "v100", args.data / "traces"
    if not profile.is_dir() or not traces.is_dir():
        print(f"skipped: no profile and traces under {args.data} (--data)", file=sys.stderr)
        return 0
    bench = Bench(
        traces=traces,
        surfaces=load_v100(profile, args.models.split(",")),
        multiples=[float(m) for m in args.slo_multiples.split(",")],
        policies=args.policies.split(","),
        seed=args.seed,
        runs=[],
        figures={},
        charts=[],
    )
    parts = {"replays": replays, "bursty": bursty, "constant": constant, "step": step, "scale": scale, "many": many}
    for part in args.only.split(","):
        parts[part](bench)
        _write(bench, args.json, args.html)
    print("\n".join(" | ".join(f"{cell:>16}" for cell in row) for row in ratios(bench)))
    print(f"wrote {args.json} and {args.html}")
    return 0


def _write(bench: Bench, json_path: pathlib.Path, html_path: pathlib.Path) -> None:
    """Writes what has been found so far."""
    rows = ratios(bench)
    for path in (json_path, html_path):
        path.parent.mkdir(parents=True, exist_ok=True)
    document = {"figures": bench.figures, "runs": [run.as_dict() for run in bench.runs]}
    json_path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    figures = Table("Other figures", [("figure", "measured"), *((k, f"{v:.4g}") for k, v in _others(bench).items())])
    intro = [text for text in (__doc__ or "").split("\n\n") if not text.startswith("    ")]
    parts: list[Chart | Table] = [Table("Costs and violations", rows), figures, *bench.charts]
    html_path.write_text(render("Scaling policies", intro, parts), encoding="utf-8")


def _others(bench: Bench) -> Mapping[str, float]:
    return {name: float(value) for name, value in bench.figures.items() if "/" not in name}


if __name__ == "__main__":
    sys.exit(main())
