from __future__ import annotations

import asyncio
import socket
import subprocess
import sys

import pytest
from hasgpu_runtime import healthcheck
from hasgpu_runtime.rpc import create_server


async def run(*arguments: str, **environ: str) -> tuple[int, str]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-I", "-S", healthcheck.__file__, *arguments, env=environ, stderr=subprocess.PIPE
    )
    _, err = await process.communicate()
    assert process.returncode is not None
    return process.returncode, err.decode()


async def test_it_tells_what_a_real_server_says():
    server = create_server(address="127.0.0.1:0")
    await server.start()
    try:
        port = server.address.rpartition(":")[2]
        status, err = await run(port)
        assert (status, "NOT_SERVING" in err) == (1, True)
        await server.set_serving(True)
        assert await run(port) == (0, "")
        assert await run(HASGPU_LISTEN=f"0.0.0.0:{port}") == (0, "")
    finally:
        await server.stop(None)
    status, err = await run(port)
    assert status == 1
    assert err.startswith(f"healthcheck: {port}: ")
    assert len(err.splitlines()) == 1


async def test_a_missing_port_is_one_line():
    status, err = await run()
    assert (status, err) == (1, "healthcheck: expected a port, or HASGPU_LISTEN=host:port, got ''\n")


def test_what_does_not_speak_the_protocol_or_says_nothing_is_no_health():
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        with pytest.raises(OSError, match="timed out"):
            healthcheck.check(port, timeout_s=0.05)
