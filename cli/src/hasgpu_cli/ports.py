"""Free ports that stay free: taken below the range from which the kernel gives ports to outgoing connections."""

from __future__ import annotations

import secrets
import socket
from collections.abc import Container

from hasgpu_core.errors import UnavailableError

LOWEST_PORT = 20_000
HIGHEST_PORT = 32_000
"""Linux gives outgoing connections 32768 and up; one of those could sit on a service's port while it restarts."""
ATTEMPTS_COUNT = 200


def is_free(port: int, host: str = "127.0.0.1") -> bool:
    """Whether a server could listen there now."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def free_port(taken: Container[int] = ()) -> int:
    """Returns a port nobody listens on and that is not in `taken`; raises UnavailableError when none is found."""
    for _ in range(ATTEMPTS_COUNT):
        port = LOWEST_PORT + secrets.randbelow(HIGHEST_PORT - LOWEST_PORT)
        if port not in taken and is_free(port):
            return port
    raise UnavailableError(f"no free port among {ATTEMPTS_COUNT} tried in {LOWEST_PORT}..{HIGHEST_PORT}")
