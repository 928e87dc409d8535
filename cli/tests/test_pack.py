"""Packing: equal files give equal archives, and nothing from outside the folder gets in."""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
from pathlib import Path

import pytest
from hasgpu_cli.pack import pack
from hasgpu_core.errors import InvalidError


def make(folder: Path, order: list[str]) -> Path:
    for name in order:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"content of {name}")
    return folder


def test_the_digest_depends_on_names_and_bytes_alone(tmp_path: Path) -> None:
    names = ["handler.py", "data/weights.bin", "a.txt"]
    first, second = make(tmp_path / "1", names), make(tmp_path / "2", names[::-1])
    os.utime(second / "handler.py", (1, 1))
    make(second, ["__pycache__/handler.pyc", "data/old.pyc", ".git/HEAD"])
    one, two = pack(first), pack(second)
    assert one.archive == two.archive
    assert one.artifact.sha256 == hashlib.sha256(one.archive).hexdigest()
    assert one.artifact.size_bytes == len(one.archive)
    assert one.names == ("a.txt", "data/weights.bin", "handler.py")
    (second / "a.txt").write_text("another")
    assert pack(second).artifact.sha256 != one.artifact.sha256


def test_entries_carry_no_owner_and_no_time(tmp_path: Path) -> None:
    make(tmp_path, ["b", "a"])
    (tmp_path / "a").chmod(0o700)
    with tarfile.open(fileobj=io.BytesIO(pack(tmp_path).archive)) as tar:
        members = tar.getmembers()
    assert [member.name for member in members] == ["a", "b"]
    assert [oct(member.mode) for member in members] == ["0o755", "0o644"]
    assert {(m.uid, m.gid, m.uname, m.gname, m.mtime) for m in members} == {(0, 0, "", "", 0)}


def test_a_link_inside_is_packed_as_its_file(tmp_path: Path) -> None:
    make(tmp_path, ["real"])
    (tmp_path / "link").symlink_to("real")
    with tarfile.open(fileobj=io.BytesIO(pack(tmp_path).archive)) as tar:
        assert tar.getmember("link").isreg()
        file = tar.extractfile("link")
        assert file is not None
        assert file.read() == b"content of real"


def test_a_single_file(tmp_path: Path) -> None:
    make(tmp_path, ["model.pt", "other"])
    assert pack(tmp_path / "model.pt").names == ("model.pt",)


def test_links_that_leave_are_refused(tmp_path: Path) -> None:
    folder = make(tmp_path / "f", ["a"])
    (tmp_path / "secret").write_text("x")
    (folder / "out").symlink_to("../secret")
    with pytest.raises(InvalidError, match=r"links that stay in the folder, got .*out, which points to .*secret"):
        pack(folder)


def test_links_to_folders_are_refused(tmp_path: Path) -> None:
    folder = make(tmp_path / "f", ["sub/a"])
    (folder / "loop").symlink_to(".")
    with pytest.raises(InvalidError, match="a link to a folder"):
        pack(folder)


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InvalidError, match="which is neither"):
        pack(tmp_path)


def test_nothing_to_pack(tmp_path: Path) -> None:
    with pytest.raises(InvalidError, match="holds none"):
        pack(tmp_path)
