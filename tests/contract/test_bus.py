"""What a Bus promises, asked of the double and of real NATS."""

from __future__ import annotations

import asyncio

import pytest
from hasgpu_core.errors import InvalidError, UnavailableError
from hasgpu_core.ports import Bus, CaughtUp, StateChange
from hasgpu_runtime.brokers import NatsServer
from hasgpu_runtime.bus.nats import NatsBus
from hasgpu_runtime.clock import SystemClock

TIMEOUT_S = 20.0


async def take(iterator, count: int = 1):
    """The next items; a test that waits in vain fails."""
    async with asyncio.timeout(TIMEOUT_S):
        return [await anext(iterator) for _ in range(count)]


async def until_caught_up(iterator) -> dict[str, bytes | None]:
    values: dict[str, bytes | None] = {}
    async with asyncio.timeout(TIMEOUT_S):
        async for item in iterator:
            if isinstance(item, CaughtUp):
                return values
            values[item.subject] = item.payload
    raise AssertionError("a watch ended by itself")


class BusContract:
    @pytest.fixture
    def bus(self) -> Bus:
        raise NotImplementedError

    async def test_a_watch_gives_last_values_then_caught_up_then_changes(self, bus):
        await bus.put("node.a", b"1")
        await bus.put("node.a", b"2", {"traceparent": "t"})
        await bus.put("node.b", b"3")
        await bus.put("plan.a", b"other")
        async with bus.watch("node.>") as changes:
            first = await take(changes, 3)
            assert {item.subject: item.payload for item in first[:2]} == {"node.a": b"2", "node.b": b"3"}
            assert {item.subject: dict(item.headers) for item in first[:2]} == {
                "node.a": {"traceparent": "t"},
                "node.b": {},
            }
            assert first[2] == CaughtUp()
            await bus.put("node.c", b"4", {"traceparent": "u"})
            assert await take(changes) == [StateChange("node.c", b"4", {"traceparent": "u"})]
            await bus.put("node.a", b"5")
            assert await take(changes) == [StateChange("node.a", b"5")]

    async def test_a_watch_of_nothing_catches_up_at_once(self, bus):
        async with bus.watch("function.>", "capacity.*.*") as changes:
            assert await take(changes) == [CaughtUp()]

    async def test_a_watch_takes_several_patterns_that_may_overlap(self, bus):
        await bus.put("instance.f.f-1", b"1")
        await bus.put("node.a", b"2")
        await bus.put("plan.a", b"3")
        async with bus.watch("instance.>", "instance.f.*", "node.a", "node.a") as changes:
            assert await until_caught_up(changes) == {"instance.f.f-1": b"1", "node.a": b"2"}
            await bus.put("instance.f.f-2", b"4")
            await bus.put("node.a", b"5")
            assert [item.payload for item in await take(changes, 2)] == [b"4", b"5"]

    async def test_watchers_hear_of_a_deletion_and_later_ones_do_not_see_it(self, bus):
        await bus.put("node.a", b"1")
        await bus.put("node.b", b"2")
        async with bus.watch("node.*") as changes:
            await until_caught_up(changes)
            await bus.delete("node.a", {"traceparent": "t"})
            assert await take(changes) == [StateChange("node.a", None, {"traceparent": "t"})]
        async with bus.watch("node.*") as changes:
            assert await until_caught_up(changes) == {"node.b": b"2"}
            await bus.put("node.a", b"3")
            assert await take(changes) == [StateChange("node.a", b"3")]

    async def test_deleting_what_is_not_there_does_nothing(self, bus):
        async with bus.watch("node.*") as changes:
            await until_caught_up(changes)
            await bus.delete("node.nobody")
            await bus.put("node.a", b"1")
            await bus.delete("node.a")
            await bus.delete("node.a")
            await bus.put("node.b", b"2")
            seen = await take(changes, 3)
        assert seen == [StateChange("node.a", b"1"), StateChange("node.a", None), StateChange("node.b", b"2")]

    async def test_an_empty_payload_is_a_value(self, bus):
        await bus.put("node.a", b"")
        async with bus.watch("node.*") as changes:
            assert await until_caught_up(changes) == {"node.a": b""}

    async def test_many_values_all_arrive_before_caught_up(self, bus):
        expected = {}
        for at in range(300):
            subject = f"instance.f.f-{at}"
            await bus.put(subject, str(at).encode())
            expected[subject] = str(at).encode()
        async with bus.watch("instance.>") as changes:
            assert await until_caught_up(changes) == expected

    async def test_the_last_value_reaches_a_reader_that_was_slow(self, bus):
        async with bus.watch("node.*") as changes:
            await until_caught_up(changes)
            for at in range(500):
                await bus.put("node.a", str(at).encode())
            payload = b""
            while payload != b"499":
                [change] = await take(changes)
                payload = change.payload

    async def test_state_goes_to_state_subjects_only(self, bus):
        for subject in ("demand.f.g", "node", "node.*", "node.a b", "scale.horizontal.f", ""):
            with pytest.raises(InvalidError):
                await bus.put(subject, b"")
        with pytest.raises(InvalidError):
            async with bus.watch("demand.>"):
                pass
        with pytest.raises(InvalidError):
            async with bus.watch("node.>.a"):
                pass

    async def test_published_messages_reach_present_subscribers_once(self, bus):
        await bus.publish("demand.f.g", b"nobody listens")
        async with (
            bus.subscribe("demand.>", "demand.f.*", "device.n.*") as messages,
            bus.subscribe("device.>") as other,
        ):
            await bus.publish("demand.f.g", b"1", {"traceparent": "t"})
            await bus.publish("device.n.cpu0", b"2")
            await bus.publish("other.n", b"3")
            await bus.publish("demand.f.h", b"4")
            got = await take(messages, 3)
            assert sorted((m.subject, m.payload, m.headers.get("traceparent")) for m in got) == [
                ("demand.f.g", b"1", "t"),
                ("demand.f.h", b"4", None),
                ("device.n.cpu0", b"2", None),
            ]
            assert [m.payload for m in await take(other)] == [b"2"]

    async def test_a_command_goes_to_one_holder_and_not_again_after_ack(self, bus):
        await bus.send_command("scale.horizontal.f", b"1", dedup_id="f-1", headers={"traceparent": "t"})
        await bus.send_command("scale.horizontal.g", b"2", dedup_id="g-1")
        async with bus.commands("scale.horizontal.>", consumer="scheduler") as commands:
            [first] = await take(commands)
            assert (first.subject, first.payload, dict(first.headers).get("traceparent")) == (
                "scale.horizontal.f",
                b"1",
                "t",
            )
            await first.ack()
            await first.ack()
            [second] = await take(commands)
            assert second.payload == b"2"
            await second.ack()
        async with bus.commands("scale.horizontal.>", consumer="scheduler") as commands:
            await bus.send_command("scale.horizontal.f", b"3", dedup_id="f-2")
            [third] = await take(commands)
            assert third.payload == b"3"
            await third.ack()

    async def test_a_command_is_stored_once_for_its_dedup_id(self, bus):
        await bus.send_command("scale.horizontal.f", b"1", dedup_id="f-1")
        await bus.send_command("scale.horizontal.f", b"1 again", dedup_id="f-1")
        await bus.send_command("scale.horizontal.f", b"2", dedup_id="f-2")
        async with bus.commands("scale.horizontal.>", consumer="scheduler") as commands:
            got = await take(commands, 2)
            assert [command.payload for command in got] == [b"1", b"2"]
            for command in got:
                await command.ack()

    async def test_a_command_given_back_comes_again(self, bus):
        await bus.send_command("scale.horizontal.f", b"1", dedup_id="f-1")
        async with bus.commands("scale.horizontal.>", consumer="scheduler") as commands:
            [command] = await take(commands)
            await command.retry(0.05)
            [again] = await take(commands)
            assert again.payload == b"1"
            await again.retry(0)
            [again] = await take(commands)
            await again.ack()
            await bus.send_command("scale.horizontal.f", b"2", dedup_id="f-2")
            assert [item.payload for item in await take(commands)] == [b"2"]

    async def test_a_command_left_unsettled_by_a_lost_holder_comes_again(self, bus):
        await bus.send_command("scale.horizontal.f", b"1", dedup_id="f-1")
        async with bus.commands("scale.horizontal.>", consumer="scheduler") as commands:
            await take(commands)
        async with bus.commands("scale.horizontal.>", consumer="scheduler") as commands:
            [again] = await take(commands)
            assert again.payload == b"1"
            await again.ack()

    async def test_commands_go_to_command_subjects_only(self, bus):
        with pytest.raises(InvalidError):
            await bus.send_command("node.a", b"", dedup_id="x")
        with pytest.raises(InvalidError):
            async with bus.commands("node.>", consumer="scheduler"):
                pass


class TestMemoryBus(BusContract):
    @pytest.fixture
    async def bus(self, memory_bus, background_errors):
        return memory_bus

    async def test_while_it_is_away_and_when_it_returns(self, bus):
        await bus.put("node.a", b"1")
        async with bus.watch("node.*") as changes:
            await until_caught_up(changes)
            bus.go_away()
            with pytest.raises(UnavailableError):
                await bus.put("node.b", b"2")
            await bus.publish("demand.f.g", b"dropped")
            bus.come_back()
            assert await until_caught_up(changes) == {"node.a": b"1"}


class TestNatsBus(BusContract):
    @pytest.fixture
    async def bus(self, nats_bus, background_errors):
        return nats_bus

    async def test_two_connections_share_everything(self, bus, nats_server):
        async with NatsBus.connect(nats_server.url, name="other", clock=SystemClock()) as other:
            await bus.put("node.a", b"1")
            async with other.watch("node.*") as changes, other.subscribe("demand.>") as messages:
                assert await until_caught_up(changes) == {"node.a": b"1"}
                await bus.delete("node.a")
                assert await take(changes) == [StateChange("node.a", None)]
                await bus.publish("demand.f.g", b"x")
                assert [m.payload for m in await take(messages)] == [b"x"]

    async def test_services_that_start_at_once_all_find_their_streams(self, nats_server, background_errors):
        async def start(name: str) -> None:
            async with NatsBus.connect(nats_server.url, name=name, clock=SystemClock()) as bus:
                await bus.put(f"node.{name}", b"1")

        async with asyncio.TaskGroup() as group:
            for at in range(6):
                group.create_task(start(f"s{at}"))


async def test_a_broker_that_is_not_there_is_named():
    with pytest.raises(UnavailableError, match=r"127\.0\.0\.1:9"):
        async with NatsBus.connect("nats://127.0.0.1:9", name="t", clock=SystemClock(), timeout_s=0.5):
            pass


async def test_a_broker_that_restarts(tmp_path, background_errors):
    """Watches deliver again, deletions included; commands and subscriptions go on; calls meanwhile say so."""
    with NatsServer(tmp_path) as server:
        async with (
            NatsBus.connect(server.url, name="a", clock=SystemClock()) as bus,
            bus.watch("node.>") as changes,
            bus.subscribe("demand.>") as messages,
            bus.commands("scale.horizontal.>", consumer="scheduler") as commands,
        ):
            await until_caught_up(changes)
            await bus.put("node.a", b"1")
            await bus.put("node.b", b"2")
            assert len(await take(changes, 2)) == 2
            server.kill()
            async with asyncio.timeout(TIMEOUT_S):
                while bus.connected:  # noqa: ASYNC110  the bus tells nobody
                    await asyncio.sleep(0.01)
            await bus.publish("demand.f.g", b"dropped")
            with pytest.raises(UnavailableError):
                await bus.put("node.a", b"lost")
            server.start()
            assert await until_caught_up(changes) == {"node.a": b"1", "node.b": b"2"}
            await bus.put("node.c", b"3")
            assert await take(changes) == [StateChange("node.c", b"3")]
            await bus.publish("demand.f.g", b"heard")
            assert [m.payload for m in await take(messages)] == [b"heard"]
            await bus.send_command("scale.horizontal.f", b"4", dedup_id="f-1")
            [command] = await take(commands)
            assert command.payload == b"4"
            await command.ack()


async def test_what_vanished_while_away_is_told_as_deleted(tmp_path, background_errors):
    """The broker comes back without its data: streams are made again and watchers hear that the subjects are gone."""
    with NatsServer(tmp_path / "first") as first:
        async with NatsBus.connect(first.url, name="a", clock=SystemClock()) as bus:
            await bus.put("node.a", b"1")
            async with bus.watch("node.>") as changes:
                assert await until_caught_up(changes) == {"node.a": b"1"}
                first.kill()
                with NatsServer(tmp_path / "second", port=first.port):
                    assert await until_caught_up(changes) == {"node.a": None}
                    await bus.put("node.a", b"2")
                    assert await take(changes) == [StateChange("node.a", b"2")]
