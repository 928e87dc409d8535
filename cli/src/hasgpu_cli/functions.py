"""Deploying functions and reading them back."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import TYPE_CHECKING, Any

from hasgpu_core.errors import DeadlineError, HasgpuError, ModelError, UnavailableError

from hasgpu_cli.client import CALL_TIMEOUT_S, Target
from hasgpu_cli.home import NotUpError
from hasgpu_cli.proto_json import to_plain
from hasgpu_cli.spec import Deployment

if TYPE_CHECKING:
    from hasgpu.gateway.v1 import gateway_pb2

CHUNK_BYTES = 1 << 20
UPLOAD_TIMEOUT_S = 600.0
POLL_S = 0.3
PATIENCE_AWAY_S = 20.0
SERVING_CONDITIONS = ("ready", "scaled to zero", "standing by")
PATIENCE_FAILED_S = 8.0
"""Instances are tried again by themselves; after this long without one that loads, waiting ends with the reason."""
PATIENCE_FAILURES_COUNT = 4
"""The same, where loading takes so long that there is hardly a moment in which all have failed."""


async def deploy(target: Target, deployment: Deployment, *, replace: bool) -> dict[str, Any]:
    """Sends the spec and the artifact; returns the function's status. Raises AlreadyExistsError without `replace`."""
    from hasgpu.gateway.v1 import gateway_pb2, gateway_pb2_grpc
    from hasgpu_runtime.wire import spec_to_proto

    async def parts() -> AsyncIterator[gateway_pb2.DeployFunctionRequest]:
        header = gateway_pb2.DeployHeader(spec=spec_to_proto(deployment.spec), replace=replace)
        yield gateway_pb2.DeployFunctionRequest(header=header)
        for at in range(0, len(deployment.archive), CHUNK_BYTES):
            yield gateway_pb2.DeployFunctionRequest(chunk=deployment.archive[at : at + CHUNK_BYTES])

    async with target.channel("gateway") as channel:
        stub = gateway_pb2_grpc.FunctionServiceStub(channel)
        answer = await stub.DeployFunction(parts(), timeout=UPLOAD_TIMEOUT_S)
    return to_plain(answer.function)


async def get_function(target: Target, name: str) -> dict[str, Any]:
    """Returns a function's status; raises NotFoundError."""
    from hasgpu.gateway.v1 import gateway_pb2, gateway_pb2_grpc

    async with target.channel("gateway") as channel:
        stub = gateway_pb2_grpc.FunctionServiceStub(channel)
        answer = await stub.GetFunction(gateway_pb2.GetFunctionRequest(name=name), timeout=CALL_TIMEOUT_S)
    return to_plain(answer.function)


async def update_function(target: Target, name: str, **changes: Any) -> dict[str, Any]:
    """Changes the objective, bounds or limits of a function; returns its status."""
    from hasgpu.gateway.v1 import gateway_pb2, gateway_pb2_grpc

    async with target.channel("gateway") as channel:
        stub = gateway_pb2_grpc.FunctionServiceStub(channel)
        request = gateway_pb2.UpdateFunctionRequest(name=name, **changes)
        answer = await stub.UpdateFunction(request, timeout=CALL_TIMEOUT_S)
    return to_plain(answer.function)


async def delete_function(target: Target, name: str) -> None:
    """Deletes a function; raises NotFoundError."""
    from hasgpu.gateway.v1 import gateway_pb2, gateway_pb2_grpc

    async with target.channel("gateway") as channel:
        stub = gateway_pb2_grpc.FunctionServiceStub(channel)
        await stub.DeleteFunction(gateway_pb2.DeleteFunctionRequest(name=name), timeout=CALL_TIMEOUT_S)


async def profiling_progress(target: Target) -> dict[str, str]:
    """Functions whose profile runs or waits, with how far it is."""
    from hasgpu.rapp.v1 import rapp_pb2, rapp_pb2_grpc

    async with target.channel("rapp") as channel:
        stub = rapp_pb2_grpc.RappServiceStub(channel)
        answer = await stub.Describe(rapp_pb2.DescribeRequest(), timeout=CALL_TIMEOUT_S)
    return dict(answer.profiling)


async def surface(target: Target, function: str, device_model: str) -> dict[str, Any]:
    """The whole predicted grid of a function on a device model."""
    from hasgpu.rapp.v1 import rapp_pb2, rapp_pb2_grpc

    async with target.channel("rapp") as channel:
        stub = rapp_pb2_grpc.RappServiceStub(channel)
        request = rapp_pb2.PredictSurfaceRequest(function=function, device_model=device_model)
        return to_plain(await stub.PredictSurface(request, timeout=CALL_TIMEOUT_S))


async def wait_until_ready(
    target: Target,
    name: str,
    *,
    within_s: float,
    profiled: bool = False,
    on_progress: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Waits until a function is ready (or scaled to zero, which serves too) and, if asked, until it is profiled.

    A gateway that is away for a while (it is started again) is waited for.

    Raises:
        ModelError: Its instances fail; with the reason.
        DeadlineError: It takes longer than the bound; says what it was waiting for.
    """
    async with target.session():
        until_s = time.monotonic() + within_s
        failures = _Failures()
        answered_s = time.monotonic()
        while True:
            now_s = time.monotonic()
            try:
                function = await get_function(target, name)
            except UnavailableError:
                if now_s - answered_s > PATIENCE_AWAY_S:
                    raise
                await asyncio.sleep(POLL_S)
                continue
            answered_s = now_s
            text = await _progress(target, name, function)
            on_progress(text)
            if _is_ready(name, function, profiled=profiled):
                return function
            if reason := failures.hopeless(function["instances"], now_s):
                raise ModelError(f"{name} does not start: {reason}")
            if now_s > until_s:
                raise DeadlineError(f"{name} is not ready after {within_s:.0f} s: {text}")
            await asyncio.sleep(POLL_S)


class _Failures:
    """Tells instances that will not start from those that take a while."""

    def __init__(self) -> None:
        self._since_s: float | None = None
        self._count = 0
        self._failed: set[str] = set()

    def hopeless(self, instances: Sequence[dict[str, Any]], now_s: float) -> str:
        """Takes what the instances are now; returns why none will start, empty while one still may."""
        failed = {item["instance"]: item["reason"] for item in instances if item["state"] == "failed"}
        if any(item["state"] == "ready" for item in instances):
            self._count = 0
        self._count += len(failed.keys() - self._failed)
        self._failed = set(failed)
        self._since_s = (self._since_s or now_s) if failed and len(failed) == len(instances) else None
        lasting = self._since_s is not None and now_s - self._since_s > PATIENCE_FAILED_S
        if failed and (lasting or self._count >= PATIENCE_FAILURES_COUNT):
            return str(next(iter(failed.values())))
        return ""


def _is_ready(name: str, function: dict[str, Any], *, profiled: bool) -> bool:
    capacity = function["capacity"]
    has_profile = capacity is not None and capacity["basis"] in ("profiled", "transferred")
    if has_profile and capacity["infeasible_reason"]:
        raise ModelError(f"{name}: no configuration meets its objective: {capacity['infeasible_reason']}")
    return function["condition"].startswith(SERVING_CONDITIONS) and (has_profile or not profiled)


async def _progress(target: Target, name: str, function: dict[str, Any]) -> str:
    try:
        profiling = (await profiling_progress(target)).get(name, "")
    except NotUpError:
        profiling = ""  # only the gateway's address is known
    except HasgpuError as error:
        profiling = f"unknown ({error})"
    instances = ", ".join(
        f"{instance['instance']} {instance['state']}{' (' + instance['reason'] + ')' if instance['reason'] else ''}"
        for instance in function["instances"]
    )
    parts = [function["condition"], instances, f"profiling: {profiling}" if profiling else ""]
    return "; ".join(part for part in parts if part)
