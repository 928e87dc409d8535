"""The probe: its table of modes, its cache, its children's crashes, and all of it on fakes of driver and daemon."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hasgpu_core.errors import InvalidError
from hasgpu_device.backends.cuda import probe as probe_module
from hasgpu_device.backends.cuda.mps import MpsDaemon
from hasgpu_device.backends.cuda.probe import Child, Probe, step_argv
from hasgpu_device.backends.cuda.probe_findings import (
    STEPS,
    Finding,
    Findings,
    ProbeCache,
    capabilities,
    choose_mode,
    compare_sms,
    judge_rungs,
)

GPU = "GPU-00000000-0000-0000-0000-000000000001"
TESTS = Path(__file__).parent
GREEN = ("green_api", "groups", "bite_green", "disjoint")
GOOD_TIMES: dict[int, list[tuple[int, float]]] = {
    100: [(132, 200.0)],
    75: [(96, 260.0), (104, 250.0)],
    50: [(64, 390.0), (64, 391.0)],
    25: [(32, 780.0)] * 4,
}


def found(*proven: str, failed: Mapping[str, str] | None = None) -> Findings:
    steps = {step: Finding(step, True, f"{step} is fine") for step in proven}
    for step in ("bite_green", "bite_pct"):
        if step in steps:
            steps[step] = judge_rungs(step, GOOD_TIMES)
    if "static" in steps:
        steps["static"] = Finding("static", True, "static is fine", {"sm_rungs_pct": [7, 13, 100]})
    steps |= {step: Finding(step, False, why) for step, why in (failed or {}).items()}
    return Findings(GPU, "580.65.06", "2.11.0", (25, 50, 75, 100), steps)


# --- the table ---


@pytest.mark.parametrize("wanted", ["", "mps+green", "mps+pct", "mps+static", "timeshare"])
@pytest.mark.parametrize(
    "proven",
    [
        frozenset(
            step for step, on in zip(("nvml", "driver", "mps", "green", "pct", "static"), bits, strict=True) if on
        )
        for bits in itertools.product((False, True), repeat=6)
    ],
    ids=lambda steps: "+".join(sorted(steps)) or "nothing",
)
def test_the_whole_table(proven: frozenset[str], wanted: str) -> None:
    named = {"mps": ("mps_start", "mps_in_use"), "green": GREEN, "pct": ("bite_pct",)}
    steps = [step for name in proven for step in named.get(name, (name,))]
    choice = choose_mode(found(*steps), wanted)
    if "driver" not in proven:
        expected = "none"
    elif "mps" not in proven or wanted == "timeshare":
        expected = "timeshare"
    elif wanted == "mps+static" and "static" in proven:
        expected = "mps+static"
    elif wanted != "mps+pct" and "green" in proven:
        expected = "mps+green"
    elif "pct" in proven:
        expected = "mps+pct"
    else:
        expected = "timeshare"
    assert choice.mode == expected
    assert choice.reasons
    rungs = {"none": (), "timeshare": (100,), "mps+static": (7, 13, 100)}
    assert choice.sm_rungs_pct == rungs.get(expected, (25, 50, 75, 100))


@pytest.mark.parametrize("broken", GREEN)
def test_each_green_step_is_needed_and_named(broken: str) -> None:
    steps = [step for step in ("driver", "mps_start", "mps_in_use", *GREEN, "bite_pct") if step != broken]
    choice = choose_mode(found(*steps, failed={broken: "it was Tuesday"}))
    assert choice.mode == "mps+pct"
    assert f"no green contexts ({STEPS[broken]}: it was Tuesday)" in choice.reasons


@pytest.mark.parametrize("broken", ["mps_start", "mps_in_use"])
def test_each_mps_step_is_needed_and_named(broken: str) -> None:
    steps = [step for step in ("driver", "mps_start", "mps_in_use", *GREEN, "bite_pct") if step != broken]
    choice = choose_mode(found(*steps, failed={broken: "it was Tuesday"}))
    assert choice.mode == "timeshare"
    assert choice.reasons == (f"no MPS ({STEPS[broken]}: it was Tuesday)",)


def test_a_refused_gpu_has_no_mode() -> None:
    findings = found("driver", "mps_start", "mps_in_use", *GREEN)
    refused = Finding("nvml", False, "MIG mode is enabled", {"refused": True})
    choice = choose_mode(replace(findings, steps={**findings.steps, "nvml": refused}))
    assert (choice.mode, choice.reasons) == ("none", ("MIG mode is enabled",))
    assert capabilities(findings, choice) == ("mode none", "MIG mode is enabled")


def test_a_mode_that_does_not_exist_is_refused() -> None:
    with pytest.raises(InvalidError, match="expected mps\\+green, mps\\+pct, mps\\+static, timeshare, got 'single'"):
        choose_mode(found("driver"), "single")


# --- what may be claimed ---


def test_capabilities_claim_only_what_was_proven() -> None:
    base = ("driver", "mps_start", "mps_in_use")
    green = capabilities(findings := found(*base, *GREEN), choose_mode(findings))
    assert any(
        line.startswith("SM partitions of 25, 50, 75, 100 % change at the next segment (proven") for line in green
    )
    assert "partitions do not overlap (disjoint is fine)" in green

    findings = found(*base, "green_api", "groups", "bite_green", "bite_pct", failed={"disjoint": "ranges share SMs"})
    pct = capabilities(findings, choose_mode(findings))
    assert "mode mps+pct" in pct
    assert not any("partitions" in line and not line.startswith("not proven") for line in pct)
    assert "not proven: SMs of two processes: ranges share SMs" in pct

    findings = found("driver", failed={"mps_start": "no program"})
    alone = capabilities(findings, choose_mode(findings))
    assert "no SM limits: one instance holds the whole device at a time" in alone
    assert "not proven: starting MPS in a private folder: no program" in alone
    assert not any("memory limit" in line for line in alone)


def test_a_rung_that_does_not_bite_is_not_offered() -> None:
    times = GOOD_TIMES | {75: [(96, 260.0), (104, 201.0)]}
    judged = judge_rungs("bite_green", times)
    assert judged.is_proven
    assert [rung["is_accepted"] for rung in judged.data["rungs"]] == [True, True, False]
    findings = found("driver", "mps_start", "mps_in_use", *GREEN)
    findings = replace(findings, steps={**findings.steps, "bite_green": judged})
    choice = choose_mode(findings)
    assert choice.sm_rungs_pct == (25, 50, 100)
    assert "not proven: SM partition of 75 %: only 0.02 of the predicted slowdown was seen" in capabilities(
        findings, choice
    )


@pytest.mark.parametrize(
    ("times_us", "proven", "bites"),
    [
        ({100: [(100, 10.0)], 50: [(50, 20.0)]}, True, [1.0]),
        ({100: [(100, 10.0)], 50: [(50, 13.0)]}, True, [0.3]),
        ({100: [(100, 10.0)], 50: [(50, 12.9)]}, False, [0.29]),
        ({100: [(100, 10.0)], 50: [(50, 9.0)]}, False, [-0.1]),
        ({100: [(100, 10.0)], 50: [(100, 20.0)]}, False, [0.0]),
        ({100: [(100, 10.0)]}, False, []),
        ({50: [(50, 20.0)]}, False, None),
        ({100: [(100, 0.0)], 50: [(50, 20.0)]}, False, None),
    ],
)
def test_bite(times_us: dict[int, list[tuple[int, float]]], proven: bool, bites: list[float] | None) -> None:
    judged = judge_rungs("bite_green", times_us)
    assert judged.is_proven is proven
    assert [rung["bite"] for rung in judged.data["rungs"]] == bites if bites is not None else not judged.data


@pytest.mark.parametrize(
    ("one", "two", "proven", "words"),
    [
        ({"0": [0, 1], "50": [2, 3]}, {"0": [0, 1], "50": [2, 3]}, True, "2 ranges"),
        ({"0": [0, 1], "50": [2, 3]}, {"0": [2, 3], "50": [0, 1]}, False, "range 0 has other SMs"),
        ({"0": [0, 1], "50": [1, 2]}, {"0": [0, 1], "50": [1, 2]}, False, "ranges 0 and 50 share SMs [1]"),
        ({"0": [0, 1]}, {"0": [0, 1]}, False, "did not record the same ranges"),
        ({"0": [0], "50": []}, {"0": [0], "50": []}, False, "did not record the same ranges"),
        ({"0": [0], "50": [1]}, {"0": [0], "25": [1]}, False, "did not record the same ranges"),
    ],
)
def test_comparing_sms(one: dict[str, list[int]], two: dict[str, list[int]], proven: bool, words: str) -> None:
    compared = compare_sms(one, two)
    assert compared.is_proven is proven
    assert words in compared.detail


# --- cache ---


def test_findings_are_kept_by_gpu_driver_torch_and_widths(tmp_path: Path) -> None:
    cache = ProbeCache(tmp_path / "probe.json")
    key = (GPU, "580.65.06", "2.11.0", (25, 50, 75, 100))
    assert cache.load(*key) is None
    findings = found("driver", "mps_start", "mps_in_use", *GREEN)
    other = replace(findings, gpu_uuid="GPU-other")
    assert cache.save(findings)
    assert cache.save(other)
    assert cache.load(*key) == findings
    assert cache.load("GPU-other", *key[1:]) == other
    assert cache.load(GPU, "590.0", *key[2:]) is None
    assert cache.load(*key[:2], "2.12.0", key[3]) is None
    assert cache.load(*key[:3], (50, 100)) is None


@pytest.mark.parametrize("text", ["", "[]", "{", json.dumps({GPU: 3}), json.dumps({GPU: {"probe_version": 0}})])
def test_a_cache_that_cannot_be_read_is_empty(tmp_path: Path, text: str) -> None:
    path = tmp_path / "probe.json"
    path.write_text(text)
    cache = ProbeCache(path)
    assert cache.load(GPU, "580.65.06", "2.11.0", (25, 50, 75, 100)) is None
    assert cache.save(found("driver"))
    assert cache.load(GPU, "580.65.06", "2.11.0", (25, 50, 75, 100)) == found("driver")


def test_a_time_out_is_not_kept(tmp_path: Path) -> None:
    findings = found("driver")
    hung = Finding("mps_start", False, "did not answer", is_final=False)
    cache = ProbeCache(tmp_path / "probe.json")
    assert cache.save(replace(findings, steps={**findings.steps, "mps_start": hung})) is False
    assert not (tmp_path / "probe.json").exists()


# --- children ---


def finish(program: str, timeout_s: float = 60.0) -> Finding:
    return Child("bite_green", [sys.executable, "-ISc", program], {}).finish(timeout_s)


def test_a_child_that_hangs_is_a_finding_and_is_ended() -> None:
    hung = finish("import time\ntime.sleep(1000)", timeout_s=0.5)
    assert hung.detail == "the probe of slowdown by green contexts did not answer in 0.5 s"
    assert not hung.is_proven
    assert not hung.is_final


@pytest.mark.parametrize(
    ("program", "words"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "ended with signal SIGSEGV: no message"),
        ("raise SystemExit(9)", "ended with exit code 9"),
        ("1 / 0", "exit code 1: ZeroDivisionError: division by zero"),
        ("print('hello')", "no answer that can be read: 'hello'"),
        ("print()", "no answer that can be read"),
        ("print('{\"is_proven\": true}')", "no answer that can be read"),
    ],
)
def test_a_child_that_breaks_is_a_finding(program: str, words: str) -> None:
    broken = finish(program)
    assert words in broken.detail
    assert not broken.is_proven
    assert not broken.is_final


def test_a_child_that_cannot_be_started_is_a_finding() -> None:
    broken = Child("driver", ["/nonexistent/python"], {}).finish(60)
    assert "can't be started: No such file" in broken.detail


def test_a_childs_chatter_before_its_answer_is_passed_over() -> None:
    answer = json.dumps({"is_proven": True, "detail": "fine", "data": {"a": 1}})
    assert finish(f"print('warning: x'); print({answer!r})") == Finding("bite_green", True, "fine", {"a": 1})


# --- the whole probe, on fakes of the driver and the MPS daemon ---


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("no C compiler to build the fake driver with")
    folders = {}
    for name, options in (("new", []), ("old", ["-DOLD_DRIVER"])):
        folders[name] = tmp_path_factory.mktemp(name)
        source = TESTS / ("fake_probe" if name == "new" else "fake_cuda") / "libcuda.c"
        subprocess.run(
            [compiler, "-shared", "-fPIC", "-w", *options, "-o", folders[name] / "libcuda.so.1", source], check=True
        )
    return folders


class Machine:
    """An environment with the fakes, and the answers of the two steps that need a real device: the timed ones."""

    def __init__(self, tmp_path: Path, libraries: Mapping[str, Path]) -> None:
        folder = tmp_path / "bin"
        folder.mkdir()
        program = folder / "nvidia-cuda-mps-control"
        source = (TESTS / "fake_mps" / "nvidia_cuda_mps_control.py").read_text()
        program.write_text(f"#!{sys.executable} -IS\n{source}")
        program.chmod(0o755)
        self.record = tmp_path / "record"
        self.scenario = tmp_path / "scenario"
        self.environment = dict(os.environ) | {
            "PATH": str(folder),
            "LD_LIBRARY_PATH": str(libraries["new"]),
            "FAKE_MPS_RECORD": str(self.record),
            "FAKE_MPS_SCENARIO": str(self.scenario),
        }
        self.times: dict[str, Any] = {str(width): value for width, value in GOOD_TIMES.items()}
        self.pct: Callable[[int], tuple[int, float]] | None = None
        self.nvml: dict[str, Any] = {"driver_version": "580.65.06"}
        self.ran: list[str] = []

    def argv(self, step: str, arguments: Mapping[str, Any]) -> Sequence[str]:
        self.ran.append(step)
        if step == "nvml":
            answer: Any = {"is_proven": not self.nvml.get("refused"), "detail": "by NVML", "data": self.nvml}
        elif step == "bite_green":
            answer = {"is_proven": True, "detail": "timed", "data": {"times_us": self.times}}
        elif step == "bite_pct" and self.pct is not None:
            program = (
                "import json, os, sys\npct = os.environ['CUDA_MPS_ACTIVE_THREAD_PERCENTAGE']\n"
                "print(json.loads(sys.argv[1])[pct])"
            )
            table = {
                str(width): json.dumps(
                    {
                        "is_proven": True,
                        "detail": "timed",
                        "data": dict(zip(("sms", "time_us"), self.pct(width), strict=True)),
                    }
                )
                for width in arguments["widths_pct"]
            }
            return (sys.executable, "-ISc", program, json.dumps(table))
        else:
            return step_argv(step, arguments)
        return (sys.executable, "-ISc", f"print({json.dumps(answer)!r})")

    def probe(self, **options: Any) -> Probe:
        settings: dict[str, Any] = {
            "environment": self.environment,
            "timeout_s": 60.0,
            "record_s": 0.1,
            "argv": self.argv,
        }
        return Probe(GPU, **(settings | options))

    def mps_commands(self) -> list[str]:
        lines = [json.loads(line) for line in self.record.read_text().splitlines()]
        return [line.get("command", "start " + " ".join(line.get("start", []))) for line in lines]


@pytest.fixture
def machine(tmp_path: Path, libraries: Mapping[str, Path]) -> Machine:
    return Machine(tmp_path, libraries)


def test_a_machine_with_everything_gets_green_rungs(machine: Machine, tmp_path: Path) -> None:
    cache = ProbeCache(tmp_path / "cache.json")
    findings = machine.probe().run(cache)
    assert {step: one.is_proven for step, one in findings.steps.items()} == dict.fromkeys(
        ("nvml", "driver", "mps_start", "mps_in_use", *GREEN), True
    ), findings
    choice = choose_mode(findings)
    assert (choice.mode, choice.sm_rungs_pct) == ("mps+green", (25, 50, 75, 100))
    assert findings.steps["groups"].data["groups"] == 16
    assert findings.steps["disjoint"].detail.startswith("4 ranges recorded in two processes")
    assert findings.steps["disjoint"].data["sms"] == {"0": 32, "25": 32, "50": 32, "75": 32}
    commands = machine.mps_commands()
    assert commands[0] == "start -f"
    assert commands[-1] == "quit"

    machine.ran.clear()
    again = machine.probe().run(cache)
    assert machine.ran == ["nvml"]
    assert again.steps == findings.steps


def test_another_driver_is_probed_anew(machine: Machine, tmp_path: Path) -> None:
    cache = ProbeCache(tmp_path / "cache.json")
    machine.environment["FAKE_CUDA_mps"] = "0"
    machine.probe().run(cache)
    machine.nvml = {"driver_version": "590.1"}
    machine.ran.clear()
    machine.probe().run(cache)
    assert "driver" in machine.ran


def test_a_daemon_that_processes_do_not_join_means_timeshare(machine: Machine) -> None:
    machine.environment["FAKE_CUDA_mps"] = "0"
    findings = machine.probe().run()
    choice = choose_mode(findings)
    assert choice.mode == "timeshare"
    assert "is no MPS client (attribute 133 is not 1)" in choice.reasons[0]
    assert "groups" not in findings.steps


def test_no_mps_program_means_timeshare(machine: Machine) -> None:
    machine.environment["PATH"] = "/nonexistent"
    choice = choose_mode(machine.probe().run())
    assert choice.mode == "timeshare"
    assert "nvidia-cuda-mps-control can't be run" in choice.reasons[0]


def test_an_old_driver_is_shared_by_percentage(machine: Machine, libraries: Mapping[str, Path]) -> None:
    machine.environment["LD_LIBRARY_PATH"] = str(libraries["old"])
    machine.pct = lambda width: (132 * width // 100, 200.0 * 100 / width)
    findings = machine.probe().run()
    choice = choose_mode(findings)
    assert (choice.mode, choice.sm_rungs_pct) == ("mps+pct", (25, 50, 75, 100))
    assert "the driver has no cuDeviceGetDevResource" in findings.steps["green_api"].detail


def test_green_contexts_that_do_not_hold_kernels_are_found_out(machine: Machine) -> None:
    machine.environment["FAKE_PROBE_spread"] = "1"
    machine.pct = lambda width: (132, 200.0)
    findings = machine.probe().run()
    assert "share SMs" in findings.steps["disjoint"].detail
    assert not findings.proven("bite_pct")
    assert choose_mode(findings).mode == "timeshare"


@pytest.mark.parametrize(("trap", "words"), [("crash", "ended with signal SIGSEGV"), ("hang", "did not answer in")])
def test_a_driver_that_crashes_or_hangs_is_a_finding(machine: Machine, trap: str, words: str) -> None:
    machine.environment[f"FAKE_PROBE_{trap}"] = "cuLaunchKernel"
    machine.pct = lambda width: (132 * width // 100, 200.0 * 100 / width)
    findings = machine.probe(timeout_s=25.0).run()
    assert words in findings.steps["disjoint"].detail
    assert choose_mode(findings).mode == "mps+pct"
    assert machine.mps_commands()[-1] == "quit"


def test_a_kernel_that_cannot_be_loaded_is_told(machine: Machine) -> None:
    machine.environment["FAKE_PROBE_missing"] = "1"
    findings = machine.probe().run()
    assert "in cuLibraryLoadData" in findings.steps["disjoint"].detail


def test_without_a_gpu_there_is_no_mode(machine: Machine) -> None:
    machine.environment["FAKE_CUDA_devices"] = "0"
    findings = machine.probe().run()
    choice = choose_mode(findings)
    assert choice.mode == "none"
    assert "CUDA_ERROR_NO_DEVICE" in choice.reasons[0]
    assert not machine.record.exists()


def test_another_gpu_than_asked_for_is_told(machine: Machine) -> None:
    other = "GPU-00000000-0000-0000-0000-000000000009"
    findings = Probe(other, environment=machine.environment, argv=machine.argv).run()
    assert f"expected GPU {other}, the driver shows {GPU}" in choose_mode(findings).reasons[0]


def test_a_refused_gpu_is_not_touched(machine: Machine) -> None:
    machine.nvml["refused"] = True
    findings = machine.probe().run()
    assert choose_mode(findings).mode == "none"
    assert not machine.record.exists()


def test_static_partitions_are_tried_when_asked_for(machine: Machine) -> None:
    machine.environment["FAKE_CUDA_sms"] = "8"
    machine.environment["FAKE_CUDA_group_sms"] = "2"
    findings = machine.probe(wanted="mps+static").run()
    choice = choose_mode(findings, "mps+static")
    assert choice.mode == "mps+static", findings.steps["static"]
    assert choice.sm_rungs_pct[:3] == (7, 13, 19)
    assert choice.sm_rungs_pct[-1] == 100
    assert "start -f -S" in machine.mps_commands()

    machine.environment["FAKE_CUDA_sms"] = "132"
    del machine.environment["FAKE_CUDA_group_sms"]
    findings = machine.probe(wanted="mps+static").run()
    assert findings.steps["static"].detail == "a client sees 132 SMs in a partition of 8"
    assert choose_mode(findings, "mps+static").mode == "mps+green"


def test_a_daemon_without_static_partitions_falls_back(machine: Machine) -> None:
    machine.scenario.write_text(json.dumps({"no_static": True}))
    findings = machine.probe(wanted="mps+static").run()
    assert "invalid option" in findings.steps["static"].detail
    assert choose_mode(findings, "mps+static").mode == "mps+green"


def test_a_daemon_that_runs_is_used_and_left_running(machine: Machine) -> None:
    # Not under tmp_path, which may be too long for a Unix socket.
    folder = Path(tempfile.mkdtemp(prefix="m", dir="/tmp"))
    daemon = MpsDaemon(GPU, folder, environment=machine.environment, timeout_s=30.0)
    daemon.start(server_uid=os.geteuid())
    try:
        findings = machine.probe(pipe_dir=daemon.pipe_dir).run()
        assert choose_mode(findings).mode == "mps+green"
        assert "quit" not in machine.mps_commands()
        assert daemon.pid is not None
    finally:
        daemon.quit()
        shutil.rmtree(folder)

    findings = machine.probe(pipe_dir=Path("/nonexistent")).run()
    assert "does not answer" in findings.steps["mps_start"].detail
    assert choose_mode(findings).mode == "timeshare"


# --- the command ---


def test_the_command_on_a_machine_without_cuda_in_torch(machine: Machine, tmp_path: Path) -> None:
    """Nothing is replaced here but driver and daemon: torch finds no device, so no SM limit is claimed."""
    out = tmp_path / "out.json"
    done = subprocess.run(
        [sys.executable, "-m", "hasgpu_device.backends.cuda.probe", "--gpu", GPU, "--json", out],
        env=machine.environment,
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(out.read_text())
    assert report["mode"] == "timeshare"
    assert report["sm_rungs_pct"] == [100]
    assert "torch finds no CUDA device" in report["findings"]["steps"]["bite_green"]["detail"]
    assert "not proven" in done.stdout
    assert "mode timeshare, SM rungs 100" in done.stdout


def test_the_command_refuses_what_is_no_uuid(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        probe_module.main(["--gpu", "0", "--json", str(tmp_path / "x")])
    assert "expected a UUID, \"GPU-...\", got '0'" in capsys.readouterr().err
