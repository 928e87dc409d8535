"""The scheduler's shell on the memory bus and store: commands in, plans stored and announced, failures survived."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from hasgpu_core.clock import ManualClock
from hasgpu_core.events import PlanEvent, horizontal_subject, instance_subject, node_subject, plan_subject
from hasgpu_core.ports import CaughtUp, Fence
from hasgpu_runtime import wire
from hasgpu_runtime.bus.memory import MemoryBus
from hasgpu_runtime.store.memory import MemoryStore
from hasgpu_runtime.telemetry import Telemetry
from hasgpu_scheduler.adapters.plan_store import PLAN_PREFIX, WANTED_PREFIX, PlanStore
from hasgpu_scheduler.app import SchedulerApp
from hasgpu_scheduler.core import GHOST_S, SchedulerCore


class World:
    """A bus, a store and a clock, and schedulers on them."""

    def __init__(self) -> None:
        self.clock = ManualClock(100.0)
        self.bus = MemoryBus()
        self.store = MemoryStore(self.clock)
        self.plans_said: list[PlanEvent] = []

    @asynccontextmanager
    async def scheduler(self, owner: str = "one", *, lead: bool = True) -> AsyncIterator[SchedulerApp]:
        """A scheduler whose tasks run; it holds the lease when it can get it."""
        held: list[Fence | None] = [None]
        if lead:
            held[0] = await self.store.acquire_lease("scheduler", owner, ttl_s=3.0)
        app = SchedulerApp(
            bus=self.bus,
            plans=PlanStore(self.store),
            clock=self.clock,
            core=SchedulerCore(node_timeout_s=6.0, silence_s=3.0),
            telemetry=Telemetry(),
            fence=lambda: held[0],
            fenced=lambda: None,
            poke=lambda: None,
        )
        app.held = held  # type: ignore[attr-defined]
        tasks = [asyncio.ensure_future(app.watch()), asyncio.ensure_future(app.take_commands())]
        await app.wait_caught_up()
        try:
            yield app
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def settle(self) -> None:
        """Lets the tasks work off what is there."""
        for _ in range(50):
            await asyncio.sleep(0)

    async def beat(self, event) -> None:
        await self.bus.put(node_subject(event.node), wire.encode(event))
        await self.settle()

    async def command(self, event, dedup_id: str = "") -> None:
        dedup_id = dedup_id or f"{event.function}:{event.revision}"
        await self.bus.send_command(horizontal_subject(event.function), wire.encode(event), dedup_id=dedup_id)
        await self.settle()

    async def said(self) -> dict[str, PlanEvent]:
        """The plans that the bus holds."""
        found = {}
        async with self.bus.watch("plan.>") as changes:
            async for change in changes:
                if isinstance(change, CaughtUp):
                    return found
                assert change.payload is not None
                plan = wire.decode_plan(change.payload)
                found[plan.node] = plan
        return found

    async def stored(self) -> dict[str, PlanEvent]:
        return {
            key.removeprefix(PLAN_PREFIX): wire.decode_plan(value.value)
            for key, value in (await self.store.list(PLAN_PREFIX)).items()
        }


@pytest.fixture
def world() -> World:
    return World()


async def test_a_command_becomes_a_stored_and_announced_plan(world, make):
    async with world.scheduler() as app:
        await world.beat(make.node("a"))
        await world.command(make.wanted("f", 1, (0, make.allocation(600))))
        said = await world.said()
        assert [p.instance for p in said["a"].instances] == ["f-0"]
        assert said == await world.stored()
        assert said["a"].fencing_token == 1
        assert WANTED_PREFIX + "f" in await world.store.list(WANTED_PREFIX)
        assert app.leading


async def test_a_stale_command_is_acknowledged_and_ignored(world, make):
    async with world.scheduler():
        await world.beat(make.node("a"))
        await world.command(make.wanted("f", 3, (0, make.allocation(600))))
        before = await world.said()
        await world.command(make.wanted("f", 2, (0, make.allocation(600)), (1, make.allocation(300))))
        assert await world.said() == before
        assert not world.bus._commands._unsettled


async def test_a_command_that_cannot_be_read_does_not_block_the_next(world, make):
    async with world.scheduler():
        await world.beat(make.node("a"))
        await world.bus.send_command("scale.horizontal.f", b"\xff\xff", dedup_id="bad")
        await world.command(make.wanted("f", 1, (0, make.allocation(600))))
        assert [p.instance for p in (await world.said())["a"].instances] == ["f-0"]


async def test_plans_survive_a_restart(world, make):
    async with world.scheduler() as app:
        await world.beat(make.node("a"))
        await world.command(make.wanted("f", 1, (0, make.allocation(600))))
        await app.run_pass()
        before = await world.stored()
    async with world.scheduler() as app:
        await app.run_pass()
        assert await world.stored() == before
        assert app.core.wanted["f"].revision == 1
        world.clock.advance(2.0)
        await world.command(make.wanted("f", 2, (0, make.allocation(600)), (1, make.allocation(300))))
        assert [p.instance for p in (await world.said())["a"].instances] == ["f-0", "f-1"]


async def test_what_was_stored_while_the_bus_was_away_is_announced_on_its_return(world, make):
    async with world.scheduler() as app:
        await world.beat(make.node("a"))
        await world.command(make.wanted("f", 1, (0, make.allocation(600))))
        app.core.accept(make.wanted("f", 2, (0, make.allocation(600)), (1, make.allocation(300))), world.clock.now_s())
        world.bus.go_away()
        await app.run_pass()
        assert len((await world.stored())["a"].instances) == 2
        world.bus.come_back()
        await world.settle()
        assert len((await world.said())["a"].instances) == 1
        await app.run_pass()
        assert await world.said() == await world.stored()


async def test_the_bus_being_away_rebinds_nothing(world, make):
    async with world.scheduler() as app:
        await world.beat(make.node("a"))
        await world.beat(make.node("b"))
        await world.command(make.wanted("f", 1, (0, make.allocation(600))))
        before = await world.stored()
        world.bus.go_away()
        for _ in range(30):
            world.clock.advance(1.0)
            await app.run_pass()
        world.bus.come_back()
        await app.run_pass()
        await world.settle()
        await app.run_pass()
        assert await world.stored() == before


async def test_a_silent_node_is_noticed_although_nobody_else_speaks(world, make):
    """The scheduler hears its own plan come back, so it knows that the bus is there and the node is not."""
    async with world.scheduler() as app:
        await world.beat(make.node("a"))
        await world.command(make.wanted("f", 1, (0, make.allocation(600))))
        for _ in range(8):
            world.clock.advance(1.0)
            await app.run_pass()
            await world.settle()
        assert not app.core.nodes["a"].alive
        assert "node a is lost" in app.core.unplaced[0].reason


async def test_the_store_being_away_keeps_the_command(world, make):
    async with world.scheduler() as app:
        await world.beat(make.node("a"))
        await app.run_pass()
        world.store.go_away()
        await world.command(make.wanted("f", 1, (0, make.allocation(600))))
        await app.run_pass()
        assert "f" not in app.core.wanted
        assert len(world.bus._commands._unsettled) == 1
        world.store.come_back()


async def test_a_leader_that_was_overtaken_writes_nothing(world, make):
    async with world.scheduler("one") as old:
        await world.beat(make.node("a"))
        await old.run_pass()
        world.clock.advance(4.0)
        second = await world.store.acquire_lease("scheduler", "two", ttl_s=3.0)
        assert second is not None
        before = await world.stored()
        old.core.accept(make.wanted("f", 1, (0, make.allocation(600))), world.clock.now_s())
        await old.run_pass()
        assert await world.stored() == before
        assert (await world.said())["a"].instances == ()
        old.held[0] = None  # type: ignore[attr-defined]
        await old.run_pass()
        assert not old.leading
        assert old.core.wanted == {}


async def test_who_does_not_lead_takes_no_commands_and_decides_nothing(world, make):
    async with world.scheduler(lead=False) as app:
        await world.beat(make.node("a"))
        await world.command(make.wanted("f", 1, (0, make.allocation(600))))
        await app.run_pass()
        assert await world.said() == {}
        assert len(world.bus._commands._unsettled) == 1
        assert len(world.bus._commands._waiting) == 1
        app.held[0] = await world.store.acquire_lease("scheduler", "one", ttl_s=3.0)  # type: ignore[attr-defined]
        app.leadership_changed()
        await world.settle()
        assert [p.instance for p in (await world.said())["a"].instances] == ["f-0"]
        app.held[0] = None  # type: ignore[attr-defined]
        app.leadership_changed()
        await world.settle()
        await world.command(make.wanted("f", 2))
        assert len(world.bus._commands._waiting) == 1


async def test_a_write_whose_answer_was_lost_is_read_again(world, make):
    async with world.scheduler() as app:
        await world.beat(make.node("a"))
        await world.command(make.wanted("f", 1, (0, make.allocation(600))))
        key = PLAN_PREFIX + "a"
        stored = await world.store.get(key)
        assert stored is not None
        await world.store.compare_and_set(key, stored.value, expected_revision=stored.revision)
        app.core.accept(make.wanted("f", 2, (0, make.allocation(300))), world.clock.now_s())
        await app.run_pass()  # conflict
        await app.run_pass()
        await world.command(make.wanted("f", 2, (0, make.allocation(300))))
        assert (await world.said())["a"].instances[0].allocation.request_permille == 300


async def test_a_deleted_function_empties_the_plan(world, make):
    async with world.scheduler() as app:
        await world.beat(make.node("a"))
        await world.command(make.wanted("f", 1, (0, make.allocation(600))))
        await world.command(make.wanted("f", 2))
        assert (await world.said())["a"].instances == ()
        world.clock.advance(601.0)
        await app.run_pass()
        assert not await world.store.list(WANTED_PREFIX)


async def test_the_plan_of_a_node_that_left_is_purged(world, make):
    async with world.scheduler() as app:
        await world.beat(make.node("a"))
        await app.run_pass()
        assert plan_subject("a") in world.bus._state
        await world.bus.delete(node_subject("a"))
        await world.settle()
        await app.run_pass()
        assert plan_subject("a") not in world.bus._state


async def test_what_a_lost_node_said_of_an_instance_that_is_no_more_wanted_is_taken_back(world, make):
    """Its agent will not: nobody would ever learn that the instance is gone."""
    share = make.allocation(300)

    async def pass_time(duration_s: float) -> None:
        for _ in range(round(duration_s)):
            world.clock.advance(1.0)
            await world.beat(make.node("b", beat=round(world.clock.now_s())))
            await app.run_pass()

    async with world.scheduler() as app:
        await world.beat(make.node("a"))
        await world.command(make.wanted("f", 1, (0, share), (1, share)))
        for name in ("f-0", "f-1"):
            await world.bus.put(instance_subject("f", name), wire.encode(make.status(name, "a", share, 1)))
        await world.beat(make.node("b", gpus=()))
        await pass_time(10)
        assert not app.core.nodes["a"].alive
        await world.command(make.wanted("f", 2, (0, share)))
        await pass_time(GHOST_S / 2)
        assert instance_subject("f", "f-1") in world.bus._state, "its workers may still serve"
        await world.command(make.wanted("f", 3))
        await pass_time(GHOST_S / 2 + 5)
        assert not [subject for subject in world.bus._state if subject.startswith("instance.")]


async def test_what_a_live_node_says_of_an_instance_is_left_to_it(world, make):
    async with world.scheduler() as app:
        await world.beat(make.node("a"))
        status = make.status("f-0", "a", make.allocation(300), 1)
        await world.bus.put(instance_subject("f", "f-0"), wire.encode(status))
        for beat in range(round(2 * GHOST_S)):
            world.clock.advance(1.0)
            await world.beat(make.node("a", beat=beat + 2))
            await app.run_pass()
        assert instance_subject("f", "f-0") in world.bus._state
