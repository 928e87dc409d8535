"""ScalerService over real gRPC: state, explanations, pausing, scaling by hand."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from dataclasses import replace

import grpc
import grpc.aio
import pytest
from hasgpu.scaler.v1 import scaler_pb2, scaler_pb2_grpc
from hasgpu_runtime.rpc import create_server, open_channel
from hasgpu_scaler.server import ScalerServicer


@asynccontextmanager
async def serving(app):
    server = create_server(address="127.0.0.1:0")
    scaler_pb2_grpc.add_ScalerServiceServicer_to_server(ScalerServicer(app), server)
    await server.start()
    try:
        async with open_channel(server.address) as channel:
            yield scaler_pb2_grpc.ScalerServiceStub(channel)
    finally:
        await server.stop()


async def refused(call) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value


def scale(**fields) -> scaler_pb2.ManualScaleRequest:
    return scaler_pb2.ManualScaleRequest(**{"function": "f", **fields})


async def test_desired_state_is_shown(world):
    async with world.scaler() as app, serving(app) as stub:
        await world.ready(app)
        answer = await stub.GetDesiredState(scaler_pb2.GetDesiredStateRequest())
        assert answer.leader
        assert [(s.function, s.revision, [i.instance for i in s.instances]) for s in answer.states] == [
            ("f", 1, ["f-0"])
        ]
        error = await refused(stub.GetDesiredState(scaler_pb2.GetDesiredStateRequest(function="g")))
        assert error.code() is grpc.StatusCode.NOT_FOUND
        assert "'g'" in error.details()


async def test_decisions_are_explained_with_their_numbers(world):
    async with world.scaler() as app, serving(app) as stub:
        await world.ready(app)
        await world.load(app, 60.0, 5.0)
        acted = (await stub.ExplainDecisions(scaler_pb2.ExplainDecisionsRequest(function="f"))).decisions
        assert all(d.actions for d in acted)
        assert [d.decided_unix_ns for d in acted] == sorted((d.decided_unix_ns for d in acted), reverse=True)
        newest = acted[0]
        assert (newest.origin, newest.policy, newest.slo_ms) == ("policy", "hasgpu", 200)
        assert newest.predicted_rps > 10
        assert newest.reason
        every = await stub.ExplainDecisions(
            scaler_pb2.ExplainDecisionsRequest(function="f", limit=500, include_idle=True)
        )
        assert len(every.decisions) > len(acted)
        error = await refused(stub.ExplainDecisions(scaler_pb2.ExplainDecisionsRequest(function="f", limit=501)))
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_quota_set_by_hand_holds_and_then_the_policy_goes_on(world):
    async with world.scaler() as app, serving(app) as stub:
        await world.ready(app)
        await world.load(app, 20.0, 6.0)
        answer = await stub.ManualScale(scale(request_permille=900, hold_s=20))
        assert {i.allocation.request_permille for i in answer.state.instances} == {900}
        assert answer.state.held_until_unix_ns == world.clock.unix_ns() + 20 * 10**9
        said = list(world.verticals().values())
        assert {v.allocation.request_permille for v in said} == {900}
        await world.obey()
        await world.load(app, 5.0, 18.0)
        held = await world.record()
        assert {i.allocation.request_permille for i in held.instances} == {900}
        await world.load(app, 5.0, 12.0)
        after = await world.record()
        assert {i.allocation.request_permille for i in after.instances} != {900}
        shown = (await stub.GetDesiredState(scaler_pb2.GetDesiredStateRequest(function="f"))).states[0]
        assert shown.held_until_unix_ns == 0  # a hold that is over is none
        newest = (await stub.ExplainDecisions(scaler_pb2.ExplainDecisionsRequest(function="f", limit=50))).decisions
        assert [d.origin for d in newest if d.origin == "manual"] == ["manual"]
        assert [a.kind for d in newest if d.origin == "manual" for a in d.actions] == ["vertical_up"]


async def test_instances_are_added_and_removed_by_hand(world):
    async with world.scaler() as app, serving(app) as stub:
        await world.ready(app)
        answer = await stub.ManualScale(scale(instances=3))
        assert [i.instance for i in answer.state.instances] == ["f-0", "f-1", "f-2"]
        assert len({i.allocation.request_permille for i in answer.state.instances}) == 1
        assert [i.instance for i in world.commands()[-1].instances] == ["f-0", "f-1", "f-2"]
        answer = await stub.ManualScale(scale(instances=1))
        assert [i.instance for i in answer.state.instances] == ["f-0"]  # the one that serves stays
        answer = await stub.ManualScale(scale(instances=2))
        assert [i.instance for i in answer.state.instances] == ["f-0", "f-3"]  # ids are never used twice


async def test_a_ready_standby_is_activated_before_an_instance_is_added(world, make_spec):
    async with world.scaler() as app, serving(app) as stub:
        await world.ready(app, make_spec(standby=1))
        before = await world.record()
        (standby,) = [item for item in before.instances if item.standby]
        (active,) = [item for item in before.instances if not item.standby]
        answer = await stub.ManualScale(scale(instances=2))
        assert [(i.instance, i.standby) for i in answer.state.instances] == [("f-0", False), ("f-1", False)]
        quotas = {i.instance: i.allocation.request_permille for i in answer.state.instances}
        assert quotas[standby.instance] == active.allocation.request_permille > standby.allocation.request_permille
        newest = (await stub.ExplainDecisions(scaler_pb2.ExplainDecisionsRequest(function="f", limit=1))).decisions
        assert [(a.kind, a.instance) for d in newest for a in d.actions] == [("vertical_up", standby.instance)]
        answer = await stub.ManualScale(scale(instances=3))
        assert [i.instance for i in answer.state.instances] == ["f-0", "f-1", "f-2"]


async def test_a_standby_gets_what_its_row_has_left(world, make_spec):
    async with world.scaler() as app, serving(app) as stub:
        await world.ready(app, make_spec(standby=1))
        await stub.ManualScale(scale(request_permille=700))
        await world.obey()
        answer = await stub.ManualScale(scale(instances=2))
        assert [(i.allocation.request_permille, i.standby) for i in answer.state.instances] == [
            (700, False),
            (300, False),
        ]


async def test_a_standby_whose_row_is_full_is_left_parked(world, make_spec):
    async with world.scaler() as app, serving(app) as stub:
        await world.ready(app, make_spec(standby=1))
        await world.beat("b")
        standby = next(item.instance for item in (await world.record()).instances if item.standby)
        await stub.ManualScale(scale(request_permille=990))
        await world.obey()
        answer = await stub.ManualScale(scale(instances=2))
        parked = [i.instance for i in answer.state.instances if i.standby]
        assert parked == [standby]
        assert len(answer.state.instances) == 3


async def test_scaling_up_by_hand_from_nothing_takes_what_the_table_says(world, make_spec, make_table):
    async with world.scaler() as app, serving(app) as stub:
        await world.beat()
        await world.deploy(make_spec(min_instances=0))
        await world.predict(make_table())
        await app.run_pass()
        answer = await stub.ManualScale(scale(instances=1))
        (item,) = answer.state.instances
        point = make_table().best(item.allocation.sm_pct, item.allocation.request_permille)
        assert point.capacity_rps > 0


@pytest.mark.parametrize(
    ("fields", "code", "says"),
    [
        ({"function": "g", "instances": 1}, grpc.StatusCode.NOT_FOUND, "'g'"),
        ({"instance": "f-9", "request_permille": 500}, grpc.StatusCode.NOT_FOUND, "f-9"),
        ({"request_permille": 1001}, grpc.StatusCode.INVALID_ARGUMENT, "10..1000"),
        ({"request_permille": 0}, grpc.StatusCode.INVALID_ARGUMENT, "got 0"),
        ({"request_permille": 500, "limit_permille": 400}, grpc.StatusCode.INVALID_ARGUMENT, "500 (the request)..1000"),
        ({"instances": 9}, grpc.StatusCode.INVALID_ARGUMENT, "1..8"),
        ({"instances": 0}, grpc.StatusCode.INVALID_ARGUMENT, "1..8"),
        ({"instances": 2, "instance": "f-0"}, grpc.StatusCode.INVALID_ARGUMENT, "empty when instances is given"),
        ({}, grpc.StatusCode.INVALID_ARGUMENT, "none of them"),
        ({"instances": 2, "hold_s": 90_000}, grpc.StatusCode.INVALID_ARGUMENT, "86400"),
    ],
)
async def test_what_cannot_be_is_refused_and_changes_nothing(world, fields, code, says):
    async with world.scaler() as app, serving(app) as stub:
        await world.ready(app)
        before = await world.record()
        error = await refused(stub.ManualScale(scale(**fields)))
        assert error.code() is code
        assert says in error.details()
        assert await world.record() == before


async def test_a_full_row_is_refused_with_what_is_free(world, make_spec):
    async with world.scaler() as app, serving(app) as stub:
        await world.ready(app)
        await world.deploy(make_spec("g"))
        mine = (await world.record()).instances[0]
        row = (25, 50, 75, 100).index(mine.allocation.sm_pct)
        await world.report("g-0", replace(mine.allocation, request_permille=600), 1, row=row)
        await app.run_pass()
        error = await refused(stub.ManualScale(scale(request_permille=900)))
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "‰ free" in error.details()
        answer = await stub.ManualScale(scale(request_permille=400))
        assert answer.state.instances[0].allocation.request_permille == 400


async def test_more_instances_than_fit_are_refused_with_what_is_free(world):
    async with world.scaler() as app, serving(app) as stub:
        await world.ready(app)
        await stub.ManualScale(scale(request_permille=1000))
        before = await world.record()
        error = await refused(stub.ManualScale(scale(instances=8)))
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "a/cpu0 has free" in error.details()
        assert await world.record() == before


async def test_pausing_stops_decisions_until_resumed(world):
    async with world.scaler() as app, serving(app) as stub:
        await world.ready(app)
        await stub.Pause(scaler_pb2.PauseRequest(function="f", paused=True))
        before = await world.record()
        assert before.paused
        await world.load(app, 80.0, 5.0)
        assert await world.record() == before
        await stub.Pause(scaler_pb2.PauseRequest(function="f", paused=False))
        await world.load(app, 80.0, 5.0)
        assert (await world.record()).revision > before.revision + 1
        error = await refused(stub.Pause(scaler_pb2.PauseRequest(function="g", paused=True)))
        assert error.code() is grpc.StatusCode.NOT_FOUND


async def test_pausing_everything_survives_a_restart(world):
    async with world.scaler("one") as app, serving(app) as stub:
        await world.ready(app)
        await stub.Pause(scaler_pb2.PauseRequest(paused=True))
        answer = await stub.GetDesiredState(scaler_pb2.GetDesiredStateRequest(function="f"))
        assert answer.states[0].paused
    world.clock.advance(5.0)
    before = await world.record()
    async with world.scaler("two") as app, serving(app) as stub:
        await world.load(app, 80.0, 5.0)
        assert await world.record() == before
        await stub.Pause(scaler_pb2.PauseRequest(paused=False))
        await world.load(app, 80.0, 5.0)
        assert await world.record() != before


async def test_who_does_not_lead_refuses_changes(world):
    async with world.scaler(lead=False) as app, serving(app) as stub:
        await world.ready(app)
        error = await refused(stub.ManualScale(scale(instances=2)))
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        assert not (await stub.GetDesiredState(scaler_pb2.GetDesiredStateRequest())).leader


async def test_who_does_not_lead_shows_what_the_leader_stored(world):
    async with world.scaler("one") as leader, world.scaler("two", lead=False) as other, serving(other) as stub:
        await world.ready(leader)
        answer = await stub.GetDesiredState(scaler_pb2.GetDesiredStateRequest(function="f"))
        assert [i.instance for i in answer.states[0].instances] == ["f-0"]
        error = await refused(stub.WatchDesiredState(scaler_pb2.WatchDesiredStateRequest()).read())
        assert error.code() is grpc.StatusCode.UNAVAILABLE


async def test_scaling_by_hand_while_the_store_is_away_is_refused(world):
    async with world.scaler() as app, serving(app) as stub:
        await world.ready(app)
        world.store.go_away()
        error = await refused(stub.ManualScale(scale(instances=2)))
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        assert len(app.core.records["f"].instances) == 1
        world.store.come_back()


async def test_scaling_by_hand_while_the_bus_is_away_is_stored_and_said_later(world):
    async with world.scaler() as app, serving(app) as stub:
        await world.ready(app)
        world.bus.go_away()
        await stub.ManualScale(scale(instances=2))
        assert len((await world.record()).instances) == 2
        assert len(world.commands()) == 1
        world.bus.come_back()
        await world.settle()
        await app.run_pass()
        assert len(world.commands()) == 2


async def test_a_watch_shows_the_state_and_each_change_and_the_end(world):
    async with world.scaler() as app, serving(app) as stub:
        await world.ready(app)
        call = stub.WatchDesiredState(scaler_pb2.WatchDesiredStateRequest(function="f"))
        first = await asyncio.wait_for(call.read(), 10)
        assert first.state.revision == 1
        await stub.ManualScale(scale(instances=2))
        second = await asyncio.wait_for(call.read(), 10)
        assert (second.state.revision, len(second.state.instances)) == (2, 2)
        await world.undeploy("f")
        world.clock.advance(2.5)
        await app.run_pass()
        last = await asyncio.wait_for(call.read(), 10)
        assert list(last.state.instances) == []
        call.cancel()
