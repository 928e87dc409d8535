"""Services that tell how they are, on the real brokers."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest
from hasgpu.system.v1 import system_pb2 as pb
from hasgpu_core.errors import UnavailableError
from hasgpu_core.events import QUESTION_SUBJECT, NodeEvent, node_subject
from hasgpu_core.resources import DeviceHealth, DeviceInfo
from hasgpu_runtime import diagnosis, wire
from hasgpu_runtime.bus.memory import MemoryBus
from hasgpu_runtime.bus.nats import NatsBus
from hasgpu_runtime.bus.nats_checks import check_server
from hasgpu_runtime.clock import SystemClock
from hasgpu_runtime.diagnosis import Check, Level, Look, Reporter
from hasgpu_runtime.store.redis import RedisStore
from hasgpu_runtime.store.redis_checks import check_redis

CLOCK = SystemClock()


async def asked(bus: NatsBus | MemoryBus, *reporters: Reporter, wait_s: float = 0.5) -> list[pb.ServiceReport]:
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(reporter.answer(bus)) for reporter in reporters]
        await asyncio.sleep(0.1)
        found = await diagnosis.ask_all(bus, CLOCK, wait_s=wait_s)
        for task in tasks:
            task.cancel()
    return found


async def test_everybody_answers_with_version_clock_and_brokers(nats_bus: NatsBus, redis_store: RedisStore) -> None:
    looks = nats_bus.looks + nats_bus.stream_looks + redis_store.looks
    found = await asked(
        nats_bus, Reporter("scaler", "h-2", CLOCK, 5, looks), Reporter("rapp", "h-1", CLOCK, 7), wait_s=2
    )
    assert [(report.service, report.instance) for report in found] == [("rapp", "h-1"), ("scaler", "h-2")]
    scaler = found[1]
    assert scaler.version == diagnosis.version()
    assert scaler.asked_unix_ns <= scaler.answered_unix_ns <= scaler.received_unix_ns
    by_subject = {check.subject: check for check in scaler.checks}
    assert by_subject.keys() == {"NATS", "Redis", "stream STATE", "stream COMMANDS", "stream OBJ_artifacts"}
    assert {check.level for name, check in by_subject.items() if name.startswith("stream")} == {pb.LEVEL_OK}
    assert "messages" in by_subject["stream STATE"].found


async def test_what_is_no_question_is_passed_over() -> None:
    bus = MemoryBus()
    async with asyncio.TaskGroup() as group:
        task = group.create_task(Reporter("rapp", "h-1", CLOCK, 0).answer(bus))
        await asyncio.sleep(0)
        await bus.publish(QUESTION_SUBJECT, b"\xff\xff")
        assert len(await diagnosis.ask_all(bus, CLOCK, wait_s=0.2)) == 1
        task.cancel()


async def test_a_look_that_fails_or_hangs_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagnosis, "CHECK_TIMEOUT_S", 0.05)

    async def fails() -> Sequence[Check]:
        raise UnavailableError("it is away")

    async def hangs() -> Sequence[Check]:
        await asyncio.sleep(60)
        return []

    found = await diagnosis.look_at([Look("A", fails), Look("B", hangs)])
    assert [(check.level, check.subject) for check in found] == [(Level.FAULT, "A"), (Level.FAULT, "B")]
    assert found[0].found == "it is away"
    assert "no answer within" in found[1].found


async def test_nodes_with_their_devices() -> None:
    bus = MemoryBus()
    lost = DeviceInfo("n1", "gpu0", "H", "cuda", 1, (100,), health=DeviceHealth.LOST, health_reason="Xid 79")
    event = NodeEvent("n1", "h:1", (lost,), observed_unix_ns=CLOCK.unix_ns() - 3_000_000_000, plan_revision=1)
    await bus.put(node_subject("n1"), wire.encode(event))
    (node,) = await diagnosis.nodes(bus, CLOCK)
    assert 3_000 <= node.heartbeat_age_ms < 60_000
    assert (node.devices[0].health, node.devices[0].health_reason) == ("lost", "Xid 79")


class Version:
    major, minor, patch = 2, 9, 1


class OldNats:
    is_connected = True
    connected_server_version = Version()

    async def flush(self, timeout: int) -> None:
        pass


async def test_an_old_nats_is_a_fault() -> None:
    (check,) = await check_server(OldNats(), "nats://h")
    assert (check.level, check.advice) == (Level.FAULT, "hasgpu needs NATS 2.11 or later")
    assert "2.9.1" in check.found


class Redis:
    def __init__(self, **info: object) -> None:
        self._info = {"redis_version": "7.2.4", "aof_enabled": 1, "used_memory": 1, **info}

    async def ping(self) -> None:
        pass

    async def info(self) -> dict[str, object]:
        return self._info


@pytest.mark.parametrize(
    ("info", "level", "words"),
    [
        ({}, Level.OK, ""),
        ({"redis_version": "5.0.1"}, Level.FAULT, "6.2 or later"),
        ({"aof_last_write_status": "err"}, Level.FAULT, "disk"),
        ({"maxmemory": 100, "used_memory": 95}, Level.FAULT, "maxmemory"),
        ({"maxmemory_policy": "allkeys-lru"}, Level.WARNING, "noeviction"),
        ({"aof_enabled": 0}, Level.WARNING, "appendonly yes"),
    ],
)
async def test_what_redis_is_judged_by(info: dict[str, object], level: Level, words: str) -> None:
    (check,) = await check_redis(Redis(**info), "redis://h")
    assert check.level is level
    assert words in check.advice
