from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys

import pytest
from hasgpu_core.errors import UnavailableError
from hasgpu_runtime import service
from hasgpu_runtime.brokers import NatsServer, RedisServer

PROGRAM = """
import asyncio
from hasgpu_core.errors import InvalidError
from hasgpu_runtime.service import run_service

def load(environ):
    if environ.get("HASGPU_TEST") == "bad":
        raise InvalidError("HASGPU_TEST", expected="good", got="'bad'")
    return environ.get("HASGPU_TEST", "")

async def body(service):
    async def forever():
        await asyncio.Event().wait()
    service.group.create_task(forever())
    await service.bus.put("node.a", b"1")
    if service.settings == "crash":
        raise KeyError("unforeseen")
    server = service.create_server()
    await server.start()
    print("ready", service.advertised(server), flush=True)
    await service.stop.wait()
    await server.stop(None)
    print("wound up", flush=True)

if __name__ == "__main__":
    run_service("test", load, body, needs_store=NEEDS_STORE)
"""


def start(nats_url: str, redis_url: str = "", *, needs_store: bool = True, **environ: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM.replace("NEEDS_STORE", str(needs_store))],
        env={
            **{k: v for k, v in os.environ.items() if not k.startswith(("HASGPU_", "OTEL_"))},
            "HASGPU_NATS_URL": nats_url,
            "HASGPU_REDIS_URL": redis_url or "redis://127.0.0.1:9/0",
            **environ,
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("needs_store", [True, False])
def test_it_stops_in_order_when_told(nats_server: NatsServer, redis_server: RedisServer, needs_store):
    url = redis_server.url if needs_store else ""
    process = start(nats_server.url, url, needs_store=needs_store)
    assert process.stdout is not None
    assert process.stdout.readline().startswith("ready 127.0.0.1:")
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (0, "wound up\n"), err
    assert "has stopped" in err


def test_bad_configuration_is_one_line_and_status_2(nats_server: NatsServer):
    process = start(nats_server.url, HASGPU_TEST="bad")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert err == "hasgpu-test: configuration: HASGPU_TEST: expected good, got 'bad'\n"
    process = start("http://x")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "HASGPU_NATS_URL" in err
    assert len(err.splitlines()) == 1


def test_a_taken_port_is_one_line_and_status_1(nats_server: NatsServer):
    process = start(nats_server.url, needs_store=False, HASGPU_LISTEN=f"127.0.0.1:{nats_server.port}")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert f"can't listen on 127.0.0.1:{nats_server.port}" in err
    assert "Traceback" not in err


def test_an_unforeseen_error_is_logged_with_its_traceback(nats_server: NatsServer):
    process = start(nats_server.url, needs_store=False, HASGPU_TEST="crash", HASGPU_LOG_FORMAT="json")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "KeyError: 'unforeseen'" in err
    assert '"level": "critical"' in err


def test_it_can_be_stopped_while_it_waits_for_its_brokers():
    process = start("nats://127.0.0.1:9", HASGPU_LOG_LEVEL="debug")
    assert process.stderr is not None
    assert "NATS at nats://127.0.0.1:9" in process.stderr.readline()
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err


async def test_a_task_that_swallows_a_cancellation_is_cancelled_again(monkeypatch):
    monkeypatch.setattr(service, "CANCEL_AGAIN_S", 0.01)
    swallowed = []

    async def stubborn() -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            swallowed.append(1)
        await asyncio.Event().wait()

    async with asyncio.timeout(60), service._Group() as group:
        group.create_task(stubborn())
        await asyncio.sleep(0)
        await group.end()
    assert swallowed == [1]


async def test_a_failure_ends_a_task_that_swallows_its_cancellation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "CANCEL_AGAIN_S", 0.05)
    swallowed = []

    async def stubborn() -> None:
        try:
            await asyncio.sleep(600)
        except asyncio.CancelledError:
            swallowed.append(1)
        await asyncio.sleep(600)

    async def fails() -> None:
        await asyncio.sleep(0.01)
        raise UnavailableError("the device is away")

    async with asyncio.timeout(60):
        with pytest.raises(ExceptionGroup) as caught:  # noqa: PT012  the group is what raises
            async with service._Group() as group:
                group.create_task(stubborn())
                group.create_task(fails())
                await asyncio.sleep(600)
    assert [str(error) for error in caught.value.exceptions] == ["the device is away"]
    assert swallowed
