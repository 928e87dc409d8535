"""The scaler's shell on the memory bus and store."""

from __future__ import annotations

import itertools
from dataclasses import replace

from hasgpu_core.events import DesiredInstance
from hasgpu_core.policy.scaling import Decision, PolicyState
from hasgpu_core.resources import Allocation, InstanceState
from hasgpu_scaler.adapters.desired_store import PREFIX
from hasgpu_scaler.core import TOMBSTONE_S

SHARE = Allocation(100, 300, 1_000, 100 << 20)


class Scripted:
    """A policy that wants what the test says, of the function named f."""

    name = "scripted"

    def __init__(self, *wanted: DesiredInstance) -> None:
        self.wanted = wanted

    def decide(self, snapshot, state, now_s):
        decisions = []
        for view in snapshot.functions:
            present = tuple(DesiredInstance(i.instance, i.allocation, i.standby) for i in view.instances)
            wanted = present if view.held else self.wanted
            decisions.append(
                Decision(
                    function=view.spec.name,
                    desired=wanted,
                    actions=(),
                    reason="as told",
                    look_again_s=1.0,
                    next_ordinal=max(view.next_ordinal, len(wanted)),
                    observed_rps=None,
                    predicted_rps=None,
                    capacity_rps=0.0,
                )
            )
        return tuple(decisions), PolicyState()


async def test_a_new_function_gets_its_first_instance(world, make_spec):
    async with world.scaler() as app:
        await world.beat()
        await world.deploy(make_spec(min_instances=2))
        await app.run_pass()
        record = await world.record()
        assert record is not None
        assert [item.instance for item in record.instances] == ["f-0", "f-1"]
        assert (record.revision, record.next_ordinal) == (1, 2)
        (command,) = world.commands()
        assert command.instances == record.instances
        assert (command.revision, command.fencing_token) == (1, 1)
        assert world.verticals() == {}  # the first share comes with the plan


async def test_load_grows_shares_and_rest_lets_them_come_down(world, make_spec):
    async with world.scaler() as app:
        await world.ready(app)
        first = (await world.record()).instances[0].allocation.request_permille
        await world.load(app, 60.0, 6.0)
        record = await world.record()
        grown = sum(i.allocation.request_permille * i.allocation.sm_pct for i in record.instances)
        assert grown > first * record.instances[0].allocation.sm_pct
        vertical = world.verticals()
        assert vertical
        for item in record.instances:
            said = vertical.get(f"scale.vertical.a.{item.instance}")
            assert said is None or said.allocation == item.allocation
        await world.load(app, 2.0, 40.0)
        low = await world.record()
        assert sum(i.allocation.request_permille * i.allocation.sm_pct for i in low.instances) < grown
        kinds = {a.kind.value for logged in app.log.newest("f", limit=500) for a in logged.decision.actions}
        assert {"vertical_up", "vertical_down"} <= kinds


async def test_shares_stay_when_demand_falls_silent(world):
    async with world.scaler() as app:
        await world.ready(app)
        await world.load(app, 60.0, 6.0)
        before = await world.record()
        for _ in range(60):
            world.clock.advance(0.5)
            await world.beat()
            await app.run_pass()
        assert await world.record() == before


async def test_every_change_is_one_revision(world):
    async with world.scaler() as app:
        await world.ready(app)
        seen = [(await world.record()).revision]
        for _ in range(12):
            await world.load(app, 80.0, 0.5)
            seen.append((await world.record()).revision)
        assert seen == sorted(seen)
        assert all(later - earlier in (0, 1) for earlier, later in itertools.pairwise(seen))
        assert seen[-1] > seen[0]


async def test_a_standby_turned_active_is_told_both_ways(world, make_spec):
    parked = DesiredInstance("f-0", replace(SHARE, request_permille=10), standby=True)
    policy = Scripted(parked)
    async with world.scaler(policy=policy) as app:
        await world.beat()
        await world.deploy(make_spec())
        await app.run_pass()
        await world.obey()
        policy.wanted = (DesiredInstance("f-0", SHARE),)
        await app.run_pass()
        assert [c.instances[0].standby for c in world.commands()] == [True, False]
        assert world.verticals()["scale.vertical.a.f-0"].allocation == SHARE


async def test_a_change_of_shares_alone_goes_straight_to_the_node(world, make_spec):
    policy = Scripted(DesiredInstance("f-0", SHARE))
    async with world.scaler(policy=policy) as app:
        await world.beat()
        await world.deploy(make_spec())
        await app.run_pass()
        await world.obey()
        grown = replace(SHARE, request_permille=700)
        policy.wanted = (DesiredInstance("f-0", grown),)
        await app.run_pass()
        assert len(world.commands()) == 1
        said = world.verticals()["scale.vertical.a.f-0"]
        assert (said.allocation, said.revision) == (grown, 2)
        await app.run_pass()
        assert (await world.record()).revision == 2


async def test_what_could_not_be_announced_is_announced_when_the_bus_is_back(world, make_spec):
    policy = Scripted(DesiredInstance("f-0", SHARE))
    async with world.scaler(policy=policy) as app:
        await world.beat()
        await world.deploy(make_spec())
        await app.run_pass()
        await world.obey()
        grown = replace(SHARE, request_permille=700)
        policy.wanted = (DesiredInstance("f-0", grown), DesiredInstance("f-1", SHARE))
        world.bus.go_away()
        await app.run_pass()
        assert (await world.record()).revision == 2  # stored, not said
        assert (len(world.commands()), world.verticals()) == (1, {})
        world.bus.come_back()
        await world.settle()
        await app.run_pass()
        assert [c.revision for c in world.commands()] == [1, 2]
        assert world.verticals()["scale.vertical.a.f-0"].allocation == grown


async def test_scaling_pauses_while_something_is_unsaid(world, make_spec):
    policy = Scripted(DesiredInstance("f-0", SHARE))
    async with world.scaler(policy=policy) as app:
        await world.beat()
        await world.deploy(make_spec())
        world.bus.go_away()
        await app.run_pass()
        policy.wanted = ()
        await app.run_pass()
        assert len((await world.record()).instances) == 1


async def test_a_command_is_sent_again_while_no_agent_knows_the_instance(world, make_spec):
    async with world.scaler(policy=Scripted(DesiredInstance("f-0", SHARE))) as app:
        await world.beat()
        await world.deploy(make_spec())
        await app.run_pass()
        for seconds, commands in ((4.0, 1), (2.0, 2), (6.0, 2), (5.0, 3)):
            world.clock.advance(seconds)
            await app.run_pass()
            assert len(world.commands()) == commands
        await world.obey()
        world.clock.advance(300.0)
        await app.run_pass()
        assert [c.revision for c in world.commands()] == [1, 1, 1]


async def test_a_restarted_scaler_goes_on_where_the_last_one_stopped(world):
    async with world.scaler("one") as app:
        await world.ready(app)
        await world.load(app, 60.0, 4.0)
        before = await world.record()
    world.clock.advance(5.0)
    async with world.scaler("two") as app:
        await world.beat()
        await app.run_pass()
        assert await world.record() == before
        assert app.core.records["f"] == before
        await world.load(app, 60.0, 2.0)
        after = await world.record()
        assert after.next_ordinal >= before.next_ordinal


async def test_without_a_record_what_runs_is_taken_over(world, make_spec, make_table):
    async with world.scaler() as app:
        await world.beat()
        await world.deploy(make_spec())
        await world.predict(make_table())
        await world.report("f-4", SHARE, 17)
        await app.run_pass()
        record = await world.record()
        assert [item.instance for item in record.instances] == ["f-4"]
        assert record.revision > 17
        assert record.next_ordinal == 5


async def test_a_deleted_function_is_taken_down_and_its_ids_stay_used(world, make_spec):
    async with world.scaler() as app:
        await world.ready(app)
        await world.undeploy("f")
        await app.run_pass()
        assert (await world.record()).instances  # a moment's grace
        world.clock.advance(2.5)
        await app.run_pass()
        gone = await world.record()
        assert gone.instances == ()
        assert gone.deleted_unix_ns > 0
        assert world.commands()[-1].instances == ()
        await world.withdraw("f-0")
        await world.beat()
        await world.deploy(make_spec(), 2)
        await app.run_pass()
        again = await world.record()
        assert [item.instance for item in again.instances] == ["f-1"]
        assert again.revision == gone.revision + 1
        assert not again.deleted_unix_ns


async def test_a_deleted_function_is_forgotten_in_the_end(world):
    async with world.scaler() as app:
        await world.ready(app)
        await world.undeploy("f")
        world.clock.advance(2.5)
        await app.run_pass()
        await world.withdraw("f-0")
        world.clock.advance(TOMBSTONE_S + 1.0)
        await app.run_pass()
        assert await world.store.list(PREFIX) == {}


async def test_a_function_that_vanished_while_no_scaler_ran_is_taken_down(world):
    async with world.scaler("one") as app:
        await world.ready(app)
    await world.undeploy("f")
    world.clock.advance(5.0)
    async with world.scaler("two") as app:
        await app.run_pass()
        world.clock.advance(2.5)
        app.held[0] = await world.store.acquire_lease("scaler", "two", ttl_s=3.0)  # type: ignore[attr-defined]
        await app.run_pass()
        assert (await world.record()).instances == ()


async def test_a_vertical_value_is_purged_with_its_instance(world):
    policy = Scripted(DesiredInstance("f-0", SHARE), DesiredInstance("f-1", SHARE))
    async with world.scaler(policy=policy) as app:
        await world.ready(app)
        policy.wanted = tuple(DesiredInstance(i, replace(SHARE, request_permille=400)) for i in ("f-0", "f-1"))
        await app.run_pass()
        assert len(world.verticals()) == 2
        policy.wanted = policy.wanted[:1]
        await world.obey()
        await app.run_pass()
        assert len(world.verticals()) == 2  # it still drains
        await world.withdraw("f-1")
        await app.run_pass()
        assert list(world.verticals()) == ["scale.vertical.a.f-0"]


async def test_a_vertical_value_for_a_node_that_lost_the_instance_is_purged(world):
    policy = Scripted(DesiredInstance("f-0", SHARE))
    async with world.scaler(policy=policy) as app:
        await world.ready(app)
        grown = replace(SHARE, request_permille=400)
        policy.wanted = (DesiredInstance("f-0", grown),)
        await app.run_pass()
        await world.report("f-0", SHARE, 1, node="b", state=InstanceState.LOADING)
        await app.run_pass()
        assert {s: v.allocation for s, v in world.verticals().items()} == {"scale.vertical.b.f-0": grown}


async def test_while_the_store_is_away_nothing_is_said_and_nothing_lost(world):
    policy = Scripted(DesiredInstance("f-0", SHARE))
    async with world.scaler(policy=policy) as app:
        await world.ready(app)
        policy.wanted = (DesiredInstance("f-0", replace(SHARE, request_permille=500)),)
        world.store.go_away()
        await app.run_pass()
        assert world.verticals() == {}
        assert app.core.records["f"].revision == 1
        world.store.come_back()
        await app.run_pass()
        assert (await world.record()).revision == 2
        assert len(world.verticals()) == 1


async def test_a_policys_memory_is_taken_back_when_its_decision_was_not_stored(world):
    async with world.scaler() as app:
        await world.ready(app)
        await world.load(app, 10.0, 3.0)
        before = app.core._state.functions["f"]
        world.clock.advance(0.5)
        await world.demand(200)
        world.store.go_away()
        await app.run_pass()
        assert app.core._state.functions["f"] == before
        world.store.come_back()
        await app.run_pass()
        assert app.core._state.functions["f"] != before


async def test_a_leader_that_was_overtaken_writes_nothing(world):
    policy = Scripted(DesiredInstance("f-0", SHARE))
    async with world.scaler("one", policy=policy) as old:
        await world.ready(old)
        world.clock.advance(4.0)
        assert await world.store.acquire_lease("scaler", "two", ttl_s=3.0) is not None
        before = await world.record()
        policy.wanted = (DesiredInstance("f-0", replace(SHARE, request_permille=500)),)
        await old.run_pass()
        assert await world.record() == before
        assert world.verticals() == {}


async def test_who_does_not_lead_decides_nothing(world):
    async with world.scaler(lead=False) as app:
        await world.ready(app)
        assert await world.record() is None
        assert not app.leading


async def test_waiting_requests_for_a_function_at_zero_ask_for_a_pass(world, make_spec, make_table):
    async with world.scaler() as app:
        await world.beat()
        await world.deploy(make_spec(min_instances=0))
        await world.predict(make_table())
        await app.run_pass()
        assert await world.record() is None
        before = world.poked_count
        await world.demand(1, queued=1)
        assert world.poked_count == before + 1
        await app.run_pass()
        assert len((await world.record()).instances) == 1
        await world.obey()
        before = world.poked_count
        await world.demand(1)
        assert world.poked_count == before  # nobody waits: the period will do


async def test_idle_decisions_for_one_reason_are_kept_once(world):
    async with world.scaler(policy=Scripted(DesiredInstance("f-0", SHARE))) as app:
        await world.ready(app)
        for _ in range(5):
            world.clock.advance(0.5)
            await app.run_pass()
        assert len(app.log.newest("f", include_idle=True)) == 1


async def test_a_value_that_cannot_be_read_is_left_out(world):
    async with world.scaler() as app:
        await world.ready(app)
        await world.bus.put("capacity.f.other", b"\xff\xff\xff")
        await world.bus.publish("demand.f.gw", b"\xff\xff\xff")
        await world.settle()
        await app.run_pass()
        assert list(app.core.observer.snapshot(world.clock.now_s()).functions[0].tables) == ["cpu-2c"]
