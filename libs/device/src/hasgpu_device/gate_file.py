"""A row's gate as a file: its layout, its critical section, and the locks that tell that a slot's owner lives.

```
offset 0  header: magic, version, slots; whether somebody waits; holder, slots in use, row clock
     128  slots of 128 bytes: futex word, flags, pid, stamp, shares, buckets
 1 << 20  (beyond the end) one byte a slot: the lock that tells that its owner lives
```
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import mmap
import os
import struct
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hasgpu_device.errors import GateError
from hasgpu_device.quota import NOBODY, PERMILLE, Account, RowClock

MAGIC = b"HASGPURG"
VERSION = 2
SLOTS = 64
SLOT_BYTES = 128
SIZE_BYTES = SLOT_BYTES * (SLOTS + 1)

_HEADER = struct.Struct("<8sII")
_WANTED_OFFSET = 16  # a word: somebody waits
_ROW = struct.Struct("<iIiiqqqq")  # holder, slots in use, holder borrows, row clock (five)
_ROW_OFFSET = 24
_HOLDER = struct.Struct("<i")
_SLOT = struct.Struct("<IqqIIqqqqqqqq")
_SLOT_OFFSET = 4  # behind the futex word
_FLOCK = struct.Struct("hhqqi4x")
_LOCK_OFFSET = 1 << 20
_FLAGS = struct.Struct("<I")
_ATTACHED, _WAITING, _HOLDING, _BACKGROUND, _LINGERING, _GRANTED = 1, 2, 4, 8, 16, 32
_NOTHING_WANTED = bytes(4)

_open_descriptors: weakref.WeakSet[GateFile] = weakref.WeakSet()


@dataclass(slots=True)
class Row:
    """The file's content, taken out to be worked on."""

    in_use: int
    holder: int
    borrowed: bool
    clock: RowClock
    accounts: dict[int, Account]
    pids: dict[int, int]
    stamps_ns: dict[int, int]
    lingering: set[int]
    granted: int = NOBODY
    """Slot that was handed the device and has not taken it up yet."""


class GateFile:
    """The mapped file, its critical section and its slot locks."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise GateError(str(path), error.strerror or str(error)) from error
        try:
            size_bytes = os.fstat(self.descriptor).st_size
            if size_bytes != SIZE_BYTES:
                raise GateError(str(path), f"not a gate: {size_bytes} bytes")
            # mmap keeps a duplicate of its descriptor; of another open file, for it must not hold the locks.
            other = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            try:
                self.memory = mmap.mmap(other, SIZE_BYTES)
            finally:
                os.close(other)
            magic, version, slots = _HEADER.unpack_from(self.memory)
            if magic != MAGIC or slots != SLOTS:
                raise GateError(str(path), f"not a gate: begins with {magic!r}")
            if version != VERSION:
                raise GateError(str(path), f"version {version}, this program knows {VERSION}")
        except GateError:
            os.close(self.descriptor)
            raise
        self.words = [ctypes.c_uint32.from_buffer(self.memory, SLOT_BYTES * (slot + 1)) for slot in range(SLOTS)]
        _open_descriptors.add(self)

    def close(self) -> None:
        """Lets go of the file, and with it of the lock on a slot."""
        _open_descriptors.discard(self)
        if self.descriptor >= 0:
            self.words.clear()
            os.close(self.descriptor)
            self.descriptor = -1
            # A traceback may still hold a word; the mapping then goes with it.
            with contextlib.suppress(BufferError):
                self.memory.close()

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

    def load(self) -> Row:
        """Takes the content out; only in the critical section."""
        holder, in_use, borrows, turn, virtual_ns, seen_ns, borrow_ns, left_ns = _ROW.unpack_from(
            self.memory, _ROW_OFFSET
        )
        clock = RowClock(virtual_ns, seen_ns, borrow_ns, turn, left_ns)
        row = Row(in_use, holder, bool(borrows), clock, {}, {}, {}, set())
        for slot in range(min(in_use, SLOTS)):
            flags, pid, stamp_ns, request, limit, window_ns, *amounts = _SLOT.unpack_from(
                self.memory, SLOT_BYTES * (slot + 1) + _SLOT_OFFSET
            )
            if flags & _ATTACHED:
                row.accounts[slot] = Account(
                    request,
                    limit,
                    window_ns,
                    bool(flags & _WAITING),
                    bool(flags & _HOLDING),
                    bool(flags & _BACKGROUND),
                    *amounts,
                )
                if flags & _LINGERING:
                    row.lingering.add(slot)
                if flags & _GRANTED:
                    row.granted = slot
                row.pids[slot] = pid
                row.stamps_ns[slot] = stamp_ns
        return row

    def handed_over(self, slot: int) -> tuple[bool, int, int]:
        """Tells a holder what it was handed: borrowed, entitled for so long, in debt by so much; nobody writes now."""
        _, _, borrows, _, virtual_ns, *_ = _ROW.unpack_from(self.memory, _ROW_OFFSET)
        _, _, _, request, _, _, amount, settled_ns, *_ = _SLOT.unpack_from(
            self.memory, SLOT_BYTES * (slot + 1) + _SLOT_OFFSET
        )
        lag_ns = amount // request + virtual_ns - settled_ns
        return bool(borrows), max(0, lag_ns), max(0, -lag_ns * request // PERMILLE)

    def store_row(self, row: Row) -> None:
        """Writes the row back, but for its slots; only in the critical section."""
        clock = row.clock
        _ROW.pack_into(
            self.memory,
            _ROW_OFFSET,
            row.holder,
            row.in_use,
            row.borrowed,
            clock.turn,
            clock.virtual_ns,
            clock.seen_ns,
            clock.borrow_ns,
            clock.turn_left_ns,
        )
        wanted = any(account.waiting for account in row.accounts.values())
        self.memory[_WANTED_OFFSET : _WANTED_OFFSET + 4] = _FLAGS.pack(wanted)

    def is_wanted(self) -> bool:
        """Tells, without the critical section, whether somebody waits."""
        return self.memory[_WANTED_OFFSET : _WANTED_OFFSET + 4] != _NOTHING_WANTED

    def take_up(self, slot: int) -> bool:
        """Takes a grant up that another has written into the slot; False when there is none (any more)."""
        if _HOLDER.unpack_from(self.memory, _ROW_OFFSET)[0] != slot:
            return False
        with self.locked():
            if _HOLDER.unpack_from(self.memory, _ROW_OFFSET)[0] != slot:
                return False
            offset = SLOT_BYTES * (slot + 1) + _SLOT_OFFSET
            _FLAGS.pack_into(self.memory, offset, _FLAGS.unpack_from(self.memory, offset)[0] & ~_GRANTED)
            return True

    def store_slot(
        self,
        slot: int,
        account: Account,
        pid: int,
        stamp_ns: int,
        *,
        lingers: bool = False,
        granted: bool = False,
    ) -> None:
        """Writes a slot; only in the critical section."""
        flags = (
            _ATTACHED
            | (_WAITING if account.waiting else 0)
            | (_HOLDING if account.holding else 0)
            | (_BACKGROUND if account.background else 0)
            | (_LINGERING if lingers else 0)
            | (_GRANTED if granted else 0)
        )
        _SLOT.pack_into(
            self.memory,
            SLOT_BYTES * (slot + 1) + _SLOT_OFFSET,
            flags,
            pid,
            stamp_ns,
            account.request_permille,
            account.limit_permille,
            account.window_ns,
            account.quota,
            account.settled_ns,
            account.allowance,
            account.allowance_seen_ns,
            account.idle_since_ns,
            account.idle_lag_ns,
            account.borrow_tag_ns,
        )

    def clear_slot(self, slot: int) -> None:
        """Empties a slot; its futex word stays."""
        self.memory[SLOT_BYTES * (slot + 1) + _SLOT_OFFSET : SLOT_BYTES * (slot + 2)] = bytes(SLOT_BYTES - _SLOT_OFFSET)


def make(path: Path, now_ns: int) -> None:
    """Writes an empty gate, whole or not at all; raises GateError.

    Args:
        path: Where; its folder must exist.
        now_ns: Monotonic time, at which the row's clock begins.
    """
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    content = bytearray(SIZE_BYTES)
    _HEADER.pack_into(content, 0, MAGIC, VERSION, SLOTS)
    _ROW.pack_into(content, _ROW_OFFSET, NOBODY, 0, 0, NOBODY, 0, now_ns, 0, 0)
    try:
        draft.write_bytes(content)
        draft.replace(path)
    except OSError as error:
        raise GateError(str(path), error.strerror or str(error)) from error


def _forget_in_child() -> None:
    # A forked child shares the open file and with it the locks: it would keep a dead parent's slot alive.
    for file in list(_open_descriptors):
        os.close(file.descriptor)
        file.descriptor = -1


os.register_at_fork(after_in_child=_forget_in_child)
