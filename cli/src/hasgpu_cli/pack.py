"""Packs a model's files into an archive whose digest depends on their names and bytes alone."""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hasgpu_core.errors import InvalidError
from hasgpu_core.function import Artifact

LARGEST_ARTIFACT_BYTES = 2 << 30
LEFT_OUT_NAMES = frozenset({"__pycache__", ".git", ".DS_Store", ".ipynb_checkpoints"})
LEFT_OUT_SUFFIXES = frozenset({".pyc", ".pyo"})


@dataclass(frozen=True, slots=True)
class Packed:
    """An archive and its address."""

    archive: bytes
    """A plain tar."""
    artifact: Artifact
    names: tuple[str, ...]
    """What is inside, sorted."""


def pack(path: Path, *, leave_out: frozenset[Path] = frozenset()) -> Packed:
    """Packs a file or a folder.

    Entries are sorted by name; times, owners and all mode bits but "executable" are dropped, so equal files give an
    equal digest on every machine. Links to files inside the folder are packed as the files that they point to.

    Args:
        path: A file (packed under its own name) or a folder.
        leave_out: Resolved paths that are not packed (the function's own YAML).

    Raises:
        InvalidError: Nothing is there, a link leaves the folder, something is neither file nor folder, or it is too
            large.
    """
    if not path.exists():
        raise InvalidError("path", expected="a file or a folder", got=f"{path}, which does not exist")
    files = {path.name: path} if path.is_file() else dict(_walk(path, leave_out))
    if not files:
        raise InvalidError("path", expected="at least one file to pack", got=f"{path}, which holds none")
    size = sum(file.stat().st_size for file in files.values())
    if size > LARGEST_ARTIFACT_BYTES:
        raise InvalidError("path", expected=f"at most {LARGEST_ARTIFACT_BYTES} bytes", got=f"{size} bytes in {path}")
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name in sorted(files):
            data = files[name].read_bytes()
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            entry.mode = 0o755 if os.access(files[name], os.X_OK) else 0o644
            tar.addfile(entry, io.BytesIO(data))
    archive = buffer.getvalue()
    digest = hashlib.sha256(archive).hexdigest()
    return Packed(archive, Artifact(sha256=digest, size_bytes=len(archive)), tuple(sorted(files)))


def _walk(folder: Path, leave_out: frozenset[Path]) -> Iterator[tuple[str, Path]]:
    """Yields archive names and the files to read for them."""
    root = folder.resolve()
    for directory, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if name not in LEFT_OUT_NAMES)
        for name in folders:
            if (link := Path(directory) / name).is_symlink():
                raise InvalidError("path", expected="files and folders", got=f"{link}, a link to a folder: copy it")
        for name in names:
            file = Path(directory) / name
            if name in LEFT_OUT_NAMES or file.suffix in LEFT_OUT_SUFFIXES:
                continue
            target = file.resolve()
            if target in leave_out:
                continue
            if not target.is_relative_to(root):
                raise InvalidError(
                    "path", expected="links that stay in the folder", got=f"{file}, which points to {target}"
                )
            if not target.is_file():
                raise InvalidError("path", expected="files and folders", got=f"{file}, which is neither")
            yield file.relative_to(root).as_posix(), target
