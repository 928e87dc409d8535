"""Unpacks a function's artifact: an archive from a stranger."""

from __future__ import annotations

import gzip
import io
import lzma
import os
import stat
import tarfile
import zlib
from pathlib import Path, PurePosixPath

from hasgpu_node_agent.errors import UnsafeArchiveError

MAX_UNPACKED_BYTES = 8 << 30
MAX_ENTRIES = 20_000
_FOLDER_MODE = 0o755
_FILE_MODES = 0o755


def unpack(data: bytes, into: Path, *, max_unpacked_bytes: int = MAX_UNPACKED_BYTES) -> None:
    """Unpacks a tar archive (plain or compressed) into an empty folder.

    Every entry is checked before the first is written; `tarfile`'s own data filter is the second line of defence.

    Raises:
        UnsafeArchiveError: an entry has an absolute path or `..`, is neither file nor folder, or all are too large.
    """
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:*") as archive:
            entries = _checked(archive, max_unpacked_bytes)
            _extract(archive, into, entries)
    except (tarfile.TarError, EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error) as error:
        raise UnsafeArchiveError("", expected="a tar archive", got=f"{type(error).__name__}: {error}") from error


def _extract(archive: tarfile.TarFile, into: Path, entries: list[tarfile.TarInfo]) -> None:
    if hasattr(tarfile, "data_filter"):
        archive.extractall(into, members=entries, filter="data")
        return
    # Python before 3.11.4: what of that filter is left to do after the checks, by hand
    for entry in entries:
        entry.mode = _FOLDER_MODE if entry.isdir() else entry.mode & _FILE_MODES | stat.S_IRUSR | stat.S_IWUSR
        entry.uid, entry.gid, entry.uname, entry.gname = os.geteuid(), os.getegid(), "", ""
    archive.extractall(into, members=entries)  # noqa: S202  every entry was checked


def _checked(archive: tarfile.TarFile, max_unpacked_bytes: int) -> list[tarfile.TarInfo]:
    total_bytes = 0
    entries: list[tarfile.TarInfo] = []
    for entry in archive:
        path = PurePosixPath(entry.name)
        if path.is_absolute() or ".." in path.parts:
            raise UnsafeArchiveError(entry.name, expected="a path inside the artifact", got="one that leaves it")
        if not (entry.isreg() or entry.isdir()):
            raise UnsafeArchiveError(entry.name, expected="a file or folder", got="a link or special file")
        total_bytes += entry.size
        if total_bytes > max_unpacked_bytes:
            raise UnsafeArchiveError(
                entry.name, expected=f"at most {max_unpacked_bytes} bytes unpacked", got=f"{total_bytes} so far"
            )
        entries.append(entry)
        if len(entries) > MAX_ENTRIES:
            raise UnsafeArchiveError(entry.name, expected=f"at most {MAX_ENTRIES} entries", got="more")
    return entries
