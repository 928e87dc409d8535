"""The conformance suite over the backends; `python -m hasgpu_device.conformance` runs it without pytest."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from hasgpu_device import conformance
from hasgpu_device.control import Shares

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


def test_a_tenant_begins_anew_where_one_of_its_name_has_ended(tmp_path: Path) -> None:
    bench = conformance.Bench("emulated", tmp_path)
    for request in (500, 300):
        began_ns = time.monotonic_ns()
        with bench.tenant("t0", Shares(request, request)) as tenant:
            assert tenant.control.read_shares().request_permille == request
            end = time.monotonic() + 60
            while not tenant.segments():
                assert time.monotonic() < end
                time.sleep(0.01)
            assert tenant.segments()[0].began_ns >= began_ns
