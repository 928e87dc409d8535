"""What an artifact may hold, and what it may not."""

from __future__ import annotations

import gzip
import io
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hasgpu_node_agent.archive import unpack
from hasgpu_node_agent.errors import UnsafeArchiveError


def tar(*entries: tuple[str, bytes], kind: bytes = tarfile.REGTYPE, link: str = "", mode: str = "w") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:  # type: ignore[call-overload]
        for name, content in entries:
            info = tarfile.TarInfo(name)
            info.type, info.linkname, info.size = kind, link, len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:xz"])
def test_files_and_folders_come_out(tmp_path: Path, mode: str) -> None:
    unpack(tar(("handler.py", b"x = 1"), ("weights/a.bin", b"123"), mode=mode), tmp_path)
    assert (tmp_path / "handler.py").read_bytes() == b"x = 1"
    assert (tmp_path / "weights" / "a.bin").read_bytes() == b"123"


@pytest.mark.parametrize("has_filter", [True, False])
def test_modes_and_owners_are_not_taken_over_by_any_python(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_filter: bool
) -> None:
    if not has_filter:
        monkeypatch.delattr(tarfile, "data_filter", raising=False)  # as before 3.11.4
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        info = tarfile.TarInfo("run.sh")
        info.mode, info.uid, info.uname, info.size = 0o6777, 12_345, "nobody", 1
        archive.addfile(info, io.BytesIO(b"x"))
    unpack(buffer.getvalue(), tmp_path)
    found = (tmp_path / "run.sh").stat()
    assert (found.st_mode & 0o7777, found.st_uid) == (0o755, os.geteuid())


@pytest.mark.parametrize("name", ["/etc/passwd", "../outside", "a/../../outside", "a/.."])
def test_paths_that_leave_are_refused_before_anything_is_written(tmp_path: Path, name: str) -> None:
    with pytest.raises(UnsafeArchiveError):
        unpack(tar(("good", b"1"), (name, b"2")), tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
def test_links_and_special_files_are_refused(tmp_path: Path, kind: bytes) -> None:
    with pytest.raises(UnsafeArchiveError, match="a link or special file"):
        unpack(tar(("entry", b""), kind=kind, link="target"), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_unpacked_size_is_bounded(tmp_path: Path) -> None:
    bomb = tar(("zeros", b"\0" * 2_000_000), mode="w:gz")
    assert len(bomb) < 10_000
    with pytest.raises(UnsafeArchiveError, match="at most 1000000 bytes unpacked"):
        unpack(bomb, tmp_path, max_unpacked_bytes=1_000_000)
    assert list(tmp_path.iterdir()) == []


def _cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


@pytest.mark.parametrize("damage", [lambda data: b"not a tar", lambda data: _cut(gzip.compress(data))])
def test_what_is_no_archive_is_refused(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    with pytest.raises(UnsafeArchiveError, match="a tar archive"):
        unpack(damage(tar(("a", bytes(range(256)) * 40))), tmp_path)
