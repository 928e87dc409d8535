"""The real pynvml on a library of fake_nvml/, each case in a process of its own: a library stays loaded."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hasgpu_device.backends.cuda.nvml import Nvml

UUID_0 = "GPU-00000000-aaaa-bbbb-cccc-000000000000"
UUID_1 = "GPU-00000001-aaaa-bbbb-cccc-000000000000"

PROGRAM = """
import dataclasses, json, sys
from pathlib import Path
from hasgpu_device.backends.cuda.nvml import Nvml
scenario, looks = Path(sys.argv[1]), json.loads(sys.argv[2])
nvml = Nvml.open()
inventory = nvml.inventory()
out = {"inventory": dataclasses.asdict(inventory), "models": [gpu.model for gpu in inventory.gpus], "looks": []}
for text, uuid in looks:
    if text is not None:
        scenario.write_text(text)
    out["looks"].append(dataclasses.asdict(nvml.telemetry(uuid)))
nvml.close()
nvml.close()
out["closed"] = nvml.inventory().reason
print(json.dumps(out))
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("pynvml", reason="nvidia-ml-py is not installed")
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("no C compiler to build the fake NVML with")
    folder = tmp_path_factory.mktemp("nvml")
    source = Path(__file__).parent / "fake_nvml" / "nvml.c"
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-Wall", "-Werror", "-o", folder / "libnvidia-ml.so.1", source], check=True
    )
    return folder


class Host:
    def __init__(self, folder: Path, library: Path | None) -> None:
        self._scenario = folder / "scenario"
        self._scenario.write_text("")
        self._environment = os.environ | {"FAKE_NVML": str(self._scenario), "LD_LIBRARY_PATH": str(library or folder)}

    def ask(self, scenario: str = "", *looks: tuple[str | None, str]) -> Any:
        self._scenario.write_text(scenario)
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, self._scenario, json.dumps(looks)],
            env=self._environment,
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)


@pytest.fixture
def host(tmp_path: Path, library: Path) -> Host:
    return Host(tmp_path, library)


def test_inventory(host: Host) -> None:
    said = host.ask("count 2")
    inventory = said["inventory"]
    assert inventory["reason"] == ""
    assert inventory["driver_version"] == "580.65.06"
    assert inventory["cuda_version"] == [13, 0]
    assert inventory["refused"] == []
    assert inventory["gpus"][1] == {
        "index": 1,
        "uuid": UUID_1,
        "name": "NVIDIA H100 80GB HBM3",
        "memory_bytes": 85520809984,
        "compute_capability": [9, 0],
        "sm_count": 132,
        "compute_mode": "DEFAULT",
        "notes": [],
    }
    assert said["models"] == ["NVIDIA-H100-80GB-HBM3"] * 2
    assert said["closed"] == "no NVIDIA GPU: NVML was closed"


def test_gpus_that_cannot_be_used_are_refused_with_a_reason(host: Host) -> None:
    inventory = host.ask(
        "count 6\ngpu0.mig 1\ngpu1.mig_pending 1\ngpu2.compute_mode 2\ngpu3.handle_error 4\ngpu4.lost 1"
    )["inventory"]
    assert [gpu["index"] for gpu in inventory["gpus"]] == [5]
    reasons = {gpu["index"]: gpu["reason"] for gpu in inventory["refused"]}
    assert reasons[0].startswith("MIG mode is enabled")
    assert reasons[1].startswith("MIG mode will be enabled at the next reset")
    assert reasons[2].startswith("compute mode PROHIBITED")
    assert reasons[3] == "this user may not use it (no permission on its /dev/nvidia file)"
    assert reasons[4].startswith("lost: it has fallen off the bus")
    assert inventory["refused"][0]["uuid"] == UUID_0
    assert inventory["reason"] == ""


def test_a_host_with_refused_gpus_alone_says_why_there_is_none(host: Host) -> None:
    inventory = host.ask("gpu0.mig 1")["inventory"]
    assert inventory["gpus"] == []
    assert inventory["reason"].startswith("no NVIDIA GPU: GPU 0 NVIDIA H100 80GB HBM3: MIG mode is enabled")


def test_exclusive_mode_is_reported_and_used(host: Host) -> None:
    gpu = host.ask("gpu0.compute_mode 3")["inventory"]["gpus"][0]
    assert gpu["compute_mode"] == "EXCLUSIVE_PROCESS"
    assert gpu["notes"] == ["compute mode EXCLUSIVE_PROCESS: without MPS only one process can use it"]


def test_what_a_gpu_does_not_offer_is_none_not_zero(host: Host) -> None:
    said = host.ask("gpu0.bare 1", (None, UUID_0))
    gpu = said["inventory"]["gpus"][0]
    assert (gpu["sm_count"], gpu["compute_capability"], gpu["compute_mode"]) == (None, None, "")
    look = said["looks"][0]
    assert look["health"] == "ok"
    assert look["memory_used_bytes"] == 1 << 30
    offered = ("busy_pct", "power_mw", "power_limit_mw", "temperature_c", "sm_clock_mhz", "ecc_uncorrected_count")
    assert [look[key] for key in offered] == [None] * len(offered)


def test_sms_of_a_capability_that_is_not_known_are_not_guessed(host: Host) -> None:
    assert host.ask("gpu0.major 99")["inventory"]["gpus"][0]["sm_count"] is None


def test_telemetry(host: Host) -> None:
    look = host.ask("", (None, UUID_0))["looks"][0]
    assert look == {
        "uuid": UUID_0,
        "health": "ok",
        "reason": "",
        "memory_used_bytes": 1 << 30,
        "memory_total_bytes": 85520809984,
        "busy_pct": 37,
        "power_mw": 123456,
        "power_limit_mw": 700000,
        "temperature_c": 41,
        "sm_clock_mhz": 1980,
        "memory_clock_mhz": 2619,
        "throttle_reasons": 4,
        "ecc_uncorrected_count": 0,
        "xid": 0,
    }


def test_an_older_driver_still_tells_the_temperature(host: Host) -> None:
    assert host.ask("gpu0.old 1", (None, UUID_0))["looks"][0]["temperature_c"] == 40


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("gpu0.ecc 3", "3 uncorrected memory errors"),
        ("gpu0.retired 2", "2 memory pages retired"),
        ("gpu0.retired_pending 1", "pages are to be retired"),
        ("gpu0.row_pending 1", "rows are to be remapped"),
        ("gpu0.row_failure 1", "the board is to be replaced"),
    ],
)
def test_memory_trouble_degrades_a_gpu(host: Host, line: str, words: str) -> None:
    look = host.ask(line, (None, UUID_0))["looks"][0]
    assert look["health"] == "degraded"
    assert words in look["reason"]
    assert look["reason"].startswith(f"NVIDIA H100 80GB HBM3 ({UUID_0}): ")


def test_xids_are_heard_and_those_of_the_hardware_tell_on_health(host: Host) -> None:
    looks = host.ask(
        "count 2",
        (None, UUID_0),
        (None, UUID_1),
        ("count 2\ngpu0.xid 31", UUID_0),
        ("count 2\ngpu0.xid 48", UUID_0),
        ("count 2\ngpu0.xid 13", UUID_0),
        (None, UUID_1),
        ("count 2\ngpu0.xid 13\ngpu1.xid 79", UUID_1),
    )["looks"]
    assert [look["xid"] for look in looks] == [0, 0, 31, 48, 48, 0, 79]
    assert [look["health"] for look in looks] == ["ok", "ok", "ok", "degraded", "degraded", "ok", "lost"]
    assert "Xid 48: double-bit memory error" in looks[4]["reason"]
    assert host.ask("gpu0.xid -1", (None, UUID_0))["looks"][0]["xid"] is None


def test_a_gpu_that_vanishes_is_told_by_name_and_the_others_go_on(host: Host) -> None:
    looks = host.ask(
        "count 2",
        (None, UUID_0),
        ("count 2\ngpu0.lost 1", UUID_0),
        (None, UUID_1),
        ("count 2\ngpu0.vanished 1", UUID_0),
        ("count 2\ngpu0.memory_error 999", UUID_0),
        ("count 2", UUID_0),
    )["looks"]
    assert [look["health"] for look in looks] == ["ok", "lost", "ok", "lost", "unknown", "ok"]
    assert looks[1]["reason"] == f"NVIDIA H100 80GB HBM3 ({UUID_0}): GPU is lost"
    assert "has vanished" in looks[3]["reason"]
    assert looks[1]["memory_used_bytes"] is None


@pytest.mark.parametrize(
    ("scenario", "reason"),
    [
        ("init_error 9", "no NVIDIA GPU: the NVIDIA kernel driver is not loaded"),
        ("init_error 4", "no NVIDIA GPU: this user may not ask the NVIDIA driver"),
        ("init_error 18", "no NVIDIA GPU: the driver's library and its kernel module are of different versions"),
        ("init_error 999", "no NVIDIA GPU: NVML does not initialise: Unknown Error"),
        ("count 0", "no NVIDIA GPU: the driver lists none"),
    ],
)
def test_a_host_without_gpu_says_why(host: Host, scenario: str, reason: str) -> None:
    said = host.ask(scenario, (None, UUID_0))
    assert said["inventory"]["gpus"] == []
    assert said["inventory"]["reason"].startswith(reason)
    assert said["looks"][0]["health"] == ("lost" if scenario == "count 0" else "unknown")


def test_a_host_without_the_library(tmp_path: Path, library: Path) -> None:
    said = Host(tmp_path, None).ask("", (None, UUID_0))
    if said["inventory"]["driver_version"]:
        pytest.skip("this host has an NVIDIA driver")
    assert "libnvidia-ml.so.1 is not installed" in said["inventory"]["reason"]
    assert said["looks"][0]["health"] == "unknown"


def test_a_host_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    nvml = Nvml.open()
    assert nvml.inventory().reason.startswith("no NVIDIA GPU: the Python package nvidia-ml-py is not installed")
    nvml.close()
