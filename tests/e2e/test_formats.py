"""The examples of the two file formats, built, deployed and asked by the command, answer as torch does."""

from __future__ import annotations

import json
import pathlib
import shutil
import subprocess
import sys
from typing import Any

import pytest
from hasgpu_system import EXAMPLES, System

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

ASK_TORCH = """
import json, sys
import torch
sys.path.insert(0, sys.argv[1])
import build
x = torch.tensor(json.loads(sys.argv[2]), dtype=torch.float32)
with torch.inference_mode():
    print(json.dumps(build.build()(x).tolist()))
"""


def python(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=120, check=False, cwd="/"
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def flat(values: Any) -> list[float]:
    return [float(v) for row in values for v in row]


@pytest.mark.parametrize(
    ("folder", "name", "file"), [("torchscript", "mlp-script", "model.pt"), ("torch-export", "mlp-export", "model.pt2")]
)
@pytest.mark.parametrize("rows", [3])
def test_a_built_example_answers_as_torch(
    system: System, tmp_path: pathlib.Path, folder: str, name: str, file: str, rows: int
) -> None:
    copy = tmp_path / folder
    shutil.copytree(EXAMPLES / folder, copy, ignore=shutil.ignore_patterns("model.*", "__pycache__"))
    assert not (copy / file).exists()
    python(str(copy / "build.py"))
    assert (copy / file).stat().st_size > 0
    values = json.dumps([[(7 * row + column) % 11 / 10 - 0.5 for column in range(16)] for row in range(rows)])
    wanted = json.loads(python("-c", ASK_TORCH, str(copy), values))
    system.cli("deploy", str(copy / "function.yaml"), "--wait", timeout_s=200)
    try:
        answer = system.json("infer", name, "--input", f"x={values}")
        again = system.json("infer", name, "--input", f"x={json.dumps(json.loads(values)[:1])}")
    finally:
        system.cli("delete", name)
    (output,) = answer["outputs"]
    assert (answer["function"], output["name"], output["datatype"]) == (name, "y", "FP32")
    assert output["shape"] == [rows, 4]
    assert flat(output["data"]) == pytest.approx(flat(wanted), abs=1e-4)
    assert flat(again["outputs"][0]["data"]) == pytest.approx(flat(wanted[:1]), abs=1e-4)
    assert max(map(abs, flat(wanted))) > 0.01  # not all zeros, which anything could answer
    assert name not in [function["spec"]["name"] for function in system.json("functions")]
