"""From a caller through the queue to a worker and back, and what breaks on the way."""

from __future__ import annotations

import asyncio
import dataclasses
import struct

import grpc
import grpc.aio
import pytest
from hasgpu.gateway.v1 import gateway_pb2
from hasgpu.node_agent.v1 import node_agent_pb2 as worker_pb
from hasgpu_core.events import instance_subject
from hasgpu_core.resources import Allocation, InstanceState
from hasgpu_runtime import wire


async def failure(call) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value


def first_values(worker) -> list[list[float]]:
    """Of each batch that a worker got, the first value of each item."""
    return [[struct.unpack_from("<f", item.inputs[0].raw)[0] for item in request.items] for request in worker.requests]


async def test_an_answer_carries_the_id_the_version_and_raw_outputs(harness) -> None:
    worker = await harness.worker()
    await harness.deploy(harness.make_spec())
    await harness.announce(worker)
    response = await harness.infer((1.0, 2.0), (3.0, 4.0), id="r7")
    assert (response.id, response.model_version, response.model_name) == ("r7", "1", "echo")
    assert list(response.raw_output_contents) == [harness.floats(1, 2, 3, 4)]
    assert list(response.outputs[0].shape) == [2, 2]
    assert worker.requests[0].items[0].rows == 2


async def test_an_unknown_model_is_not_found(harness) -> None:
    error = await failure(harness.infer(name="nobody"))
    assert error.code() is grpc.StatusCode.NOT_FOUND
    assert error.details() == "Request for unknown model: 'nobody' is not found"


async def test_a_bad_request_is_told_and_reaches_no_worker(harness) -> None:
    worker = await harness.worker()
    await harness.deploy(harness.make_spec())
    await harness.announce(worker)
    request = harness.request((1.0, 2.0))
    request.inputs[0].datatype = "FP64"
    error = await failure(harness.inference.ModelInfer(request))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert error.details() == "input 'x': datatype: expected FP32, got 'FP64'"
    assert not worker.requests


async def test_an_oversize_message_is_refused_with_its_size(harness) -> None:
    await harness.deploy(harness.make_spec())
    request = harness.request((1.0, 2.0))
    request.raw_input_contents[0] = bytes(200_000)
    error = await failure(harness.inference.ModelInfer(request))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "100000" in error.details()


async def test_a_request_for_a_function_without_instances_waits_and_wakes_the_scaler(harness) -> None:
    await harness.deploy(harness.make_spec())
    async with harness.bus.subscribe("demand.>") as messages:
        call = harness.infer((5.0, 6.0))
        async with asyncio.timeout(20):
            async for message in messages:
                event = wire.decode_demand(message.payload)
                if event.queued_count:
                    break
        assert (event.function, event.gateway, event.arrived_count) == ("echo", "gw1", 1)
        worker = await harness.worker()
        await harness.announce(worker)
        response = await call
    assert response.raw_output_contents[0] == harness.floats(5, 6)


async def test_waiting_requests_leave_in_one_batch_in_due_order(harness) -> None:
    worker = await harness.worker()
    await harness.deploy(harness.make_spec())
    calls = []
    for value in (1.0, 2.0, 3.0, 4.0, 5.0):
        calls.append(harness.infer((value, 0.0)))
        await harness.until(lambda: harness.lane().queued_count == len(calls))
    await harness.announce(worker)
    await asyncio.gather(*calls)
    assert first_values(worker) == [[1.0, 2.0, 3.0, 4.0], [5.0]]


async def test_a_batch_stays_as_small_as_the_objective_asks(harness) -> None:
    worker = await harness.worker()
    spec = harness.make_spec(slo_ms=10_000)
    await harness.deploy(spec)
    await harness.table(4.0, slo_ms=10_000)
    calls = [harness.infer((float(value), 0.0)) for value in range(4)]
    await harness.until(lambda: harness.lane().queued_count == 4)
    await harness.announce(worker)
    await asyncio.gather(*calls)
    assert [len(request.items) for request in worker.requests] == [2, 2]


async def test_a_lone_request_leaves_at_once_and_a_busy_instance_collects_a_batch(harness) -> None:
    worker = await harness.worker()
    worker.gate.clear()
    await harness.deploy(harness.make_spec())
    await harness.table(0.05)
    await harness.announce(worker)
    await harness.connected("echo-0")
    first = harness.infer((0.0, 0.0))
    await worker.wait_for_batches(1)
    others = [harness.infer((float(value), 0.0)) for value in (1, 2, 3)]
    await harness.until(lambda: harness.lane().queued_count == 3)
    worker.gate.set()
    await asyncio.gather(first, *others)
    assert [len(request.items) for request in worker.requests] == [1, 3]


async def test_no_instance_holds_more_batches_than_its_credits(harness) -> None:
    worker = await harness.worker()
    worker.gate.clear()
    await harness.deploy(harness.make_spec(max_batch=1))
    await harness.announce(worker)
    calls = [harness.infer((float(value), 0.0)) for value in range(5)]
    await harness.until(lambda: harness.lane().in_flight_count == 2 and harness.lane().queued_count == 3)
    assert len(harness.lane().routes["echo-0"].in_flight) == 2
    worker.gate.set()
    await asyncio.gather(*calls)


async def test_the_faster_instance_is_chosen(harness) -> None:
    fast, slow = await harness.worker(), await harness.worker()
    await harness.deploy(harness.make_spec())
    await harness.table(0.002)
    share = Allocation(sm_pct=100, request_permille=100, limit_permille=100, memory_bytes=1 << 30)
    await harness.announce(slow, instance="echo-0", allocation=share)
    await harness.announce(fast, instance="echo-1")
    await harness.connected("echo-0", "echo-1")
    for _ in range(5):
        await harness.infer()
    assert (len(fast.requests), len(slow.requests)) == (5, 0)


async def test_a_standby_gets_nothing_until_it_is_made_active(harness) -> None:
    worker = await harness.worker()
    await harness.deploy(harness.make_spec())
    parked = Allocation(sm_pct=100, request_permille=10, limit_permille=10, memory_bytes=1 << 30)
    event = await harness.announce(worker, allocation=parked)
    call = harness.infer()
    await harness.connected("echo-0")
    await harness.until(lambda: harness.lane().queued_count == 1)
    assert not worker.requests
    await harness.announce(worker, allocation=Allocation(100, 500, 1000, 1 << 30), allocation_revision=2)
    await call
    assert len(worker.requests) == 1
    assert event.instance == "echo-0"


async def test_a_lost_worker_s_requests_run_elsewhere(harness) -> None:
    dying, healthy = await harness.worker(), await harness.worker()
    dying.gate.clear()
    await harness.deploy(harness.make_spec())
    await harness.announce(dying)
    call = harness.infer((7.0, 8.0))
    await dying.wait_for_batches(1)
    await harness.announce(healthy, instance="echo-1")
    await dying.kill()
    assert (await call).raw_output_contents[0] == harness.floats(7, 8)
    assert len(healthy.requests) == 1


async def test_when_the_only_worker_dies_the_request_waits_for_its_restart(harness) -> None:
    dying = await harness.worker()
    dying.gate.clear()
    await harness.deploy(harness.make_spec())
    await harness.announce(dying)
    call = harness.infer((7.0, 8.0))
    await dying.wait_for_batches(1)
    await dying.kill()
    await harness.announce(dying, state=InstanceState.LOADING, address="")
    await harness.until(lambda: harness.lane().queued_count == 1)
    restarted = await harness.worker()
    await harness.announce(restarted, restarts_count=1)
    assert (await call).raw_output_contents[0] == harness.floats(7, 8)


async def test_a_request_is_retried_once_only(harness) -> None:
    workers = [await harness.worker() for _ in range(2)]
    await harness.deploy(harness.make_spec())
    for index, worker in enumerate(workers):
        worker.gate.clear()
        await harness.announce(worker, instance=f"echo-{index}")
    call = harness.infer()
    await harness.until(lambda: any(worker.requests for worker in workers))
    first, second = sorted(workers, key=lambda worker: not worker.requests)
    await first.kill()
    await second.wait_for_batches(1)
    await second.kill()
    error = await failure(call)
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    assert "the second for this request" in error.details()


async def test_a_draining_worker_passes_its_requests_on(harness) -> None:
    draining, other = await harness.worker(), await harness.worker()

    async def refuse(worker, request):
        return harness.failing(request, worker_pb.ERROR_KIND_DRAINING)

    draining.behaviour = refuse
    await harness.deploy(harness.make_spec())
    await harness.announce(draining)
    call = harness.infer()
    await draining.wait_for_batches(1)
    await harness.announce(other, instance="echo-1")
    await call
    await harness.infer()
    assert (len(draining.requests), len(other.requests)) == (1, 2)


async def test_a_retired_instance_finishes_what_it_has(harness) -> None:
    worker, other = await harness.worker(), await harness.worker()
    worker.gate.clear()
    await harness.deploy(harness.make_spec())
    await harness.announce(worker)
    first = harness.infer((1.0, 1.0))
    await worker.wait_for_batches(1)
    await harness.announce(worker, state=InstanceState.DRAINING)
    await harness.announce(other, instance="echo-1")
    await harness.infer((2.0, 2.0))
    worker.gate.set()
    await first
    await harness.bus.delete(instance_subject("echo", "echo-0"))
    await harness.until(lambda: list(harness.lane().routes) == ["echo-1"])
    assert (len(worker.requests), len(other.requests)) == (1, 1)


async def test_a_model_error_is_internal_with_its_message(harness) -> None:
    worker = await harness.worker()

    async def fail(_, request):
        return harness.failing(request, worker_pb.ERROR_KIND_MODEL, "ValueError: bad weights")

    worker.behaviour = fail
    await harness.deploy(harness.make_spec())
    await harness.announce(worker)
    error = await failure(harness.infer())
    assert error.code() is grpc.StatusCode.INTERNAL
    assert "ValueError: bad weights" in error.details()
    assert len(worker.requests) == 1


async def test_an_instance_started_for_smaller_batches_does_not_make_a_request_wrong(harness) -> None:
    worker = await harness.worker()

    async def fail(_, request):
        return harness.failing(request, worker_pb.ERROR_KIND_INPUT, "rows of the batch: expected at most 2, got 3")

    worker.behaviour = fail
    await harness.deploy(harness.make_spec(max_batch=2))
    await harness.announce(worker)
    await harness.connected("echo-0")
    await harness.functions.UpdateFunction(gateway_pb2.UpdateFunctionRequest(name="echo", max_batch=4))
    error = await failure(harness.infer((1.0, 2.0), (3.0, 4.0), (5.0, 6.0)))
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    assert "instance 'echo-0' takes 2 rows until it is replaced, got 3" in error.details()


async def test_an_undecodable_input_is_the_caller_s_fault(harness) -> None:
    worker = await harness.worker()

    async def fail(_, request):
        return harness.failing(request, worker_pb.ERROR_KIND_INPUT, "not UTF-8")

    worker.behaviour = fail
    await harness.deploy(harness.make_spec())
    await harness.announce(worker)
    error = await failure(harness.infer())
    assert (error.code(), error.details()) == (grpc.StatusCode.INVALID_ARGUMENT, "not UTF-8")


async def test_one_poisonous_request_does_not_fail_the_others_of_its_batch(harness) -> None:
    worker = await harness.worker()

    async def poisoned(_, request):
        values = [struct.unpack_from("<f", item.inputs[0].raw)[0] for item in request.items]
        if 13.0 in values:
            return harness.failing(request, worker_pb.ERROR_KIND_MODEL, "unlucky")
        return harness.echo(request)

    worker.behaviour = poisoned
    await harness.deploy(harness.make_spec())
    calls = []
    for value in (1.0, 13.0, 2.0):
        calls.append(harness.infer((value, 0.0)))
        await harness.until(lambda: harness.lane().queued_count == len(calls))
    await harness.announce(worker)
    good, bad, good2 = await asyncio.gather(*calls, return_exceptions=True)
    assert good.raw_output_contents[0] == harness.floats(1, 0)
    assert good2.raw_output_contents[0] == harness.floats(2, 0)
    assert bad.code() is grpc.StatusCode.INTERNAL
    assert "unlucky" in bad.details()
    assert first_values(worker) == [[1.0, 13.0, 2.0], [1.0], [13.0], [2.0]]


async def test_a_hung_handler_is_named_and_its_batch_is_not_tried_again(harness) -> None:
    worker, other = await harness.worker(), await harness.worker()

    async def hang(_, request):
        return harness.failing(request, worker_pb.ERROR_KIND_HUNG, "in line 3")

    worker.behaviour = other.behaviour = hang
    await harness.deploy(harness.make_spec(execution_timeout_ms=700))
    await harness.announce(worker)
    await harness.announce(other, instance="echo-1")
    error = await failure(harness.infer())
    assert error.code() is grpc.StatusCode.INTERNAL
    assert "handler held the device longer than 700 ms" in error.details()
    assert len(worker.requests) + len(other.requests) == 1


async def test_a_batch_that_expired_at_the_worker_is_a_timeout(harness) -> None:
    worker = await harness.worker()

    async def expire(_, request):
        return harness.failing(request, worker_pb.ERROR_KIND_EXPIRED)

    worker.behaviour = expire
    await harness.deploy(harness.make_spec())
    await harness.announce(worker)
    error = await failure(harness.infer())
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    assert error.details() == "Request timeout expired: 20000 ms passed before 'echo-0' came to it"


@pytest.mark.parametrize("where", ["function", "parameter"])
async def test_a_request_s_own_timeout_ends_its_wait(harness, where: str) -> None:
    await harness.deploy(harness.make_spec(timeout_ms=50 if where == "function" else 20_000))
    request = harness.request((1.0, 2.0))
    if where == "parameter":
        request.parameters["timeout"].int64_param = 50_000
    error = await failure(harness.inference.ModelInfer(request, timeout=20))
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    assert error.details() == "Request timeout expired: 50 ms passed while 'echo' had no instance"
    assert harness.lane().queued_count == 0


async def test_a_request_that_waited_for_an_instance_in_vain_says_what_became_of_it(harness) -> None:
    worker = await harness.worker()
    await harness.deploy(harness.make_spec(timeout_ms=50))
    await harness.announce(worker, state=InstanceState.FAILED, reason="loading 'handler.py' failed: no weights")
    error = await failure(harness.infer())
    assert error.details() == (
        "Request timeout expired: 50 ms passed while no instance of 'echo' was ready: "
        "echo-0 failed (loading 'handler.py' failed: no weights)"
    )


async def test_a_caller_s_deadline_or_leaving_takes_its_request_out_of_the_line(harness) -> None:
    await harness.deploy(harness.make_spec())
    error = await failure(harness.infer(timeout=0.1))
    assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await harness.until(lambda: harness.lane().queued_count == 0)
    call = harness.infer()
    await harness.until(lambda: harness.lane().queued_count == 1)
    call.cancel()
    await harness.until(lambda: harness.lane().queued_count == 0)
    await harness.until(lambda: harness.lane().meter.failed_count == 2)


async def test_what_waits_is_bounded_in_bytes_too(harness) -> None:
    await harness.deploy(harness.make_spec())
    lane = harness.lane()
    lane._settings = dataclasses.replace(lane._settings, max_queue_bytes=20)
    waiting = [harness.infer((1.0, 2.0), (3.0, 4.0), (5.0, 6.0))]
    await harness.until(lambda: lane.queued_count == 1)
    error = await failure(harness.infer())
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    assert "requests of 24 bytes wait, of 20 that may, and this one has 8" in error.details()
    waiting[0].cancel()
    await harness.until(lambda: lane.queued_count == 0)
    waiting += [harness.infer(), harness.infer()]
    await harness.until(lambda: lane.queued_count == 2)
    await harness.announce(await harness.worker())
    await asyncio.gather(*waiting[1:])
    assert lane._queued_bytes == 0


async def test_a_full_queue_refuses(harness) -> None:
    await harness.deploy(harness.make_spec(max_queue=1))
    waiting = harness.infer()
    await harness.until(lambda: harness.lane().queued_count == 1)
    error = await failure(harness.infer())
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    assert "Exceeds maximum queue size" in error.details()
    assert harness.lane().meter.refused_count == 1
    waiting.cancel()


async def test_what_can_t_be_answered_in_time_is_refused_with_a_hint(harness) -> None:
    worker = await harness.worker()
    await harness.deploy(harness.make_spec())
    await harness.table(2.0)
    await harness.announce(worker)
    await harness.connected("echo-0")
    error = await failure(harness.infer(timeout=1.0))
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    assert "retry after" in error.details()
    assert int(dict(error.trailing_metadata())["retry-after-ms"]) > 0
    assert not worker.requests


async def test_a_static_table_refuses_nobody(harness) -> None:
    worker = await harness.worker()
    await harness.deploy(harness.make_spec())
    await harness.table(50.0, basis="static")
    await harness.announce(worker)
    await harness.connected("echo-0")
    await harness.infer(timeout=10)
    assert len(worker.requests) == 1


async def test_an_unreachable_worker_is_tried_until_it_is_there(harness) -> None:
    worker = await harness.worker()
    address = worker.address
    await worker.kill()
    await harness.deploy(harness.make_spec())
    await harness.announce(worker)
    call = harness.infer()
    await harness.until(lambda: harness.lane().queued_count == 1)
    late = type(worker)()
    assert late.port != worker.port
    await late.start()
    harness.workers.append(late)
    await harness.announce(late)
    assert address != late.address
    await call


async def test_stopping_fails_what_waits_and_finishes_what_runs(harness) -> None:
    worker = await harness.worker()
    worker.gate.clear()
    await harness.deploy(harness.make_spec())
    await harness.deploy(harness.make_spec("cold"))
    await harness.announce(worker)
    running = harness.infer()
    await worker.wait_for_batches(1)
    waiting = harness.infer(name="cold")
    await harness.until(lambda: harness.lane("cold").queued_count == 1)
    harness.stop.set()
    error = await failure(waiting)
    assert (error.code(), error.details()) == (grpc.StatusCode.UNAVAILABLE, "the gateway stops")
    worker.gate.set()
    assert (await running).raw_output_contents
    await harness.main


async def test_demand_counts_what_happened(harness) -> None:
    worker = await harness.worker()
    await harness.deploy(harness.make_spec())
    await harness.announce(worker)
    async with harness.bus.subscribe("demand.echo.*") as messages:
        for _ in range(3):
            await harness.infer()
        async with asyncio.timeout(20):
            async for message in messages:
                event = wire.decode_demand(message.payload)
                if event.ok_count == 3:
                    break
    assert (event.arrived_count, event.failed_count, event.refused_count, event.window_count) == (3, 0, 0, 3)
    assert event.p50_ms is not None
    assert event.p50_ms <= event.p99_ms
    assert (event.queued_count, event.in_flight_count, event.oldest_wait_ms) == (0, 0, 0)


async def test_demand_counts_the_items_of_requests_in_line_and_of_refused_ones(harness) -> None:
    await harness.deploy(harness.make_spec(max_queue=2))
    rows = ((1.0, 2.0), (3.0, 4.0), (5.0, 6.0))
    async with harness.bus.subscribe("demand.echo.*") as messages:
        calls = [harness.infer(*rows), harness.infer(*rows[:2])]
        await harness.until(lambda: harness.lane().queued_count == 2)
        refused = await failure(harness.infer(*rows))
        assert "Exceeds maximum queue size" in refused.details()
        async with asyncio.timeout(20):
            async for message in messages:
                event = wire.decode_demand(message.payload)
                if event.refused_count:
                    break
        assert (event.arrived_count, event.arrived_items_count) == (3, 8)
        assert (event.queued_count, event.queued_items_count) == (2, 5)
        await harness.announce(await harness.worker())
        await asyncio.gather(*calls)


async def test_a_request_that_lost_its_worker_goes_before_later_ones(harness) -> None:
    dying = await harness.worker()
    dying.gate.clear()
    await harness.deploy(harness.make_spec())
    await harness.announce(dying)
    first = harness.inference.ModelInfer(harness.request((1.0, 0.0)))
    await dying.wait_for_batches(1)
    await harness.announce(dying, state=InstanceState.DRAINING)
    later = [harness.inference.ModelInfer(harness.request((value, 0.0))) for value in (2.0, 3.0)]
    await harness.until(lambda: harness.lane().queued_count == 2)
    await dying.kill()
    await harness.until(lambda: harness.lane().queued_count == 3)
    worker = await harness.worker()
    await harness.announce(worker, instance="echo-1")
    await asyncio.gather(first, *later)
    assert first_values(worker)[0][0] == 1.0


async def test_requests_too_large_for_one_message_are_split_over_batches(harness) -> None:
    worker = await harness.worker()
    await harness.deploy(harness.make_spec())
    harness.lane()._settings = dataclasses.replace(harness.lane()._settings, max_batch_bytes=17)
    calls = [harness.infer((float(value), 0.0)) for value in range(4)]
    await harness.until(lambda: harness.lane().queued_count == 4)
    await harness.announce(worker)
    await asyncio.gather(*calls)
    assert [len(request.items) for request in worker.requests] == [2, 2]


async def test_a_larger_batch_limit_waits_for_instances_that_know_it(harness) -> None:
    worker = await harness.worker()
    await harness.deploy(harness.make_spec(max_batch=2))
    await harness.announce(worker)
    await harness.connected("echo-0")
    worker.gate.clear()
    blockers = [harness.infer() for _ in range(2)]
    await harness.until(lambda: harness.lane().in_flight_count == 2)
    await harness.functions.UpdateFunction(gateway_pb2.UpdateFunctionRequest(name="echo", max_batch=4))
    calls = [harness.infer((float(value), 0.0)) for value in range(4)]
    await harness.until(lambda: harness.lane().queued_count == 4)
    worker.gate.set()
    await asyncio.gather(*blockers, *calls)
    assert max(len(request.items) for request in worker.requests) == 2
