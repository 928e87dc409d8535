"""`make gpu-lab` as a rehearsal on this host's CPU: real steps, tiny models."""

from __future__ import annotations

import importlib.util
import json
import pathlib
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
from hasgpu_core.profile import Basis, Profile

ROOT = pathlib.Path(__file__).resolve().parents[2]
LAB = ROOT / "tools" / "gpu_lab.py"
MEASURE = ROOT / "tools" / "gpu_lab_measure.py"
MODELS = ROOT / "tools" / "gpu_lab_models.py"

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def lab(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(LAB), *words], check=False, capture_output=True, text=True, timeout=240)


@pytest.fixture(scope="module")
def tool() -> Any:
    spec = importlib.util.spec_from_file_location("gpu_lab", LAB)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_without_a_gpu_it_says_so_in_one_line() -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = lab()
    assert done.returncode == 3
    assert done.stdout == ""
    assert done.stderr.startswith("gpu-lab: no NVIDIA GPU here (")
    assert done.stderr.count("\n") == 1


def test_a_rehearsal_profiles_models_and_goes_on_where_it_ended(tmp_path: pathlib.Path) -> None:
    words = ("--device", "cpu", "--out", str(tmp_path), "--steps", "probe,profile", "--models", "mlp,minilm")
    done = lab(*words, "--budget-s", "200")
    assert done.returncode == 0, done.stdout + done.stderr
    profile = Profile.parse((tmp_path / "profile.csv").read_text())
    assert profile.header.complete
    assert profile.header.basis is Basis.MEASURED
    assert set(profile.header.models) == {"mlp", "minilm"}
    cells = {(b, s, 1_000) for b in (1, 2, 4) for s in (25, 50, 75, 100)} | {
        (b, 100, q) for b in (1, 2) for q in (500, 200)
    }
    for model in profile.header.models:
        assert {row.cell[1:] for row in profile.rows if row.model == model} == cells
    document = json.loads((tmp_path / "lab.json").read_text())
    assert {name: step["state"] for name, step in document["steps"].items()} == {"probe": "done", "profile": "done"}
    assert "profile: done by an earlier run" in lab(*words).stdout

    # As an interruption leaves it: some rows, no word of the step.
    kept = tuple(row for row in profile.rows if row.model == "mlp" or row.batch < 4)
    half = Profile(replace(profile.header, complete=False), kept)
    (tmp_path / "profile.csv").write_text(half.format())
    (tmp_path / "lab.json").unlink()
    done = lab(*words, "--budget-s", "200")
    assert done.returncode == 0, done.stdout + done.stderr
    again = Profile.parse((tmp_path / "profile.csv").read_text())
    assert again.header.complete
    assert set(kept) < set(again.rows)
    assert "mlp: ready" not in done.stdout


def test_a_budget_that_is_too_small_is_told_and_leaves_the_rest_for_later(tmp_path: pathlib.Path) -> None:
    done = lab("--device", "cpu", "--out", str(tmp_path), "--steps", "profile", "--models", "mlp", "--budget-s", "0.5")
    assert done.returncode == 1
    assert "not done: profile" in done.stdout
    assert json.loads((tmp_path / "lab.json").read_text())["steps"]["profile"]["state"] == "out of time"


def test_a_model_is_measured_with_torch_numpy_and_the_device_layer_alone(tmp_path: pathlib.Path, tool: Any) -> None:
    made = subprocess.run(
        [sys.executable, str(MODELS), "lstm", "tiny", "false", str(tmp_path)],
        check=True,
        capture_output=True,
        text=True,
        timeout=200,
    )
    order = json.loads(made.stdout.splitlines()[-1]) | {
        "name": "lstm",
        "device": "cpu",
        "mode": "",
        "gpu_uuid": "",
        "rungs_pct": [50, 100],
        "cores": 1.0,
        "artifact_dir": str(tmp_path),
        "parameters": {},
        "batches": [1, 2],
        "cells": [[1, 100, 1_000], [2, 50, 1_000]],
        "budget_s": 20.0,
    }
    path = tmp_path / "order.json"
    path.write_text(json.dumps(order))
    program = (
        "import runpy, sys\n"
        "for name in ('google', 'hasgpu', 'hasgpu_runtime', 'click', 'yaml', 'rich', 'nats', 'pynvml'):\n"
        "    sys.modules[name] = None\n"
        f"sys.path[:0] = {list(tool.SOURCES)!r}\n"
        f"runpy.run_path({str(LAB)!r}, run_name='lab')\n"
        f"sys.argv = ['measure', {str(path)!r}]\n"
        f"runpy.run_path({str(MEASURE)!r}, run_name='__main__')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], check=False, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["cell"] for line in lines[1:]] == order["cells"]
    assert all(line["device_time_us"] > 0 and line["repetitions"] >= 1 for line in lines[1:])


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--budget-s", "0"), "--budget-s: expected above 0, got 0"),
        (("--steps", "probe,dance"), "--steps: expected some of probe, conformance, quota, resize, profile, got dance"),
        (("--models", "mlp,alexnet"), "got alexnet"),
        (("--device", "tpu"), "invalid choice: 'tpu'"),
    ],
)
def test_wrong_usage_is_told(words: tuple[str, ...], says: str) -> None:
    done = lab(*words)
    assert done.returncode == 2
    assert says in done.stderr


def test_an_unreadable_record_is_refused(tmp_path: pathlib.Path) -> None:
    (tmp_path / "lab.json").write_text("{")
    done = lab("--device", "cpu", "--out", str(tmp_path), "--steps", "probe")
    assert done.returncode == 1
    assert "lab.json is not readable" in done.stderr
    assert lab("--device", "cpu", "--out", str(tmp_path), "--steps", "probe", "--fresh").returncode == 0


@pytest.mark.parametrize(
    ("text", "value"),
    [('{"a": 1}', {"a": 1}), ('loading\n{"a":\n 1}\n', {"a": 1}), ("[1]\n[2]\n", [2]), ("nothing", None), ("{", None)],
)
def test_the_document_at_the_end_of_what_a_step_printed(tool: Any, text: str, value: Any) -> None:
    assert tool.last_json(text) == value
