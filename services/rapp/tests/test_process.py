"""`python -m hasgpu_rapp` as a process, on a real nats-server."""

from __future__ import annotations

import asyncio
import signal
import sys
from pathlib import Path

import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from hasgpu.rapp.v1 import rapp_pb2, rapp_pb2_grpc
from hasgpu_core.errors import InvalidError
from hasgpu_rapp.settings import load
from hasgpu_runtime.brokers import NatsServer
from hasgpu_runtime.bus.nats import NatsBus
from hasgpu_runtime.rpc import open_channel
from hasgpu_runtime.testing import nats_bus, nats_server  # noqa: F401  fixtures

from .conftest import DEVICE_MODEL, Rig, profiled, spec


async def listening(process: asyncio.subprocess.Process) -> str:
    assert process.stderr is not None
    async with asyncio.timeout(30):
        async for line in process.stderr:
            if b"rapp listens on " in line:
                return line.decode().split("rapp listens on ")[1].split(" ")[0]
    raise AssertionError("it ended before it listened")


async def test_process_serves_profiles_and_stops(
    rig: Rig,
    nats_bus: NatsBus,  # noqa: F811  the fixture
    nats_server: NatsServer,  # noqa: F811  the fixture
    tmp_path: Path,
) -> None:
    rig.bus = nats_bus  # type: ignore[assignment]
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "hasgpu_rapp",
        env={"HASGPU_NATS_URL": nats_server.url, "HASGPU_STATE_DIR": str(tmp_path), "HOME": str(tmp_path)},
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with open_channel(await listening(process)) as channel:
            health = health_pb2_grpc.HealthStub(channel)
            async with asyncio.timeout(30):
                answer = await health.Check(health_pb2.HealthCheckRequest(), timeout=10)
                while answer.status != health_pb2.HealthCheckResponse.SERVING:
                    answer = await health.Check(health_pb2.HealthCheckRequest(), timeout=10)
            await rig.node(observed_unix_ns=0)
            await rig.deploy(spec())
            await rig.table(profiled)
            stub = rapp_pb2_grpc.RappServiceStub(channel)
            described = await stub.Describe(rapp_pb2.DescribeRequest(device_model=DEVICE_MODEL), timeout=10)
            assert [card.rows_count for card in described.cards] == [48]
            assert described.cards[0].HasField("mape_pct")
        assert list((tmp_path / "rapp" / DEVICE_MODEL / "profiles").glob("*.json"))
    finally:
        process.send_signal(signal.SIGTERM)
        await process.communicate()
    assert process.returncode == 0


def test_settings_name_the_variable_and_the_bound() -> None:
    settings = load({"HASGPU_STATE_DIR": "/state", "HASGPU_RAPP_THREADS": "2"})
    assert settings.state_dir == Path("/state")
    assert settings.training.threads_count == 2
    assert load({"HOME": "/home/me"}).state_dir == Path("/home/me/.local/state/hasgpu")
    assert load({"HOME": "/home/me", "XDG_STATE_HOME": "/xdg"}).state_dir == Path("/xdg/hasgpu")
    with pytest.raises(InvalidError, match=r"HASGPU_RAPP_THREADS: expected a whole number in 1\.\.256"):
        load({"HASGPU_RAPP_THREADS": "many"})
