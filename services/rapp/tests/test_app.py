"""From a deployed function to its capacity tables."""

from __future__ import annotations

import asyncio

import pytest
from hasgpu_core.errors import ModelError, UnavailableError
from hasgpu_core.events import capacity_subject, function_subject, node_subject
from hasgpu_core.function import Artifact
from hasgpu_rapp.queries import Queries

from .conftest import DEVICE_MODEL, RUNGS, Rig, profiled, spec, true_device_time_s


async def test_new_function_gets_a_static_then_a_profiled_table(rig: Rig) -> None:
    rig.agent.hold = asyncio.Event()
    async with rig.rapp() as app:
        await rig.node()
        await rig.deploy(spec())
        static = await rig.table()
        assert static.basis == "static"
        assert static.capacity_rps(100, 1000) > 0
        await rig.until(lambda: "loading" in Queries(app).profiling_texts().values())
        assert Queries(app).profiling_texts() == {f"fn on {DEVICE_MODEL}": "loading"}
        rig.agent.hold.set()
        table = await rig.table(profiled)
        assert table.version == 1
        assert table.sm_pcts == RUNGS
        assert table.computed_unix_ns >= 10**18
        latency_s = table.latency_s(4, 50, 1000)
        assert latency_s == pytest.approx(true_device_time_s(4, 50) + 0.001, rel=0.1)
        assert rig.agent.runs_count == 1
        await rig.until(lambda: not Queries(app).profiling_texts())


async def test_function_before_any_node_waits_for_one(rig: Rig) -> None:
    async with rig.rapp() as app:
        await rig.deploy(spec())
        await rig.until(lambda: "fn" in app.world.functions)
        await rig.node()
        assert (await rig.table(profiled)).version == 1


async def test_restart_serves_what_was_kept_without_measuring(rig: Rig) -> None:
    async with rig.rapp():
        await rig.node()
        await rig.deploy(spec())
        before = await rig.table(profiled)
    await rig.bus.delete(capacity_subject("fn", DEVICE_MODEL))
    async with rig.rapp() as app:
        after = await rig.table()
        assert after.points == before.points
        assert (after.version, after.basis) == (1, "profiled")
        assert app.trainer.refresh(DEVICE_MODEL) is None
    assert rig.agent.runs_count == 1


async def test_corrupt_files_are_replaced(rig: Rig) -> None:
    async with rig.rapp():
        await rig.node()
        await rig.deploy(spec())
        await rig.table(profiled)
    folder = rig.repository._folder / DEVICE_MODEL
    next((folder / "model").glob("*.cbm")).write_bytes(b"no model")
    async with rig.rapp():
        assert (await rig.table(lambda t: t.version == 2)).basis == "profiled"
    assert rig.agent.runs_count == 1
    next((folder / "profiles").glob("*.json")).write_text("{")
    async with rig.rapp():
        await rig.until(lambda: rig.agent.runs_count == 2)
        await rig.table(lambda t: profiled(t) and t.version == 3)


@pytest.mark.parametrize("damage", ["no model", "foreign", "other device", "missing"])
async def test_a_model_file_that_cannot_be_read_leaves_the_one_before(rig: Rig, damage: str) -> None:
    async with rig.rapp() as app:
        await rig.node()
        await rig.deploy(spec())
        await rig.table(profiled)
        await app.trainer.train(DEVICE_MODEL)
        served = app.predictions.served[DEVICE_MODEL]
        folder = rig.repository._folder / DEVICE_MODEL / "model"
        (binary,) = folder.glob("*.cbm")
        card = folder / "card.json"
        if damage == "no model":
            binary.write_bytes(b"no model")
        elif damage == "foreign":
            card.write_text('{"format": "somebody else\'s"}')
        elif damage == "other device":
            card.write_text(card.read_text().replace(f'"{DEVICE_MODEL}"', '"abacus"'))
        else:
            binary.unlink()
        await app.reconcile()
        assert app.predictions.served[DEVICE_MODEL] is served, "nobody reads the file while a model serves"
    async with rig.rapp() as app:
        assert app.predictions.served[DEVICE_MODEL].model.card.version == 1
        (note,) = [note for note in app.notes if "is left out" in note]
        assert "the model model of" not in note
        assert "the one before it serves" in note
        assert (await rig.table()).basis == "profiled"
        assert [card["version"] for card in Queries(app).versions()] == [2, 1]


async def test_training_that_fails_keeps_the_served_model(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ModelError("CatBoost can't fit 48 rows")

    async with rig.rapp() as app:
        await rig.node()
        await rig.deploy(spec())
        await rig.table(profiled)
        served = app.predictions.served[DEVICE_MODEL].model
        monkeypatch.setattr("hasgpu_predictor.LatencyModel.train", fail)
        with pytest.raises(ModelError):
            await app.trainer.train(DEVICE_MODEL)
        assert app.predictions.served[DEVICE_MODEL].model is served


async def test_change_of_objective_and_batch_limit_republishes_without_a_profile(rig: Rig) -> None:
    async with rig.rapp():
        await rig.node()
        await rig.deploy(spec())
        await rig.table(profiled)
        await rig.deploy(spec(slo_ms=10, max_batch=3), revision=2)
        table = await rig.table(lambda t: t.function_revision == 2)
        assert table.basis == "profiled"
        assert table.slo_ms == 10
        assert table.batches == (1, 2, 3)
        assert "batch 1 at 100 % SM and 100 % quota" in table.infeasible_reason
        assert "the objective is 10 ms" in table.infeasible_reason
    assert rig.agent.runs_count == 1


async def test_same_artifact_under_another_name_needs_no_run(rig: Rig) -> None:
    async with rig.rapp():
        await rig.node()
        await rig.deploy(spec())
        await rig.table(profiled)
        await rig.deploy(spec("twin", slo_ms=400))
        assert (await rig.table(function="twin")).basis == "profiled"
        await rig.deploy(spec("other", artifact=Artifact("b" * 64, 1 << 20)))
        table = await rig.table(profiled, function="other")
        assert table.version == 2
        assert (await rig.table(lambda t: t.version == 2)).basis == "profiled"
    assert rig.agent.runs_count == 2


async def test_deletion_takes_the_tables_with_it(rig: Rig) -> None:
    async with rig.rapp() as app:
        await rig.node()
        await rig.deploy(spec())
        await rig.table(profiled)
        await rig.bus.delete(function_subject("fn"))
        await rig.gone(capacity_subject("fn", DEVICE_MODEL))
        assert "fn" not in app.world.functions
        await rig.deploy(spec(), revision=2)
        assert (await rig.table(lambda t: t.function_revision == 2)).basis == "profiled"
    assert rig.agent.runs_count == 1


async def test_tables_of_functions_deleted_while_away_are_deleted_at_start(rig: Rig) -> None:
    async with rig.rapp():
        await rig.node()
        await rig.deploy(spec())
        await rig.table(profiled)
    await rig.bus.delete(function_subject("fn"))
    async with rig.rapp():
        await rig.gone(capacity_subject("fn", DEVICE_MODEL))


async def test_table_lost_with_the_broker_is_published_again(rig: Rig) -> None:
    async with rig.rapp():
        await rig.node()
        await rig.deploy(spec())
        await rig.table(profiled)
        await rig.bus.delete(capacity_subject("fn", DEVICE_MODEL))
        assert (await rig.table()).basis == "profiled"


async def test_handler_that_fails_to_load_is_told_and_not_tried_again(rig: Rig) -> None:
    rig.agent.always = ModelError("handler.py: ModuleNotFoundError: no module named 'sklern'")
    async with rig.rapp() as app:
        await rig.node()
        await rig.deploy(spec())
        await rig.until(lambda: any("sklern" in text for text in Queries(app).profiling_texts().values()))
        for _ in range(3):
            rig.clock.advance(400)
            await rig.node()
            rig.poke()
            await rig.until(lambda: app.world.places(DEVICE_MODEL, now_s=rig.clock.now_s()) != [])
            await app.reconcile()
        assert rig.agent.runs_count == 1
        table = await rig.table()
        assert table.basis == "static"
        assert table.infeasible_reason == ""
        rig.agent.always = None
        await rig.deploy(spec(artifact=Artifact("c" * 64, 1)), revision=2)
        assert (await rig.table(profiled)).function_revision == 2


async def test_agent_that_is_away_for_a_while_is_asked_again(rig: Rig) -> None:
    rig.agent.errors = [UnavailableError("the agent restarts"), UnavailableError("the agent restarts")]
    async with rig.rapp():
        await rig.node()
        await rig.deploy(spec())
        await rig.table(profiled)
    assert rig.agent.runs_count == 3
    assert rig.clock.now_s() >= 103.0, "it waited between the attempts"


async def test_attempts_are_bounded_and_come_back_after_a_rest(rig: Rig) -> None:
    rig.agent.always = UnavailableError("no room on the device")
    async with rig.rapp() as app:
        await rig.node(observed_unix_ns=0)
        await rig.deploy(spec())

        def given_up() -> bool:
            return any(job.failed for job in app.profiling.jobs.values())

        await rig.until(given_up)
        runs_count = rig.agent.runs_count
        assert 1 <= runs_count <= 6
        await app.reconcile()
        assert rig.agent.runs_count == runs_count
        rig.agent.always = None
        rig.clock.advance(400)
        await rig.node()
        await rig.table(profiled)


async def test_node_not_heard_of_is_not_asked(rig: Rig) -> None:
    async with rig.rapp() as app:
        await rig.node(observed_unix_ns=rig.clock.unix_ns() - 60 * 10**9)
        await rig.deploy(spec())
        assert (await rig.table()).basis == "static"
        await app.reconcile()
        assert app.profiling.jobs == {}
        await rig.node()
        await rig.table(profiled)
        await rig.bus.delete(node_subject("n1"))


async def test_observed_device_times_correct_the_table_within_bounds(rig: Rig) -> None:
    async with rig.rapp() as app:
        await rig.node()
        await rig.deploy(spec())
        before = await rig.table(profiled)
        seen_s = before.latency_s(2, 50, 500)
        assert seen_s is not None
        await rig.observe(1.5, batches_count=32)
        after = await rig.table(lambda t: t.latency_s(2, 50, 500) != seen_s)
        assert after.latency_s(2, 50, 500) == pytest.approx(1.5 * seen_s, rel=0.02)
        # At most every 5 s, and never beyond twice the prediction.
        await rig.observe(9.0, batches_count=1000)
        for count in range(1001, 1300, 32):
            await rig.observe(9.0, batches_count=count)
        await rig.until(lambda: app.predictions.corrections["fn", DEVICE_MODEL].observed_count == 200)
        await app.reconcile()
        assert app.predictions.corrections["fn", DEVICE_MODEL].factor == pytest.approx(1.5, rel=0.02)
        rig.clock.advance(5.0)
        rig.poke()
        limited = await rig.table(lambda t: (t.latency_s(2, 50, 500) or 0) > 1.8 * seen_s)
        assert limited.latency_s(2, 50, 500) == pytest.approx(2.0 * seen_s, rel=0.02)


async def test_repeated_observations_count_once(rig: Rig) -> None:
    async with rig.rapp() as app:
        await rig.node()
        await rig.deploy(spec())
        await rig.table(profiled)
        await rig.observe(1.0, batches_count=10)
        for _ in range(5):
            await rig.observe(1.0, batches_count=12)
        await rig.observe(1.0, batches_count=13)
        await rig.until(lambda: app.world.batches_read.get("fn-1") == ("fn", 13))
        assert app.predictions.corrections["fn", DEVICE_MODEL].observed_count == 13


async def test_another_artifact_forgets_the_observations_of_the_one_before(rig: Rig) -> None:
    async with rig.rapp() as app:
        await rig.node()
        await rig.deploy(spec())
        await rig.table(profiled)
        await rig.observe(1.0, batches_count=10)
        await rig.until(lambda: ("fn", DEVICE_MODEL) in app.predictions.corrections)
        await rig.deploy(spec(artifact=Artifact("d" * 64, 1)), revision=2)
        await rig.table(lambda t: profiled(t) and t.function_revision == 2)
        await rig.observe(1.0, batches_count=20)
        await rig.until(lambda: app.world.batches_read.get("fn-1") == ("fn", 20))
        assert app.predictions.corrections == {}


async def test_bus_that_goes_away_delays_the_table(rig: Rig) -> None:
    async with rig.rapp() as app:
        await rig.node()
        await rig.until(lambda: bool(app.world.device_models()))
        rig.bus.go_away()
        with pytest.raises(UnavailableError):
            await rig.deploy(spec())
        rig.bus.come_back()
        await rig.deploy(spec())
        await rig.table(profiled)


async def test_garbage_on_the_bus_is_left_out(rig: Rig) -> None:
    async with rig.rapp():
        await rig.bus.put(function_subject("bad"), b"\xff\xff")
        await rig.bus.put(node_subject("bad"), b"\xff\xff")
        await rig.node()
        await rig.deploy(spec())
        await rig.table(profiled)


async def test_training_that_fails_leaves_the_physical_estimate(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    trainings: list[str] = []

    def fail(*_: object, device_model: str, **__: object) -> None:
        trainings.append(device_model)
        raise ModelError("CatBoost can't fit 48 rows")

    monkeypatch.setattr("hasgpu_predictor.LatencyModel.train", fail)
    async with rig.rapp() as app:
        await rig.node()
        await rig.deploy(spec())
        table = await rig.table(profiled)
        assert table.version == 0
        assert table.latency_s(4, 50, 1000) == pytest.approx(true_device_time_s(4, 50) + 0.001, rel=0.1)
        for _ in range(3):
            await app.reconcile()
        assert trainings == [DEVICE_MODEL], "the same rows are not tried again"
