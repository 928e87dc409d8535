from __future__ import annotations

import os

import pytest
from hasgpu_core.errors import UnavailableError
from hasgpu_runtime.brokers import NatsServer, RedisServer


@pytest.mark.parametrize("kind", [NatsServer, RedisServer])
def test_a_broker_starts_on_a_free_port_keeps_it_and_stops(kind, tmp_path):
    server = kind(tmp_path / "new" / "folder")
    with pytest.raises(UnavailableError):
        _ = server.url
    server.start()
    try:
        pid, url = server.pid, server.url
        os.kill(pid, 0)
        server.start()
        assert server.pid == pid
        server.kill()
        assert not server.running
        server.start()
        assert server.url == url
        assert server.pid != pid
    finally:
        server.stop()
    with pytest.raises(UnavailableError):
        _ = server.pid
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


@pytest.mark.parametrize("kind", [NatsServer, RedisServer])
def test_a_broker_that_can_not_start_shows_its_log(kind, tmp_path, redis_server):
    with pytest.raises(UnavailableError, match=r"(?i)address already in use"):
        kind(tmp_path, port=redis_server.port).start()


def test_two_brokers_can_run_at_once(tmp_path, redis_server):
    with RedisServer(tmp_path) as other:
        assert other.url != redis_server.url
