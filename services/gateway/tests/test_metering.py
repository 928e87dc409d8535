"""What the gateway measures of a function, and that a deleted one is not told of any more."""

from __future__ import annotations

import asyncio

from hasgpu.gateway.v1 import gateway_pb2
from hasgpu_runtime import metric_catalogue as names
from hasgpu_runtime.metric_catalogue import MetricSpec


def values(harness, spec: MetricSpec) -> dict[tuple[str, ...], float]:
    collected = harness.gateway._world.metrics.collect()
    return {point.labels: point.value for found, points in collected if found is spec for point in points}


def counts(harness, spec: MetricSpec) -> int:
    collected = harness.gateway._world.metrics.collect()
    return sum(sum(point.counts) for found, points in collected if found is spec for point in points)


async def test_requests_are_counted_by_outcome(harness) -> None:
    await harness.deploy(harness.make_spec(timeout_ms=30))
    await asyncio.gather(harness.infer(), return_exceptions=True)
    assert values(harness, names.REQUESTS)["echo", "expired"] == 1
    await harness.deploy(harness.make_spec(timeout_ms=20_000, slo_ms=60_000), replace=True)
    await harness.announce(await harness.worker())
    await harness.infer((1.0, 2.0), (3.0, 4.0))
    await harness.deploy(harness.make_spec(timeout_ms=20_000, slo_ms=1), replace=True)
    await harness.infer()
    found = values(harness, names.REQUESTS)
    assert (found["echo", "in_time"] + found["echo", "late"], found["echo", "expired"]) == (2, 1)
    assert found["echo", "in_time"] >= 1
    assert found["echo", "failed"] == found["echo", "refused"] == 0
    assert values(harness, names.REQUEST_ITEMS)["echo",] == 4
    assert counts(harness, names.REQUEST_DURATION) == counts(harness, names.REQUEST_SLO_RATIO) == 2
    assert values(harness, names.FUNCTION_SLO)["echo",] == 0.001
    assert values(harness, names.ROUTES_OPEN)["echo",] == 1


async def test_the_queue_is_told_while_requests_wait(harness) -> None:
    await harness.deploy(harness.make_spec())
    waiting = harness.infer((1.0, 2.0), (3.0, 4.0))
    await harness.until(lambda: harness.lane().queued_count == 1)
    await asyncio.sleep(0.01)
    assert values(harness, names.QUEUE_LENGTH)["echo",] == 1
    assert values(harness, names.QUEUE_ITEMS)["echo",] == 2
    assert values(harness, names.QUEUE_OLDEST_WAIT)["echo",] >= 0.01
    await harness.announce(await harness.worker())
    await waiting
    assert values(harness, names.QUEUE_LENGTH)["echo",] == values(harness, names.QUEUE_OLDEST_WAIT)["echo",] == 0


async def test_a_deleted_function_is_not_told_of(harness) -> None:
    await harness.deploy(harness.make_spec())
    await harness.announce(await harness.worker())
    await harness.infer()
    assert counts(harness, names.REQUEST_DURATION) == 1
    await harness.functions.DeleteFunction(gateway_pb2.DeleteFunctionRequest(name="echo"))
    await harness.until(lambda: harness.gateway.lanes.find("echo") is None)
    told = {
        label
        for spec, points in harness.gateway._world.metrics.collect()
        if "function" in spec.attributes
        for point in points
        for label in point.labels
    }
    assert "echo" not in told
