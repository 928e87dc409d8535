"""The predictor's error on configurations that it has not seen, and how long a surface takes.

    python bench/rapp.py --profiles ../shared/data/profiles/v100 --json bench/results/cpu/rapp.json

Of every model in `latency.csv.gz` a random tenth of the rows is held out; one predictor is trained on the rest and
each model's surface, made monotone as it is served, is compared with the held-out rows. `--repeats` does it with as
many seeds. Time is wall clock on the machine that it runs on, medians.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from hasgpu_predictor import Axes, FunctionView, LatencyModel, Profile, ProfilePoint, TrainingSettings
from hasgpu_predictor.model import held_out_errors

ROOT = Path(__file__).resolve().parents[1]
DEVICE_MODEL = "v100"
SURFACE = Axes((1, 2, 4, 8), tuple(range(5, 101, 5)), tuple(range(100, 1001, 100)))
HELD_OUT_SHARE = 0.1


def read_points(path: Path) -> dict[str, list[ProfilePoint]]:
    """Returns the points of each model; latencies are means of 180 runs."""
    points: dict[str, list[ProfilePoint]] = {}
    with gzip.open(path, "rt", newline="") as file:
        for row in csv.DictReader(file):
            points.setdefault(row["model"], []).append(
                ProfilePoint(
                    batch=int(row["batch"]),
                    sm_pct=int(row["sm_pct"]),
                    quota_permille=10 * int(row["quota_pct"]),
                    latency_s=float(row["latency_ms"]) / 1e3,
                    repetitions_count=180,
                )
            )
    return points


def evaluate(points: dict[str, list[ProfilePoint]], seed: int, settings: TrainingSettings) -> dict[str, object]:
    """Trains on nine tenths and returns the errors on the tenth, the training time and surface times."""
    rng = np.random.default_rng(seed)
    held = {name: rng.random(len(rows)) < HELD_OUT_SHARE for name, rows in points.items()}
    known = {name: [p for p, out in zip(points[name], held[name], strict=True) if not out] for name in points}
    unseen = {name: [p for p, out in zip(points[name], held[name], strict=True) if out] for name in points}
    began_s = time.perf_counter()
    model = LatencyModel.train(
        [Profile(name, DEVICE_MODEL, tuple(rows)) for name, rows in known.items()],
        device_model=DEVICE_MODEL,
        version=1,
        settings=settings,
    )
    train_s = time.perf_counter() - began_s
    pairs = {name: held_out_errors(model, known[name], unseen[name]) for name in points if unseen[name]}
    errors = np.concatenate([ours for ours, _ in pairs.values()])
    physical = np.concatenate([theirs for _, theirs in pairs.values()])
    first = next(iter(known.values()))
    profile, view = Profile("", DEVICE_MODEL, tuple(first)), FunctionView(first)
    configurations = SURFACE.configurations()
    return {
        "mape_pct": 100 * float(errors.mean()),
        "median_ape_pct": 100 * float(np.median(errors)),
        "p95_ape_pct": 100 * float(np.quantile(errors, 0.95)),
        "physical_mape_pct": 100 * float(physical.mean()),
        "mape_by_model_pct": {name: round(100 * float(ours.mean()), 2) for name, (ours, _) in pairs.items()},
        "rows_unseen": len(errors),
        "rows_trained": sum(map(len, known.values())),
        "train_s": train_s,
        "surface_ms": median_ms(lambda: model.surface(profile, SURFACE)),
        "latencies_ms": median_ms(lambda: model.latencies_s(view, configurations)),
    }


def median_ms(work: Callable[[], object], times: int = 20) -> float:
    """Returns the median wall-clock time of a call."""
    taken = []
    for _ in range(times):
        began_s = time.perf_counter()
        work()
        taken.append(1e3 * (time.perf_counter() - began_s))
    return statistics.median(taken)


def main() -> int:
    """Runs the benchmark; 0 also when there is nothing to measure, which is said."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profiles", type=Path, default=ROOT.parent / "shared/data/profiles/v100")
    parser.add_argument("--json", type=Path, default=ROOT / "bench/results/cpu/rapp.json")
    parser.add_argument("--models", type=int, default=0, help="take so many of the models; 0: all")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    path = options.profiles / "latency.csv.gz"
    if not path.exists():
        print(f"skipped: {path} is not there (pass --profiles)")
        return 0
    points = read_points(path)
    if options.models:
        step = max(1, len(points) // options.models)
        points = {name: points[name] for name in sorted(points)[::step][: options.models]}
    settings = TrainingSettings(cross_validate=False, threads_count=os.cpu_count() or 1)
    runs = []
    for seed in range(options.repeats):
        runs.append(evaluate(points, seed, settings))
        print(
            f"seed {seed}: {len(points)} models, {runs[-1]['rows_unseen']} unseen rows: "
            f"MAPE {runs[-1]['mape_pct']:.2f} % (physical estimate alone {runs[-1]['physical_mape_pct']:.2f} %), "
            f"median {runs[-1]['median_ape_pct']:.2f} %, trained in {runs[-1]['train_s']:.1f} s, "
            f"{SURFACE.configurations().shape[0]} configurations in {runs[-1]['surface_ms']:.1f} ms "
            f"(of which predicted in {runs[-1]['latencies_ms']:.1f} ms)",
            flush=True,
        )
    result = {
        "benchmark": "rapp",
        "data": "shared/data/profiles/v100/latency.csv.gz",
        "machine": {"cpus": os.cpu_count(), "machine": platform.machine(), "python": platform.python_version()},
        "held_out_share": HELD_OUT_SHARE,
        "models_count": len(points),
        "surface_configurations_count": SURFACE.configurations().shape[0],
        "unseen_configurations": {
            key: statistics.mean(float(run[key]) for run in runs)  # type: ignore[arg-type]  # these are numbers
            for key in runs[0]
            if key != "mape_by_model_pct"
        },
        "runs": runs,
    }
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written: {options.json}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
