"""Both examples, asked by a client that nobody here wrote, answer as the model called directly."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys
from collections.abc import Iterator

import pytest
from hasgpu_system import EXAMPLES, ROOT, System

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

TRITON_PYTHON = ROOT / ".venv" / "tritonclient" / "bin" / "python"


@pytest.fixture(scope="module")
def deployed(system: System) -> Iterator[System]:
    for name in ("minilm", "resnet18"):
        system.cli("deploy", str(EXAMPLES / name / "function.yaml"), "--wait", timeout_s=200)
    yield system
    for name in ("minilm", "resnet18"):
        system.cli("delete", name)


@pytest.mark.skipif(not TRITON_PYTHON.exists(), reason="make test sets up .venv/tritonclient; plain pytest does not")
def test_tritonclient_infers_both_unchanged(deployed: System, tmp_path: pathlib.Path) -> None:
    for name in ("minilm", "resnet18"):
        done = subprocess.run(
            [sys.executable, str(EXAMPLES / "reference.py"), name, str(tmp_path / f"{name}.npz")],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr
    script = ROOT / "tests" / "support" / "ask_with_tritonclient.py"
    done = subprocess.run(
        [str(TRITON_PYTHON), str(script), deployed.address, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert seen["live"]
    assert seen["ready"]
    assert seen["models_ready"] == [True, True]
    assert seen["minilm_max_error"] < 1e-4
    assert seen["resnet18_max_error"] < 1e-4
    assert seen["paraphrase"] > seen["unrelated"] + 0.2
    assert "StatusCode.NOT_FOUND" in seen["unknown_model"]
