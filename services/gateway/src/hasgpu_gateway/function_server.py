"""`hasgpu.gateway.v1.FunctionService`: deploying, changing and watching functions."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from typing import Any

import grpc.aio
from hasgpu.gateway.v1 import gateway_pb2 as pb
from hasgpu.gateway.v1.gateway_pb2_grpc import FunctionServiceServicer
from hasgpu_core.errors import IntegrityError, InvalidError, NotFoundError, UnavailableError
from hasgpu_core.events import FunctionEvent
from hasgpu_core.function import FunctionSpec
from hasgpu_core.ports import Clock
from hasgpu_runtime import wire

from hasgpu_gateway.directory import Directory
from hasgpu_gateway.lanes import Lanes
from hasgpu_gateway.registry import Registry, with_changes
from hasgpu_gateway.status import function_status

_Context = grpc.aio.ServicerContext[Any, Any]

UPDATABLE = (
    "slo_ms",
    "slo_permille",
    "timeout_ms",
    "max_batch",
    "min_instances",
    "max_instances",
    "standby",
    "max_queue",
    "advisory",
)


class FunctionServer(FunctionServiceServicer):
    """Answers the registry's calls; the registry writes, the directory tells what is."""

    def __init__(
        self, registry: Registry, directory: Directory, lanes: Lanes, clock: Clock, *, max_artifact_bytes: int
    ) -> None:
        self._registry = registry
        self._directory = directory
        self._lanes = lanes
        self._clock = clock
        self._max_artifact_bytes = max_artifact_bytes
        self._stopping = asyncio.Event()

    def stop(self) -> None:
        """Ends the watches that are open."""
        self._stopping.set()

    async def DeployFunction(
        self, request_iterator: AsyncIterator[pb.DeployFunctionRequest], context: _Context
    ) -> pb.DeployFunctionResponse:
        """Takes the header, then the artifact in chunks; see `Registry.deploy` for the errors."""
        spec, replace = await self._read_header(request_iterator)
        artifact = await self._read_artifact(request_iterator, spec)
        event = await self._registry.deploy(spec, artifact, replace_existing=replace)
        return pb.DeployFunctionResponse(function=self._status(event))

    async def GetFunction(self, request: pb.GetFunctionRequest, context: _Context) -> pb.GetFunctionResponse:
        """Returns one function's state."""
        return pb.GetFunctionResponse(function=self._status(self._find(request.name)))

    async def ListFunctions(self, request: pb.ListFunctionsRequest, context: _Context) -> pb.ListFunctionsResponse:
        """Returns every function's state, by name."""
        self._check_known()
        events = self._directory.functions
        return pb.ListFunctionsResponse(functions=[self._status(events[name]) for name in sorted(events)])

    async def UpdateFunction(self, request: pb.UpdateFunctionRequest, context: _Context) -> pb.UpdateFunctionResponse:
        """Changes some numbers of a function."""
        changes = {field: int(getattr(request, field)) for field in UPDATABLE if request.HasField(field)}  # type: ignore[arg-type]  # the names above are the message's
        if not changes:
            raise InvalidError("update", expected=f"at least one of {', '.join(UPDATABLE)}", got="none")
        event = await self._registry.update(
            request.name, lambda spec: with_changes(spec, changes), if_revision=request.if_revision
        )
        return pb.UpdateFunctionResponse(function=self._status(event))

    async def DeleteFunction(self, request: pb.DeleteFunctionRequest, context: _Context) -> pb.DeleteFunctionResponse:
        """Deletes a function; its requests in line fail with NOT_FOUND."""
        await self._registry.delete(request.name)
        return pb.DeleteFunctionResponse()

    async def WatchFunctions(
        self, request: pb.WatchFunctionsRequest, context: _Context
    ) -> AsyncIterator[pb.WatchFunctionsResponse]:
        """Yields the present state, then each change; changes that come faster than the reader reads are merged."""
        self._check_known()
        if request.name:
            self._find(request.name)
        dirty: dict[str, None] = dict.fromkeys([request.name] if request.name else sorted(self._directory.functions))
        told: set[str] = set()
        wake = asyncio.Event()

        def changed(name: str) -> None:
            if request.name in ("", name):
                dirty[name] = None
                wake.set()

        self._directory.listen(changed)
        try:
            while True:
                while dirty:
                    name = next(iter(dirty))
                    del dirty[name]
                    event = self._directory.functions.get(name)
                    if event is not None:
                        told.add(name)
                        yield pb.WatchFunctionsResponse(function=self._status(event))
                    elif name in told:
                        told.discard(name)
                        response = pb.WatchFunctionsResponse(deleted=True)
                        response.function.spec.name = name
                        yield response
                wake.clear()
                await self._wait(wake)
        finally:
            self._directory.unlisten(changed)

    async def _wait(self, wake: asyncio.Event) -> None:
        """Waits for a change; raises UnavailableError when the gateway stops."""
        waits = [asyncio.ensure_future(event.wait()) for event in (wake, self._stopping)]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
        if self._stopping.is_set():
            raise UnavailableError("the gateway stops")

    async def _read_header(self, requests: AsyncIterator[pb.DeployFunctionRequest]) -> tuple[FunctionSpec, bool]:
        """Returns the checked spec and whether it may replace another."""
        first = await anext(aiter(requests), None)
        if first is None or first.WhichOneof("part") != "header":
            raise InvalidError("first message", expected="the header", got="a chunk" if first else "nothing")
        spec = wire.spec_from_proto(first.header.spec)
        if spec.artifact.size_bytes > self._max_artifact_bytes:
            raise InvalidError(
                "artifact.size_bytes", expected=f"at most {self._max_artifact_bytes}", got=str(spec.artifact.size_bytes)
            )
        await self._registry.check_deployable(spec, replace_existing=first.header.replace)
        return spec, first.header.replace

    async def _read_artifact(self, requests: AsyncIterator[pb.DeployFunctionRequest], spec: FunctionSpec) -> bytes:
        """Returns the artifact, of the size and digest declared; hashed as it comes, so that serving is not held up."""
        chunks: list[bytes] = []
        size_bytes = 0
        digest = hashlib.sha256()
        async for message in requests:
            if message.WhichOneof("part") != "chunk":
                raise InvalidError("message after the header", expected="a chunk", got=str(message.WhichOneof("part")))
            chunk = message.chunk
            size_bytes += len(chunk)
            if size_bytes > spec.artifact.size_bytes:
                raise InvalidError(
                    "artifact", expected=f"{spec.artifact.size_bytes} bytes as declared", got=f"{size_bytes} or more"
                )
            digest.update(chunk)
            chunks.append(chunk)
        if size_bytes != spec.artifact.size_bytes:
            raise InvalidError(
                "artifact", expected=f"{spec.artifact.size_bytes} bytes as declared", got=f"{size_bytes} bytes"
            )
        if digest.hexdigest() != spec.artifact.sha256:
            raise IntegrityError(expected_sha256=spec.artifact.sha256, got_sha256=digest.hexdigest())
        return b"".join(chunks)

    def _check_known(self) -> None:
        if not self._directory.caught_up:
            raise UnavailableError("the gateway is starting and does not know its functions yet", retry_after_s=0.5)

    def _find(self, name: str) -> FunctionEvent:
        self._check_known()
        event = self._directory.functions.get(name)
        if event is None:
            raise NotFoundError("function", name)
        return event

    def _status(self, event: FunctionEvent) -> pb.FunctionStatus:
        name = event.spec.name
        lane = self._lanes.find(name)
        return function_status(
            event,
            self._directory.instances(name),
            self._directory.tables(name),
            queued_count=lane.queued_count if lane else 0,
            now_unix_ns=self._clock.unix_ns(),
        )
