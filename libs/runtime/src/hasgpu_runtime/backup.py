"""An installation's state as one file, and back: `python -m hasgpu_runtime.backup save|check|restore`.

    save      writes the volumes below HASGPU_VOLUMES to standard output
    check     reads what `save` wrote from standard input, to its end, and says what is in it
    restore   puts it into volumes that hold nothing yet

The file is a gzipped tar: a header that names the layout of the state, the files of each volume, and a last member that
says how many there were, so that one cut short is known as such. `save` copies files as they are; those of Redis and
NATS are whole when their programs stand still meanwhile (deploy/compose/backup.sh pauses them), because both write a
change to its file before they confirm it and read files that end early, as they must after a crash.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import shutil
import sys
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import IO

from hasgpu_core.errors import HasgpuError, InvalidError

from hasgpu_runtime.diagnosis import version
from hasgpu_runtime.layout import FILE as LAYOUT_FILE
from hasgpu_runtime.layout import LAYOUT, check_layout
from hasgpu_runtime.settings import environment, text
from hasgpu_runtime.volumes import DEFAULT_VOLUMES

VOLUMES = ("secrets", "redis", "nats", "rapp", "scaler")
"""What is kept; node agents fill theirs again by themselves."""
HEADER = "hasgpu-backup.json"
END = "hasgpu-backup-end.json"
FORMAT = 1
_GZIP_LEVEL = 1  # models' weights do not get smaller, and the brokers wait
_FILE_MODES = 0o777
_EXPECTED = "a backup of hasgpu"
_DAMAGED = (tarfile.TarError, EOFError, gzip.BadGzipFile, zlib.error, UnicodeDecodeError)


@dataclass(frozen=True, slots=True)
class Contents:
    """What a backup holds."""

    layout: int
    """Of the state in it."""
    version: str
    """Of hasgpu, which wrote it."""
    files_count: int
    """Without header and end."""
    size_bytes: int
    """Of these files, unpacked."""

    def __str__(self) -> str:
        return (
            f"{self.files_count} files, {self.size_bytes / 1e6:.1f} MB, layout {self.layout}, of hasgpu {self.version}"
        )


def save(root: Path, out: IO[bytes]) -> Contents:
    """Writes the state below a folder.

    Raises:
        InvalidError: A volume is not there, or a file can't be read or gets shorter meanwhile.
        UnsupportedError: The state is of another version's layout.
    """
    for name in VOLUMES:
        _check_volume(root / name)
    files_count = size_bytes = 0
    with (
        gzip.GzipFile(fileobj=out, mode="wb", compresslevel=_GZIP_LEVEL) as packed,
        tarfile.open(fileobj=packed, mode="w|") as archive,
    ):
        _add_json(archive, HEADER, {"format": FORMAT, "layout": LAYOUT, "version": version()})
        for path in (path for name in VOLUMES for path in _walk(root / name)):
            size_bytes += _add(archive, path, path.relative_to(root).as_posix())
            files_count += path.is_file()
        _add_json(archive, END, {"files": files_count, "bytes": size_bytes})
    out.flush()
    return Contents(LAYOUT, version(), files_count, size_bytes)


def check(source: IO[bytes]) -> Contents:
    """Reads a backup to its end and returns what it holds.

    Raises:
        InvalidError: It is not a backup, or not whole.
        UnsupportedError: The state in it is of another version's layout.
    """
    return _read(source, None)


def restore(root: Path, source: IO[bytes]) -> Contents:
    """Unpacks a backup into the volumes below a folder; after an error they hold nothing, as before.

    Raises:
        InvalidError: A volume holds something, or can't be written; the backup is none, or not whole.
        UnsupportedError: The state in it is of another version's layout.
    """
    for name in VOLUMES:
        _check_volume(root / name)
        if any(path.name != LAYOUT_FILE for path in (root / name).iterdir()):
            raise InvalidError(
                f"volume {name}",
                expected="nothing in it; `docker compose down --volumes` deletes what this installation has",
                got="the state of an installation",
            )
    try:
        return _read(source, root)
    except BaseException:
        for name in VOLUMES:
            _empty(root / name)
        raise


def _check_volume(folder: Path) -> None:
    if not folder.is_dir():
        raise InvalidError(f"volume {folder}", expected="a folder", got="none; has this installation been started?")
    mark = folder / LAYOUT_FILE
    if mark.exists():
        try:
            check_layout(str(folder), json.loads(mark.read_text(encoding="utf-8"))["layout"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InvalidError(str(mark), expected='{"layout": N}', got=f"{type(error).__name__}: {error}") from error


def _walk(folder: Path) -> Iterator[Path]:
    """Folders and files below one, sorted, each folder before what is in it; sockets and links are no state."""
    for path in sorted(folder.iterdir()):
        if path.is_symlink():
            continue
        if path.is_dir():
            yield path
            yield from _walk(path)
        elif path.is_file():
            yield path


def _add(archive: tarfile.TarFile, path: Path, name: str) -> int:
    """Adds a folder or a file and returns the file's size as it was when it was opened."""
    try:
        if path.is_dir():
            archive.add(path, name, recursive=False)
            return 0
        with path.open("rb") as content:
            member = archive.gettarinfo(arcname=name, fileobj=content)
            archive.addfile(member, content)
            return member.size
    except OSError as error:
        raise InvalidError(
            f"file {path}", expected="one that stays while it is read; pause what writes it", got=str(error)
        ) from error


def _add_json(archive: tarfile.TarFile, name: str, content: dict[str, object]) -> None:
    data = json.dumps(content).encode()
    member = tarfile.TarInfo(name)
    member.size, member.mode = len(data), 0o600
    archive.addfile(member, BytesIO(data))


def _read(source: IO[bytes], root: Path | None) -> Contents:
    """Reads a backup, and unpacks it below a folder if there is one."""
    files_count = size_bytes = 0
    header = end = None
    try:
        with (
            gzip.GzipFile(fileobj=source, mode="rb") as packed,
            tarfile.open(fileobj=packed, mode="r|") as archive,
        ):
            for member in archive:
                if header is None:
                    header = _read_header(archive, member)
                elif member.name == END:
                    end = _json_of(archive, member)
                else:
                    files_count += member.isfile()
                    size_bytes += member.size
                    _unpack(archive, member, root)
            while packed.read(1 << 20):  # to gzip's own check of the whole
                pass
    except _DAMAGED as error:
        got = f"damaged or cut short: {error}" if header else f"something else: {error}"
        raise InvalidError("backup", expected=_EXPECTED, got=got) from error
    if header is None or end is None or end != {"files": files_count, "bytes": size_bytes}:
        raise InvalidError("backup", expected=_EXPECTED, got=f"one cut short after {files_count} files")
    return Contents(int(header["layout"]), str(header["version"]), files_count, size_bytes)


def _read_header(archive: tarfile.TarFile, member: tarfile.TarInfo) -> dict[str, int | str]:
    if member.name != HEADER:
        raise InvalidError("backup", expected=_EXPECTED, got=f"an archive that begins with {member.name}")
    header = _json_of(archive, member)
    if set(header) != {"format", "layout", "version"} or header["format"] != FORMAT:
        raise InvalidError("backup", expected=f"one of format {FORMAT}", got=f"a header of {header}")
    check_layout("the backup", header["layout"])
    return header


def _json_of(archive: tarfile.TarFile, member: tarfile.TarInfo) -> dict[str, int | str]:
    content = archive.extractfile(member)
    try:
        found = json.loads(content.read() if content else b"")
    except ValueError as error:
        raise InvalidError("backup", expected=f"JSON in {member.name}", got=str(error)) from error
    if not isinstance(found, dict):
        raise InvalidError("backup", expected=f"a JSON object in {member.name}", got=type(found).__name__)
    return found


def _unpack(archive: tarfile.TarFile, member: tarfile.TarInfo, root: Path | None) -> None:
    """Writes one member, owned by who runs this; anything that `save` does not write is refused."""
    path = PurePosixPath(member.name)
    inside = not path.is_absolute() and ".." not in path.parts and path.parts[0] in VOLUMES
    if not inside or not (member.isfile() or member.isdir()):
        raise InvalidError("backup", expected=f"files and folders below {', '.join(VOLUMES)}", got=member.name)
    if root is None:
        return
    target = root / path
    try:
        if member.isdir():
            target.mkdir(exist_ok=True)
        else:
            content = archive.extractfile(member)
            with target.open("wb") as written:
                if content:
                    shutil.copyfileobj(content, written, 1 << 20)
                written.flush()
                os.fsync(written.fileno())
        target.chmod(member.mode & _FILE_MODES)
    except OSError as error:
        raise InvalidError(f"volume {path.parts[0]}", expected="to write to it", got=str(error)) from error


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                path.unlink()


def main(arguments: Sequence[str]) -> int:
    """Returns the exit status: 0; 1 with one line about what is wrong; 2 for a wrong call."""
    root = Path(text(environment(), "HASGPU_VOLUMES", DEFAULT_VOLUMES))
    try:
        match list(arguments):
            case ["save"]:
                done = save(root, sys.stdout.buffer)
            case ["check"]:
                done = check(sys.stdin.buffer)
            case ["restore"]:
                done = restore(root, sys.stdin.buffer)
            case _:
                sys.stderr.write("usage: python -m hasgpu_runtime.backup save > FILE | check < FILE | restore < FILE\n")
                return 2
    except (HasgpuError, BrokenPipeError) as error:
        sys.stderr.write(f"hasgpu: {error}\n")
        return 1
    sys.stderr.write(f"hasgpu: {done}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
