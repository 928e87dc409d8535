"""Scaling policies side by side in the simulator: cost, violations and actions, on the V100 profile and real traces.

    python bench/policy.py                    # everything; about 25 minutes on one core
    python bench/policy.py --only replays     # or: bursty, constant, step, scale, many, rivals, pictures
    python bench/policy.py --only replays --policies hybrid,clairvoyant --keep  # the other runs stay as they are
    python bench/policy.py --models resnet50,densenet121 --slo-multiples 2,5 --seed 7

Needs the measured profile and traces beside the checkout (`--data`, by default ../shared/data); says so and does
nothing without them. Writes JSON and an HTML page. Cost is GPU-seconds per request answered inside its SLO; ratios
are geometric means over models and multiples. Runs come twice: with idle device time lent between request and limit
and paid for by who uses it (as the system's gate lends it: these are the official figures), and with nothing lent.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import pathlib
import resource
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from hasgpu_core.cluster import ClusterSnapshot, DemandView, FunctionView
from hasgpu_core.policy.hybrid import HybridPolicy
from hasgpu_core.policy.rivals.clairvoyant import borrowed_bound, held_bound
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
from policy_pictures import draw
from policy_rivals import sweep

ROOT = pathlib.Path(__file__).resolve().parents[1]
OUT = ROOT / "bench" / "results"
MODELS = "resnet50,mobilenet_v3_large,convnext_base,densenet121,efficientnet_b4"
PARTS = ("replays", "bursty", "constant", "step", "scale", "many", "rivals", "pictures")
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
    tables: list[Table]

    def add(self, run: RunResult) -> None:
        """Takes a run in, in place of an earlier one of the same."""
        key = _key(run)
        self.runs = [*(known for known in self.runs if _key(known) != key), run]

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
                    self.add(found)
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
                if lend and "hybrid" in bench.policies:
                    _at_once(bench, trace, process.value)
                if kept:
                    for policy in (p for p in POLICIES if p not in kept and p != "clairvoyant"):
                        surface, multiple = next(iter(bench.surfaces.values())), bench.multiples[0]
                        drawn = run_one(surface, multiple, trace, process.value, policy, settings)[1]
                        if drawn is not None:
                            kept[policy] = drawn
                    _over_time(bench, trace, kept, "lent" if lend else "reserved")


def _key(run: RunResult) -> tuple[object, ...]:
    return (run.model, run.slo_multiple, run.policy, run.trace, run.arrivals, run.lend, run.physics, run.seed)


def _at_once(bench: Bench, trace: Trace, arrivals: str) -> None:
    """Our cost over the bounds of those who send a request as soon as an instance is idle (`rivals.clairvoyant`)."""
    times = list(next(iter(trace.arrivals_s.values())))
    over, over_held, held_over = [], [], []
    for run in bench.runs:
        if run.policy != "hybrid" or run.trace != trace.name or run.arrivals != arrivals or not run.lend:
            continue
        load = function_load("f", bench.surfaces[run.model], run.slo_multiple, times, Settings())
        bound = borrowed_bound(times, load.tables[0], max_batch=load.spec.max_batch, online=True)
        over.append(run.cost_per_good / (bound.gpu_seconds / bound.requests_count))
        held = held_bound(times, load.tables[0], duration_s=trace.duration_s, max_batch=load.spec.max_batch)
        over_held.append(run.cost_per_good / (held.gpu_seconds / held.requests_count))
        least = borrowed_bound(times, load.tables[0], max_batch=load.spec.max_batch)
        held_over.append((held.gpu_seconds / held.requests_count) / (least.gpu_seconds / least.requests_count))
    for what, ratios_found in (
        ("hybrid: cost over the bound of who sends at once", over),
        ("hybrid: cost over the bound of who holds a set for 5 s and sends at once", over_held),
        ("the bound of who holds a set for 5 s and sends at once over clairvoyant's", held_over),
    ):
        ratio = geometric_mean(ratios_found)
        print(f"{trace.name}, {arrivals}, lent: {what} {ratio:.3f}")
        bench.figures[f"{trace.name}/{arrivals}/lent/{what}"] = ratio


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
    # The snapshot is there before a pass, as in a service that has run for a while: the collector need not look at it.
    gc.collect()
    gc.freeze()
    started = time.process_time()
    decisions, _ = policy.decide(ClusterSnapshot(tuple(views), states), state, 0.0)
    took = time.process_time() - started
    gc.unfreeze()
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
    bench.add(run)
    memory_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(
        f"313 functions x 8 h: {run.requests} requests in {took:.0f} s of processor time and {memory_mib:.0f} MiB; "
        f"{run.gpu_seconds:.0f} GPU-s, violations {run.violation_rate:.4%}, {run.actions} actions"
    )
    bench.figures |= {"many_s": took, "many_mib": memory_mib, "many_violation_rate": run.violation_rate}


def rivals(bench: Bench) -> None:
    """What tuning the rivals further would give."""
    path = bench.traces / "has_gpu_replay_5s.csv.gz"
    trace = load_trace(path, part="rps", process=Process.POISSON, seed=bench.seed)
    rows: list[Sequence[str]] = [("time", "policy", "setting", "mGPU-s a request in time", "late or dropped")]
    for time_kind, rival, setting, cost, late in sweep(bench.surfaces, bench.multiples, trace, bench.seed):
        rows.append((time_kind, rival, setting, f"{cost:.3f}", f"{late:.3%}"))
        bench.figures[f"rivals/{time_kind}/{rival}/{setting}: mGPU-s"] = cost
        bench.figures[f"rivals/{time_kind}/{rival}/{setting}: late"] = late
    bench.tables.append(Table("Tuning of the rivals: the replay, Poisson", rows))


def pictures(bench: Bench) -> None:
    """The pictures of docs/scaling.md."""
    for name, text in draw(next(iter(bench.surfaces.values())), bench.seed).items():
        (ROOT / "docs" / name).write_text(text, encoding="utf-8")
        print(f"wrote docs/{name}")


def ratios(bench: Bench) -> list[Sequence[str]]:
    """The figures of the issue: costs of rivals over ours, and violations."""
    rows: list[Sequence[str]] = [("trace", "arrivals", "time", "policy", "cost / hybrid's", "violations", "worst run")]
    groups: dict[tuple[str, str, bool], list[RunResult]] = {}
    for run in bench.runs:
        groups.setdefault((run.trace, run.arrivals, run.lend), []).append(run)
    for (trace, arrivals, lend), runs in groups.items():
        ours = {(r.model, r.slo_multiple): r for r in runs if r.policy == "hybrid"}
        for policy in (p for p in POLICIES if any(r.policy == p for r in runs)):
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
    parser.add_argument("--keep", action="store_true", help="runs and figures in the JSON that are not made anew stay")
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
        tables=[],
    )
    if args.keep and args.json.exists():
        _take_up(bench, json.loads(args.json.read_text(encoding="utf-8")))
    parts = dict(zip(PARTS, (replays, bursty, constant, step, scale, many, rivals, pictures), strict=True))
    for part in args.only.split(","):
        if part not in parts:
            parser.error(f"--only: there are {', '.join(PARTS)}, got {part!r}")
        parts[part](bench)
        _write(bench, args.json, args.html)
    print("\n".join(" | ".join(f"{cell:>16}" for cell in row) for row in ratios(bench)))
    print(f"wrote {args.json} and {args.html}")
    return 0


def _take_up(bench: Bench, document: Mapping[str, Any]) -> None:
    """Takes in what an earlier run of this bench wrote."""
    bench.figures = {name: math.inf if value is None else value for name, value in document["figures"].items()}
    bench.charts = [Chart(**chart) for chart in document.get("charts", ())]
    bench.tables = [Table(**table) for table in document.get("tables", ())]
    for run in document["runs"]:
        values: dict[str, Any] = {name: math.inf if value is None else value for name, value in run.items()}
        bench.runs.append(RunResult(**values))


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Seven digits, and null for what no number is: JSON knows no infinity."""

    def one(value: object) -> object:
        if not isinstance(value, float):
            return value
        return float(f"{value:.7g}") if math.isfinite(value) else None

    return {name: one(value) for name, value in values.items()}


def _write(bench: Bench, json_path: pathlib.Path, html_path: pathlib.Path) -> None:
    """Writes what has been found so far."""
    rows = ratios(bench)
    for path in (json_path, html_path):
        path.parent.mkdir(parents=True, exist_ok=True)
    bench.charts = list({chart.title: chart for chart in bench.charts}.values())
    bench.tables = list({table.title: table for table in bench.tables}.values())
    document = {
        "figures": _plain(bench.figures),
        "runs": [_plain(run.as_dict()) for run in bench.runs],
        "charts": [asdict(chart) for chart in bench.charts],
        "tables": [asdict(table) for table in bench.tables],
    }
    json_path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    figures = Table("Other figures", [("figure", "measured"), *((k, f"{v:.4g}") for k, v in _others(bench).items())])
    intro = [text for text in (__doc__ or "").split("\n\n") if not text.startswith("    ")]
    parts: list[Chart | Table] = [Table("Costs and violations", rows), figures, *bench.tables, *bench.charts]
    html_path.write_text(render("Scaling policies", intro, parts), encoding="utf-8")


def _others(bench: Bench) -> Mapping[str, float]:
    return {name: float(value) for name, value in bench.figures.items() if "/" not in name}


if __name__ == "__main__":
    sys.exit(main())
