"""The conformance suite over the backends; `python -m hasgpu_device.conformance` runs it without pytest."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hasgpu_device import conformance

CUDA = pytest.param(
    "cuda",
    marks=[pytest.mark.gpu, pytest.mark.skipif(not Path("/dev/nvidiactl").exists(), reason="no NVIDIA GPU")],
)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", conformance.CHECKS)
@pytest.mark.parametrize("device", ["fake", "cpu", "emulated", CUDA])
def test_a_backend_conforms(device: str, name: str) -> None:
    assert conformance.run_check(name, device)


def test_a_check_that_fails_is_told_and_ends_with_a_status(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(bench: conformance.Bench) -> str:
        raise AssertionError(f"{bench.device} lost its time")

    monkeypatch.setitem(conformance.CHECKS, "charged", broken)
    out = tmp_path / "x" / "out.json"
    assert conformance.main(["--device", "fake", "--check", "charged", "--json", str(out)]) == 1
    (row,) = json.loads(out.read_text())["rows"]
    assert row == {"check": "charged", "passed": False, "words": "fake lost its time"}
