"""Commands from the work queue, pulled one at a time."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any

import nats.errors
import nats.js.api
import nats.js.errors
from hasgpu_core.ports import Clock, Command
from nats.aio.msg import Msg

from hasgpu_runtime.bus import nats_streams
from hasgpu_runtime.bus.nats_watch import own_headers

_log = logging.getLogger(__name__)

ACK_WAIT_S = 5.0
"""A command neither acknowledged nor given back for so long is delivered again."""
FETCH_S = 2.0
"""How long one pull waits at the server; also how soon a returned broker is asked again."""
_RETRY_S = 0.2


class CommandReader:
    """Iterates over the commands of a durable consumer; never ends by itself."""

    def __init__(
        self, js: Any, clock: Clock, pattern: str, consumer: str, wait_connected: Callable[[], Awaitable[None]]
    ) -> None:
        self._js = js
        self._clock = clock
        self._pattern = pattern
        self._consumer = consumer
        self._wait_connected = wait_connected
        self._subscription: Any = None

    def __aiter__(self) -> AsyncIterator[Command]:
        return self

    async def __anext__(self) -> Command:
        while True:
            await self._wait_connected()
            began_s = self._clock.now_s()
            try:
                if self._subscription is None:
                    self._subscription = await self._bind()
                (message,) = await self._subscription.fetch(1, timeout=FETCH_S)
            except TimeoutError:
                if self._clock.now_s() - began_s < FETCH_S / 2:
                    await self._begin_again("answered at once with nothing")
            except (nats.errors.Error, OSError) as error:
                await self._begin_again(repr(error))
            else:
                return NatsCommand(message)

    async def close(self) -> None:
        """Stops pulling; raises the NATS client's errors."""
        subscription, self._subscription = self._subscription, None
        if subscription is not None:
            await subscription.unsubscribe()

    async def _begin_again(self, why: str) -> None:
        _log.debug("consumer %s begins again: %s", self._consumer, why)
        try:
            await self.close()
            await nats_streams.ensure(self._js)
        except (nats.errors.Error, TimeoutError, OSError) as error:
            _log.debug("consumer %s: %r", self._consumer, error)
        await self._clock.sleep(_RETRY_S)

    async def _bind(self) -> Any:
        """Creates the consumer when it is missing (the same configuration again is no error) and binds to it."""
        api = nats.js.api
        await self._js.add_consumer(
            nats_streams.COMMANDS,
            config=api.ConsumerConfig(
                durable_name=self._consumer,
                filter_subject=self._pattern,
                ack_policy=api.AckPolicy.EXPLICIT,
                ack_wait=ACK_WAIT_S,
                max_deliver=-1,
            ),
        )
        return await self._js.pull_subscribe_bind(consumer=self._consumer, stream=nats_streams.COMMANDS)


class NatsCommand:
    """Implements `hasgpu_core.ports.Command`. A settlement that does not reach the broker means another delivery."""

    def __init__(self, message: Msg) -> None:
        self._message = message
        self._headers = own_headers(message.headers)

    @property
    def subject(self) -> str:
        """What it was sent to."""
        return str(self._message.subject)

    @property
    def payload(self) -> bytes:
        """What was sent."""
        return bytes(self._message.data)

    @property
    def headers(self) -> Mapping[str, str]:
        """Trace context and the like."""
        return self._headers

    async def ack(self) -> None:
        """Settles the command."""
        await self._settle(self._message.ack())

    async def retry(self, delay_s: float) -> None:
        """Gives the command back."""
        await self._settle(self._message.nak(delay=delay_s if delay_s > 0 else None))

    async def _settle(self, settling: Awaitable[None]) -> None:
        try:
            await settling
        except nats.errors.MsgAlreadyAckdError:
            return
        except (nats.errors.Error, OSError) as error:
            _log.debug("%s will come again: %r", self._message.subject, error)
