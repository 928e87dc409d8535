"""Changing the policy without a restart, and advisory mode."""

from __future__ import annotations

import pytest
from hasgpu.scaler.v1 import scaler_pb2
from hasgpu_core.errors import NotFoundError
from hasgpu_core.policy.choice import LIVE_POLICIES, make_live_policy
from hasgpu_scaler.adapters.recording_files import RecordingFiles
from hasgpu_scaler.manual import ManualRequest
from hasgpu_sim.recording import read_recording, read_recording_bytes

from .test_server import refused, serving


@pytest.mark.parametrize("name", LIVE_POLICIES)
async def test_every_policy_can_decide_live_without_a_restart(world, name):
    async with world.scaler() as app:
        await world.ready(app)
        await world.load(app, 20.0, 2.0)
        assert await app.set_policy(name) == name
        await world.load(app, 20.0, 6.0)
        newest = app.log.newest("f", limit=1, include_idle=True)[0]
        assert newest.policy == name
        assert (await world.record()).instances


async def test_the_policy_set_is_kept_and_can_be_taken_back(world):
    async with world.scaler() as app, serving(app) as stub:
        await world.ready(app)
        error = await refused(stub.SetPolicy(scaler_pb2.SetPolicyRequest(policy="nobody")))
        assert "hybrid" in error.details()
        await stub.SetPolicy(scaler_pb2.SetPolicyRequest(policy="kserve"))
    async with world.scaler() as app, serving(app) as stub:
        await app.run_pass()
        found = await stub.GetPolicy(scaler_pb2.GetPolicyRequest())
        assert (found.policy, found.configured, tuple(found.available)) == ("kserve", "hasgpu", LIVE_POLICIES)
        await stub.SetPolicy(scaler_pb2.SetPolicyRequest(policy=""))
        assert app.core.policy.name == "hasgpu"


async def test_a_policy_of_another_version_is_left_out(world):
    async with world.scaler() as app:
        fence = app.held[0]
        await world.store.compare_and_set("hasgpu:scaler:policy", b'"gone"', expected_revision=0, fence=fence)
        await world.ready(app)
        assert app.core.policy.name == "hasgpu"


async def ask(world, app, function, rate_rps, seconds):
    """Steady demand for one function, a pass every half second, on a cluster that obeys."""
    for _ in range(round(2 * seconds)):
        world.clock.advance(0.5)
        await world.beat()
        await world.demand(round(rate_rps / 2), function=function)
        await app.run_pass()
        await world.obey()


async def test_advisory_mode_shows_and_does_nothing(world, make_spec, make_table, tmp_path):
    files = RecordingFiles(tmp_path, 1 << 30)
    async with world.scaler(files=files) as app:
        await world.ready(app)
        await world.deploy(make_spec("g", min_instances=0, advisory=True))
        await world.predict(make_table("g"))
        await ask(world, app, "g", 20.0, 3.0)
        assert await world.record("g") is None
        assert await world.record("f") is not None
        advice = app.log.newest("g")
        assert {(a.origin, a.revision) for a in advice} == {("advisory", 0)}
        assert advice[0].decision.actions
        tick = next(t for t in read_recording(files.segments(0, 0)[0]).ticks if t.advised and t.advised[0].actions)
        assert tick.advised[0].function == "g"
        assert "g" not in {decision.function for decision in tick.decisions}
        await world.deploy(make_spec("g"), revision=2)
        await app.run_pass()
        assert (await world.record("g")).instances


async def test_a_function_in_advisory_mode_gets_its_minimum_and_no_more(world, make_spec, make_table):
    async with world.scaler() as app:
        await world.ready(app)
        await world.deploy(make_spec("g", advisory=True))
        await world.predict(make_table("g"))
        await app.run_pass()
        first = await world.record("g")
        assert [item.instance for item in first.instances] == ["g-0"]
        assert "advisory mode: g-0 for the minimum of 1" in first.reason
        assert ("policy", first.revision) in {(item.origin, item.revision) for item in app.log.newest("g", limit=10)}
        await world.obey()
        await ask(world, app, "g", 400.0, 5.0)
        assert (await world.record("g")).revision == first.revision  # though the load asks for more
        advice = app.log.newest("g")[0]
        assert advice.origin == "advisory"
        assert advice.decision.actions
        await world.deploy(make_spec("g", min_instances=2, advisory=True), revision=2)
        await app.run_pass()
        second = await world.record("g")
        assert len(second.instances) == 2
        assert second.instances[0] == first.instances[0]


async def test_what_was_set_by_hand_stays_in_advisory_mode(world, make_spec, make_table):
    async with world.scaler() as app:
        await world.ready(app)
        await world.deploy(make_spec("g", min_instances=0, advisory=True))
        await world.predict(make_table("g"))
        await app.run_pass()
        await app.scale_by_hand(ManualRequest("g", instances_count=1, hold_s=1))
        record = await world.record("g")
        await ask(world, app, "g", 400.0, 5.0)  # far beyond the hold
        assert (await world.record("g")).instances == record.instances


async def test_the_recording_is_read_over_grpc(world, tmp_path):
    files = RecordingFiles(tmp_path, 1 << 30)
    async with world.scaler(files=files) as app, serving(app) as stub:
        await world.ready(app)
        await world.load(app, 20.0, 3.0)
        data = b"".join([part.data async for part in stub.ReadRecording(scaler_pb2.ReadRecordingRequest())])
        load = read_recording_bytes(data)
        assert len(list(load.ticks)) == 7
        assert {tick.policy for tick in load.ticks} == {"hasgpu"}
    async with world.scaler() as app, serving(app) as stub:
        error = await refused(anext(aiter(stub.ReadRecording(scaler_pb2.ReadRecordingRequest()))))
        assert "HASGPU_SCALER_RECORDING_MIB" in error.details()


def test_policies_that_know_the_future_can_not_run_live():
    with pytest.raises(NotFoundError, match="kserve"):
        make_live_policy("clairvoyant")
    assert make_live_policy("hybrid", idle_to_zero_s=7.0)._settings.idle_to_zero_s == 7.0
