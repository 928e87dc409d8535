"""Everything that only a GPU can prove, in under nine minutes: facts, probe, conformance, quotas, resizes, a profile.

    python tools/gpu_lab.py [--device cuda|cpu] [--budget-s 520] [--out DIR] [--steps ...] [--models ...] [--fresh]

Needs torch, numpy, protobuf and grpcio alone (nvidia-ml-py and a C compiler are used where they are there). Each step
has a time budget and runs in processes of its own; what a step found is written as soon as it ends. Run it again after
an interruption: steps that are done are left out, the profile goes on where it ended.

    DIR/lab.json      the steps: state, seconds, what was said          (DIR: bench/results/<device model>)
    DIR/probe.json  DIR/conformance.json  DIR/quota.json  DIR/resize.json
    DIR/profile.csv   at least 8 models over batch, SM share and quota

With `--device cpu` it is a rehearsal: the same steps on this host's CPU, smaller models. Exit status: 0 all steps were
made, 1 one failed or ran out of time, 3 there is no GPU (which is no failure of the product).
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SOURCES = tuple(str(ROOT / part) for part in ("libs/core/src", "libs/device/src", "proto/gen", "cli/src"))
sys.path[:0] = SOURCES

from hasgpu_cli.profiling.axes import Cell  # noqa: E402  the path comes first
from hasgpu_cli.profiling.file import ProfileFile  # noqa: E402
from hasgpu_core.errors import HasgpuError  # noqa: E402
from hasgpu_core.profile import Basis, ProfileHeader, ProfileModel, ProfileRow  # noqa: E402

EXIT_NO_GPU = 3
BUDGET_S = 520.0
PARTS = {"probe": 0.11, "conformance": 0.12, "quota": 0.26, "resize": 0.11, "profile": 0.4}
"""Of the budget; what a step leaves over goes to those after it."""
BENCHES = {"quota": (55.0, 20), "resize": (15.0, 8)}
"""Of each benchmark, as `--quick` makes it: about what it takes beside measuring (s), and how often it measures."""
MODELS = ("resnet18", "minilm", "resnet50", "bert-base", "vit-b-16", "gpt2", "mobilenet-v2", "unet", "mlp", "lstm")
TAIL = 4_000


@dataclass(slots=True)
class Step:
    """How a step went."""

    state: str
    """"done", "failed", "out of time" or "left out"."""
    seconds: float = 0.0
    said: str = ""
    """Why, or the end of what it printed."""


@dataclass(slots=True)
class Lab:
    """One run on one device."""

    device: str
    size: str
    out: Path
    facts: dict[str, Any]
    mode: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Of the processes that use the device."""
    models: tuple[str, ...] = MODELS
    steps: dict[str, Step] = field(default_factory=dict)

    def write(self) -> None:
        """Writes lab.json, atomically."""
        self.out.mkdir(parents=True, exist_ok=True)
        document = {
            "device": self.facts["model"],
            "facts": self.facts,
            "mode": self.mode,
            "size": self.size,
            "steps": {name: asdict(step) for name, step in self.steps.items()},
        }
        draft = self.out / f".lab.json.{os.getpid()}"
        draft.write_text(json.dumps(document, indent=1) + "\n")
        draft.replace(self.out / "lab.json")

    def read(self) -> None:
        """Takes up the steps of an earlier run on the same device in the same size; others are begun anew."""
        try:
            document = json.loads((self.out / "lab.json").read_text())
            if (document["device"], document["size"]) == (self.facts["model"], self.size):
                self.steps = {name: Step(**step) for name, step in document["steps"].items()}
        except FileNotFoundError:
            return
        except (ValueError, KeyError, TypeError) as error:
            raise SystemExit(f"{self.out / 'lab.json'} is not readable ({error}); --fresh begins anew") from error

    def is_done(self, name: str) -> bool:
        """Whether an earlier run made the step."""
        return name in self.steps and self.steps[name].state == "done"


def machine_facts(device: str) -> dict[str, Any]:
    """Returns what machine and device this is; of a GPU in a process of its own, whose CUDA context ends with it.

    Exits with EXIT_NO_GPU when there is none.
    """
    import torch

    facts: dict[str, Any] = {
        "host": platform.platform(),
        "cores": len(os.sched_getaffinity(0)),
        "versions": {"python": platform.python_version(), "torch": str(torch.__version__)},
        "driver": "",
        "gpu_uuid": "",
        "rungs_pct": [25, 50, 75, 100],
    }
    if device == "cpu":
        from hasgpu_device.backends import cpu

        facts["gate"] = build_gate()
        info = cpu.probe("lab")
        return facts | {"model": info.model, "memory_bytes": info.memory_bytes, "capabilities": list(info.capabilities)}
    done = finish([__file__, "--gpu-facts"], dict(os.environ), 120)
    found = last_json(done.stdout)
    if done.returncode or not isinstance(found, dict):
        built = "" if torch.version.cuda else f", torch {torch.__version__} is built without CUDA"
        reason = done.stderr.strip().splitlines()[-1:] or ["it can't be asked"]
        print(f"gpu-lab: no NVIDIA GPU here ({reason[0]}{built}); nothing was measured", file=sys.stderr)
        raise SystemExit(EXIT_NO_GPU)
    found["versions"] = facts["versions"] | found["versions"]
    return facts | found | {"gate": build_gate()}


def build_gate() -> str:
    """Builds the gate's core in C where that can be done; returns which one the steps run with, and why."""
    from hasgpu_device import native

    try:
        native.build()
    except native.BuildError as error:
        return f"python ({error})"
    return "native"


def gpu_facts() -> dict[str, Any]:
    """Returns what torch and NVML say of the first GPU; exits when there is none."""
    import torch

    if not torch.cuda.is_available():
        raise SystemExit("torch finds none")
    properties = torch.cuda.get_device_properties(0)
    facts: dict[str, Any] = {
        "model": properties.name.replace(" ", "-"),
        "memory_bytes": properties.total_memory,
        "sm_count": properties.multi_processor_count,
        "gpu_uuid": f"GPU-{properties.uuid}",
        "versions": {"cuda": str(torch.version.cuda)},
    }
    from hasgpu_device.backends.cuda.nvml import Nvml

    nvml = Nvml.open()
    inventory = nvml.inventory()
    nvml.close()
    known = inventory.find(facts["gpu_uuid"]) or inventory.find("0")
    if known is not None:
        facts |= {"driver": inventory.driver_version, "gpu_uuid": known.uuid, "compute_mode": known.compute_mode}
    return facts | {"nvml": inventory.reason or "ok"}


def finish(words: list[str], environment: Mapping[str, str], timeout_s: float) -> subprocess.CompletedProcess[str]:
    """Runs a Python program to its end; whatever happens, nothing that it started is left.

    Raises:
        TimeoutExpired: It took too long.
    """
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(
            [sys.executable, *words], env=dict(environment), stdout=out, stderr=err, cwd=ROOT, start_new_session=True
        )
        try:
            code = process.wait(timeout=timeout_s)
        except subprocess.TimeoutExpired as error:
            out.seek(0)
            err.seek(0)
            raise subprocess.TimeoutExpired(error.cmd, timeout_s, stderr=err.read() or out.read()) from None
        finally:
            end_group(process)
        out.seek(0)
        err.seek(0)
        return subprocess.CompletedProcess(words, code, out.read(), err.read())


def end_group(process: subprocess.Popen[Any]) -> None:
    """Kills what is left of a process and of those that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def command(lab: Lab, words: list[str], budget_s: float) -> Step:
    """Runs a step's command."""
    began_s = time.monotonic()
    try:
        done = finish(words, lab.environment, budget_s)
    except subprocess.TimeoutExpired as error:
        return Step("out of time", round(budget_s, 1), str(error.stderr or "")[-TAIL:])
    seconds = round(time.monotonic() - began_s, 1)
    if done.returncode:
        return Step("failed", seconds, f"exit {done.returncode}: {(done.stderr or done.stdout)[-TAIL:]}")
    return Step("done", seconds)


def last_json(text: str) -> Any:
    """Returns the JSON document that a text is, or ends with; None: it holds none."""
    decoder = json.JSONDecoder()
    starts = [0, *(at + 1 for at, sign in enumerate(text) if sign == "\n")]
    for at in starts:
        line = text[at:].lstrip()
        if line[:1] in ("{", "["):
            try:
                value, end = decoder.raw_decode(line)
            except ValueError:
                continue
            if not line[end:].strip():
                return value
    return None


@contextmanager
def sharing(lab: Lab) -> Iterator[None]:
    """Has the device shared as the probe found it can be, as a node agent would, and gives processes the way there."""
    plain = {**os.environ, "PYTHONPATH": os.pathsep.join(SOURCES)}
    if lab.device != "cuda":
        lab.environment = plain
        yield
        return
    from hasgpu_device.backends.cuda.mps import (
        MpsDaemon,
        client_environment,
        replace_cuda_variables,
        timeshare_environment,
    )

    with tempfile.TemporaryDirectory(prefix="lab-") as name:
        folder = Path(name)
        if not lab.mode.startswith("mps"):
            (folder / "none").mkdir()
            variables = timeshare_environment(lab.facts["gpu_uuid"], folder / "none")
            lab.environment = replace_cuda_variables(plain, variables)
            yield
            return
        daemon = MpsDaemon(lab.facts["gpu_uuid"], folder / "mps", environment=plain)
        daemon.start()
        try:
            mode = "mps+green" if lab.mode == "mps+green" else "mps+pct"
            lab.environment = replace_cuda_variables(plain, client_environment(daemon.pipe_dir, mode))
            yield
        finally:
            daemon.quit()


def probe_step(lab: Lab, budget_s: float) -> Step:
    """Finds out what the device can enforce; a CPU's is among the facts."""
    if lab.device == "cpu":
        (lab.out / "probe.json").write_text(json.dumps(lab.facts["capabilities"], indent=1) + "\n")
        return Step("done", 0.0, "a CPU device: its capabilities are among the facts")
    words = ["-m", "hasgpu_device.backends.cuda.probe", "--gpu", lab.facts["gpu_uuid"]]
    return command(lab, [*words, "--json", str(lab.out / "probe.json")], budget_s)


def take_probe(lab: Lab) -> None:
    """Takes mode and rungs from what the probe wrote; without it the GPU is shared in time alone."""
    if lab.device == "cpu":
        return
    try:
        document = json.loads((lab.out / "probe.json").read_text())
    except (OSError, ValueError):
        document = {}
    lab.mode = str(document.get("mode", "") or "timeshare")
    lab.facts["rungs_pct"] = list(document.get("sm_rungs_pct") or lab.facts["rungs_pct"])


def bench_step(lab: Lab, name: str, budget_s: float) -> Step:
    """Runs bench/<name>.py on the device."""
    script = ROOT / "bench" / f"{name}.py"
    if not script.exists():
        return Step("left out", 0.0, f"{script.relative_to(ROOT)} is not here")
    beside_s, count = BENCHES[name]
    seconds = max(1.0, (budget_s - beside_s) / count)
    words = [str(script), "--device", lab.device, "--mode", lab.mode, "--quick", "--seconds", f"{seconds:.1f}"]
    return command(lab, [*words, "--json", str(lab.out / f"{name}.json")], budget_s)


def conformance_step(lab: Lab, budget_s: float) -> Step:
    """Runs the device layer's conformance suite."""
    words = ["-m", "hasgpu_device.conformance", "--device", lab.device, "--mode", lab.mode]
    return command(lab, [*words, "--json", str(lab.out / "conformance.json")], budget_s)


def cells_of(lab: Lab) -> list[Cell]:
    """Returns what is measured of each model, the most informative first."""
    batches = (1, 2, 4) if lab.size == "tiny" else (1, 8, 32, 2, 4, 16)
    rungs = sorted(lab.facts["rungs_pct"], reverse=True)
    if lab.device == "cuda" and lab.mode not in ("mps+green", "mps+pct"):
        rungs = [100]
    whole = [(batch, sm_pct, 1_000) for batch in batches for sm_pct in rungs]
    return whole + [(batch, 100, quota) for batch in batches[:2] for quota in (500, 200)]


def profile_step(lab: Lab, budget_s: float) -> Step:
    """Measures the models one after the other, as far as the budget reaches."""
    began_s = time.monotonic()
    until_s = began_s + budget_s
    troubles: list[str] = []
    missing_count = 0
    with (
        tempfile.TemporaryDirectory(prefix="lab-") as name,
        ThreadPoolExecutor(max(1, lab.facts["cores"] // 4)) as pool,
    ):
        wanted = [model for model in lab.models if missing_of(lab, model)]
        # Exporting takes the host's cores and measuring one of them: the next models are made meanwhile.
        orders = {model: pool.submit(build_order, lab, model, Path(name) / model, until_s) for model in wanted}
        for index, model in enumerate(wanted):
            left_s = until_s - time.monotonic()
            try:
                if left_s > 1:
                    order = orders[model].result(timeout=left_s)
                    left_s = until_s - time.monotonic()
                    profile_model(lab, model, order, left_s / (len(wanted) - index), left_s)
            except (OSError, ValueError, HasgpuError, subprocess.SubprocessError, TimeoutError) as error:
                troubles.append(f"{model}: {error}"[:TAIL])
            missing_count += len(missing_of(lab, model))
    seconds = round(time.monotonic() - began_s, 1)
    if troubles:
        return Step("failed", seconds, "; ".join(troubles)[-TAIL:])
    text = f"{missing_count} cells are missing: run it again" if missing_count else ""
    return Step("out of time" if missing_count else "done", seconds, text)


def open_file(lab: Lab, name: str) -> ProfileFile:
    """Returns the profile with the rows of one model, as it stands."""
    code = (ROOT / "tools/gpu_lab_models.py").read_bytes() + f"{name} {lab.size} {lab.device}".encode()
    model = ProfileModel(hashlib.sha256(code).hexdigest(), 0)
    return ProfileFile(lab.out / "profile.csv", header_of(lab, name, model), resume=True)


def missing_of(lab: Lab, name: str) -> list[Cell]:
    """Returns the cells of a model that the profile lacks, the most informative first."""
    known = open_file(lab, name).cells()
    return [cell for cell in cells_of(lab) if cell not in known]


def profile_model(lab: Lab, name: str, order: dict[str, Any], share_s: float, left_s: float) -> None:
    """Measures what the file lacks of a model, as far as its share of the time reaches.

    Raises:
        ValueError, OSError: It can't be loaded or measured.
    """
    missing = missing_of(lab, name)
    widths = sorted({cell[1] for cell in missing}, reverse=True)
    # An MPS percentage holds for a process's life: there each width has a process of its own.
    groups = [[width] for width in widths] if lab.mode == "mps+pct" else [widths]
    for group in groups:
        cells = [cell for cell in missing if cell[1] in group]
        environment = dict(lab.environment)
        if lab.mode == "mps+pct":
            environment["CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"] = str(group[0])
        path = Path(order["artifact_dir"]) / f"order{group[0]}.json"
        path.write_text(json.dumps(order | {"cells": cells, "budget_s": share_s / len(groups)}))
        measure_cells(lab, name, path, environment, left_s)


def build_order(lab: Lab, name: str, folder: Path, until_s: float) -> dict[str, Any]:
    """Makes the model's artifact; returns what the measuring process is told. Raises ValueError, SubprocessError."""
    folder.mkdir()
    half = "true" if lab.device == "cuda" else "false"
    words = [str(ROOT / "tools/gpu_lab_models.py"), name, lab.size, half, str(folder)]
    done = finish(words, lab.environment, max(1.0, until_s - time.monotonic()))
    document = last_json(done.stdout)
    if done.returncode or not isinstance(document, dict):
        raise ValueError(f"can't be built: {done.stderr[-TAIL:]}")
    return document | {
        "name": name,
        "device": lab.device,
        "mode": lab.mode,
        # Under MPS a process sees the daemon's GPU alone, whatever its UUID.
        "gpu_uuid": "" if lab.mode.startswith("mps") else lab.facts["gpu_uuid"],
        "rungs_pct": lab.facts["rungs_pct"],
        "cores": float(lab.facts["cores"]),
        "artifact_dir": str(folder),
        "parameters": {"name": name, "size": lab.size, "half": half} if document["format"] == "python" else {},
        "batches": sorted({cell[0] for cell in cells_of(lab)}),
    }


def measure_cells(lab: Lab, name: str, order: Path, environment: Mapping[str, str], timeout_s: float) -> None:
    """Runs the measuring process and writes each cell as it comes; raises ValueError when the process fails."""
    file, missing = open_file(lab, name), set(missing_of(lab, name))
    words = [sys.executable, str(ROOT / "tools/gpu_lab_measure.py"), str(order)]
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            words, env=dict(environment), stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True
        )
        assert process.stdout is not None
        too_late = threading.Timer(timeout_s, end_group, [process])
        too_late.start()
        try:
            for line in process.stdout:
                found = json.loads(line)
                if "cell" not in found:
                    print(f"  {name}: ready after {found['ready_s']:.1f} s {found['note']}", flush=True)
                    continue
                cell: Cell = tuple(found.pop("cell"))
                missing.discard(cell)
                file.add(ProfileRow(name, *cell, **found), missing=missing)
            code = process.wait()
        finally:
            too_late.cancel()
            end_group(process)
        if code:
            errors.seek(0)
            raise ValueError(f"measuring ended with exit {code}: {errors.read()[-TAIL:]}")


def header_of(lab: Lab, name: str, model: ProfileModel) -> ProfileHeader:
    """Returns the header of the profile as far as one model goes."""
    return ProfileHeader(
        device_model=lab.facts["model"],
        backend=lab.device,
        basis=Basis.MEASURED,
        memory_bytes=max(1, lab.facts["memory_bytes"]),
        sm_rungs_pct=tuple(lab.facts["rungs_pct"]),
        driver=lab.facts["driver"],
        versions=lab.facts["versions"],
        created_unix_s=int(time.time()),
        source=f"make gpu-lab, models of size {lab.size}, mode {lab.mode or lab.device}",
        models={name: model},
        complete=False,
    )


STEPS = {
    "conformance": conformance_step,
    "quota": lambda lab, budget_s: bench_step(lab, "quota", budget_s),
    "resize": lambda lab, budget_s: bench_step(lab, "resize", budget_s),
    "profile": profile_step,
}


def run(lab: Lab, budget_s: float, wanted: tuple[str, ...]) -> None:
    """Makes the steps that are wanted and not done."""
    until_s = time.monotonic() + budget_s
    lab.environment = {**os.environ, "PYTHONPATH": os.pathsep.join(SOURCES)}

    def make(name: str, step: Callable[[Lab, float], Step]) -> None:
        if name not in wanted:
            return
        if lab.is_done(name):
            print(f"{name}: done by an earlier run")
            return
        rest = [PARTS[one] for one in list(PARTS)[list(PARTS).index(name) :] if one in wanted and not lab.is_done(one)]
        left_s = until_s - time.monotonic()
        share_s = left_s * PARTS[name] / sum(rest)
        print(f"{name}: up to {share_s:.0f} s ...", flush=True)
        lab.steps[name] = found = step(lab, share_s) if left_s > 1 else Step("out of time", 0.0, "not begun")
        lab.write()
        print(f"{name}: {found.state} after {found.seconds:g} s {(found.said.splitlines() or [''])[-1]}", flush=True)

    make("probe", probe_step)
    take_probe(lab)
    with sharing(lab):
        for name, step in STEPS.items():
            make(name, step)


def main() -> int:
    """Reads the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--budget-s", type=float, default=BUDGET_S, help="for everything (520)")
    parser.add_argument("--size", choices=["full", "tiny"], help="of the models (full; on a CPU tiny)")
    parser.add_argument("--out", type=Path, help="where the results go (bench/results/<device model>)")
    parser.add_argument("--steps", default=",".join(PARTS), help="which (all)")
    parser.add_argument("--models", default=",".join(MODELS), help="which are profiled (all)")
    parser.add_argument("--fresh", action="store_true", help="forget what earlier runs did")
    parser.add_argument("--gpu-facts", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.gpu_facts:
        print(json.dumps(gpu_facts()))
        return 0
    if options.budget_s <= 0:
        parser.error(f"--budget-s: expected above 0, got {options.budget_s:g}")
    for name, known in (("steps", tuple(PARTS)), ("models", MODELS)):
        if unknown := sorted(set(getattr(options, name).split(",")) - set(known)):
            parser.error(f"--{name}: expected some of {', '.join(known)}, got {', '.join(unknown)}")
    facts = machine_facts(options.device)
    out: Path = (
        options.out or ROOT / "bench/results" / (facts["model"] if options.device == "cuda" else "cpu-lab")
    ).absolute()
    lab = Lab(options.device, options.size or ("full" if options.device == "cuda" else "tiny"), out, facts)
    lab.models = tuple(options.models.split(","))
    if options.fresh:
        for name in ("lab.json", "profile.csv"):
            (out / name).unlink(missing_ok=True)
    lab.read()
    lab.write()
    wanted = tuple(options.steps.split(","))
    run(lab, options.budget_s, wanted)
    bad = [name for name in wanted if not lab.is_done(name)]
    print(f"results are in {lab.out}" + (f"; not done: {', '.join(bad)}" if bad else ""))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
