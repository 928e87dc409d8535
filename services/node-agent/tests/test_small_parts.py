"""Meters, publisher, plans and artifacts."""

from __future__ import annotations

import asyncio
import hashlib
import io
import tarfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hasgpu_core.errors import IntegrityError, NotFoundError, UnavailableError
from hasgpu_core.events import instance_subject
from hasgpu_core.function import Artifact
from hasgpu_core.ports import CaughtUp
from hasgpu_node_agent.adapters.artifacts import ArtifactCache
from hasgpu_node_agent.agent import run_until_one_fails
from hasgpu_node_agent.meters import AllocationMeter, BusyMeter
from hasgpu_node_agent.plan import load_digest
from hasgpu_node_agent.publisher import BusPublisher
from hasgpu_node_agent.row_guard import WorkerKey
from hasgpu_runtime.bus.memory import MemoryBus
from hasgpu_runtime.wire import decode_instance, encode


def test_allocated_time_is_the_integral_of_the_share() -> None:
    meter = AllocationMeter(10.0)
    meter.accrue(0.5, 12.0)
    assert meter.gpu_ns == 0
    meter.accrue(0.25, 14.0)
    meter.accrue(0.0, 15.0)
    assert meter.gpu_ns == 1_250_000_000


def test_busy_time_is_weighted_by_space_and_starts_at_the_first_look() -> None:
    meter = BusyMeter(0.0)
    key = WorkerKey("f-0", 1)
    assert meter.take([(key, 50, 7_000_000_000)], 1.0) == 0
    assert meter.take([(key, 50, 7_400_000_000)], 2.0) == 200
    assert meter.take([], 3.0) == 0
    assert meter.take([], 3.0) == 0


def test_a_load_digest_tells_what_needs_another_worker(make: Any) -> None:
    spec = make.function().spec
    assert load_digest(replace(spec, slo_ms=9, max_instances=3, max_queue=7, standby=2)) == load_digest(spec)
    for changed in (
        replace(spec, entry="other.py"),
        replace(spec, parameters={"a": "b"}),
        replace(spec, artifact=Artifact("1" * 64, 1)),
    ):
        assert load_digest(changed) != load_digest(spec)


async def last(bus: MemoryBus, subject: str) -> bytes | None:
    payload = None
    async with bus.watch(subject) as changes:
        async for change in changes:
            if isinstance(change, CaughtUp):
                return payload
            payload = change.payload
    raise AssertionError


async def test_what_could_not_be_told_is_told_when_the_bus_is_back(world: Any, make: Any) -> None:
    bus = MemoryBus()
    told: list[str] = []

    def event(instance: str) -> Any:
        return (world.event(instance), {}) if instance in world.reconciler.instances else None

    publisher = BusPublisher(bus, "n", event, lambda e: told.append(e.reason), lambda _: True)
    world.plan(1, make.planned())
    await world.step()
    bus.go_away()
    publisher.mark("f-0")
    with pytest.raises(UnavailableError):
        await publisher.write_all()
    await publisher.flush("f-0")
    assert told == []
    bus.come_back()
    await publisher.wait()
    await publisher.write_all()
    payload = await last(bus, instance_subject("f", "f-0"))
    assert payload is not None
    assert decode_instance(payload).reason == told[0]
    bus.go_away()
    publisher.gone("f", "f-0")
    with pytest.raises(UnavailableError):
        await publisher.write_all()
    bus.come_back()
    await publisher.write_all()
    assert await last(bus, instance_subject("f", "f-0")) is None


async def test_a_node_that_is_back_does_not_hide_what_the_new_one_says(world: Any, make: Any) -> None:
    bus = MemoryBus()
    subject = instance_subject("f", "f-0")
    planned = True
    publisher = BusPublisher(bus, "n", lambda i: (world.event(i), {}), lambda _: None, lambda _: planned)
    world.plan(1, make.planned())
    await world.step()
    await publisher.flush("f-0")
    new = encode(replace(world.event("f-0"), node="other"))
    await bus.put(subject, new)
    planned = False
    await publisher.flush("f-0")
    publisher.gone("f", "f-0")
    await publisher.write_all()
    assert await last(bus, subject) == new
    await bus.put(subject, encode(world.event("f-0")))
    publisher.gone("f", "f-0")
    await publisher.write_all()
    assert await last(bus, subject) is None


async def test_an_instance_does_not_wait_for_another_ones_subject(world: Any, make: Any) -> None:
    looking: set[str] = set()
    all_look, may_look = asyncio.Event(), asyncio.Event()

    class SlowBus(MemoryBus):
        """Each look takes until the test lets it."""

        @asynccontextmanager
        async def watch(self, *patterns: str) -> AsyncIterator[Any]:
            looking.update(patterns)
            if len(looking) == len(names):
                all_look.set()
            await may_look.wait()
            async with super().watch(*patterns) as changes:
                yield changes

    bus = SlowBus()
    publisher = BusPublisher(bus, "n", lambda i: (world.event(i), {}), lambda _: None, lambda i: i == "f-0")
    names = [f"f-{n}" for n in range(4)]
    world.plan(1, *(make.planned(name, make.share(100)) for name in names))
    await world.step()
    for name in names:
        await bus.put(instance_subject("f", name), encode(world.event(name)))
        publisher.gone("f", name)
    leaving = asyncio.create_task(publisher.write_all())
    async with asyncio.timeout(60):
        await all_look.wait()
        assert not leaving.done()
    may_look.set()
    await leaving
    assert [await last(bus, instance_subject("f", name)) for name in names] == [None] * len(names)


def tarball(content: bytes) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        info = tarfile.TarInfo("handler.py")
        info.size = len(content)
        archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


async def test_artifacts_are_fetched_once_and_found_again(make: Any, tmp_path: Path) -> None:
    bus = MemoryBus()
    data = tarball(b"x = 1")
    spec = replace(make.function().spec, artifact=Artifact(hashlib.sha256(data).hexdigest(), len(data)))
    cache = ArtifactCache(bus, tmp_path / "artifacts")
    with pytest.raises(NotFoundError):
        await cache.fetch(spec)
    await bus.put_artifact(spec.artifact.sha256, data)
    folder = await cache.fetch(spec)
    assert (folder / "handler.py").read_bytes() == b"x = 1"
    bus.go_away()
    assert await cache.fetch(spec) == folder
    assert ArtifactCache(bus, tmp_path / "artifacts").unpacked(spec) == folder
    draft = tmp_path / "artifacts" / f".{'b' * 64}.1"
    draft.mkdir()
    assert cache.prune([spec.artifact.sha256]) == []
    assert cache.unpacked(spec) == folder
    assert cache.prune([]) == [spec.artifact.sha256]
    assert cache.unpacked(spec) is None
    await cache.sweep()
    # What is being fetched stays.
    assert list((tmp_path / "artifacts").iterdir()) == [draft]


async def test_bytes_of_another_digest_are_refused(make: Any, tmp_path: Path) -> None:
    class Lying(MemoryBus):
        async def get_artifact(self, sha256: str) -> bytes:
            return tarball(b"something else")

    spec = replace(make.function().spec, artifact=Artifact("a" * 64, 10))
    cache = ArtifactCache(Lying(), tmp_path / "artifacts")
    with pytest.raises(IntegrityError):
        await cache.fetch(spec)
    assert list((tmp_path / "artifacts").iterdir()) == []


async def test_loops_end_even_when_one_swallows_its_cancellation() -> None:
    swallowed = 0

    async def stubborn() -> None:
        nonlocal swallowed
        while True:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                swallowed += 1
                if swallowed > 1:
                    raise

    async def quiet() -> None:
        await asyncio.Event().wait()

    running = asyncio.ensure_future(run_until_one_fails([stubborn(), quiet()]))
    await asyncio.sleep(0)
    running.cancel()
    await asyncio.wait({running})
    assert running.cancelled()
    assert swallowed == 2


async def test_a_loop_that_fails_ends_the_others_with_its_error() -> None:
    ended: list[str] = []

    async def failing() -> None:
        raise UnavailableError("gone")

    async def other() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append("other")

    with pytest.raises(UnavailableError, match="gone"):
        await run_until_one_fails([other(), failing()])
    assert ended == ["other"]
