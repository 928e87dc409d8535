"""The ledger of a device: which SMs are in use now. It is kept only while partitions of the device may overlap.

Rows have disjoint partitions, and then nobody needs to know. While the agent moves or widens rows two of them may
overlap for a moment; the shares concerned say `exclusive`, and a segment takes its range here before it runs. Ranges
that overlap never run at once, so those that run never add up to more than the whole device.

First come, first served: whoever waits keeps what overlaps its range from those that come later. One shared file a
device (`slot_file`), with a futex word a slot to sleep on; the range of a dead holder is free again within one look.

```
offset 0  header: magic, version, slots; next ticket
      64  slots of 32 bytes: futex word, flags, first and width in per cent, ticket
 1 << 20  (beyond the end) one byte a slot: the lock that tells that its owner lives
```
"""

from __future__ import annotations

import ctypes
import struct
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from hasgpu_core.errors import InvalidError

from hasgpu_device import futex, slot_file
from hasgpu_device.errors import LedgerError
from hasgpu_device.slot_file import SlotFile

MAGIC = b"HASGPUSM"
VERSION = 1
SLOTS = 256
LOOK_NS = 40_000_000
"""A waiter looks at least so often whether a holder has died."""

_TICKET_OFFSET = slot_file.HEADER.size
_TICKET = struct.Struct("<Q")
_SLOTS_OFFSET = 64
_SLOT_BYTES = 32
_WORD_BYTES = 4
_FIELDS = struct.Struct("<IIIQ")
_SIZE_BYTES = _SLOTS_OFFSET + SLOTS * _SLOT_BYTES
_KIND = slot_file.Kind("ledger", MAGIC, VERSION, SLOTS, _SIZE_BYTES, LedgerError)
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
    _KIND.create(path, _TICKET.pack(1))


class SmLedger:
    """One process's part in a device's ledger. Used by one thread.

    Args:
        path: The ledger's file.
        attach: Take a slot; without one, only `ranges` can be asked for.

    Raises:
        LedgerError: The file is missing, is something else, of another version, or has no slot left.
    """

    def __init__(self, path: Path | str, *, attach: bool = True) -> None:
        self._file = SlotFile(Path(path), _KIND)
        self._memory = self._file.memory
        self._slot = -1
        if attach:
            try:
                self._slot = self._attach()
            except LedgerError:
                self._file.close()
                raise

    def _attach(self) -> int:
        with self._file.locked():
            for slot in range(SLOTS):
                if self._file.take_slot(slot):
                    self._write(slot, _ATTACHED, 0, 0, 0)
                    return slot
        raise LedgerError(str(self._file.path), f"all {SLOTS} slots are taken")

    def close(self) -> None:
        """Gives back what is held and leaves."""
        if self._file.descriptor < 0:
            return
        if self._slot >= 0:
            self.give()
            self._write(self._slot, 0, 0, 0, 0)
        self._file.close()

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
        with self._file.locked():
            (ticket,) = _TICKET.unpack_from(self._memory, _TICKET_OFFSET)
            _TICKET.pack_into(self._memory, _TICKET_OFFSET, ticket + 1)
        while True:
            with self._file.locked():
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
        with self._file.locked():
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
        with self._file.locked():
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
        return slot == self._slot or self._file.slot_lives(slot)

    def _read(self, slot: int) -> tuple[int, int, int, int]:
        flags, first, width, ticket = _FIELDS.unpack_from(
            self._memory, _SLOTS_OFFSET + slot * _SLOT_BYTES + _WORD_BYTES
        )
        return flags, first, width, ticket

    def _write(self, slot: int, flags: int, first: int, width: int, ticket: int) -> None:
        _FIELDS.pack_into(self._memory, _SLOTS_OFFSET + slot * _SLOT_BYTES + _WORD_BYTES, flags, first, width, ticket)


def _overlap(first: int, width: int, other_first: int, other_width: int) -> bool:
    return first < other_first + other_width and other_first < first + width
