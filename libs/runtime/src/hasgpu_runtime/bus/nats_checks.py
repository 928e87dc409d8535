"""How NATS and its streams are, for `hasgpu doctor`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import nats.errors
import nats.js.errors

from hasgpu_runtime.bus import nats_streams
from hasgpu_runtime.diagnosis import Check, Level

OLDEST_VERSION = (2, 11)
"""Of the server: messages with a time to live."""
SLOW_MS = 50.0
PENDING_COUNT = 100
"""Commands of one consumer that wait; they are taken within milliseconds when somebody takes them."""

_DURABLE = {nats_streams.STATE: "functions, plans and instances", nats_streams.COMMANDS: "scaling commands"}


async def check_server(client: Any, where: str) -> Sequence[Check]:
    """Looks at the connection and the server's version.

    Args:
        client: The NATS client.
        where: The URL without its password.
    """
    if not client.is_connected:
        advice = "is it running? HASGPU_NATS_URL names it; connections are tried again without end"
        return [Check(Level.FAULT, "NATS", f"no connection to {where}", advice)]
    begin_s = time.perf_counter()
    try:
        await client.flush(timeout=2)
    except (nats.errors.Error, TimeoutError, OSError) as error:
        advice = "the server is overloaded or the network between them is broken"
        return [Check(Level.FAULT, "NATS", f"{where} does not answer: {error!r}", advice)]
    took_ms = (time.perf_counter() - begin_s) * 1e3
    version = client.connected_server_version
    found = f"{version.major}.{version.minor}.{version.patch} at {where}, answers in {took_ms:.1f} ms"
    if (version.major, version.minor) < OLDEST_VERSION:
        return [Check(Level.FAULT, "NATS", found, "hasgpu needs NATS 2.11 or later")]
    if took_ms > SLOW_MS:
        return [Check(Level.WARNING, "NATS", found, "slow: is its host, or this one, overloaded?")]
    return [Check(Level.OK, "NATS", found)]


async def check_streams(js: Any) -> Sequence[Check]:
    """Looks at the streams and at what waits in the work queue."""
    checks = []
    for name in (nats_streams.STATE, nats_streams.COMMANDS, nats_streams.BUCKET_STREAM):
        subject = f"stream {name}"
        try:
            info = await js.stream_info(name)
            waiting = await _waiting(js, name) if name == nats_streams.COMMANDS else {}
        except nats.js.errors.NotFoundError:
            advice = "restart any service: each makes the streams that are missing"
            checks.append(Check(Level.FAULT, subject, "is not there", advice))
            continue
        except (nats.errors.Error, TimeoutError, OSError) as error:
            advice = "is JetStream on (nats-server -js), and is its disk full?"
            checks.append(Check(Level.FAULT, subject, f"can't be asked: {error!r}", advice))
            continue
        found = f"{info.state.messages} messages, {info.state.bytes / 2**20:.1f} MiB"
        behind = {consumer: count for consumer, count in waiting.items() if count > PENDING_COUNT}
        if behind:
            text = ", ".join(f"{count} for {consumer}" for consumer, count in sorted(behind.items()))
            advice = "is a scheduler running? It takes them"
            checks.append(Check(Level.FAULT, subject, f"{found}; {text} are not taken", advice))
        else:
            checks.append(Check(Level.OK, subject, found))
    return checks


async def _waiting(js: Any, stream: str) -> dict[str, int]:
    consumers = await js.consumers_info(stream)
    return {info.name: int(info.num_pending or 0) for info in consumers}
