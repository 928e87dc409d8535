"""What was seen at a time and why."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from hasgpu_cli.__main__ import cli
from hasgpu_cli.recordings import look, parse_time, summary
from hasgpu_core.errors import InvalidError, NotFoundError
from hasgpu_core.policy.choice import make_live_policy
from hasgpu_core.recording import RecordedLoad
from hasgpu_sim.arrivals import RateStep
from hasgpu_sim.evaluate import Settings, devices
from hasgpu_sim.recording import write_recording
from hasgpu_sim.scenario import FunctionLoad, Scenario
from hasgpu_sim.simulate import simulate
from hasgpu_sim.surface import filled_surface
from hasgpu_sim.synthetic import synthetic_spec, synthetic_table

NOW_S = 1_800_000_000.0  # 2027-01-15 08:00:00 UTC


def test_times_are_read() -> None:
    assert parse_time("-90s", NOW_S) == round((NOW_S - 90) * 1e9)
    assert parse_time("-2m", NOW_S) == round((NOW_S - 120) * 1e9)
    assert parse_time("07:59:30", NOW_S) == round((NOW_S - 30) * 1e9)
    assert parse_time("07:59:30.5", NOW_S) == round((NOW_S - 29.5) * 1e9)
    assert parse_time("08:30:00", NOW_S) == round((NOW_S - 86_400 + 1_800) * 1e9)  # yesterday's
    assert parse_time("2027-01-15T08:00:00+00:00", NOW_S) == round(NOW_S * 1e9)
    for wrong in ("soon", "-5 days", "25:00:00"):
        with pytest.raises(InvalidError, match="ISO 8601"):
            parse_time(wrong, NOW_S)


@pytest.fixture(scope="module")
def load() -> RecordedLoad:
    cells = {(b, s, q): 0.01 * b * 100 / s * 1000 / q for b in (1, 2) for s in (50, 100) for q in (500, 1000)}
    surface = filled_surface("m", "emu", cells)
    table = synthetic_table("f", device_model="emu", slo_ms=200, fixed_s=0.01, item_s=0.005, speed={50: 0.6, 100: 1.0})
    scenario = Scenario(
        devices(Settings(gpus=1), surface),
        (FunctionLoad(synthetic_spec("f", slo_ms=200), (table,), (RateStep(10, 5.0), RateStep(10, 60.0))),),
        20.0,
    )
    made = simulate(scenario, make_live_policy("hasgpu")).recording
    return RecordedLoad(made.entries, round(NOW_S * 1e9))


def test_the_decision_of_a_time_comes_with_what_was_seen(load: RecordedLoad, tmp_path: Path) -> None:
    at_ns = round((NOW_S + 9.1) * 1e9)
    seen, later = look(load, "f", at_ns)
    assert 0 <= at_ns - seen.at_unix_ns <= 0.3e9
    assert seen.view is not None
    assert seen.view.demand.rate_rps == pytest.approx(5.0, abs=1.5)
    assert later is not None
    assert later.at_unix_ns > NOW_S * 1e9 + 10e9
    assert later.view is not None
    assert later.view.demand.rate_rps > 5.0
    assert later.decision.actions
    with pytest.raises(NotFoundError, match="recorded are f, 2027"):
        look(load, "g", at_ns)
    with pytest.raises(NotFoundError, match="2027"):
        look(load, "f", round((NOW_S - 100) * 1e9))
    path = tmp_path / "r.gz"
    write_recording(load, path)
    assert "vertical_up" in summary(path)
    words = ["explain", "f", "--at", "2027-01-15T08:00:09.1", "--recording", str(path)]
    said = CliRunner().invoke(cli, words)
    assert said.exit_code == 0, said.output
    for part in ("why: ", "saw:", "demand 5", "f-0: ready", "SM 100 %", "next that changes something"):
        assert part in said.output
    found = json.loads(CliRunner().invoke(cli, [*words, "--json"]).output)
    assert found["decision"]["function"] == "f"
    assert found["view"]["tables"] == ["emu"]
    info = CliRunner().invoke(cli, ["recording", "info", str(path)])
    assert "passes" in info.output
