"""The gate among processes that attach, run, leave, are stopped and are killed at random."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hasgpu_device.gate import RowGate

SECONDS = os.environ.get("HASGPU_CHURN_S", "4")
"""HASGPU_CHURN_S=30 for a longer play."""


@pytest.mark.skipif(sys.platform != "linux", reason="kills are noticed by Linux's locks")
@pytest.mark.parametrize("seed", [1, 2])
def test_never_two_holders_and_nobody_starves(tmp_path: Path, seed: int) -> None:
    gate, witness = tmp_path / "row.gate", tmp_path / "witness"
    witness.touch()
    with RowGate.create(gate) as row:
        script = Path(__file__).with_name("gate_churn.py")
        done = subprocess.run(
            [sys.executable, str(script), str(gate), str(witness), SECONDS, str(seed)],
            capture_output=True,
            text=True,
            timeout=200 + float(SECONDS),
            check=False,
        )
        assert done.stderr == ""
        assert done.stdout.startswith("ok "), done.stdout
        assert row.members() == ()
