"""Recordings as files: gzipped segments in a folder, the oldest thrown away when they take too much room."""

from __future__ import annotations

import gzip
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path

SEGMENT_S = 600.0
SEGMENT_BYTES = 16 << 20
BUFFER_BYTES = 64 << 10
BUFFER_S = 5.0
"""Lines are gzipped and written together, when there are so many bytes of them or the first is so old."""
LEVEL = 4
SUFFIX = ".jsonl.gz"

_log = logging.getLogger(__name__)


class RecordingFiles:
    """Segments in a folder, named by the time at which they begin.

    A segment is gzip members one after the other, so that it can be read at any time. When the disk can't be written,
    that is said once and recording stops until the next segment.
    """

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self._folder = folder
        self._limit_bytes = limit_bytes
        self._path: Path | None = None
        self._began_ns = 0
        self._written_bytes = 0
        self._buffer: list[str] = []
        self._buffered_bytes = 0
        self._buffered_since_ns = 0
        self._failed = False

    @property
    def folder(self) -> Path:
        """Where they lie."""
        return self._folder

    def begin(self, header: str, base: Iterable[str], unix_ns: int) -> None:
        """Begins a segment and throws the oldest ones away."""
        self.close()
        self._path = self._folder / f"{unix_ns // 1_000_000:014d}{SUFFIX}"
        self._began_ns, self._written_bytes = unix_ns, 0
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._prune()
        except OSError as error:
            self._fail(error)
            return
        self.write([header, *base], unix_ns)
        self.flush()

    def write(self, lines: list[str], unix_ns: int) -> None:
        """Adds lines to the segment."""
        if self._path is None:
            return
        if not self._buffer:
            self._buffered_since_ns = unix_ns
        self._buffer += lines
        self._buffered_bytes += sum(len(line) + 1 for line in lines)
        if self._buffered_bytes >= BUFFER_BYTES or unix_ns - self._buffered_since_ns >= BUFFER_S * 1e9:
            self.flush()

    def is_full(self, unix_ns: int) -> bool:
        """Whether the next pass should begin a new segment."""
        return unix_ns - self._began_ns >= SEGMENT_S * 1e9 or self._written_bytes >= SEGMENT_BYTES

    def flush(self) -> None:
        """Writes what is buffered."""
        if self._path is None or not self._buffer:
            return
        data = gzip.compress(("\n".join(self._buffer) + "\n").encode(), LEVEL)
        self._buffer, self._buffered_bytes = [], 0
        try:
            with self._path.open("ab") as file:
                file.write(data)
        except OSError as error:
            self._fail(error)
            return
        self._written_bytes += len(data)
        self._failed = False

    def close(self) -> None:
        """Ends the segment."""
        self.flush()
        self._path = None

    def segments(self, from_unix_ns: int, to_unix_ns: int) -> list[Path]:
        """Returns the files that hold a stretch of time, oldest first; 0: from the oldest, to the newest."""
        self.flush()
        files = self._files()
        begins = [int(file.name.removesuffix(SUFFIX)) * 1_000_000 for file in files]
        chosen = []
        for index, file in enumerate(files):
            ends_ns = begins[index + 1] if index + 1 < len(files) else None
            after = ends_ns is None or ends_ns > from_unix_ns
            if after and (not to_unix_ns or begins[index] <= to_unix_ns):
                chosen.append(file)
        return chosen

    def _files(self) -> list[Path]:
        return sorted(file for file in self._folder.glob(f"*{SUFFIX}") if file.name.removesuffix(SUFFIX).isdecimal())

    def _prune(self) -> None:
        files = self._files()
        total_bytes = sum(file.stat().st_size for file in files)
        for file in files:
            if total_bytes <= self._limit_bytes - SEGMENT_BYTES:
                return
            total_bytes -= file.stat().st_size
            file.unlink(missing_ok=True)

    def _fail(self, error: OSError) -> None:
        self._path, self._buffer, self._buffered_bytes = None, [], 0
        if not self._failed:
            _log.warning("what is seen and decided is not recorded for now: %s", error)
        self._failed = True


def read_chunks(paths: Iterable[Path], chunk_bytes: int = 1 << 18) -> Iterator[bytes]:
    """Yields the bytes of files; one that was thrown away meanwhile is left out."""
    for path in paths:
        try:
            with path.open("rb") as file:
                while chunk := file.read(chunk_bytes):
                    yield chunk
        except FileNotFoundError:
            continue
