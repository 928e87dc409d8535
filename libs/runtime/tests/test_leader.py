from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack

import pytest
from hasgpu_core.clock import ManualClock
from hasgpu_core.errors import FencedError
from hasgpu_core.ports import Fence
from hasgpu_runtime.leader import LeaderLease
from hasgpu_runtime.store.memory import MemoryStore

TTL_S = 3.0
TICK_S = 1.0


class SteppedClock(ManualClock):
    """Who sleeps on it is woken by `step` alone."""

    def __init__(self) -> None:
        super().__init__(1_000.0)
        self._sleepers: list[tuple[float, asyncio.Future[None]]] = []

    async def sleep(self, delay_s: float) -> None:
        woken = asyncio.get_running_loop().create_future()
        sleeper = (self.now_s() + delay_s, woken)
        self._sleepers.append(sleeper)
        try:
            await woken
        finally:
            self._sleepers.remove(sleeper)

    async def all_asleep(self, count: int) -> None:
        """Waits until so many sleep: each has done what it does when awake."""
        async with asyncio.timeout(60):
            while sum(not woken.done() for _, woken in self._sleepers) != count:  # noqa: ASYNC110  a few turns of the loop
                await asyncio.sleep(0)

    async def step(self, delay_s: float = TICK_S) -> None:
        """Moves on, wakes those whose time has come, and waits until all sleep again."""
        count = len(self._sleepers)
        self.advance(delay_s)
        for until_s, woken in self._sleepers:
            if until_s <= self.now_s():
                woken.set_result(None)
        await self.all_asleep(count)


@pytest.fixture
def clock() -> SteppedClock:
    return SteppedClock()


@pytest.fixture
def store(clock: SteppedClock) -> MemoryStore:
    return MemoryStore(clock)


async def test_one_leads_and_another_follows_before_the_lease_runs_out_when_it_gives_up(
    store, clock, background_errors
):
    changes = []
    async with AsyncExitStack() as holding_first:
        first = await holding_first.enter_async_context(
            LeaderLease.keep(store, "scaler", owner="b", clock=clock, ttl_s=TTL_S)
        )
        await clock.all_asleep(1)
        assert first.fence is not None
        async with LeaderLease.keep(
            store, "scaler", owner="a", clock=clock, ttl_s=TTL_S, on_change=lambda: changes.append(1)
        ) as second:
            await clock.all_asleep(2)
            for _ in range(5):
                await clock.step()
                assert first.fence is not None
                assert second.fence is None
            assert changes == []
            old = first.fence
            await holding_first.aclose()
            assert first.fence is None
            for _ in range(5):
                await clock.step()
                assert second.fence is not None
                assert second.fence.token > old.token
            assert first.fence is None
            assert changes == [1]
            with pytest.raises(FencedError):
                await store.compare_and_set("k", b"", expected_revision=0, fence=old)
    assert changes == [1, 1]


async def test_leadership_is_not_claimed_while_the_store_is_away(store, clock, background_errors):
    async with LeaderLease.keep(store, "scaler", owner="a", clock=clock, ttl_s=TTL_S) as leader:
        await clock.all_asleep(1)
        assert leader.fence is not None
        store.go_away()
        await clock.step(TTL_S - TICK_S)
        assert leader.fence is not None
        await clock.step()
        assert leader.fence is None
        store.come_back()
        await clock.step()
        assert leader.fence is not None


async def test_a_fence_ends_with_its_time_even_when_nobody_renews(store, manual_clock):
    leader = LeaderLease(store, "scaler", owner="a", clock=manual_clock, ttl_s=3.0)
    leader._take(Fence("scaler", 1), manual_clock.now_s())
    manual_clock.advance(2.9)
    assert leader.fence == Fence("scaler", 1)
    manual_clock.advance(0.2)
    assert leader.fence is None
