"""The latency predictor's error on configurations and models that it has not seen, and what it costs.

    python bench/rapp.py --profiles ../shared/data/profiles/v100 --json bench/results/v100/rapp.json

Cross-validated on the given files: a random tenth of all rows held out (`--repeats` seeds), seven random folds of
models, and each family of three models or more held out in turn, predicted from operators and 11 probes (five rows
and six graph probes); the folds also with 0, 3, 5 and 25 probes, and with 11 of which one is
measured at batch 8 and 15 % of the SMs. Beside them the noise of the data. Errors are mean
absolute errors in per cent of the measured latency, over surfaces made monotone as they are served. `--quick`: a part
of the models.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from hasgpu_predictor.dataset import Measured
from hasgpu_predictor.evaluation import Data, ProbeRows, evaluate, samples_of, training_settings
from hasgpu_predictor.operators import Array
from hasgpu_predictor.page import family_of
from hasgpu_predictor.surface import Axes, monotone
from hasgpu_predictor.transfer import Probes, Sample, TransferModel, TransferSettings, probes_of, train_transfer
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parents[1]
SURFACE = Axes((1, 2, 4, 8), tuple(range(5, 101, 5)), tuple(range(100, 1001, 100)))
HELD_OUT_SHARE = 0.1
FOLDS_COUNT = 7
FAMILY_MIN = 3
"""Smaller ones are left out: one or two models tell little of a family."""
PROBE_COUNTS = (0, 3, 5, 11, 25)
DEVICE_PROBE = 8.0, 15.0
"""Batch and SM share of the one row that `spread_probes` measures away from the others."""


@dataclass(frozen=True, slots=True)
class Errors:
    """Of one prediction of one model, rows that were probes left out."""

    ape_pct: Array
    covered: NDArray[np.bool_]
    monotone: bool


def probes_with(sample: Sample, count: int, rng: np.random.Generator) -> Probes:
    """Returns 0, 3 (quotas 20, 60, 100), 5 (quotas by 20), 11 (and six graph probes) or 25 (and 14 random rows)."""
    quotas = {0: (), 3: (20.0, 60.0, 100.0)}.get(count, (20.0, 40.0, 60.0, 80.0, 100.0))
    probes = probes_of(sample, 4, 100, quotas)
    graph = probes.graph_ms if count >= 11 else {}
    others: tuple[tuple[float, float, float, float], ...] = ()
    if count > 11:
        free = np.flatnonzero(~is_probe(sample.configurations, probes))
        chosen = rng.permutation(free)[: count - 11]
        rows = np.column_stack([sample.configurations, sample.latency_ms])[chosen].tolist()
        others = tuple((b, s, q, ms) for b, s, q, ms in rows)
    return Probes(probes.batch, probes.sm_pct, probes.by_quota_ms, graph, others)


def spread_probes(sample: Sample) -> Probes:
    """Returns 11 probes too, one row of the five (quota 80) measured where the device decides: large batch, few SMs."""
    probes = probes_of(sample, 4, 100, (20.0, 40.0, 60.0, 100.0))
    batch, sm, quota = sample.configurations.T
    whole = np.flatnonzero(quota == 100)
    if not len(whole):
        return probes
    apart = np.abs(np.log2(batch[whole] / DEVICE_PROBE[0])), np.abs(sm[whole] - DEVICE_PROBE[1])
    row = whole[np.lexsort((apart[1], apart[0]))[0]]
    other = (float(batch[row]), float(sm[row]), 100.0, float(sample.latency_ms[row]))
    return Probes(probes.batch, probes.sm_pct, probes.by_quota_ms, probes.graph_ms, (other,))


def is_probe(configurations: Array, probes: Probes) -> NDArray[np.bool_]:
    """Marks the rows that were looked at."""
    batch, sm, quota = configurations.T
    mask = (batch == probes.batch) & (sm == probes.sm_pct) & np.isin(quota, list(probes.by_quota_ms))
    for b, s, q, _ in probes.others:
        mask |= (batch == b) & (sm == s) & (quota == q)
    return np.asarray(mask)


def errors_of(model: TransferModel, sample: Sample, probes: Probes) -> Errors:
    """Predicts a model that was not trained on."""
    surface = model.surface(model.view(sample.workload, probes), SURFACE)
    keep = ~is_probe(sample.configurations, probes)
    batch, sm, quota = sample.configurations[keep].T
    measured_s = sample.latency_ms[keep] / 1e3
    predicted_s = surface.at(batch, sm, 10 * quota)
    bounds = surface.bounds_at(batch, sm, 10 * quota)
    covered = np.ones(len(batch), bool) if bounds is None else (bounds[0] <= measured_s) & (measured_s <= bounds[1])
    steps = (np.diff(surface.latency_s, axis=1) > 0).any() or (np.diff(surface.latency_s, axis=2) > 0).any()
    return Errors(100 * np.abs(predicted_s / measured_s - 1), covered, not steps)


def unseen_models(
    samples: Mapping[str, Sample],
    folds: Mapping[str, Sequence[str]],
    counts: Sequence[int],
    options: argparse.Namespace,
) -> dict[str, object]:
    """Trains without each fold in turn and predicts it with each number of probes."""
    rng = np.random.default_rng(options.seed)
    found: dict[int, dict[str, dict[str, Errors]]] = {count: {} for count in counts}
    spread: dict[str, dict[str, Errors]] = {}
    train_s = []
    for name, models in folds.items():
        began_s = time.perf_counter()
        model = train_transfer(
            [sample for m, sample in samples.items() if m not in models],
            TransferSettings(seed=options.seed, threads_count=options.threads),
        )
        train_s.append(time.perf_counter() - began_s)
        for count in counts:
            found[count][name] = {m: errors_of(model, samples[m], probes_with(samples[m], count, rng)) for m in models}
        spread[name] = {m: errors_of(model, samples[m], spread_probes(samples[m])) for m in models}
        told = ", ".join(f"{count} probes {fold_mape(found[count][name]):.2f} %" for count in counts)
        told += f", 11 spread {fold_mape(spread[name]):.2f} %"
        print(f"without {name} ({len(models)} models): {told}; trained in {train_s[-1]:.1f} s", flush=True)
    return {
        "train_s": statistics.median(train_s),
        "by_probes": {str(count): digest(found[count]) for count in counts},
        "spread_11_probes": digest(spread),
    }


def fold_mape(errors: Mapping[str, Errors]) -> float:
    """Mean over the rows of a fold."""
    return float(np.concatenate([e.ape_pct for e in errors.values()]).mean())


def digest(folds: Mapping[str, Mapping[str, Errors]]) -> dict[str, object]:
    """Returns means over folds and models, coverage over rows."""
    every = {model: errors for fold in folds.values() for model, errors in fold.items()}
    ape = np.concatenate([e.ape_pct for e in every.values()])
    return {
        "mape_pct_mean_over_folds": statistics.mean(fold_mape(fold) for fold in folds.values()),
        "mape_pct_by_fold": {name: round(fold_mape(fold), 2) for name, fold in folds.items()},
        "median_ape_pct": float(np.median(ape)),
        "p95_ape_pct": float(np.quantile(ape, 0.95)),
        "coverage_90_pct": 100 * float(np.concatenate([e.covered for e in every.values()]).mean()),
        "surfaces_not_monotone": sum(not e.monotone for e in every.values()),
        "mape_pct_by_model": {model: round(float(e.ape_pct.mean()), 2) for model, e in sorted(every.items())},
    }


def unseen_configurations(data: Data, seed: int, threads: int) -> dict[str, object]:
    """Holds a tenth of the rows out."""
    rng = np.random.default_rng(seed)
    kept, held = {}, {}
    for name, table in sorted(data.latencies.items()):
        out = rng.random(len(table.latency_ms)) < HELD_OUT_SHARE
        kept[name] = Measured(table.configurations[~out], table.latency_ms[~out])
        held[name] = Measured(table.configurations[out], table.latency_ms[out])
    result = evaluate(
        Data(kept, data.operators, data.graph_probes),
        Data(held, data.operators, data.graph_probes),
        ProbeRows(),
        now_s=time.perf_counter,
        training=training_settings(seed=seed, threads_count=threads),
    )
    summary = result.summary()
    return {
        key: value for key, value in summary.items() if key not in ("unseen_models", "units", "already_trained_rows")
    }


def noise(data: Data) -> dict[str, float]:
    """What no predictor can know, in per cent.

    `neighbours`: how far a cell is from the mean of the next smaller and larger SM share at its batch and quota (a
    prediction from both sides), over sqrt(3/2), which is what independent noise of a cell makes of it.
    `closest_monotone`: the error of the monotone surface made of the measured latencies themselves.
    `one_curve`: the error of the larger of a cell's device time, read from its own row of quotas, and the one launch
    curve of its model that errs least, both from the very rows that are judged. `probed_curve`: the same with the curve
    as it is where new models are probed (batch 4, from 80 % of the SMs, median), all quotas, wherever it shows there.
    """
    near, closest, curve, probed = [], [], [], []
    for table in data.latencies.values():
        axes = [np.unique(column) for column in table.configurations.T]
        logs = np.full([len(axis) for axis in axes], np.nan)
        index = tuple(np.searchsorted(axis, c) for axis, c in zip(axes, table.configurations.T, strict=True))
        logs[index] = np.log(table.latency_ms)
        middle = logs[:, 1:-1] - (logs[:, :-2] + logs[:, 2:]) / 2
        near.append(np.abs(middle[np.isfinite(middle)]))
        filled = np.where(np.isfinite(logs), logs, _filled(logs))
        closest.append(np.abs(np.expm1(monotone(filled) - logs)[np.isfinite(logs)]))
        ordered = np.sort(np.where(np.isfinite(logs), logs, np.inf), axis=2)[..., :3]
        low = np.where(np.isfinite(ordered[..., 1]), ordered[..., 1], np.minimum(ordered[..., 0], 20.0))
        place = axes[0][:, None] == 4, axes[1][None, :] >= 80
        place_low = nanmedian(low[place[0] & place[1]])
        for k in range(logs.shape[2]):
            known = np.isfinite(logs[..., k])
            column, floor = logs[..., k][known], low[known]
            levels = np.quantile(column, np.linspace(0, 1, 41)) if len(column) else []
            tried = [np.abs(np.expm1(np.maximum(floor, level) - column)) for level in levels]
            curve += [min(tried, key=lambda e: float(e.mean()))] if tried else []
            there = nanmedian(logs[..., k][place[0] & place[1]])
            launched = there > place_low + 0.1
            probed += [np.abs(np.expm1(np.maximum(floor, there) - column))] if launched else curve[-1:]
    return {
        "neighbours_pct": 100 * float(np.concatenate(near).mean()) / 1.5**0.5,
        "closest_monotone_pct": 100 * float(np.concatenate(closest).mean()),
        "one_curve_pct": 100 * float(np.concatenate(curve).mean()),
        "probed_curve_pct": 100 * float(np.concatenate(probed).mean()),
    }


def nanmedian(values: Array) -> float:
    """Median of what is finite; NaN of nothing."""
    known = values[np.isfinite(values)]
    return float(np.median(known)) if len(known) else float("nan")


def _filled(logs: Array) -> Array:
    """Holes take the value of the nearest SM share."""
    out = logs.copy()
    for b in range(out.shape[0]):
        for q in range(out.shape[2]):
            known = np.flatnonzero(np.isfinite(out[b, :, q]))
            if len(known):
                out[b, :, q] = np.interp(np.arange(out.shape[1]), known, out[b, known, q])
    return np.where(np.isfinite(out), out, np.nanmax(logs))


def surface_ms(samples: Mapping[str, Sample], options: argparse.Namespace) -> dict[str, float]:
    """Times a surface of 800 configurations, of a view that is known and of a new one."""
    model = train_transfer(list(samples.values()), TransferSettings(seed=options.seed, threads_count=options.threads))
    sample = next(iter(samples.values()))
    probes = probes_of(sample, 4, 100)
    view = model.view(sample.workload, probes)
    known = median_ms(lambda: model.surface(view, SURFACE), 200)
    fresh = median_ms(lambda: model.surface(model.view(sample.workload, probes), SURFACE), 20)
    return {"surface_800_ms": known, "surface_800_of_new_model_ms": fresh}


def median_ms(work: Callable[[], object], times: int) -> float:
    """Returns the median wall-clock time of a call."""
    taken = []
    for _ in range(times):
        began_s = time.perf_counter()
        work()
        taken.append(1e3 * (time.perf_counter() - began_s))
    return statistics.median(taken)


def folds_of(models: Sequence[str], seed: int, count: int) -> dict[str, list[str]]:
    """Returns random folds of models."""
    fold_of = np.random.default_rng(seed).permutation(len(models)) % count
    return {f"fold {f + 1}": [m for m, g in zip(models, fold_of, strict=True) if g == f] for f in range(count)}


def families_of(models: Sequence[str]) -> dict[str, list[str]]:
    """Returns the families of at least FAMILY_MIN models, by name."""
    families: dict[str, list[str]] = {}
    for model in models:
        families.setdefault(family_of(model), []).append(model)
    return {name: members for name, members in families.items() if len(members) >= FAMILY_MIN}


def measure(data: Data, options: argparse.Namespace) -> Iterator[dict[str, object]]:
    """Runs everything; yields what there is after each part, so that a run that is cut short leaves its figures."""
    with_operators = [model for model in sorted(data.latencies) if model in data.operators]
    samples = dict(zip(with_operators, samples_of(data), strict=True))
    result: dict[str, object] = {"noise": noise(data)}
    print("noise of the data:", json.dumps(result["noise"]), flush=True)
    yield result
    runs = []
    for seed in range(options.seed, options.seed + options.repeats):
        runs.append(unseen_configurations(data, seed, options.threads))
        print(
            f"seed {seed}: unseen configurations {runs[-1]['mape']:.2f} %, before made monotone "
            f"{runs[-1]['mape_unconstrained']:.2f} %, in the interval {runs[-1]['coverage_90']:.1f} %, trained in "
            f"{runs[-1]['train_s']:.1f} s",
            flush=True,
        )
    result["unseen_configurations"] = runs
    yield result
    count = min(FOLDS_COUNT, max(2, len(samples) // 3))
    result["unseen_models"] = unseen_models(
        samples, folds_of(with_operators, options.seed, count), PROBE_COUNTS, options
    )
    result |= surface_ms(samples, options)
    result["max_rss_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    yield result
    families = families_of(with_operators)
    if options.quick:
        families = dict(list(families.items())[:1])
    result["family_left_out"] = unseen_models(samples, families, (0, 11), options)
    yield result


def main() -> int:
    """Runs the benchmark; 0 also when there is nothing to measure, which is said."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profiles", type=Path, default=ROOT.parent / "shared/data/profiles/v100")
    parser.add_argument("--json", type=Path, default=ROOT / "bench/results/v100/rapp.json")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="every sixth model, one family")
    options = parser.parse_args()
    files = [options.profiles / name for name in ("latency.csv.gz", "model_ops.csv.gz", "sm_probes.csv")]
    if not all(path.exists() for path in files):
        print(f"skipped: the profiles are not in {options.profiles} (pass --profiles)")
        return 0
    data = Data.read(*files)
    if options.quick:
        data, options.repeats = data.only(set(sorted(data.latencies)[::6])), 1
    head = {
        "benchmark": "rapp",
        "data": "profiles/v100",
        "quick": options.quick,
        "machine": {"cpus": os.cpu_count(), "machine": platform.machine(), "python": platform.python_version()},
        "models_count": len(data.latencies),
        "rows_count": sum(len(table.latency_ms) for table in data.latencies.values()),
    }
    options.json.parent.mkdir(parents=True, exist_ok=True)
    for result in measure(data, options):
        options.json.write_text(json.dumps(head | result, indent=1) + "\n")
    print(f"written: {options.json}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
