"""Asks a service of this host for its health, by the gRPC health protocol; for a container's health check.

    python -I -S healthcheck.py [PORT]

PORT: by default that of HASGPU_LISTEN. Exit status 0: SERVING; 1, with one line: anything else. It is run every few
seconds for as long as a service lives, so it speaks just enough HTTP/2 (RFC 9113, RFC 7541) over the standard library:
importing grpc would take twenty times the CPU time.
"""

from __future__ import annotations

import os
import socket
import sys

TIMEOUT_S = 2.0
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_DATA, _HEADERS, _RST_STREAM, _SETTINGS, _PING, _GOAWAY = 0, 1, 3, 4, 6, 7
_ACK = _END_STREAM = 1
_END_HEADERS = 4
_STREAM = 1
_STATUS = {0: "UNKNOWN", 1: "SERVING", 2: "NOT_SERVING", 3: "SERVICE_UNKNOWN"}
_REQUEST_HEADERS = (
    (b":method", b"POST"),
    (b":scheme", b"http"),
    (b":path", b"/grpc.health.v1.Health/Check"),
    (b":authority", b"localhost"),
    (b"content-type", b"application/grpc"),
    (b"te", b"trailers"),
)


def check(port: int, timeout_s: float = TIMEOUT_S) -> str:
    """Returns the status of the server on a port of the loopback address: "SERVING", "NOT_SERVING", ...

    Raises OSError when nobody listens, it does not answer in time, or what answers does not speak the protocol.
    """
    with socket.create_connection(("127.0.0.1", port), timeout=timeout_s) as connection:
        # Literal header fields without indexing; every name and value is shorter than 127 bytes.
        headers = b"".join(
            b"\0" + bytes((len(name),)) + name + bytes((len(value),)) + value for name, value in _REQUEST_HEADERS
        )
        connection.sendall(
            _PREFACE
            + _frame(_SETTINGS, 0, 0, b"")
            + _frame(_HEADERS, _END_HEADERS, _STREAM, headers)
            + _frame(_DATA, _END_STREAM, _STREAM, bytes(5))  # an empty message: the server as a whole
        )
        stream = connection.makefile("rb")
        body = b""
        while True:
            head = _read(stream, 9)
            size, kind, flags = int.from_bytes(head[:3], "big"), head[3], head[4]
            payload = _read(stream, size)
            if kind in (_SETTINGS, _PING) and not flags & _ACK:
                connection.sendall(_frame(kind, _ACK, 0, payload if kind == _PING else b""))
            elif kind == _DATA:
                body += payload
            if kind in (_RST_STREAM, _GOAWAY) or (kind in (_DATA, _HEADERS) and flags & _END_STREAM):
                return _status(body)


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return len(payload).to_bytes(3, "big") + bytes((kind, flags)) + stream.to_bytes(4, "big") + payload


def _read(stream: object, size: int) -> bytes:
    data: bytes = stream.read(size)  # type: ignore[attr-defined]  # a binary file; typing is not imported, it costs
    if len(data) < size:
        raise OSError("the connection was closed")
    return data


def _status(body: bytes) -> str:
    """Reads HealthCheckResponse {status = 1} behind gRPC's five bytes; the default, 0, is not on the wire."""
    if len(body) < 5:
        raise OSError("no answer to the health check")
    message = body[5:]
    return _STATUS.get(message[1] if message[:1] == b"\x08" else 0, "UNKNOWN")


def main() -> int:
    """Returns the exit status."""
    given = sys.argv[1] if len(sys.argv) > 1 else os.environ.get("HASGPU_LISTEN", "")  # noqa: TID251  settings are not loaded here
    try:
        status = check(int(given.rpartition(":")[2]))
    except ValueError:
        sys.stderr.write(f"healthcheck: expected a port, or HASGPU_LISTEN=host:port, got {given!r}\n")
        return 1
    except OSError as error:
        sys.stderr.write(f"healthcheck: {given}: {error}\n")
        return 1
    if status != "SERVING":
        sys.stderr.write(f"healthcheck: {given}: {status}\n")
    return int(status != "SERVING")


if __name__ == "__main__":
    sys.exit(main())
