"""The ledger of a device: which SMs are in use now. It is kept only while partitions of the device may overlap.

Rows have disjoint partitions, and then nobody needs to know. While the agent moves or widens rows two of them may
overlap for a moment; the shares concerned say `exclusive`, and a segment takes its range here before it runs. Ranges
that overlap never run at once, so those that run never add up to more than the whole device.

First come, first served: whoever waits keeps what overlaps its range from those that come later. One shared file a
device, in the manner of `hasgpu_device.gate`: a critical section under `flock`, a futex word a slot to sleep on, and a
kernel lock a slot that falls with its process, so the range of a dead holder is free again within one look.

```
offset 0  header: magic, version, slots; next ticket
      64  slots of 32 bytes: futex word, flags, first and width in per cent, ticket
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
import time
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from hasgpu_core.errors import InvalidError

from hasgpu_device import futex
from hasgpu_device.errors import LedgerError

MAGIC = b"HASGPUSM"
VERSION = 1
SLOTS = 256
LOOK_NS = 40_000_000
"""A waiter looks at least so often whether a holder has died."""

_HEADER = struct.Struct("<8sIIQ")
_TICKET_OFFSET = 16
_TICKET = struct.Struct("<Q")
_SLOTS_OFFSET = 64
_SLOT_BYTES = 32
_WORD_BYTES = 4
_FIELDS = struct.Struct("<IIIQ")
_SIZE_BYTES = _SLOTS_OFFSET + SLOTS * _SLOT_BYTES
_FLOCK = struct.Struct("hhqqi4x")
_LOCK_OFFSET = 1 << 20
_ATTACHED, _WAITING, _HOLDING = 1, 2, 4


@dataclass(frozen=True, slots=True)
class RangeView:
    """What one member has or waits for, for those who look on."""

    first_pct: int
    width_pct: int
    holding: bool


def create(path: Path | str) -> None:
    """Makes a ledger where there is none.

    Raises:
        LedgerError: It can't be written, or the file that is there is something else.
    """
    path = Path(path)
    if path.exists():
        SmLedger(path, attach=False).close()
        return
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        draft.write_bytes(_HEADER.pack(MAGIC, VERSION, SLOTS, 1).ljust(_SIZE_BYTES, b"\0"))
        draft.replace(path)
    except OSError as error:
        raise LedgerError(str(path), error.strerror or str(error)) from error


class SmLedger:
    """One process's part in a device's ledger. Used by one thread.

    Args:
        path: The ledger's file.
        attach: Take a slot; without one, only `ranges` can be asked for.

    Raises:
        LedgerError: The file is missing, is something else, of another version, or has no slot left.
    """

    def __init__(self, path: Path | str, *, attach: bool = True) -> None:
        self.path = Path(path)
        try:
            self._descriptor = os.open(self.path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise LedgerError(str(path), error.strerror or str(error)) from error
        try:
            self._memory = self._map()
            self._slot = self._attach() if attach else -1
        except LedgerError:
            os.close(self._descriptor)
            raise
        _open_ledgers.add(self)

    def forget(self) -> None:
        """Closes the file without a word to the others: of a forked child, whose parent's ledger it is."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _map(self) -> mmap.mmap:
        size_bytes = os.fstat(self._descriptor).st_size
        if size_bytes != _SIZE_BYTES:
            raise LedgerError(str(self.path), f"not a ledger: {size_bytes} bytes, expected {_SIZE_BYTES}")
        # mmap keeps a duplicate of its descriptor; of another open file, for it must not hold the locks.
        other = os.open(self.path, os.O_RDWR | os.O_CLOEXEC)
        try:
            memory = mmap.mmap(other, _SIZE_BYTES)
        finally:
            os.close(other)
        magic, version, slots, _ = _HEADER.unpack_from(memory)
        if magic != MAGIC or slots != SLOTS:
            raise LedgerError(str(self.path), f"not a ledger: begins with {magic!r}")
        if version != VERSION:
            raise LedgerError(str(self.path), f"version {version}, this program knows {VERSION}")
        return memory

    def _attach(self) -> int:
        with self._locked():
            for slot in range(SLOTS):
                try:
                    request = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, _LOCK_OFFSET + slot, 1, 0)
                    fcntl.fcntl(self._descriptor, fcntl.F_OFD_SETLK, request)
                except BlockingIOError:
                    continue
                self._write(slot, _ATTACHED, 0, 0, 0)
                return slot
        raise LedgerError(str(self.path), f"all {SLOTS} slots are taken")

    def close(self) -> None:
        """Gives back what is held and leaves."""
        if self._descriptor < 0:
            return
        if self._slot >= 0:
            self.give()
            self._write(self._slot, 0, 0, 0, 0)
        os.close(self._descriptor)
        self._descriptor = -1
        # A traceback may still hold a futex word; the mapping then goes with it.
        with contextlib.suppress(BufferError):
            self._memory.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def take(self, first_pct: int, width_pct: int) -> int:
        """Waits until no SM of a range is in use and takes it.

        Args:
            first_pct: Where it begins, 0..99.
            width_pct: 1..100.

        Returns:
            Nanoseconds waited.

        Raises:
            InvalidError: The range is not within the device.
        """
        if not 0 <= first_pct < first_pct + width_pct <= 100:
            raise InvalidError("SM range", expected="within 0..100 %", got=f"{first_pct} + {width_pct}")
        began_ns = time.monotonic_ns()
        word = ctypes.c_uint32.from_buffer(self._memory, _SLOTS_OFFSET + self._slot * _SLOT_BYTES)
        with self._locked():
            (ticket,) = _TICKET.unpack_from(self._memory, _TICKET_OFFSET)
            _TICKET.pack_into(self._memory, _TICKET_OFFSET, ticket + 1)
        while True:
            with self._locked():
                free = self._is_free(first_pct, width_pct, ticket)
                flags = _ATTACHED | (_HOLDING if free else _WAITING)
                self._write(self._slot, flags, first_pct, width_pct, ticket)
                expected = word.value
            if free:
                return time.monotonic_ns() - began_ns
            futex.wait(word, expected, LOOK_NS)

    def give(self) -> None:
        """Gives the range back; nothing happens when none is held."""
        words = []
        with self._locked():
            _, first, width, _ = self._read(self._slot)
            self._write(self._slot, _ATTACHED, 0, 0, 0)
            for slot in range(SLOTS):
                flags, other_first, other_width, _ = self._read(slot)
                if flags & _WAITING and _overlap(first, width, other_first, other_width):
                    word = ctypes.c_uint32.from_buffer(self._memory, _SLOTS_OFFSET + slot * _SLOT_BYTES)
                    word.value = (word.value + 1) & 0xFFFFFFFF
                    words.append(word)
        for word in words:
            futex.wake(word)

    def ranges(self) -> tuple[RangeView, ...]:
        """Returns what live members hold or wait for."""
        with self._locked():
            found = [(slot, self._read(slot)) for slot in range(SLOTS) if self._read(slot)[0] & (_WAITING | _HOLDING)]
            return tuple(
                RangeView(first, width, bool(flags & _HOLDING))
                for slot, (flags, first, width, _) in found
                if self._lives(slot)
            )

    def _is_free(self, first_pct: int, width_pct: int, ticket: int) -> bool:
        for slot in range(SLOTS):
            if slot == self._slot:
                continue
            flags, first, width, other = self._read(slot)
            if not flags & (_WAITING | _HOLDING) or not _overlap(first_pct, width_pct, first, width):
                continue
            if flags & _WAITING and other > ticket:
                continue
            if self._lives(slot):
                return False
            self._write(slot, 0, 0, 0, 0)
        return True

    def _lives(self, slot: int) -> bool:
        if slot == self._slot:
            return True
        request = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, _LOCK_OFFSET + slot, 1, 0)
        kind: int = _FLOCK.unpack(fcntl.fcntl(self._descriptor, fcntl.F_OFD_GETLK, request))[0]
        return kind != fcntl.F_UNLCK

    def _read(self, slot: int) -> tuple[int, int, int, int]:
        flags, first, width, ticket = _FIELDS.unpack_from(
            self._memory, _SLOTS_OFFSET + slot * _SLOT_BYTES + _WORD_BYTES
        )
        return flags, first, width, ticket

    def _write(self, slot: int, flags: int, first: int, width: int, ticket: int) -> None:
        _FIELDS.pack_into(self._memory, _SLOTS_OFFSET + slot * _SLOT_BYTES + _WORD_BYTES, flags, first, width, ticket)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        fcntl.flock(self._descriptor, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)


_open_ledgers: weakref.WeakSet[SmLedger] = weakref.WeakSet()


def _forget_in_child() -> None:
    # A forked child shares the open file and with it the lock: it would keep a dead parent's range taken.
    for open_ledger in list(_open_ledgers):
        open_ledger.forget()


os.register_at_fork(after_in_child=_forget_in_child)


def _overlap(first: int, width: int, other_first: int, other_width: int) -> bool:
    return first < other_first + other_width and other_first < first + width
