from __future__ import annotations

import asyncio

import pytest
from hasgpu_core.errors import FencedError
from hasgpu_core.ports import Fence
from hasgpu_runtime.clock import SystemClock
from hasgpu_runtime.leader import LeaderLease
from hasgpu_runtime.store.memory import MemoryStore


async def until(condition) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110  the condition tells nobody
            await asyncio.sleep(0.005)


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore(SystemClock())


async def test_one_leads_and_another_follows_at_once_when_it_gives_up(store, background_errors):
    changes = []
    async with LeaderLease.keep(store, "scaler", owner="b", clock=SystemClock(), ttl_s=0.3) as second:
        await until(lambda: second.fence is not None)
        async with LeaderLease.keep(
            store, "scaler", owner="a", clock=SystemClock(), ttl_s=0.3, on_change=lambda: changes.append(1)
        ) as third:
            await asyncio.sleep(0.5)
            assert second.fence is not None
            assert third.fence is None
            assert changes == []
            old = second.fence
            await second.release()
            assert second.fence is None
            await until(lambda: third.fence is not None)
            assert third.fence.token > old.token
            assert changes == [1]
            with pytest.raises(FencedError):
                await store.compare_and_set("k", b"", expected_revision=0, fence=old)


async def test_leadership_is_not_claimed_while_the_store_is_away(store, background_errors):
    async with LeaderLease.keep(store, "scaler", owner="a", clock=SystemClock(), ttl_s=0.2) as leader:
        await until(lambda: leader.fence is not None)
        store.go_away()
        await until(lambda: leader.fence is None)
        store.come_back()
        await until(lambda: leader.fence is not None)


async def test_a_fence_ends_with_its_time_even_when_nobody_renews(store, manual_clock):
    leader = LeaderLease(store, "scaler", owner="a", clock=manual_clock, ttl_s=3.0)
    leader._take(Fence("scaler", 1), manual_clock.now_s())
    manual_clock.advance(2.9)
    assert leader.fence == Fence("scaler", 1)
    manual_clock.advance(0.2)
    assert leader.fence is None
