"""Observed batches over the bus: how fast the table is right, what a restart keeps, what drift does."""

from __future__ import annotations

import asyncio
import json
import logging

import numpy as np
import pytest
from hasgpu_core.events import BatchObservation, function_subject
from hasgpu_core.function import Artifact
from hasgpu_rapp.corrections import PROFILE_AGAIN_S
from hasgpu_rapp.queries import Queries

from .conftest import DEVICE_MODEL, OVERHEAD_S, RUNGS, Rig, profiled, spec, true_device_time_s

PAIR = ("fn", DEVICE_MODEL)


def batches(count: int, seed: int, *, slower: float) -> tuple[BatchObservation, ...]:
    """At partial quotas, with waits at the gate of any length, 5 % noise, and 5 % outliers."""
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        batch, sm, quota = int(rng.choice((1, 2, 4, 8))), int(rng.choice(RUNGS)), int(rng.choice((100, 300, 600)))
        stretch = slower * float(np.exp(0.05 * rng.standard_normal()))
        if rng.random() < 0.05:
            stretch *= float(rng.uniform(3, 15))
        device_s = stretch * true_device_time_s(batch, sm)
        run_s, wait_s = device_s + slower * OVERHEAD_S, float(rng.exponential(device_s * 1000 / quota))
        made.append(
            BatchObservation(
                batch, sm, quota, round(1e9 * (run_s + wait_s)), round(1e9 * device_s), gate_wait_ns=round(1e9 * wait_s)
            )
        )
    return tuple(made)


async def observe(rig: Rig, count: int, *, slower: float, begin: int = 0) -> int:
    """Sends batches as an agent does, 40 an event; returns how many the instance has done then."""
    for seed, done in enumerate(range(begin + 40, begin + count + 1, 40), start=begin):
        await rig.observe_batches(batches(40, seed, slower=slower), batches_count=done)
        await rig.until(lambda done=done: rig.app.world.batches_read.get("fn-1") == ("fn", done))  # type: ignore[misc]
    return begin + count


async def compared(rig: Rig, after_s: float) -> None:
    """Lets time pass, and waits until everything observed was compared with the prediction and published."""
    rig.clock.advance(after_s)
    await rig.node()
    rig.poke()
    await rig.until(lambda: not rig.app.corrections._timings[PAIR].fresh)
    await rig.app.reconcile()


async def test_a_wrong_start_is_right_after_200_observed_batches(rig: Rig) -> None:
    rig.agent.slower = 1 / 1.5  # all latencies of the profile are off by 1.5
    async with rig.rapp() as app:
        await rig.node()
        await rig.deploy(spec())
        wrong = await rig.table(profiled)
        await observe(rig, 200, slower=1.0)
        await compared(rig, 5.0)
        right = await rig.table()
        error_before, error_after = [], []
        for before, after in zip(wrong.points, right.points, strict=True):
            d = true_device_time_s(after.batch, after.sm_pct)
            truth_s = max(d + OVERHEAD_S, d * 1000 / after.quota_permille)
            error_before.append(abs(before.latency_s / truth_s - 1))
            error_after.append(abs(after.latency_s / truth_s - 1))
        assert np.mean(error_before) > 0.3
        assert np.mean(error_after) < 0.05
        assert right.correction_permille == pytest.approx(1500, rel=0.03)
        error = await Queries(app).observed_error(PAIR)
        assert error is not None
        assert error.corrected_median_run_error_pct < 5 < error.median_run_error_pct
        assert error.batches_count == 200


async def test_a_restart_keeps_corrections_and_counts_nothing_twice(rig: Rig) -> None:
    async with rig.rapp() as app:
        await rig.node()
        await rig.deploy(spec())
        await rig.table(profiled)
        await observe(rig, 120, slower=1.4)
        await compared(rig, 5.0)
        before = await rig.table(lambda t: t.correction_permille > 1300)
        await observe(rig, 40, slower=1.4, begin=120)
        await app.close()
    rig.clock.advance(60.0)
    async with rig.rapp() as app:
        after = await rig.table(lambda t: t.computed_unix_ns > before.computed_unix_ns)
        assert after.correction_permille == pytest.approx(before.correction_permille, rel=0.03)
        correction = app.predictions.corrections[PAIR]
        assert correction.observed_count == 160, "the last event is still in the stream and was read before"
        assert [level.name for level in correction.sources()] == ["device n1/cpu0", "instance fn-1"]
        await rig.deploy(spec(artifact=Artifact("e" * 64, 1)), revision=2)
        await rig.until(lambda: PAIR not in app.predictions.corrections)
    assert not list((rig.repository._folder / DEVICE_MODEL / "corrections").glob("*.json"))


@pytest.mark.parametrize("damage", ["{", '{"format": "another"}', None])
async def test_a_correction_that_cannot_be_read_is_told_and_left_out(rig: Rig, damage: str | None) -> None:
    async with rig.rapp() as app:
        await rig.node()
        await rig.deploy(spec())
        await rig.table(profiled)
        await observe(rig, 40, slower=1.4)
        await app.close()
    (path,) = (rig.repository._folder / DEVICE_MODEL / "corrections").glob("*.json")
    if damage is None:
        content = json.loads(path.read_text())
        content["correction"]["factors"] = [float("nan"), 1.0]
        damage = json.dumps(content)
    path.write_text(damage)
    async with rig.rapp() as app:
        await rig.table(profiled)
        await rig.until(lambda: PAIR in app.predictions.corrections)
        assert app.predictions.corrections[PAIR].observed_count == 40, "of the event that is still in the stream"
        assert any("the correction in" in note and "is left out" in note for note in app.notes)


async def test_drift_is_told_and_has_the_function_profiled_again(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    async with rig.rapp() as app:
        await rig.node()
        await rig.deploy(spec())
        await rig.table(profiled)
        rig.agent.slower = 1.7
        done = await observe(rig, 160, slower=1.7)
        await compared(rig, 5.0)
        corrected = await rig.table(lambda t: t.correction_permille > 1500)
        assert corrected.drift == "", "it has to last"
        await rig.node()
        rig.agent.hold = asyncio.Event()
        rig.clock.advance(25.0)
        await rig.node()
        await observe(rig, 40, slower=1.7, begin=done)
        told = await rig.table(lambda t: t.drift != "")
        assert "1.7" in told.drift
        rig.agent.hold.set()
        again = await rig.table(lambda t: t.version == 2 and t.drift == "" and t.correction_permille < 1100)
        assert again.latency_s(8, 100, 1000) == pytest.approx(1.7 * true_device_time_s(8, 100) + OVERHEAD_S, rel=0.1)
        assert rig.agent.runs_count == 2
        assert app.predictions.corrections[PAIR].drift == ""
    assert any("has drifted from its profile" in record.message for record in caplog.records)


async def test_drift_asks_for_a_profile_at_most_every_ten_minutes(rig: Rig) -> None:
    async with rig.rapp() as app:
        await rig.node()
        await rig.deploy(spec())
        await rig.table(profiled)
        pair = app.pair(*PAIR)
        await observe(rig, 40, slower=1.0)
        app.predictions.corrections[PAIR].drift = "told"
        assert app.corrections.wants_profile(PAIR)
        app.corrections.profile_asked(PAIR)
        assert not app.corrections.wants_profile(PAIR)
        rig.clock.advance(PROFILE_AGAIN_S)
        assert app.corrections.wants_profile(PAIR)
        assert app.predictions.recipe(*pair).drift == "told"


async def test_a_deleted_function_takes_its_correction_with_it(rig: Rig) -> None:
    async with rig.rapp() as app:
        await rig.node()
        await rig.deploy(spec())
        await rig.table(profiled)
        await observe(rig, 40, slower=1.4)
        await app.close()
        folder = rig.repository._folder / DEVICE_MODEL / "corrections"
        assert list(folder.glob("*.json"))
        await rig.bus.delete(function_subject("fn"))
        await rig.until(lambda: not app.predictions.corrections)
        assert not list(folder.glob("*.json"))
