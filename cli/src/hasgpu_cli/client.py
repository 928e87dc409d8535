"""Talking to the services: where they are, and errors that a user can act on."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from hasgpu_core.errors import HasgpuError, InvalidError, UnavailableError

from hasgpu_cli.home import Home, NotUpError, RunRecord, read_run_record

if TYPE_CHECKING:
    import grpc.aio

SERVICES = ("gateway", "scaler", "scheduler", "rapp")
CALL_TIMEOUT_S = 10.0
CONNECT_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class Target:
    """Which system a command talks to."""

    home: Home
    overrides: dict[str, str]
    """Addresses given by option; the environment (HASGPU_GATEWAY, ...) comes next, then the run file."""
    _kept: list[tuple[AsyncExitStack, dict[str, grpc.aio.Channel]]] = field(default_factory=list)
    """Of the session that is open, if any."""

    def address(self, service: str) -> str:
        """Returns host:port of a service; raises NotUpError when nothing names it."""
        named = self.overrides.get(service) or os.environ.get(f"HASGPU_{service.upper()}", "")
        if named:
            return named
        record = read_run_record(self.home)
        if record is None or not record.address(service):
            raise NotUpError(self.home)
        return record.address(service)

    def record(self) -> RunRecord:
        """Returns the run record; raises NotUpError."""
        record = read_run_record(self.home)
        if record is None:
            raise NotUpError(self.home)
        return record

    @asynccontextmanager
    async def session(self) -> AsyncIterator[None]:
        """Keeps the channels that are opened inside, so that many calls share them; an inner session is part of it."""
        if self._kept:
            yield
            return
        async with AsyncExitStack() as stack:
            self._kept.append((stack, {}))
            try:
                yield
            finally:
                self._kept.clear()

    @asynccontextmanager
    async def channel(self, service: str) -> AsyncIterator[grpc.aio.Channel]:
        """Gives a connected channel to a service; errors of calls inside come out as HasgpuError.

        Raises:
            NotUpError: Nothing says where the service is.
            UnavailableError: Nobody listens there, or it does not take the connection in CONNECT_TIMEOUT_S.
        """
        address = self.address(service)
        with readable_errors(service, address):
            if not self._kept:
                async with _connected(service, address) as channel:
                    yield channel
                return
            stack, channels = self._kept[0]
            if address not in channels:
                channels[address] = await stack.enter_async_context(_connected(service, address))
            yield channels[address]


@asynccontextmanager
async def _connected(service: str, address: str) -> AsyncIterator[grpc.aio.Channel]:
    """Opens a channel and waits until it stands; a refused connection is told at once, a busy server is waited for."""
    from hasgpu_runtime.rpc import open_channel

    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise InvalidError(f"the address of the {service}", expected="host:port", got=repr(address))
    try:
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            _, writer = await asyncio.open_connection(host.strip("[]"), int(port))
        writer.close()
    except (OSError, TimeoutError) as error:
        raise _unreachable(service, address) from error
    async with open_channel(address) as channel:
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                await channel.channel_ready()
        except TimeoutError as error:
            raise _unreachable(service, address) from error
        yield channel


@contextmanager
def readable_errors(service: str, address: str) -> Iterator[None]:
    """Turns gRPC errors into HasgpuError; a refused connection asks whether the system is up."""
    import grpc
    from hasgpu_runtime.rpc import from_rpc_error

    try:
        yield
    except grpc.aio.AioRpcError as error:
        raise _translate(error, service, address, from_rpc_error(error)) from error


def _translate(error: grpc.aio.AioRpcError, service: str, address: str, plain: HasgpuError) -> HasgpuError:
    import grpc

    details = (error.details() or "").lower()
    unreachable = ("connection refused", "failed to connect", "connections to all backends failing", "name resolution")
    if error.code() is grpc.StatusCode.UNAVAILABLE and any(words in details for words in unreachable):
        return _unreachable(service, address)
    return plain


def _unreachable(service: str, address: str) -> UnavailableError:
    return UnavailableError(f"the {service} at {address} can't be reached: is hasgpu up? (`hasgpu up` starts it)")
