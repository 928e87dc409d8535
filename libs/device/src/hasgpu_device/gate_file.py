"""A row's gate as a file: its layout, its critical section, and the locks that tell that a slot's owner lives.

```
offset 0  header: magic, version, slots; whether somebody waits; holder, slots in use, row clock
     128  slots of 128 bytes: futex word, flags, pid, stamp, shares, buckets
 1 << 20  (beyond the end) one byte a slot: the lock that tells that its owner lives
```
"""

from __future__ import annotations

import ctypes
import struct
from dataclasses import dataclass
from pathlib import Path

from hasgpu_device import slot_file
from hasgpu_device.errors import GateError
from hasgpu_device.quota import NOBODY, PERMILLE, Account, RowClock
from hasgpu_device.slot_file import SlotFile

MAGIC = b"HASGPURG"
VERSION = 2
SLOTS = 64
SLOT_BYTES = 128
SIZE_BYTES = SLOT_BYTES * (SLOTS + 1)

_KIND = slot_file.Kind("gate", MAGIC, VERSION, SLOTS, SIZE_BYTES, GateError)
_WANTED_OFFSET = 16  # a word: somebody waits
_ROW = struct.Struct("<iIiiqqqq")  # holder, slots in use, holder borrows, row clock (five)
_ROW_OFFSET = 24
_HOLDER = struct.Struct("<i")
_SLOT = struct.Struct("<IqqIIqqqqqqqq")
_SLOT_OFFSET = 4  # behind the futex word
_FLAGS = struct.Struct("<I")
_ATTACHED, _WAITING, _HOLDING, _BACKGROUND, _LINGERING, _GRANTED = 1, 2, 4, 8, 16, 32
_NOTHING_WANTED = bytes(4)


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


class GateFile(SlotFile):
    """The mapped file. Raises GateError when it is missing, is something else, or of another version."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, _KIND)
        self.words = [ctypes.c_uint32.from_buffer(self.memory, SLOT_BYTES * (slot + 1)) for slot in range(SLOTS)]

    def close(self) -> None:
        """Lets go of the file, and with it of the lock on a slot."""
        self.words.clear()
        super().close()

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
    row = _ROW.pack(NOBODY, 0, 0, NOBODY, 0, now_ns, 0, 0)
    _KIND.create(path, bytes(_ROW_OFFSET - slot_file.HEADER.size) + row)
