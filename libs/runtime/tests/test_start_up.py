"""What a service says when it can't begin: passwords, and state of another version's layout."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import redis
from hasgpu_core.errors import InvalidError, UnsupportedError
from hasgpu_runtime import volumes
from hasgpu_runtime.brokers import NatsServer, RedisServer, nats_executable
from hasgpu_runtime.bus import nats_streams
from hasgpu_runtime.bus.nats import NatsBus
from hasgpu_runtime.clock import SystemClock
from hasgpu_runtime.layout import FILE, LAYOUT, MARK, check_layout, claim_folder
from hasgpu_runtime.settings import load_common
from hasgpu_runtime.store.redis import RedisStore

PROGRAM = """
from hasgpu_runtime.service import run_service

async def body(service):
    print("began", flush=True)

if __name__ == "__main__":
    run_service("test", lambda environ: None, body)
"""


def run(**environ: str) -> subprocess.CompletedProcess[str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HASGPU_", "OTEL_"))}
    return subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={**kept, **environ},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def password_file(folder: Path, password: str) -> str:
    file = folder / f"{password}.txt"
    file.write_text(password + "\n")
    return str(file)


@contextmanager
def running_nats(folder: Path, password: str, port: int = -1) -> Iterator[str]:
    """The URL of a server that wants this password of hasgpu."""
    options = ["--user", "hasgpu", "--pass", password, "--js", "--store_dir", str(folder), "--ports_file_dir"]
    process = subprocess.Popen(
        [str(nats_executable()), "--addr", "127.0.0.1", "--port", str(port), *options, str(folder)],
        stderr=subprocess.DEVNULL,
    )
    try:
        end_s = time.monotonic() + 60
        while not (found := [file for file in folder.glob(f"*_{process.pid}.ports") if file.stat().st_size]):
            assert time.monotonic() < end_s
            time.sleep(0.05)
        yield str(json.loads(found[0].read_text())["nats"][0])
    finally:
        process.terminate()
        process.wait()


@pytest.fixture(scope="module")
def guarded_nats(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with running_nats(tmp_path_factory.mktemp("nats"), "ri/ght") as url:
        yield url


@pytest.fixture(scope="module")
def guarded_redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with RedisServer(tmp_path_factory.mktemp("redis")) as server:
        with redis.Redis.from_url(server.url) as client:
            client.config_set("requirepass", "ri/ght")
        yield server.url


def test_passwords_come_from_files(guarded_nats: str, guarded_redis: str, tmp_path: Path):
    right = password_file(tmp_path, "right").replace("right.txt", "slash.txt")
    Path(right).write_text("ri/ght\n")
    done = run(
        HASGPU_NATS_URL=guarded_nats,
        HASGPU_NATS_PASSWORD_FILE=right,
        HASGPU_REDIS_URL=guarded_redis,
        HASGPU_REDIS_PASSWORD_FILE=right,
    )
    assert (done.returncode, done.stdout) == (0, "began\n"), done.stderr


def test_a_wrong_password_of_nats_ends_it_at_once_with_one_line(guarded_nats: str, guarded_redis: str, tmp_path: Path):
    done = run(HASGPU_NATS_URL=guarded_nats, HASGPU_NATS_PASSWORD_FILE=password_file(tmp_path, "wrong"))
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "refuses the user or the password" in line
    assert "HASGPU_NATS_PASSWORD_FILE" in line
    assert "wrong" not in line


# the client leaves the sockets of its refused attempts to the collector of garbage, which is made to come here
@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
async def test_a_password_changed_while_it_runs_is_told_once_and_waited_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    clock = SystemClock()

    async def until(reached: Callable[[], bool]) -> None:
        async with asyncio.timeout(60):
            while not reached():
                await clock.sleep(0.05)

    def refusals() -> int:
        return sum("refuses the user or the password that it took before" in r.message for r in caplog.records)

    with running_nats(tmp_path, "old") as url:
        port = urlsplit(url).port or 0
        bus_url = f"nats://hasgpu:old@127.0.0.1:{port}"
        connecting = NatsBus.connect(bus_url, name="test", clock=clock)
        bus = await connecting.__aenter__()
    try:
        await until(lambda: not bus.connected)
        with running_nats(tmp_path, "new", port):
            await until(lambda: refusals() > 0)
            await clock.sleep(1)  # a few attempts more
            assert (refusals(), bus.connected) == (1, False)
        with running_nats(tmp_path, "old", port):
            await until(lambda: bus.connected)
    finally:
        await connecting.__aexit__(None, None, None)
        gc.collect()


def test_a_wrong_password_of_redis_ends_it_at_once_with_one_line(
    nats_server: NatsServer, guarded_redis: str, tmp_path: Path
):
    for environ in ({"HASGPU_REDIS_PASSWORD_FILE": password_file(tmp_path, "wrong")}, {}):
        done = run(HASGPU_NATS_URL=nats_server.url, HASGPU_REDIS_URL=guarded_redis, **environ)
        assert done.returncode == 1
        (line,) = done.stderr.splitlines()
        assert "refuses the user or the password" in line
        assert "HASGPU_REDIS_PASSWORD_FILE" in line
        assert "wrong.txt" not in line


def test_a_password_file_that_cannot_be_used_is_named(tmp_path: Path):
    (tmp_path / "empty").touch()
    for name in ("HASGPU_NATS_PASSWORD_FILE", "HASGPU_REDIS_PASSWORD_FILE"):
        for file in ("absent", "empty"):
            with pytest.raises(InvalidError, match=f"{name}: expected a file with a password, got .*{file}"):
                load_common({name: str(tmp_path / file)})


def test_a_url_keeps_its_user_and_gets_the_password(tmp_path: Path):
    file = password_file(tmp_path, "a@b")
    environ = {"HASGPU_NATS_PASSWORD_FILE": file, "HASGPU_REDIS_PASSWORD_FILE": file}
    common = load_common({**environ, "HASGPU_NATS_URL": "nats://n:1", "HASGPU_REDIS_URL": "redis://me:old@r:2/3"})
    assert common.nats_url == "nats://hasgpu:a%40b@n:1"
    assert common.redis_url == "redis://me:a%40b@r:2/3"


def test_who_listens_everywhere_is_found_by_the_name_of_the_host(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("socket.gethostname", lambda: "box")
    assert load_common({"HASGPU_LISTEN": "0.0.0.0:9000"}).advertise == "box:0"
    assert load_common({"HASGPU_LISTEN": "[::]:9000"}).advertise == "box:0"
    assert load_common({"HASGPU_LISTEN": "127.0.0.1:9000"}).advertise == ""
    assert load_common({"HASGPU_LISTEN": "0.0.0.0:9000", "HASGPU_ADVERTISE": "a:1"}).advertise == "a:1"


async def test_the_store_of_another_layout_is_refused(tmp_path: Path):
    with RedisServer(tmp_path) as server:
        async with RedisStore.connect(server.url):
            pass
        async with RedisStore.connect(server.url):  # its own mark
            pass
        with redis.Redis.from_url(server.url) as client:
            assert client.get("hasgpu-store:layout") == str(LAYOUT).encode()
            client.set("hasgpu-store:layout", "99")
        with pytest.raises(UnsupportedError, match=r"Redis at .* layout 99, .* layout 1: run the version"):
            async with RedisStore.connect(server.url):
                pass


async def test_streams_of_another_layout_are_refused_and_unmarked_ones_are_marked(tmp_path: Path):
    clock = SystemClock()
    with NatsServer(tmp_path) as server:
        async with NatsBus.connect(server.url, name="test", clock=clock) as bus:
            config = (await bus._js.stream_info(nats_streams.STATE)).config
            config.metadata = {}
            await bus._js.update_stream(config)
        async with NatsBus.connect(server.url, name="test", clock=clock) as bus:
            config = (await bus._js.stream_info(nats_streams.STATE)).config
            assert config.metadata[MARK] == str(LAYOUT)
            config.metadata = {MARK: "99"}
            await bus._js.update_stream(config)
        with pytest.raises(UnsupportedError, match=r"stream STATE .* layout 99, .* layout 1"):
            async with NatsBus.connect(server.url, name="test", clock=clock):
                pass


def test_a_folder_of_another_layout_is_refused(tmp_path: Path):
    claim_folder(tmp_path / "new")
    claim_folder(tmp_path / "new")
    check_layout("here", LAYOUT)
    (tmp_path / "new" / FILE).write_text('{"layout": 2}')
    with pytest.raises(UnsupportedError, match=r"new has state of layout 2, .*Upgrades"):
        claim_folder(tmp_path / "new")
    (tmp_path / "new" / FILE).write_text("[]")
    with pytest.raises(InvalidError, match=r'expected {"layout": N}'):
        claim_folder(tmp_path / "new")
    (tmp_path / "file").touch()
    with pytest.raises(InvalidError, match=r"state folder .*: expected a folder to write to"):
        claim_folder(tmp_path / "file")


def test_volumes_are_made_ready_once(tmp_path: Path):
    volumes.prepare(tmp_path)
    secrets = tmp_path / "secrets"
    before = {file.name: file.read_text() for file in secrets.iterdir()}
    assert sorted(before) == [
        "grafana-password",
        "nats-auth.conf",
        "nats-password",
        "redis-auth.conf",
        "redis-password",
    ]
    assert all(file.stat().st_mode & 0o007 == 0 for file in secrets.iterdir())
    assert len(set(before.values())) == len(before)
    assert before["nats-password"].strip() in before["nats-auth.conf"]
    assert before["redis-password"].strip() in before["redis-auth.conf"]
    (secrets / "redis-auth.conf").unlink()
    volumes.prepare(tmp_path)
    assert {file.name: file.read_text() for file in secrets.iterdir()} == before
    (tmp_path / "node" / FILE).write_text('{"layout": 2}')
    with pytest.raises(UnsupportedError, match="node has state of layout 2"):
        volumes.prepare(tmp_path)


def test_new_passwords_are_for_the_brokers_alone(tmp_path: Path):
    volumes.prepare(tmp_path)
    secrets = tmp_path / "secrets"
    before = {file.name: file.read_text() for file in secrets.iterdir()}
    volumes.new_passwords(tmp_path)
    after = {file.name: file.read_text() for file in secrets.iterdir()}
    assert {name for name in before if before[name] == after[name]} == {"grafana-password"}
    assert after["nats-password"].strip() in after["nats-auth.conf"]
    assert after["redis-password"].strip() in after["redis-auth.conf"]
    volumes.prepare(tmp_path)
    assert {file.name: file.read_text() for file in secrets.iterdir()} == after


def test_volumes_take_no_other_words(tmp_path: Path):
    done = subprocess.run(
        [sys.executable, "-m", "hasgpu_runtime.volumes", "--new"],
        env={**os.environ, "HASGPU_VOLUMES": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (2, "hasgpu: expected nothing, --wait or --new-passwords, got --new\n")
    assert list(tmp_path.iterdir()) == []
