"""The figures of docs/rapp.md, drawn from measured profiles.

    python bench/rapp_plots.py [--profiles ../shared/data/profiles/v100] [--out docs] [--json bench/results/cpu/...]

- predicted against measured latency, and error by the number of probes: a seventh of the models is held out of the
  training and predicted from operators and probes;
- error against the seconds spent on measuring, for the probe plan, for the node agent's plain order and for random
  order, with the physical estimate alone (what a first function on a new device has);
- how wrong a function without a profile is predicted from its operators, by how many others were profiled (as the live
  rapp does; whole-quota latencies at small SM shares stand for device times), no picture;
- how the correction mends a start that is off by 1.5, over batches at partial quotas with waits at the gate, 5 % noise
  and 5 % outliers.

Takes about a minute. Without the profiles it says so and ends with status 3.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from hasgpu_predictor import (
    V100,
    Axes,
    Correction,
    Known,
    LatencyModel,
    ObservedBatch,
    Profile,
    ProfilePoint,
    TransferSettings,
    corrected,
    fit_physical,
    fit_transfer,
    plan_probes,
    static_physical,
    train_transfer,
)
from hasgpu_predictor.evaluation import Data, samples_of
from numpy.typing import NDArray
from rapp import PROBE_COUNTS, SURFACE, errors_of, is_probe, probes_with

mpl.use("Agg")
mpl.rcParams.update({"svg.hashsalt": "hasgpu", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False})

import matplotlib.pyplot as plt  # noqa: E402  the backend is chosen before

ROOT = Path(__file__).resolve().parents[1]
Array = NDArray[np.float64]
Cell = tuple[int, int, int]
BUDGETS_S = (1.0, 2.0, 4.0, 8.0, 16.0)
ORDERS = ("planned", "plain order", "random order")
PLAN_SMS = tuple(range(5, 101, 5))
PLAN_QUOTAS = (1_000, 900, 700, 500, 300, 200, 100)
BATCHES_SEEN = (0, 20, 30, 40, 60, 80, 120, 160, 200)
SEEDS_COUNT = 30
FREE_QUOTA_PCT = 90
FUNCTIONS_COUNTS = (4, 8, 20)
FUNCTION_SETS = 5
OFF = 1.5


def held_out(data: Data, seed: int) -> tuple[dict[str, Any], Callable[[Path], None]]:
    """Trains on six sevenths of the models; returns the errors on the rest, and what draws them."""
    samples = dict(zip(sorted(m for m in data.latencies if m in data.operators), samples_of(data), strict=True))
    rng = np.random.default_rng(seed)
    names = sorted(samples)
    test = sorted(names[i] for i in rng.permutation(len(names))[: len(names) // 7])
    model = train_transfer([samples[m] for m in names if m not in test], TransferSettings(seed=seed, threads_count=2))
    by_count = {
        count: [float(errors_of(model, samples[m], probes_with(samples[m], count, rng)).ape_pct.mean()) for m in test]
        for count in PROBE_COUNTS
    }
    measured, predicted = [], []
    for name in test:
        sample, probes = samples[name], probes_with(samples[name], 11, rng)
        rows = ~is_probe(sample.configurations, probes)
        batch, sm, quota = sample.configurations[rows].T
        surface = model.surface(model.view(sample.workload, probes), SURFACE)
        measured.append(sample.latency_ms[rows])
        predicted.append(1e3 * surface.at(batch, sm, 10 * quota))

    def draw(out: Path) -> None:
        figure, axes = plt.subplots(figsize=(4.6, 4.2), layout="constrained")
        for x, y in zip(measured, predicted, strict=True):
            axes.plot(x, y, ".", markersize=2.5, alpha=0.35, rasterized=True)  # thousands of points
        ends = [min(x.min() for x in measured), max(x.max() for x in measured)]
        axes.plot(ends, ends, color="black", linewidth=0.8)
        axes.set(xscale="log", yscale="log", xlabel="measured latency / ms", ylabel="predicted latency / ms")
        axes.set_title(f"{len(test)} models never trained on, 11 probes each", fontsize=9)
        _save(figure, out / "rapp-predicted.svg")
        figure, axes = plt.subplots(figsize=(4.6, 3.0), layout="constrained")
        place = range(len(PROBE_COUNTS))
        for column in np.array([by_count[count] for count in PROBE_COUNTS]).T:
            axes.plot(place, column, color="0.8", linewidth=0.8)
        axes.plot(place, [statistics.fmean(by_count[count]) for count in PROBE_COUNTS], "o-", color="C0")
        axes.set(xticks=place, xticklabels=PROBE_COUNTS, xlabel="probes", ylabel="mean error / %", ylim=(0, None))
        axes.set_title("each line a model; thick: their mean", fontsize=9)
        _save(figure, out / "rapp-probes.svg")

    return {
        "test_models": test,
        "mape_pct_by_probes": {str(n): round(statistics.fmean(v), 2) for n, v in by_count.items()},
    }, draw


def plan_errors(data: Data, seed: int) -> tuple[dict[str, Any], Callable[[Path], None]]:
    """Measures a quarter of the models within budgets, in three orders; returns mean errors, and what draws them.

    Once at the whole quota alone: device times, which a gate that meters them divides (this system's does). Once at all
    quotas: the data's own gate does not.
    """
    figures: dict[str, Any] = {}
    found: dict[str, dict[str, dict[float, float]]] = {}
    for case, quotas in (("whole_quota", (1_000,)), ("all_quotas_unmetered", PLAN_QUOTAS)):
        rng = np.random.default_rng(seed)
        errors: dict[str, dict[float, list[float]]] = {o: {b: [] for b in BUDGETS_S} for o in ORDERS}
        for name in sorted(data.latencies)[::4]:
            latency_s = {cell: s for cell, s in table_of(data, name).items() if cell[2] in quotas}
            candidates = [cell for cell in sorted(latency_s) if cell[1] in PLAN_SMS]
            guess = static_physical(artifact_bytes=100 << 20, backend="cuda", slo_s=0.2)
            chance = [candidates[i] for i in rng.permutation(len(candidates))]
            for budget_s in BUDGETS_S:
                plan = [probe.cell for probe in plan_probes(guess, candidates, budget_s=budget_s, slack=4.0)]
                for order, cells in zip(ORDERS, (plan, plain(candidates), chance), strict=True):
                    known = within(latency_s, cells, budget_s)
                    errors[order][budget_s].append(physical_error_pct(latency_s, known, metered=len(quotas) == 1))
        found[case] = {o: {b: statistics.fmean(errors[o][b]) for b in BUDGETS_S} for o in ORDERS}
        figures[case] = {o: {f"{b:g}": round(error, 2) for b, error in found[case][o].items()} for o in ORDERS}

    def draw(out: Path) -> None:
        figure, axes = plt.subplots(figsize=(4.6, 3.0), layout="constrained")
        for order, by_budget in found["whole_quota"].items():
            axes.plot(BUDGETS_S, [by_budget[b] for b in BUDGETS_S], "o-", label=order)
        axes.set(xscale="log", yscale="log", xlabel="seconds of measuring", ylabel="mean error / %")
        axes.set_xticks(BUDGETS_S, [f"{b:g}" for b in BUDGETS_S])
        axes.set_yticks([4, 5, 6, 8, 10, 15, 20, 30], ["4", "5", "6", "8", "10", "15", "20", "30"])
        axes.minorticks_off()
        axes.legend(frameon=False)
        _save(figure, out / "rapp-plan.svg")

    return figures, draw


def table_of(data: Data, name: str) -> dict[Cell, float]:
    """A model's latencies in seconds by configuration."""
    table = data.latencies[name]
    both = zip(table.configurations.tolist(), table.latency_ms.tolist(), strict=True)
    return {(int(b), int(s), round(10 * q)): ms / 1e3 for (b, s, q), ms in both}


def plain(cells: Sequence[Cell]) -> list[Cell]:
    """The order without a plan: the whole quota first, ends before middles, then smaller quotas of batch 1, 2, ..."""
    batches, sms = ends_first({c[0] for c in cells}), ends_first({c[1] for c in cells})
    sms.sort(key=lambda sm: (sm not in (5, 100), sm != 100))
    whole = [c for c in cells if c[2] == 1_000]
    whole.sort(key=lambda c: (batches.index(c[0]) + sms.index(c[1]), sms.index(c[1])))
    return whole + sorted((c for c in cells if c[2] in (500, 200)), key=lambda c: (c[0], -c[2], sms.index(c[1])))


def ends_first(values: set[int]) -> list[int]:
    """Ends, middle, quarters."""
    rest = sorted(values)
    order = [rest.pop(0)]
    if rest:
        order.append(rest.pop())
    while rest:
        rest.remove(chosen := max(rest, key=lambda v: min(abs(v - o) for o in order)))
        order.append(chosen)
    return order


def within(latency_s: Mapping[Cell, float], cells: Sequence[Cell], budget_s: float) -> list[Cell]:
    """The first cells whose 12 repetitions each fit into the budget; one at least."""
    taken: list[Cell] = []
    for cell in cells:
        budget_s -= 0.02 + 12 * latency_s[cell]
        if budget_s < 0 and taken:
            break
        taken.append(cell)
    return taken


def physical_error_pct(latency_s: Mapping[Cell, float], known: Sequence[Cell], *, metered: bool) -> float:
    """Mean error on all other cells of the estimate fitted to the known ones."""
    device = 1.0 if metered else 0.0
    physical = fit_physical([ProfilePoint(*cell, latency_s[cell], device * latency_s[cell]) for cell in known])
    others = [cell for cell in latency_s if cell not in set(known)] or list(latency_s)
    predicted_s = physical.latency_s(*np.array(others, float).T)
    return 100 * float(np.abs(predicted_s / np.array([latency_s[cell] for cell in others]) - 1).mean())


def convergence(data: Data, name: str) -> tuple[dict[str, Any], Callable[[Path], None]]:
    """Mends a profile of which all latencies are off; returns the surface's error by batches, and what draws it."""
    truth = table_of(data, name)
    profile = Profile(name, "").merged(ProfilePoint(*cell, latency_s / OFF) for cell, latency_s in truth.items())
    axes_ = [sorted({cell[axis] for cell in truth}) for axis in range(3)]
    grid = Axes(tuple(axes_[0]), tuple(axes_[1]), tuple(axes_[2]))
    surface, physical = LatencyModel.untrained("").surface(profile, grid), fit_physical(profile.points)
    whole = [cell for cell in truth if cell[2] == 1_000]
    cells, latency_s = np.array(list(truth), float), np.array(list(truth.values()))
    curves = np.array(
        [_curve(seed, truth, whole, (physical, surface), cells, latency_s) for seed in range(SEEDS_COUNT)]
    )
    low, middle, high = np.quantile(curves, (0.05, 0.5, 0.95), axis=0)

    def draw(out: Path) -> None:
        figure, axes = plt.subplots(figsize=(4.6, 3.0), layout="constrained")
        axes.fill_between(BATCHES_SEEN, low, high, alpha=0.25, linewidth=0, label="90 % of 30 runs")
        axes.plot(BATCHES_SEEN, middle, "o-", label="median")
        axes.axhline(5, color="0.5", linewidth=0.8, linestyle=":")
        axes.set(xlabel="observed batches", ylabel="mean error of the surface / %", ylim=(0, None))
        axes.set_title(f"{name}; all latencies off by {OFF:g} at the start", fontsize=9)
        axes.legend(frameon=False)
        _save(figure, out / "rapp-correction.svg")

    median = {str(n): round(float(error), 2) for n, error in zip(BATCHES_SEEN, middle, strict=True)}
    return {
        "model": name,
        "median_error_pct": median,
        "worst_after_200_pct": round(float(curves[:, -1].max()), 2),
    }, draw


def _curve(
    seed: int, truth: Mapping[Cell, float], whole: Sequence[Cell], base: Any, cells: Array, latency_s: Array
) -> list[float]:
    rng, correction, errors, seen = np.random.default_rng(seed), Correction(), list[float](), 0
    physical, surface = base
    for until in BATCHES_SEEN:
        for _ in range(until - seen):
            cell = whole[int(rng.integers(len(whole)))]
            run_s = truth[cell] * float(np.exp(0.05 * rng.standard_normal()))
            if rng.random() < 0.05:
                run_s *= float(rng.uniform(3, 15))
            quota = int(rng.choice((200, 400, 600)))
            correction.observe([ObservedBatch(cell[0], cell[1], 0.0, run_s, quota, run_s + rng.exponential(2 * run_s))])
        seen = until
        correction.update(physical, surface)
        predicted_s = corrected(surface, correction.factors).at(*cells.T)
        errors.append(100 * float(np.abs(predicted_s / latency_s - 1).mean()))
    return errors


def few_functions(data: Data, seed: int) -> tuple[dict[str, Any], Callable[[Path], None]]:
    """Mean error in per cent on functions left out, of random sets of so many; from operators, and with five points."""
    places = {(b, s) for b in (1, 2, 4, 8) for s in (5, 10, 15, 20, 25)}
    known = []
    for model in sorted(set(data.latencies) & set(data.operators)):
        table = data.latencies[model]
        times: dict[tuple[int, int], list[float]] = {}
        for (batch, sm_pct, quota_pct), latency_ms in zip(table.configurations, table.latency_ms, strict=True):
            if quota_pct >= FREE_QUOTA_PCT and (batch, sm_pct) in places:
                times.setdefault((int(batch), int(sm_pct)), []).append(float(latency_ms) / 1e3)
        points = [
            ProfilePoint(*at, 1_000, d_s, d_s) for at, all_s in times.items() for d_s in [statistics.median(all_s)]
        ]
        known.append(Known(model, tuple(data.operators[model]), Profile(model, "V100").merged(points)))
    rng = np.random.default_rng(seed)
    figures: dict[str, Any] = {}
    for count in FUNCTIONS_COUNTS:
        cards = []
        for _ in range(FUNCTION_SETS):
            chosen = [known[index] for index in rng.choice(len(known), min(count, len(known)), replace=False)]
            cards.append(fit_transfer(chosen, device_model="V100", sheet=V100).card)
        figures[str(count)] = {
            "static_mape_pct": round(statistics.mean(card.static_mape_pct for card in cards), 1),
            "five_points_mape_pct": round(statistics.mean(card.probed_mape_pct for card in cards), 1),
            "static_worst_pct": round(max(card.static_mape_pct for card in cards), 1),
        }
    return {"sets": FUNCTION_SETS, "functions": figures}, lambda _folder: None


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, metadata={"Date": None}, dpi=150)
    plt.close(figure)


def main() -> None:
    """Computes, draws, prints, writes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--profiles", type=Path, default=ROOT.parent / "shared/data/profiles/v100")
    parser.add_argument("--out", type=Path, default=ROOT / "docs")
    parser.add_argument("--json", type=Path, default=ROOT / "bench/results/cpu/rapp_plots.json")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    files = [options.profiles / name for name in ("latency.csv.gz", "model_ops.csv.gz", "sm_probes.csv")]
    if not all(file.exists() for file in files):
        print(f"no profiles in {options.profiles}: nothing is drawn", file=sys.stderr)
        raise SystemExit(3)
    data = Data.read(*files)
    parts = {
        "unseen_models": held_out(data, options.seed),
        "error_pct_by_seconds": plan_errors(data, options.seed),
        "functions_without_profile": few_functions(data, options.seed),
        "correction": convergence(data, "resnet50" if "resnet50" in data.latencies else sorted(data.latencies)[0]),
    }
    for _, draw in parts.values():
        draw(options.out)
    text = json.dumps({"seed": options.seed} | {name: figures for name, (figures, _) in parts.items()}, indent=1)
    print(text)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
