"""The gateway's own configuration, from environment variables; what all services share is `hasgpu_runtime`'s."""

from __future__ import annotations

import os
import re
import secrets
import socket
from collections.abc import Mapping
from dataclasses import dataclass

from hasgpu_core.errors import InvalidError
from hasgpu_runtime.service import STOP_TIMEOUT_S
from hasgpu_runtime.settings import integer, number

GIB = 1024**3
MIB = 1024**2
DEFAULT_LISTEN = "127.0.0.1:8001"
LONGEST_STOP_S = STOP_TIMEOUT_S - 5.0
"""Leaves time for what else ends with the process."""


@dataclass(frozen=True, slots=True)
class GatewaySettings:
    """What a gateway can be told."""

    gateway_id: str
    """HASGPU_GATEWAY_ID; tells gateways apart, one NATS token. Default: host, process and a random part."""
    max_artifact_bytes: int = 2 * GIB
    """HASGPU_MAX_ARTIFACT_BYTES; larger artifacts are refused."""
    max_message_bytes: int = 64 * MIB
    """HASGPU_MAX_MESSAGE_BYTES; larger requests are refused with RESOURCE_EXHAUSTED."""
    max_queue_bytes: int = 256 * MIB
    """HASGPU_MAX_QUEUE_BYTES; tensor contents that may wait of one function, beside its `max_queue`."""
    max_batches_in_flight: int = 2
    """HASGPU_MAX_BATCHES_IN_FLIGHT, at one instance."""
    stop_timeout_s: float = 10.0
    """HASGPU_STOP_TIMEOUT_S; how long batches at workers may still take when the gateway stops."""


def load(environ: Mapping[str, str]) -> GatewaySettings:
    """Reads the settings; raises InvalidError naming the variable, the bound and what came."""
    gateway_id = environ.get("HASGPU_GATEWAY_ID") or default_gateway_id()
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,100}", gateway_id):
        raise InvalidError("HASGPU_GATEWAY_ID", expected="1 to 100 of A-Z, a-z, 0-9, - and _", got=repr(gateway_id))
    return GatewaySettings(
        gateway_id=gateway_id,
        max_artifact_bytes=integer(environ, "HASGPU_MAX_ARTIFACT_BYTES", 2 * GIB, 1, 64 * GIB),
        max_message_bytes=integer(environ, "HASGPU_MAX_MESSAGE_BYTES", 64 * MIB, 4096, 2**31 - 1),
        max_queue_bytes=integer(environ, "HASGPU_MAX_QUEUE_BYTES", 256 * MIB, 1, 64 * GIB),
        max_batches_in_flight=integer(environ, "HASGPU_MAX_BATCHES_IN_FLIGHT", 2, 1, 64),
        stop_timeout_s=number(environ, "HASGPU_STOP_TIMEOUT_S", 10.0, 0.0, LONGEST_STOP_S),
    )


def default_gateway_id() -> str:
    """Returns an id that no other gateway process has."""
    host = re.sub(r"[^A-Za-z0-9-]", "-", socket.gethostname())[:60]
    return f"{host}-{os.getpid()}-{secrets.token_hex(3)}"
