"""Measures one model for `make gpu-lab`, in a process of its own: gate, control block and backend as in a worker.

`python gpu_lab_measure.py ORDER.json`; prints a JSON object a line: `{"note": ...}` first, then one for each cell.
"""

from __future__ import annotations

import json
import random
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from hasgpu_core.function import ModelFormat, TensorSpec
from hasgpu_device import backends, ledger, tensors
from hasgpu_device.control import DEFAULT_WINDOW_NS, ControlBlock, Shares
from hasgpu_device.gate import GateMember, RowGate
from hasgpu_device.ledger import SmLedger
from hasgpu_device.segments import Run, SegmentRunner
from hasgpu_device.worker_config import WorkerConfig

REPETITIONS = 20
LEAST_SHARE = 0.3
DRAINED_FACTOR = 3
COLD_RUNS_FROM = 3
"""As in a worker: with so many repetitions the first is left out."""


def worker_config(order: dict[str, Any], folder: Path) -> WorkerConfig:
    """Returns what a worker of the model would be told."""
    return WorkerConfig(
        instance=f"{order['name']}-lab",
        function=order["name"],
        function_revision=1,
        format=ModelFormat(order["format"]),
        entry=order["entry"],
        artifact_dir=order["artifact_dir"],
        inputs=(TensorSpec("x", order["datatype"], (-1, *order["shape"])),),
        outputs=(TensorSpec("y", "FP32", (-1, *order["outputs"])),),
        max_batch=max(order["batches"]),
        control_path=str(folder / "control"),
        gate_path=str(folder / "gate"),
        status_path=str(folder / "status"),
        ledger_path=str(folder / "ledger"),
        device_cores=order["cores"],
        backend=order["device"],
        mode=order["mode"],
        gpu_uuid=order["gpu_uuid"],
        sm_rungs_pct=tuple(order["rungs_pct"]),
        parameters=order["parameters"],
    )


def measure(runner: SegmentRunner, model: Any, batch: Any, cell: list[int], budget_s: float) -> list[Run]:
    """Runs a batch back to back, at least once; below the whole quota until what the bucket held is long used up."""
    rows, _, quota = cell
    runs: list[Run] = []
    until_s = time.monotonic() + budget_s
    bucket_ns = 0.0 if quota >= 1_000 else DRAINED_FACTOR * DEFAULT_WINDOW_NS * quota / (1_000 - quota)
    more = True
    while more:
        _, run = runner.run(lambda: model.infer(batch, rows), linger=lambda: True)
        runs.append(run)
        enough = len(runs) >= REPETITIONS and sum(one.device_ns for one in runs) >= bucket_ns
        more = not enough and time.monotonic() < until_s
    runner.withdraw()
    return runs


def row(cell: list[int], runs: list[Run]) -> dict[str, Any]:
    """Returns what the runs of a cell come to: medians, as a worker tells them."""
    counted = runs[1:] if len(runs) >= COLD_RUNS_FROM else runs
    return {
        "cell": cell,
        "latency_us": statistics.median(run.gate_wait_ns + run.execute_ns for run in counted) / 1e3,
        "device_time_us": statistics.median(run.device_ns for run in counted) / 1e3,
        "longest_segment_us": max(run.longest_segment_ns for run in counted) / 1e3,
        "repetitions": len(runs),
    }


def main() -> None:
    """Reads the order and measures until its budget is used up."""
    order = json.loads(Path(sys.argv[1]).read_text())
    began_s = time.monotonic()
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as name:
        config = worker_config(order, Path(name))
        ledger.create(config.ledger_path)
        RowGate.create(config.gate_path).close()
        first_sm = order["cells"][0][1]
        control = ControlBlock.create(config.control_path, Shares(1_000, 1_000, first_sm))
        with SmLedger(config.ledger_path) as book, GateMember(config.gate_path, control.read_shares()) as member:
            backend = backends.create(config)
            runner = SegmentRunner(backend, member, control, ledger=book)
            runner.poll()
            with ThreadPoolExecutor(1, initializer=backend.setup_loader) as pool:
                model = pool.submit(backend.load, config, runner.boundary).result()
            backend.setup()
            runner.poll()
            notes = [model.note]
            if hasattr(backend, "warm_up"):
                notes.append(backend.warm_up(model, lambda work: runner.run(work, background=True)[0], runner.poll))
            print(
                json.dumps({"note": "; ".join(filter(None, notes)), "ready_s": time.monotonic() - began_s}), flush=True
            )
            # What loading took is taken off the budget, but for a part without which nothing would be measured.
            loaded_s = time.monotonic() - began_s
            until_s = time.monotonic() + max(order["budget_s"] - loaded_s, LEAST_SHARE * order["budget_s"])
            rng = random.Random(1)
            for done, cell in enumerate(order["cells"]):
                rows, sm_pct, quota = cell
                left_s = until_s - time.monotonic()
                if left_s <= 0:
                    break
                control.write_shares(Shares(quota, quota, sm_pct))
                runner.poll()
                batch = tensors.random_inputs(config.inputs, rows, rng)
                runs = measure(runner, model, batch, cell, left_s / (len(order["cells"]) - done))
                print(json.dumps(row(cell, runs)), flush=True)
        control.close()


if __name__ == "__main__":
    main()
