"""The devices that `hasgpu up` is told of."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner
from hasgpu_cli.__main__ import cli
from hasgpu_cli.stack import devices_setting
from hasgpu_core.errors import InvalidError

PROFILE = """# {"format": "hasgpu-profile", "version": 1, "device_model": "toy", "backend": "cuda", \
"basis": "modelled", "memory_bytes": 1024, "sm_rungs_pct": [100], "driver": "", "versions": {}, "created_unix_s": 1, \
"source": "", "models": {"echo": {"digest": "", "memory_bytes": 1}}, "complete": true}
model,batch,sm_pct,quota_permille,latency_us,device_time_us,longest_segment_us,repetitions
echo,1,100,1000,10,10,10,1
"""


@pytest.fixture
def profile(tmp_path: Path) -> Path:
    path = tmp_path / "toy.csv"
    path.write_text(PROFILE)
    return path


def test_options_become_the_node_agents_setting(profile: Path) -> None:
    def setting(devices: str = "", device: str = "", gpus: int | None = None, profile: Path | None = None) -> str:
        return devices_setting(devices, device=device, gpus=gpus, profile=profile)

    assert setting() == "cpu"
    assert setting(device="cpu") == "cpu"
    assert setting("cpu:cores=2;cpu:cores=1") == "cpu:cores=2;cpu:cores=1"
    assert setting(device="cuda") == "cuda"
    assert setting(device="cuda", gpus=2) == "cuda:gpu=0;cuda:gpu=1"
    assert setting(device="emulated") == "emulated:gpus=1"
    assert setting(device="emulated", gpus=64, profile=profile) == f"emulated:gpus=64,profile={profile}"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--device", "emulated", "--gpus", "0"], "--gpus: expected 1..64, got 0"),
        (["--device", "emulated", "--gpus", "65"], "--gpus: expected 1..64, got 65"),
        (["--gpus", "2"], "--gpus: expected --device emulated or cuda with it, got --device cpu"),
        (
            ["--device", "cuda", "--profile", "x.csv"],
            "--profile: expected --device emulated with it, got --device cuda",
        ),
        (["--profile", "x.csv"], "--profile: expected --device emulated with it, got --device cpu"),
        (["--device", "emulated", "--devices", "cpu"], "--devices: expected not to be given beside --device"),
        (["--device", "emulated", "--profile", "/nowhere/x.csv"], "/nowhere/x.csv: [Errno 2]"),
        (["--device", "emulated", "--profile", "/nowhere/a,b.csv"], "a path without commas and semicolons"),
    ],
)
def test_options_that_do_not_fit_are_refused(tmp_path: Path, arguments: list[str], told: str) -> None:
    done = CliRunner().invoke(cli, ["--home", str(tmp_path), "up", *arguments])
    assert done.exit_code == 1
    assert told in done.output
    assert not (tmp_path / "logs").exists()


def test_a_bad_profile_is_told_with_file_line_and_column(profile: Path) -> None:
    profile.write_text(PROFILE.replace("echo,1,100,1000,10,10", "echo,1,100,1000,10,nan"))
    with pytest.raises(InvalidError, match=r"--profile .*toy.csv: profile file, line 3, device_time_us: .*got 'nan'"):
        devices_setting("", device="emulated", gpus=None, profile=profile)
