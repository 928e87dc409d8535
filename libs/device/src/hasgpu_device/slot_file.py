"""A small file of shared memory that several processes keep together, each in a slot of its own.

What a row's gate (`gate_file`) and a device's ledger (`ledger`) have in common: a header that tells what the file is, a
critical section under `flock`, and a kernel lock a slot, held on a byte beyond the file's end for as long as the slot's
owner lives (an open-file-description lock). It falls with the process, `kill -9` included.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import struct
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hasgpu_device.errors import GateError, LedgerError

HEADER = struct.Struct("<8sII")
"""Magic, version, number of slots: how each such file begins."""
_FLOCK = struct.Struct("hhqqi4x")
_LOCK_OFFSET = 1 << 20


@dataclass(frozen=True, slots=True)
class Kind:
    """What a file is."""

    name: str
    """For messages: "gate", "ledger"."""
    magic: bytes
    version: int
    slots: int
    size_bytes: int
    error: type[GateError] | type[LedgerError]
    """Raised for a file that is missing or is something else."""

    def create(self, path: Path, content: bytes) -> None:
        """Writes a file of this kind, whole or not at all.

        Args:
            path: Where; its folder must exist.
            content: What follows the header; the rest is zeros.

        Raises:
            GateError, LedgerError: It can't be written.
        """
        draft = path.with_name(f".{path.name}.{os.getpid()}")
        header = HEADER.pack(self.magic, self.version, self.slots)
        try:
            draft.write_bytes((header + content).ljust(self.size_bytes, b"\0"))
            draft.replace(path)
        except OSError as error:
            raise self.error(str(path), error.strerror or str(error)) from error


class SlotFile:
    """The mapped file.

    Args:
        path: The file.
        kind: What it has to be.

    Raises:
        GateError, LedgerError: It is missing, is something else, or of another version.

    Attributes:
        descriptor: Of the open file that holds the locks; -1 once it is closed.
        memory: The file's content.
    """

    def __init__(self, path: Path, kind: Kind) -> None:
        self.path = path
        try:
            self.descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise kind.error(str(path), error.strerror or str(error)) from error
        try:
            self.memory = self._map(kind)
        except (GateError, LedgerError):
            os.close(self.descriptor)
            raise
        _open_files.add(self)

    def _map(self, kind: Kind) -> mmap.mmap:
        size_bytes = os.fstat(self.descriptor).st_size
        if size_bytes != kind.size_bytes:
            reason = f"not a {kind.name}: {size_bytes} bytes, expected {kind.size_bytes}"
            raise kind.error(str(self.path), reason)
        # mmap keeps a duplicate of its descriptor; of another open file, for it must not hold the locks.
        other = os.open(self.path, os.O_RDWR | os.O_CLOEXEC)
        try:
            memory = mmap.mmap(other, size_bytes)
        finally:
            os.close(other)
        magic, version, slots = HEADER.unpack_from(memory)
        if magic != kind.magic or slots != kind.slots:
            raise kind.error(str(self.path), f"not a {kind.name}: begins with {magic!r}")
        if version != kind.version:
            raise kind.error(str(self.path), f"version {version}, this program knows {kind.version}")
        return memory

    def close(self) -> None:
        """Lets go of the file, and with it of the lock on a slot; nothing happens when that was done before."""
        self.forget()
        # A traceback may still hold a futex word; the mapping then goes with it.
        with contextlib.suppress(BufferError):
            self.memory.close()

    def forget(self) -> None:
        """Lets go of the locks, without a word to the others."""
        _open_files.discard(self)
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """The critical section."""
        fcntl.flock(self.descriptor, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(self.descriptor, fcntl.LOCK_UN)

    def take_slot(self, slot: int) -> bool:
        """Takes the lock that tells that the slot's owner lives; False when somebody has it."""
        try:
            request = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, _LOCK_OFFSET + slot, 1, 0)
            fcntl.fcntl(self.descriptor, fcntl.F_OFD_SETLK, request)
        except BlockingIOError:
            return False
        return True

    def slot_lives(self, slot: int) -> bool:
        """Tells whether another open file holds the slot's lock."""
        request = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, _LOCK_OFFSET + slot, 1, 0)
        kind: int = _FLOCK.unpack(fcntl.fcntl(self.descriptor, fcntl.F_OFD_GETLK, request))[0]
        return kind != fcntl.F_UNLCK


_open_files: weakref.WeakSet[SlotFile] = weakref.WeakSet()


def _forget_in_child() -> None:
    # A forked child shares the open files and with them the locks: it would keep a dead parent's slots alive.
    for file in list(_open_files):
        file.forget()


os.register_at_fork(after_in_child=_forget_in_child)
