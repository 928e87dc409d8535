"""An installation's state as one file, and back."""

from __future__ import annotations

import gzip
import io
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hasgpu_core.errors import InvalidError, UnsupportedError
from hasgpu_runtime import backup, volumes
from hasgpu_runtime.layout import FILE

WHOLE = "damaged or cut short|cut short after"


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """Volumes with something in each."""
    root = tmp_path / "state"
    volumes.prepare(root)
    (root / "redis" / "appendonlydir").mkdir(mode=0o750)
    (root / "redis" / "appendonlydir" / "1.incr.aof").write_bytes(os.urandom(100_000))
    (root / "nats" / "jetstream" / "$G").mkdir(parents=True)
    (root / "nats" / "jetstream" / "$G" / "1.blk").write_bytes(b"")
    (root / "rapp" / "profile.json").write_text("{}")
    (root / "rapp" / "profile.json").chmod(0o600)
    (root / "scaler" / "link").symlink_to("/etc/hostname")
    (root / "node" / "unpacked").write_text("not kept")
    return root


@pytest.fixture
def empty(tmp_path: Path) -> Path:
    """Volumes as an engine makes them."""
    root = tmp_path / "empty"
    for name in backup.VOLUMES:
        (root / name).mkdir(parents=True)
    return root


def saved(root: Path) -> bytes:
    out = io.BytesIO()
    backup.save(root, out)
    return out.getvalue()


def files(root: Path) -> dict[str, tuple[int, bytes]]:
    return {
        path.relative_to(root).as_posix(): (path.stat().st_mode & 0o777, path.read_bytes() if path.is_file() else b"")
        for name in backup.VOLUMES
        for path in (root / name).rglob("*")
        if not path.is_symlink()
    }


def made(members: dict[str, bytes], change: Callable[[tarfile.TarInfo], None] = lambda member: None) -> bytes:
    """An archive as somebody else would make it."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as archive:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            change(member)
            archive.addfile(member, io.BytesIO(data))
    return out.getvalue()


def header(**changes: object) -> bytes:
    return json.dumps({"format": 1, "layout": 1, "version": "0.1.0", **changes}).encode()


def test_what_is_saved_is_restored(state: Path, empty: Path):
    data = saved(state)
    contents = backup.check(io.BytesIO(data))
    assert backup.restore(empty, io.BytesIO(data)) == contents
    assert files(empty) == files(state)
    assert "rapp/profile.json" in files(empty)
    assert contents.files_count == sum((empty / name).is_file() for name in files(empty))
    assert not (empty / "node").exists()


def test_one_that_was_cut_short_or_damaged_is_refused_and_leaves_nothing(state: Path, empty: Path):
    data = saved(state)
    flipped = bytearray(data)
    flipped[len(data) // 2] ^= 0xFF
    for broken in (data[: len(data) // 3], data[:-4], bytes(flipped)):
        with pytest.raises(InvalidError, match=WHOLE):
            backup.check(io.BytesIO(broken))
        with pytest.raises(InvalidError, match=WHOLE):
            backup.restore(empty, io.BytesIO(broken))
        assert files(empty) == {}


def test_one_without_its_end_is_cut_short(empty: Path):
    for members in (
        {backup.HEADER: header()},
        {backup.HEADER: header(), "redis/x": b"1"},
        {backup.HEADER: header(), "redis/x": b"1", backup.END: b'{"files": 2, "bytes": 1}'},
    ):
        with pytest.raises(InvalidError, match="cut short after"):
            backup.restore(empty, io.BytesIO(made(members)))
        assert files(empty) == {}


def test_something_else_is_no_backup():
    for data, said in (
        (b"hello", "something else"),
        (b"", "something else: empty file"),
        (gzip.compress(b"hello" * 500), "something else"),
        (made({"etc/passwd": b"root"}), "an archive that begins with etc/passwd"),
        (made({backup.HEADER: b"[]"}), "JSON object in hasgpu-backup.json, got list"),
        (made({backup.HEADER: b"{"}), "expected JSON in hasgpu-backup.json"),
        (made({backup.HEADER: header(format=2)}), "expected one of format 1"),
    ):
        with pytest.raises(InvalidError, match=said):
            backup.check(io.BytesIO(data))


def test_members_that_lead_elsewhere_are_refused(empty: Path):
    def link(member: tarfile.TarInfo) -> None:
        if member.name.startswith("redis"):
            member.type, member.linkname, member.size = tarfile.SYMTYPE, "/etc", 0

    for name, change in (
        ("../x", None),
        ("/etc/x", None),
        ("other/x", None),
        ("redis/../../x", None),
        ("redis/l", link),
    ):
        data = made({backup.HEADER: header(), name: b""}, *([change] if change else []))
        with pytest.raises(InvalidError, match="expected files and folders below secrets, redis"):
            backup.restore(empty, io.BytesIO(data))
        assert files(empty) == {}


def test_another_layout_is_refused_on_both_ways(state: Path, empty: Path):
    with pytest.raises(UnsupportedError, match="the backup has state of layout 9, but this version"):
        backup.check(io.BytesIO(made({backup.HEADER: header(layout=9)})))
    data = saved(state)
    (state / "rapp" / FILE).write_text('{"layout": 9}')
    with pytest.raises(UnsupportedError, match="rapp has state of layout 9"):
        backup.save(state, io.BytesIO())
    (empty / "nats" / FILE).write_text('{"layout": 9}')
    with pytest.raises(UnsupportedError, match="nats has state of layout 9"):
        backup.restore(empty, io.BytesIO(data))


def test_state_that_is_there_is_not_overwritten(state: Path, tmp_path: Path):
    data, before = saved(state), files(state)
    with pytest.raises(InvalidError, match="volume secrets: expected nothing in it; `docker compose down --volumes`"):
        backup.restore(state, io.BytesIO(data))
    assert files(state) == before
    with pytest.raises(InvalidError, match=r"volume .*secrets: expected a folder, got none"):
        backup.save(tmp_path / "absent", io.BytesIO())


def test_a_file_that_gets_shorter_meanwhile_is_told(state: Path, monkeypatch: pytest.MonkeyPatch):
    shrinking = state / "redis" / "appendonlydir" / "1.incr.aof"
    add = tarfile.TarFile.addfile

    def cut(archive: tarfile.TarFile, member: tarfile.TarInfo, content: io.BufferedReader | None = None) -> None:
        if member.name.endswith("1.incr.aof"):
            os.truncate(shrinking, 10)
        add(archive, member, content)

    monkeypatch.setattr(tarfile.TarFile, "addfile", cut)
    with pytest.raises(InvalidError, match=r"1.incr.aof: expected one that stays while it is read; pause what writes"):
        backup.save(state, io.BytesIO())


def test_the_command_takes_and_gives_streams(state: Path, empty: Path):
    def run(root: Path, *args: str, given: bytes = b"") -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(
            [sys.executable, "-m", "hasgpu_runtime.backup", *args],
            env={**os.environ, "HASGPU_VOLUMES": str(root)},
            input=given,
            capture_output=True,
            check=False,
        )

    done = run(state, "save")
    assert done.returncode == 0
    assert done.stderr.startswith(b"hasgpu: ")
    assert run(empty, "check", given=done.stdout).returncode == 0
    assert files(empty) == {}
    assert run(empty, "restore", given=done.stdout).returncode == 0
    assert files(empty) == files(state)
    again = run(empty, "restore", given=done.stdout)
    assert again.returncode == 1
    assert len(again.stderr.splitlines()) == 1
    assert run(empty, "put").returncode == 2
