"""What a Store promises, asked of the double and of a real Redis."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from hasgpu_core.errors import ConflictError, FencedError, UnavailableError
from hasgpu_core.ports import Fence, Store, Versioned
from hasgpu_runtime.brokers import RedisServer
from hasgpu_runtime.store.redis import RedisStore
from hasgpu_runtime.testing import TcpProxy


class StoreContract:
    @pytest.fixture
    def store(self) -> Store:
        raise NotImplementedError

    @pytest.fixture
    def wait(self) -> Callable[[float], Awaitable[None]]:
        """Lets time pass for leases."""
        raise NotImplementedError

    async def test_values_come_back_with_their_revision(self, store):
        assert await store.get("hasgpu:a") is None
        first = await store.compare_and_set("hasgpu:a", b"\x00\xff", expected_revision=0)
        assert await store.get("hasgpu:a") == Versioned(b"\x00\xff", first)
        second = await store.compare_and_set("hasgpu:a", b"", expected_revision=first)
        assert second > first
        assert await store.get("hasgpu:a") == Versioned(b"", second)

    async def test_a_stale_revision_is_a_conflict_and_changes_nothing(self, store):
        first = await store.compare_and_set("hasgpu:a", b"1", expected_revision=0)
        for stale in (0, first + 1):
            with pytest.raises(ConflictError) as caught:
                await store.compare_and_set("hasgpu:a", b"2", expected_revision=stale)
            assert (caught.value.expected_revision, caught.value.actual_revision) == (stale, first)
        with pytest.raises(ConflictError):
            await store.delete("hasgpu:a", expected_revision=first + 1)
        assert await store.get("hasgpu:a") == Versioned(b"1", first)

    async def test_revisions_never_repeat_after_a_delete(self, store):
        first = await store.compare_and_set("hasgpu:a", b"1", expected_revision=0)
        await store.delete("hasgpu:a", expected_revision=first)
        await store.delete("hasgpu:a")
        await store.delete("hasgpu:a", expected_revision=first)
        assert await store.get("hasgpu:a") is None
        assert await store.compare_and_set("hasgpu:a", b"1", expected_revision=0) > first

    async def test_list_finds_exactly_a_prefix(self, store):
        assert await store.list("hasgpu:") == {}
        for key in ("hasgpu:plan:b", "hasgpu:plan:a", "hasgpu:plan*", "hasgpu:function:a"):
            await store.compare_and_set(key, key.encode(), expected_revision=0)
        listed = await store.list("hasgpu:plan:")
        assert {key: item.value for key, item in listed.items()} == {
            "hasgpu:plan:a": b"hasgpu:plan:a",
            "hasgpu:plan:b": b"hasgpu:plan:b",
        }
        assert list(await store.list("hasgpu:plan*")) == ["hasgpu:plan*"]
        assert len(await store.list("")) == 4

    async def test_of_many_writers_at_one_revision_one_wins(self, store):
        async def write(value: int) -> bool:
            try:
                await store.compare_and_set("hasgpu:a", str(value).encode(), expected_revision=0)
            except ConflictError:
                return False
            return True

        won = await asyncio.gather(*(write(value) for value in range(20)))
        assert sum(won) == 1
        assert (await store.get("hasgpu:a")).value == str(won.index(True)).encode()

    async def test_a_lease_has_one_owner_until_it_runs_out(self, store, wait):
        fence = await store.acquire_lease("scaler", "a", ttl_s=2.0)
        assert fence is not None
        assert await store.acquire_lease("scaler", "b", ttl_s=2.0) is None
        assert await store.acquire_lease("scaler", "a", ttl_s=2.0) == fence
        assert await store.acquire_lease("scheduler", "b", ttl_s=10.0) is not None
        await wait(2.2)
        newer = await store.acquire_lease("scaler", "b", ttl_s=10.0)
        assert newer is not None
        assert newer.token > fence.token
        assert await store.acquire_lease("scaler", "a", ttl_s=10.0) is None

    async def test_renewing_makes_a_lease_last(self, store, wait):
        fence = await store.acquire_lease("scaler", "a", ttl_s=2.0)
        for _ in range(3):
            await wait(0.8)
            assert await store.acquire_lease("scaler", "a", ttl_s=2.0) == fence
        assert await store.acquire_lease("scaler", "b", ttl_s=2.0) is None

    async def test_a_released_lease_is_free_and_only_its_owner_releases(self, store):
        fence = await store.acquire_lease("scaler", "a", ttl_s=10.0)
        await store.release_lease("scaler", "b")
        assert await store.acquire_lease("scaler", "b", ttl_s=10.0) is None
        await store.release_lease("scaler", "a")
        newer = await store.acquire_lease("scaler", "b", ttl_s=10.0)
        assert newer is not None
        assert newer.token > fence.token

    async def test_a_deposed_leader_writes_nothing(self, store, wait):
        old = await store.acquire_lease("scaler", "a", ttl_s=0.2)
        first = await store.compare_and_set("hasgpu:a", b"1", expected_revision=0, fence=old)
        await wait(0.4)
        new = await store.acquire_lease("scaler", "b", ttl_s=10.0)
        with pytest.raises(FencedError) as caught:
            await store.compare_and_set("hasgpu:a", b"2", expected_revision=first, fence=old)
        assert (caught.value.token, caught.value.current_token) == (old.token, new.token)
        with pytest.raises(FencedError):
            await store.delete("hasgpu:a", fence=old)
        assert await store.get("hasgpu:a") == Versioned(b"1", first)
        second = await store.compare_and_set("hasgpu:a", b"3", expected_revision=first, fence=new)
        await store.delete("hasgpu:a", expected_revision=second, fence=new)

    async def test_a_fence_that_was_never_given_is_refused(self, store):
        with pytest.raises(FencedError):
            await store.compare_and_set("hasgpu:a", b"1", expected_revision=0, fence=Fence("nobody", 1))


class TestMemoryStore(StoreContract):
    @pytest.fixture
    def store(self, memory_store):
        return memory_store

    @pytest.fixture
    def wait(self, manual_clock):
        return manual_clock.sleep

    async def test_while_it_is_away(self, store):
        store.go_away()
        with pytest.raises(UnavailableError):
            await store.get("hasgpu:a")
        store.come_back()
        assert await store.get("hasgpu:a") is None


class TestRedisStore(StoreContract):
    @pytest.fixture
    async def store(self, redis_store, background_errors):
        return redis_store

    @pytest.fixture
    def wait(self):
        return asyncio.sleep


async def test_a_store_that_is_not_there_is_named_without_its_password():
    with pytest.raises(UnavailableError, match=r"127\.0\.0\.1:9") as caught:
        async with RedisStore.connect("redis://:secret@127.0.0.1:9/0", timeout_s=0.3):
            pass
    assert "secret" not in str(caught.value)


async def test_a_store_that_restarts_kept_what_it_took(tmp_path):
    with RedisServer(tmp_path) as server:
        async with RedisStore.connect(server.url) as store:
            revision = await store.compare_and_set("hasgpu:a", b"1", expected_revision=0)
            fence = await store.acquire_lease("scaler", "a", ttl_s=30.0)
            server.stop()
            with pytest.raises(UnavailableError):
                await store.get("hasgpu:a")
            server.start()
            assert await store.get("hasgpu:a") == Versioned(b"1", revision)
            assert await store.compare_and_set("hasgpu:a", b"2", expected_revision=revision, fence=fence) > revision


async def test_a_write_whose_answer_was_lost_is_made_once_and_is_no_conflict(redis_server, redis_store):
    async with (
        TcpProxy(f"127.0.0.1:{redis_server.port}") as proxy,
        RedisStore.connect(f"redis://{proxy.address}/0") as store,
    ):
        first = await store.compare_and_set("hasgpu:a", b"1", expected_revision=0)
        proxy.lost_answers = 1
        second = await store.compare_and_set("hasgpu:a", b"2", expected_revision=first)
        assert proxy.lost_answers == 0
        assert await redis_store.get("hasgpu:a") == Versioned(b"2", second)
        assert second == first + 1
        with pytest.raises(ConflictError):
            await store.compare_and_set("hasgpu:a", b"2", expected_revision=first)
