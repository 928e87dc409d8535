"""The small parts by themselves."""

from __future__ import annotations

import asyncio

import pytest
from hasgpu_core.capacity import CapacityPoint, CapacityTable
from hasgpu_core.clock import ManualClock
from hasgpu_core.errors import DeadlineError, InvalidError
from hasgpu_core.events import InstanceEvent
from hasgpu_core.resources import Allocation, InstanceState
from hasgpu_gateway.calls import BatchAnswer, InferCall
from hasgpu_gateway.deadlines import Deadlines
from hasgpu_gateway.demand import DemandMeter
from hasgpu_gateway.errors import ExpiredError
from hasgpu_gateway.pending import Pending
from hasgpu_gateway.routes import Batch, BatchOrder, Route
from hasgpu_gateway.settings import default_gateway_id, load
from hasgpu_gateway.tracing import NOT_TRACED


def call() -> InferCall:
    return InferCall("fn", "", 1, (), (), (), None)


def pending(sequence: int, *, deadline_s: float, by_caller: bool = False) -> Pending:
    return Pending(
        call(),
        asyncio.get_running_loop().create_future(),
        arrived_s=0.0,
        due_s=1.0,
        deadline_s=deadline_s,
        by_caller=by_caller,
        sequence=sequence,
        trace=NOT_TRACED,
    )


def event(**changes) -> InstanceEvent:
    fields = {
        "function": "fn",
        "instance": "fn-0",
        "node": "n",
        "gpu": "cpu0",
        "row": 0,
        "state": InstanceState.READY,
        "reason": "",
        "address": "h:1",
        "allocation": Allocation(100, 500, 1000, 1),
        "allocation_revision": 1,
        "function_revision": 3,
        "device_model": "cpu-2c",
        "plan_revision": 1,
    }
    return InstanceEvent(**(fields | changes))


def table(basis: str = "profiled") -> CapacityTable:
    points = tuple(CapacityPoint(b, 100, q, 0.01 * b * 1000 / q, 1.0) for b in (1, 2, 4) for q in (500, 1000))
    return CapacityTable("fn", 1, "cpu-2c", 1, 0, 100, points, basis)


def route(**changes) -> Route:
    made = Route(event(**changes), max_batches=2)
    made.up = True
    made.update(event(**changes), table(), max_rows=4)
    return made


async def test_deadlines_fire_in_order_and_skip_what_was_dropped() -> None:
    clock = ManualClock()
    fired: list[int] = []
    done = asyncio.Event()

    def expire(item: Pending) -> None:
        fired.append(item.sequence)
        if len(fired) == 2:
            done.set()

    deadlines = Deadlines(clock, expire)
    items = [pending(n, deadline_s=s) for n, s in ((1, 0.03), (2, 0.01), (3, 0.02))]
    for item in items:
        deadlines.add(item)
    deadlines.drop(items[2])
    clock.advance(1.0)
    async with asyncio.timeout(20):
        await done.wait()
    assert fired == [2, 1]
    assert len(deadlines) == 0
    deadlines.close()


async def test_deadlines_of_many_answered_requests_are_forgotten() -> None:
    deadlines = Deadlines(ManualClock(), lambda _: None)
    for number in range(10_000):
        item = pending(number, deadline_s=100.0 + number)
        deadlines.add(item)
        deadlines.drop(item)
    assert len(deadlines._heap) <= 1_024
    deadlines.close()


async def test_an_expired_request_has_the_status_that_its_caller_expects() -> None:
    assert isinstance(pending(1, deadline_s=1.0).expired("in the queue"), ExpiredError)
    assert isinstance(pending(1, deadline_s=1.0, by_caller=True).expired("in the queue"), DeadlineError)


def test_percentiles_are_of_the_last_seconds_only() -> None:
    meter = DemandMeter("fn", window_s=3.0)
    for index in range(100):
        meter.answered(1.0, (index + 1) / 1e3, slo_s=0.05)

    def report(now_s: float):
        return meter.event(
            gateway="g",
            epoch="e",
            now_s=now_s,
            observed_unix_ns=0,
            queued_count=0,
            queued_items_count=0,
            in_flight_count=0,
            oldest_wait_s=0.0,
        )

    now = report(2.0)
    assert (now.window_count, now.p50_ms, now.p95_ms, now.p99_ms) == (100, 50, 95, 99)
    assert (now.ok_count, now.late_count) == (100, 50)
    later = report(10.0)
    assert (later.window_count, later.p50_ms, later.ok_count) == (0, None, 100)


async def test_a_route_s_prediction_follows_what_it_observes() -> None:
    made = route()
    assert made.latency_s(2) == pytest.approx(0.02), "at the limit: idle time is lent"
    for number in range(40):
        made.sent(Batch(BatchOrder(number, (), 0), 2, 0.0, 0.04), 0.0)
        made.returned(BatchAnswer(number, (), execute_ns=80_000_000), 0.08)
    assert made.latency_s(2) == pytest.approx(0.08, rel=0.01)
    assert made.trusted_rps() == pytest.approx(25.0, rel=0.01)


async def test_a_static_table_is_trusted_once_it_was_corrected() -> None:
    made = route()
    made.update(event(), table("static"), max_rows=4)
    assert made.trusted_rps() is None
    for number in range(8):
        made.sent(Batch(BatchOrder(number, (), 0), 1, 0.0, 0.02), 0.0)
        made.returned(BatchAnswer(number, (), execute_ns=10_000_000), 0.02)
    assert made.trusted_rps() == pytest.approx(100.0)


async def test_the_backlog_is_what_is_predicted_for_the_batches_held() -> None:
    made = route()
    made.sent(Batch(BatchOrder(1, (), 0), 1, 0.0, 0.02), 10.0)
    made.sent(Batch(BatchOrder(2, (), 0), 2, 0.0, 0.04), 10.0)
    assert made.backlog_s(10.0) == pytest.approx(0.06)
    assert made.backlog_s(10.05) == pytest.approx(0.01)
    assert made.returned(BatchAnswer(1, ()), 10.03) is not None
    assert made.backlog_s(10.03) == pytest.approx(0.04)
    assert made.returned(BatchAnswer(1, ()), 10.03) is None
    assert [batch.order.batch for batch in made.take_all()] == [2]
    assert made.backlog_s(10.03) == 0.0


@pytest.mark.parametrize(
    ("changes", "is_open"),
    [
        ({}, True),
        ({"state": InstanceState.DRAINING}, False),
        ({"allocation": Allocation(100, 10, 10, 1)}, False),
        ({"function_revision": 2}, False),
    ],
)
async def test_only_ready_active_current_instances_are_routed_to(changes, is_open: bool) -> None:
    made = route(**changes)
    assert made.is_open(code_revision=3) is is_open
    made.up = False
    assert not made.is_open(code_revision=3)


async def test_a_busy_instance_takes_another_batch_only_when_that_is_full_or_short() -> None:
    made = route()
    assert made.has_credit(queued_rows=1)
    made.sent(Batch(BatchOrder(1, (), 0), 1, 0.0, 0.02), 0.0)
    assert not made.has_credit(queued_rows=3)
    assert made.has_credit(queued_rows=4)
    made.sent(Batch(BatchOrder(2, (), 0), 1, 0.0, 0.02), 0.0)
    assert not made.has_credit(queued_rows=100)


def test_settings_are_parsed_and_bounded() -> None:
    settings = load({"HASGPU_GATEWAY_ID": "g-1", "HASGPU_STOP_TIMEOUT_S": "2.5"})
    assert (settings.gateway_id, settings.stop_timeout_s, settings.max_artifact_bytes) == ("g-1", 2.5, 2 << 30)
    assert load({}).gateway_id != load({}).gateway_id
    for name, value, message in (
        ("HASGPU_GATEWAY_ID", "a.b", "HASGPU_GATEWAY_ID: expected 1 to 100"),
        ("HASGPU_STOP_TIMEOUT_S", "soon", "HASGPU_STOP_TIMEOUT_S: expected a number in 0..15, got 'soon'"),
        ("HASGPU_MAX_MESSAGE_BYTES", "1", "HASGPU_MAX_MESSAGE_BYTES: expected a whole number in 4096"),
    ):
        with pytest.raises(InvalidError) as caught:
            load({name: value})
        assert message in str(caught.value)
    assert "." not in default_gateway_id()
