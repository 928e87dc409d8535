"""`hasgpu profile` on the running system: a real worker measured, interrupted, resumed."""

from __future__ import annotations

import os
import pathlib
import signal
import subprocess

import pytest
from hasgpu_core.profile import Basis, Profile
from hasgpu_system import HASGPU, System

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]


def test_a_sweep_is_interrupted_and_resumed_and_rapp_takes_its_points(system: System, tmp_path: pathlib.Path) -> None:
    out = tmp_path / "tricky.csv"
    axes = ("--batches", "1,2,3,4", "--sm", "50,100", "--quota", "1000,50,20", "--budget", "30s", "--out", str(out))
    env = {**os.environ, "HASGPU_HOME": str(system.home), "HOME": str(system.home)}
    command = [str(HASGPU), "profile", "tricky", *axes]
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "1/24" in line:
                break
        process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=60)
    assert process.returncode == 130, told
    assert "of 24 configurations of tricky are in" in told
    first = Profile.parse(out.read_text())
    assert 1 <= len(first.rows) < 24
    assert not first.header.complete

    document = system.json("profile", "tricky", *axes)
    assert document["complete"]
    assert document["measured_count"] == 24 - len(first.rows)
    assert document["ingested_count"] == 24
    profile = Profile.parse(out.read_text())
    assert profile.header.complete
    assert profile.header.basis is Basis.MEASURED
    assert set(first.rows) < set(profile.rows)
    assert {row.cell[1:] for row in profile.rows} == {
        (batch, sm_pct, quota) for batch in (1, 2, 3, 4) for sm_pct in (50, 100) for quota in (1_000, 50, 20)
    }
    assert all(row.latency_us >= row.device_time_us * 0.9 for row in profile.rows)


def test_a_device_that_is_not_there_is_told(system: System, tmp_path: pathlib.Path) -> None:
    done = system.cli("profile", "tricky", "--gpu", "gpu7", "--out", str(tmp_path / "p.csv"), check=False)
    assert done.returncode == 1
    assert "device 'gpu7' is not found; there is node0/cpu0" in done.stderr
