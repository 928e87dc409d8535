"""Deploying, changing, watching and deleting functions; the store is the truth."""

from __future__ import annotations

import asyncio
import hashlib

import grpc
import grpc.aio
import pytest
from hasgpu.gateway.v1 import gateway_pb2 as pb
from hasgpu.inference.v2 import inference_pb2
from hasgpu_core.errors import UnavailableError
from hasgpu_core.events import FunctionEvent, function_subject
from hasgpu_core.function import Artifact
from hasgpu_core.resources import InstanceState
from hasgpu_gateway.registry import KEY_PREFIX
from hasgpu_runtime import wire


async def failure(call) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value


async def test_a_deployed_function_is_stored_announced_and_served_at_once(harness) -> None:
    status = await harness.deploy(harness.make_spec())
    assert (status.spec.name, status.revision, status.condition) == ("echo", 1, "scaled to zero")
    stored = wire.decode_function((await harness.store.get("hasgpu:function:echo")).value)
    assert stored.spec == harness.make_spec()
    assert await harness.bus.get_artifact(stored.spec.artifact.sha256) == b"the model's files"
    ready = await harness.inference.ModelReady(inference_pb2.ModelReadyRequest(name="echo"))
    assert ready.ready
    metadata = await harness.inference.ModelMetadata(inference_pb2.ModelMetadataRequest(name="echo", version="1"))
    assert list(metadata.versions) == ["1"]


async def test_a_name_is_taken_once_unless_replaced(harness) -> None:
    await harness.deploy(harness.make_spec())
    error = await failure(harness.deploy(harness.make_spec()))
    assert error.code() is grpc.StatusCode.ALREADY_EXISTS
    status = await harness.deploy(harness.make_spec(artifact=b"new"), b"new", replace=True)
    assert status.revision == 2
    with pytest.raises(Exception, match="not found"):
        await harness.bus.get_artifact(harness.make_spec().artifact.sha256)


async def test_the_same_artifact_serves_two_functions_and_outlives_one(harness) -> None:
    await harness.deploy(harness.make_spec("one"))
    await harness.deploy(harness.make_spec("two"))
    await harness.functions.DeleteFunction(pb.DeleteFunctionRequest(name="one"))
    assert await harness.bus.get_artifact(harness.make_spec().artifact.sha256)


async def test_a_wrong_digest_is_refused_and_leaves_nothing(harness) -> None:
    spec = harness.make_spec()
    error = await failure(harness.deploy(spec, b"the model's fileZ"))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    got = hashlib.sha256(b"the model's fileZ").hexdigest()
    assert error.details() == f"the artifact's sha256 is {got}, but {spec.artifact.sha256} was declared"
    assert await harness.store.list("hasgpu:function:") == {}


@pytest.mark.parametrize(
    ("artifact", "declared", "message"),
    [
        (b"short", 17, "artifact: expected 17 bytes as declared, got 5 bytes"),
        (b"x" * 30, 17, "artifact: expected 17 bytes as declared, got 21 or more"),
        (b"x", 2000, "artifact.size_bytes: expected at most 1000, got 2000"),
    ],
)
async def test_sizes_are_bounded_as_declared(harness, artifact: bytes, declared: int, message: str) -> None:
    spec = harness.make_spec(artifact=Artifact("0" * 64, declared))
    error = await failure(harness.deploy(spec, artifact))
    assert (error.code(), error.details()) == (grpc.StatusCode.INVALID_ARGUMENT, message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"slo_ms": 0}, "slo_ms: expected 1..600000, got 0"),
        ({"name": "Not A Name"}, "name: expected 1 to 63"),
        ({"min_instances": 9}, "min_instances: expected at most max_instances (8), got 9"),
    ],
)
async def test_a_bad_spec_is_refused_before_its_artifact(harness, changes, message: str) -> None:
    error = await failure(harness.deploy(harness.make_spec(**changes)))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert message in error.details()


async def test_a_deploy_must_begin_with_its_header(harness) -> None:
    call = harness.functions.DeployFunction(iter([pb.DeployFunctionRequest(chunk=b"x")]))
    assert (await failure(call)).details() == "first message: expected the header, got a chunk"


async def test_an_update_changes_numbers_and_keeps_the_artifact(harness) -> None:
    await harness.deploy(harness.make_spec())
    response = await harness.functions.UpdateFunction(pb.UpdateFunctionRequest(name="echo", slo_ms=77, if_revision=1))
    assert (response.function.revision, response.function.spec.slo_ms) == (2, 77)
    assert response.function.spec.artifact.sha256 == harness.make_spec().artifact.sha256
    assert harness.lane().event.spec.slo_ms == 77

    stale = await failure(
        harness.functions.UpdateFunction(pb.UpdateFunctionRequest(name="echo", slo_ms=5, if_revision=1))
    )
    assert stale.code() is grpc.StatusCode.ABORTED
    bad = await failure(harness.functions.UpdateFunction(pb.UpdateFunctionRequest(name="echo", max_batch=0)))
    assert (bad.code(), bad.details()) == (grpc.StatusCode.INVALID_ARGUMENT, "max_batch: expected 1..1024, got 0")
    unknown = await failure(harness.functions.UpdateFunction(pb.UpdateFunctionRequest(name="nobody", slo_ms=5)))
    assert unknown.code() is grpc.StatusCode.NOT_FOUND
    empty = await failure(harness.functions.UpdateFunction(pb.UpdateFunctionRequest(name="echo")))
    assert empty.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_smaller_queue_bound_keeps_what_waits(harness) -> None:
    await harness.deploy(harness.make_spec())
    calls = [harness.infer() for _ in range(3)]
    await harness.until(lambda: harness.lane().queued_count == 3)
    await harness.functions.UpdateFunction(pb.UpdateFunctionRequest(name="echo", max_queue=1))
    assert harness.lane().queued_count == 3
    worker = await harness.worker()
    await harness.announce(worker)
    await asyncio.gather(*calls)


async def test_deleting_fails_what_waits_and_forgets_everything(harness) -> None:
    await harness.deploy(harness.make_spec())
    waiting = harness.infer()
    await harness.until(lambda: harness.lane().queued_count == 1)
    await harness.functions.DeleteFunction(pb.DeleteFunctionRequest(name="echo"))
    error = await failure(waiting)
    assert (error.code(), error.details()) == (
        grpc.StatusCode.NOT_FOUND,
        "Request for unknown model: 'echo' is not found",
    )
    assert await harness.store.get("hasgpu:function:echo") is None
    again = await failure(harness.functions.DeleteFunction(pb.DeleteFunctionRequest(name="echo")))
    assert again.code() is grpc.StatusCode.NOT_FOUND
    ready = await failure(harness.inference.ModelReady(inference_pb2.ModelReadyRequest(name="echo")))
    assert ready.code() is grpc.StatusCode.NOT_FOUND
    assert (await harness.deploy(harness.make_spec())).revision == 2, "a revision never comes twice"


async def test_new_code_gets_no_request_on_an_old_instance(harness) -> None:
    old, new = await harness.worker(), await harness.worker()
    await harness.deploy(harness.make_spec())
    await harness.announce(old)
    await harness.infer()
    await harness.deploy(harness.make_spec(artifact=b"new"), b"new", replace=True)
    call = harness.infer()
    await harness.until(lambda: harness.lane().queued_count == 1)
    await harness.announce(new, instance="echo-1", function_revision=2)
    assert (await call).model_version == "2"
    assert (len(old.requests), len(new.requests)) == (1, 1)


async def test_a_watch_tells_the_state_then_each_change(harness) -> None:
    await harness.deploy(harness.make_spec())
    watch = harness.functions.WatchFunctions(pb.WatchFunctionsRequest())
    first = await watch.read()
    assert (first.function.spec.name, first.function.condition) == ("echo", "scaled to zero")
    worker = await harness.worker()
    await harness.announce(worker, state=InstanceState.LOADING, address="")
    loading = await watch.read()
    assert loading.function.condition == "starting: echo-0 is loading its model"
    await harness.announce(worker)
    ready = await watch.read()
    assert (ready.function.condition, ready.function.instances[0].address) == ("ready", worker.address)
    await harness.functions.DeleteFunction(pb.DeleteFunctionRequest(name="echo"))
    gone = await watch.read()
    assert (gone.deleted, gone.function.spec.name) == (True, "echo")
    watch.cancel()
    unknown = harness.functions.WatchFunctions(pb.WatchFunctionsRequest(name="nobody"))
    assert (await failure(unknown.read())).code() is grpc.StatusCode.NOT_FOUND


async def test_the_condition_names_failures_and_objectives_that_can_t_be_met(harness) -> None:
    await harness.deploy(harness.make_spec(min_instances=1))
    get = pb.GetFunctionRequest(name="echo")
    assert (await harness.functions.GetFunction(get)).function.condition.startswith("starting: waiting")
    worker = await harness.worker()
    await harness.announce(worker, state=InstanceState.FAILED, reason="no module named x", address="")
    await harness.table(0.5, infeasible_reason="the fastest configuration takes 500 ms")
    status = (await harness.functions.GetFunction(get)).function
    assert status.condition == (
        "failing: echo-0: no module named x; its objective of 200 ms can't be met: "
        "the fastest configuration takes 500 ms"
    )
    assert (status.capacity.device_model, status.capacity.best_millirps) == ("cpu-2c", 10_000)
    listed = await harness.functions.ListFunctions(pb.ListFunctionsRequest())
    assert [function.spec.name for function in listed.functions] == ["echo"]


async def test_what_the_store_holds_is_announced_again_and_what_it_lacks_is_taken_back(harness) -> None:
    kept = FunctionEvent(harness.make_spec("kept"), 4, 0)
    await harness.store.compare_and_set(KEY_PREFIX + "kept", wire.encode(kept), expected_revision=0)
    stray = FunctionEvent(harness.make_spec("stray"), 9, 0)
    await harness.bus.put(function_subject("stray"), wire.encode(stray))
    await harness.until(lambda: "stray" in harness.gateway.directory.functions)
    await harness.gateway.registry.reconcile()
    await harness.until(lambda: list(harness.gateway.directory.functions) == ["kept"])
    assert harness.gateway.directory.functions["kept"] == kept


async def test_another_gateway_s_function_is_served_here(harness) -> None:
    event = FunctionEvent(harness.make_spec(), 3, 0)
    await harness.bus.put(function_subject("echo"), wire.encode(event))
    worker = await harness.worker()
    await harness.announce(worker, function_revision=3)
    await harness.until(lambda: "echo" in harness.gateway.directory.functions)
    assert (await harness.infer()).model_version == "3"


async def test_without_the_store_serving_goes_on_and_deploying_says_so(harness) -> None:
    worker = await harness.worker()
    await harness.deploy(harness.make_spec())
    await harness.announce(worker)
    harness.store.go_away()
    await harness.infer()
    error = await failure(harness.deploy(harness.make_spec("other")))
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    harness.store.come_back()
    await harness.deploy(harness.make_spec("other"))


async def test_without_the_bus_serving_goes_on_and_a_change_is_announced_on_its_return(harness) -> None:
    worker = await harness.worker()
    await harness.deploy(harness.make_spec())
    await harness.announce(worker)
    await harness.infer()
    harness.bus.go_away()
    await harness.infer()
    error = await failure(harness.functions.UpdateFunction(pb.UpdateFunctionRequest(name="echo", slo_ms=99)))
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    assert "stored as revision 2" in error.details()
    harness.bus.come_back()
    await harness.until(lambda: harness.gateway.directory.functions["echo"].spec.slo_ms == 99)


async def test_health_and_reflection(harness) -> None:
    from grpc_health.v1 import health_pb2, health_pb2_grpc
    from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

    health = health_pb2_grpc.HealthStub(harness.channel)
    answer = await health.Check(health_pb2.HealthCheckRequest())
    assert answer.status == health_pb2.HealthCheckResponse.SERVING
    assert (await harness.inference.ServerLive(inference_pb2.ServerLiveRequest())).live
    assert (await harness.inference.ServerReady(inference_pb2.ServerReadyRequest())).ready
    assert (await harness.inference.ServerMetadata(inference_pb2.ServerMetadataRequest())).name == "hasgpu"
    stub = reflection_pb2_grpc.ServerReflectionStub(harness.channel)
    call = stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
    services = {service.name for service in (await call.read()).list_services_response.service}
    assert {"inference.GRPCInferenceService", "hasgpu.gateway.v1.FunctionService"} <= services


async def test_two_writers_that_race_both_get_through(harness) -> None:
    await harness.deploy(harness.make_spec())
    answers = await asyncio.gather(
        *(harness.functions.UpdateFunction(pb.UpdateFunctionRequest(name="echo", slo_ms=n)) for n in range(100, 104))
    )
    revisions = sorted(answer.function.revision for answer in answers)
    assert revisions == [2, 3, 4, 5]


async def test_a_registry_without_a_bus_leaves_no_half_deployed_function(harness) -> None:
    harness.bus.go_away()
    with pytest.raises(UnavailableError):
        await harness.gateway.registry.deploy(harness.make_spec(), b"the model's files", replace_existing=False)
    assert await harness.store.list(KEY_PREFIX) == {}
    harness.bus.come_back()
