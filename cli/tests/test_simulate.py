"""`hasgpu simulate`: figures, the page, SPEC.yaml, recordings, and what is refused."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from hasgpu_cli.__main__ import cli
from hasgpu_sim.recording import read_recording, write_recording

RUN_KEYS = {
    "model", "slo_multiple", "policy", "trace", "physics", "seed", "slo_ms", "requests", "completed", "violations",
    "violation_rate", "dropped", "p50_ms", "p95_ms", "p99_ms", "gpu_seconds", "actions", "gpus_peak",
    "decide_us_p50", "decide_us_p99",
}  # fmt: skip


def call(*words: object) -> Result:
    return CliRunner().invoke(cli, ["simulate", *(str(word) for word in words)])


@pytest.fixture
def profile(tmp_path: Path) -> Path:
    """Two models in HAS-GPU's format; a cell is missing."""
    lines = ["model,batch,sm_pct,quota_pct,latency_ms"]
    for model, factor in (("net-a", 1.0), ("net-b", 2.5)):
        for batch in (1, 2, 4, 8):
            for sm_pct in (10, 25, 50, 100):
                for quota in range(10, 101, 10):
                    if (batch, sm_pct, quota) != (2, 25, 50):
                        latency = factor * (4 + 16 * (0.6 + 0.4 * batch) * 30 / (30 + sm_pct)) * 100 / quota
                        lines.append(f"{model},{batch},{sm_pct},{quota},{latency:.4f}")
    path = tmp_path / "latency.csv.gz"
    path.write_bytes(gzip.compress("\n".join(lines).encode()))
    return path


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "trace.csv"
    path.write_text("set,source_index,rps\n" + "".join(f"a,{i},{rate}\n" for i, rate in enumerate((8, 5, 15, 6))))
    return path


def test_figures_and_page(profile: Path, trace: Path, tmp_path: Path) -> None:
    out, page = tmp_path / "out.json", tmp_path / "page.html"
    result = call(
        "--profile", profile, "--trace", trace, "--models", "net-a,net-b", "--slo-multiples", "2,5",
        "--policies", "hybrid,kserve,static-peak,hasgpu-released,clairvoyant", "--arrivals", "poisson",
        "--seed", 3, "--json", out, "--html", page,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    document = json.loads(out.read_text())
    runs = document["runs"]
    assert len(runs) == 2 * 2 * 5
    assert all(set(run) >= RUN_KEYS for run in runs)
    by = {(run["model"], run["slo_multiple"], run["policy"]): run for run in runs}
    for model in ("net-a", "net-b"):
        ours, whole = by[model, 5.0, "hybrid"], by[model, 5.0, "kserve"]
        assert (ours["seed"], ours["physics"]) == (3, "table")
        assert ours["requests"] == whole["requests"] > 100
        assert by[model, 5.0, "clairvoyant"]["gpu_seconds"] <= ours["gpu_seconds"] < whole["gpu_seconds"] / 3
        assert whole["gpu_seconds"] == pytest.approx(20.0, rel=0.01)
    assert any("2 of 320 cells" in note for note in document["notes"])
    html = page.read_text()
    for words in ("Rate", "Capacity", "Shares", "Late or dropped", "hasgpu-released", "<polyline"):
        assert words in html


def test_equal_seeds_give_equal_figures(profile: Path, trace: Path, tmp_path: Path) -> None:
    found = []
    for name in ("one", "two"):
        call(
            "--profile", profile, "--trace", trace, "--models", "net-a", "--slo-multiples", "3", "--policies", "hybrid",
            "--arrivals", "poisson", "--seed", 7, "--json", tmp_path / name, "--physics", "device-time", "--no-lend",
        )  # fmt: skip
        (run,) = json.loads((tmp_path / name).read_text())["runs"]
        found.append({key: value for key, value in run.items() if not key.startswith("decide")})
    assert found[0] == found[1]
    assert (found[0]["physics"], found[0]["lend"]) == ("device-time", False)


def test_functions_run_together(profile: Path, trace: Path, tmp_path: Path) -> None:
    spec = tmp_path / "spec.yaml"
    spec.write_text(
        "gpus: 2\nfunctions:\n"
        "  - {name: first, model: net-a, slo: 4x, trace: trace.csv, memory_mib: 100, class: critical}\n"
        "  - {name: second, model: net-b, slo: 300ms, instances: {min: 1, max: 3}, weight: 200}\n"
    )
    out = tmp_path / "out.json"
    result = call("--profile", profile, "--functions", spec, "--trace", trace, "--policies", "hybrid", "--json", out)
    assert result.exit_code == 0, result.output
    document = json.loads(out.read_text())
    assert [(r["function"], r["model"], r["slo_ms"]) for r in document["runs"]] == [
        ("first", "net-a", 31.0),
        ("second", "net-b", 300.0),
    ]
    (total,) = document["totals"]
    assert total["requests"] == sum(run["requests"] for run in document["runs"])
    assert document["settings"]["gpus"] == 2


def test_a_trace_of_many_functions_is_one_run(profile: Path, tmp_path: Path) -> None:
    path, out = tmp_path / "azure.csv", tmp_path / "out.json"
    rows = "".join(f"o,a,g{i},http,{i % 5},{(i * 7) % 9},3\n" for i in range(12))
    path.write_text("HashOwner,HashApp,HashFunction,Trigger,1,2,3\n" + rows)
    result = call(
        "--profile", profile, "--trace", path, "--models", "net-a", "--slo-multiples", "3", "--json", out,
        "--policies", "hybrid,fastgshare,clairvoyant", "--memory-mib", 100,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    runs = json.loads(out.read_text())["runs"]
    assert [(run["policy"], run["functions"]) for run in runs] == [
        ("hybrid", 12), ("fastgshare", 12), ("clairvoyant", 12),
    ]  # fmt: skip
    assert len({run["requests"] for run in runs}) == 1
    one = call(
        "--profile", profile, "--trace", f"{path}:g4", "--models", "net-a", "--slo-multiples", "3", "--json", out,
        "--policies", "hybrid",
    )  # fmt: skip
    assert one.exit_code == 0, one.output
    assert json.loads(out.read_text())["runs"][0]["requests"] == 4 + 28 % 9 + 3


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["--models", "net-c"], "nearest in the profile: net-"),
        (["--gpus", "0"], "at least 1, got 0"),
        (["--slo-multiples", "0.2"], "the fastest possible takes"),
        (["--slo-multiples", "x"], "numbers above 0"),
        (["--memory-mib", "20000"], "at most a GPU's 16384 MiB"),
        (["--min-instances", "40"], "min_instances"),
        (["--policies", "hybrid,nobody"], "'nobody' is not found; there are hybrid"),
        (["--trace", "nowhere.csv"], "nowhere.csv"),
        (["--profile", "nowhere"], "nowhere"),
        (["--rate-scale", "0"], "--rate-scale"),
        (["--seconds", "-1"], "--seconds"),
        (["--cold-start-s", "-1"], "--cold-start-s"),
        (["--functions", "spec.yaml"], "one of --models, --functions and --recording"),
    ],
)
def test_what_can_not_be_is_named(profile: Path, trace: Path, change: list[str], words: str) -> None:
    options = {"--profile": str(profile), "--trace": str(trace), "--models": "net-a", "--policies": "hybrid"}
    options |= {change[0]: change[1]}
    result = call(*(word for pair in options.items() for word in pair))
    assert result.exit_code == 1, result.output
    assert words in result.output.replace("\n", " ")
    assert result.exception is None or isinstance(result.exception, SystemExit)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("- a", "a mapping"),
        ("functions: []", "a list of functions"),
        ("functions: [{name: a, model: net-a, slo: soon, trace: trace.csv}]", "a multiple as 3x"),
        ("functions: [{name: a, model: net-a, slo: 3x}]", "a file here, or --trace"),
        ("functions: [{name: a, model: net-a, slo: 1ms, trace: trace.csv}]", "the fastest possible takes"),
        ("functions: [{name: A_, model: net-a, slo: 3x, trace: trace.csv}]", "a-z"),
        ("functions: [{name: a, model: net-a, slo: 3x, trace: trace.csv, colour: red}]", "'colour'"),
        ("functions: [{name: a, model: net-a, slo: 3x, trace: trace.csv, class: gold}]", "critical or standard"),
        ("functions: [{name: a, model: net-a, slo: 3x, trace: trace.csv, weight: 0}]", "weight: expected 1..10000"),
        ("functions: [{name: a, model: net-a, slo: 3x, trace: trace.csv, memory_mib: 90000}]", "MiB"),
        (
            "gpus: 1\nfunctions:\n"
            + "".join(
                f"  - {{name: a{i}, model: net-a, slo: 3x, trace: trace.csv, memory_mib: 9000}}\n" for i in range(2)
            ),
            "18000 MiB in 2 instances",
        ),
    ],
)
def test_a_spec_that_can_not_be_is_named(profile: Path, trace: Path, tmp_path: Path, text: str, words: str) -> None:
    spec = tmp_path / "spec.yaml"
    spec.write_text(text)
    result = call("--profile", profile, "--functions", spec, "--policies", "hybrid")
    assert result.exit_code == 1, result.output
    assert words in result.output.replace("\n", " ")


def test_a_recording_is_replayed_under_another_policy(profile: Path, trace: Path, tmp_path: Path) -> None:
    from hasgpu_cli.simulation.plan import SimulateOptions, make_plan
    from hasgpu_cli.simulation.runs import run_case

    options = SimulateOptions(
        profiles=str(profile), traces=str(trace), spec=None, models="net-a", slo_multiples="4", policies="hasgpu",
        gpus=2, cold_start_s=3.0, physics="table", arrivals="even", rate_scale=1.0, seconds=None, seed=0, lend=False,
        recording=None, gpu_memory_mib=None, memory_mib=512, min_instances=1,
    )  # fmt: skip
    plan = make_plan(options)
    outcome, recording = run_case(plan.cases[0], "hasgpu", plan.settings, lambda at_s: None, keep=False)
    assert recording is not None
    path, out = tmp_path / "recording.jsonl.gz", tmp_path / "out.json"
    write_recording(recording, path, "hasgpu")
    assert read_recording(path).entries == recording.entries
    result = call("--recording", path, "--policies", "kserve,hybrid", "--json", out)
    assert result.exit_code == 0, result.output
    live, kserve, hybrid = json.loads(out.read_text())["runs"]
    assert live["requests"] == outcome.results[0]["requests"] == kserve["requests"] == hybrid["requests"]
    assert live["violations"] == outcome.results[0]["violations"]
    lead_share = live["gpu_seconds"] - outcome.results[0]["gpu_seconds"]
    assert 0 <= lead_share <= 30.0  # what was held before the first arrival counts in a recording
    assert kserve["gpu_seconds"] > hybrid["gpu_seconds"]
    assert call("--recording", trace).exit_code == 1
