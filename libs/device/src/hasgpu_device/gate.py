"""The token gate of a row: instances that share an SM range in time pass it before every segment.

One shared file a row. A short critical section under `flock` decides by the arithmetic of `hasgpu_device.quota`; a
waiter sleeps on its slot's futex word, for one window at most. Whoever gives the device up hands it to the next: it
writes the grant into that slot and wakes its owner, who has only to take it up; a grant that is not taken up within a
window is void. While nobody waits, a holder goes on by its credit without the critical section. Each instance holds a
kernel lock on its slot for as long as it lives (an open-file-description lock): it falls when the process dies,
`kill -9` included, so the device of a dead holder is free again when the next waiter looks, within one window.

```
offset 0  header: magic, version, slots in use; row clock; holder; whether somebody waits
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
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Self

from hasgpu_device import futex, quota
from hasgpu_device.control import Shares
from hasgpu_device.errors import GateError, GateTimeoutError
from hasgpu_device.quota import NOBODY, Account, RowClock

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
_STALE_WINDOWS = 8
_LINGER_PART = 8
"""An instance that lingers for longer than this part of a window has lost its turn."""

_open_descriptors: weakref.WeakSet[_GateFile] = weakref.WeakSet()


@dataclass(frozen=True, slots=True)
class Grant:
    """The device is held."""

    wait_ns: int
    """How long it took to get it."""
    borrowed: bool
    """The segment is beyond the request."""
    kept: bool = False
    """It was never given up (only from `renew`)."""


_KEPT = Grant(0, borrowed=False, kept=True)
_KEPT_BORROWED = Grant(0, borrowed=True, kept=True)


@dataclass(frozen=True, slots=True)
class MemberView:
    """One attached instance, for those who look on."""

    pid: int
    waiting: bool
    holding: bool
    request_permille: int
    limit_permille: int
    debt_ns: int


class _Outlook(NamedTuple):
    """What a look at the row came to."""

    granted: bool
    sleep_ns: int
    """How long to sleep on the word otherwise, and what it holds."""
    word: ctypes.c_uint32
    expected: int
    waker: ctypes.c_uint32 | None
    """To be woken, once the critical section is left."""


class _GateFile:
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

    def load(self) -> _Row:
        holder, in_use, borrows, turn, virtual_ns, seen_ns, borrow_ns, left_ns = _ROW.unpack_from(
            self.memory, _ROW_OFFSET
        )
        clock = RowClock(virtual_ns, seen_ns, borrow_ns, turn, left_ns)
        row = _Row(in_use, holder, bool(borrows), clock, {}, {}, {}, set())
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

    def handed_over(self, slot: int) -> tuple[bool, int]:
        """Tells a holder whether its segment is borrowed, and for how long it was entitled to it; nobody writes now."""
        _, _, borrows, _, virtual_ns, *_ = _ROW.unpack_from(self.memory, _ROW_OFFSET)
        _, _, _, request, _, _, amount, settled_ns, *_ = _SLOT.unpack_from(
            self.memory, SLOT_BYTES * (slot + 1) + _SLOT_OFFSET
        )
        return bool(borrows), max(0, amount // request + virtual_ns - settled_ns)

    def store_row(self, row: _Row) -> None:
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
        self.memory[SLOT_BYTES * (slot + 1) + _SLOT_OFFSET : SLOT_BYTES * (slot + 2)] = bytes(SLOT_BYTES - _SLOT_OFFSET)


@dataclass(slots=True)
class _Row:
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


def _forget_in_child() -> None:
    # A forked child shares the open file and with it the locks: it would keep a dead parent's slot alive.
    for file in list(_open_descriptors):
        os.close(file.descriptor)
        file.descriptor = -1


os.register_at_fork(after_in_child=_forget_in_child)


class RowGate:
    """A row's gate as its maker sees it. The node agent makes one file a row; workers attach to it."""

    def __init__(self, path: Path, file: _GateFile) -> None:
        self.path = path
        self._file = file

    @classmethod
    def create(cls, path: Path | str) -> RowGate:
        """Makes a gate, or opens the one that is there with everybody attached to it.

        Raises:
            GateError: The file is there and is something else, or its folder is missing.
        """
        path = Path(path)
        if not path.exists():
            draft = path.with_name(f".{path.name}.{os.getpid()}")
            content = bytearray(SIZE_BYTES)
            _HEADER.pack_into(content, 0, MAGIC, VERSION, SLOTS)
            _ROW.pack_into(content, _ROW_OFFSET, NOBODY, 0, 0, NOBODY, 0, time.monotonic_ns(), 0, 0)
            try:
                draft.write_bytes(content)
                draft.replace(path)
            except OSError as error:
                raise GateError(str(path), error.strerror or str(error)) from error
        return cls.open(path)

    @classmethod
    def open(cls, path: Path | str) -> RowGate:
        """Opens a gate; GateError when the file is missing or is something else."""
        return cls(Path(path), _GateFile(Path(path)))

    def close(self) -> None:
        """Closes the file; members attached through it are not touched."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def attach(self, shares: Shares) -> GateMember:
        """Gives this process a slot of its own. GateError when all slots are taken."""
        return GateMember(self.path, shares)

    def poke(self, pid: int) -> bool:
        """Wakes a process's waiting member, so that it sees changed shares at once; False when it does not wait."""
        with self._file.locked():
            row = self._file.load()
            slots = [slot for slot, account in row.accounts.items() if row.pids[slot] == pid and account.waiting]
            words = [self._file.words[slot] for slot in slots]
            for word in words:
                word.value = (word.value + 1) & 0xFFFFFFFF
        for word in words:
            futex.wake(word)
        return bool(words)

    def members(self) -> tuple[MemberView, ...]:
        """Returns the live instances attached."""
        with self._file.locked():
            row = self._file.load()
            return tuple(
                MemberView(
                    row.pids[slot],
                    account.waiting,
                    account.holding,
                    account.request_permille,
                    account.limit_permille,
                    account.debt_ns(row.clock),
                )
                for slot, account in row.accounts.items()
                if self._file.slot_lives(slot)
            )


class GateMember:
    """One instance's slot at its row's gate. Used by one thread.

    Args:
        path: The gate's file.
        shares: First shares.

    Attributes:
        shares: Shares in force.
        refresh: Called before each decision and whenever a wait wakes; what it returns is put into force. A worker
            reads its control block here, so that a change takes effect with the next segment.
        on_wait: Called before this instance sleeps, once another has the device: what need not be done before.
        on_change: Called when changed shares came into force while this instance waits.
        entitled_ns: For how long, on the row's clock, it had been entitled when it last got the device.
    """

    def __init__(self, path: Path | str, shares: Shares) -> None:
        shares.validate()
        self._file = _GateFile(Path(path))
        self.shares = shares
        self.refresh: Callable[[], Shares] | None = None
        self.on_wait: Callable[[], None] | None = None
        self.on_change: Callable[[], None] | None = None
        self.entitled_ns = 0
        self.debt_ns = 0
        self._pid = os.getpid()
        self._background = False
        self._borrowed = False
        self._credit_ns = 0
        self._pending_ns = 0
        try:
            self._slot = self._attach(shares)
        except GateError:
            self._file.close()
            raise

    def _attach(self, shares: Shares) -> int:
        now_ns = time.monotonic_ns()
        with self._file.locked():
            row = self._load(now_ns)
            for slot in range(SLOTS):
                if slot in row.accounts or not self._file.take_slot(slot):
                    continue
                row.in_use = max(row.in_use, slot + 1)
                account = Account(shares.request_permille, shares.limit_permille, shares.window_ns)
                quota.join(account, row.clock, now_ns)
                self._file.store_slot(slot, account, self._pid, now_ns)
                self._file.store_row(row)
                return slot
        raise GateError(str(self._file.path), f"all {SLOTS} slots are taken")

    def close(self) -> None:
        """Leaves the gate; the device is given up if it was held."""
        if self._file.descriptor < 0:
            return
        now_ns = time.monotonic_ns()
        with self._file.locked():
            row = self._load(now_ns)
            if row.holder == self._slot:
                row.holder = NOBODY
            row.accounts.pop(self._slot, None)
            self._file.clear_slot(self._slot)
            word = self._next(row, now_ns)
            self._file.store_row(row)
        if word is not None:
            futex.wake(word)
        del word
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def poll(self) -> None:
        """Puts changed shares into force while the instance is idle."""
        if self._changed() is None:
            return
        now_ns = time.monotonic_ns()
        with self._file.locked():
            row = self._load(now_ns)
            self._store(row, row.accounts[self._slot], now_ns)

    def acquire(
        self,
        *,
        deadline_ns: int | None = None,
        cancelled: Callable[[], bool] | None = None,
        background: bool = False,
    ) -> Grant:
        """Waits until this instance may run its next segment.

        Args:
            deadline_ns: Monotonic time at which the wait ends; None: it has no end.
            cancelled: Looked at whenever the wait wakes, at least once a window.
            background: The segment may go beyond the limit while the row is idle otherwise, and such a segment is not
                charged: for warming up before an instance serves.

        Raises:
            GateTimeoutError: The deadline passed, or `cancelled` returned true. Nothing is held.
        """
        self._background = background
        began_ns = time.monotonic_ns()
        now_ns = began_ns
        with self._file.locked():
            row = self._load(now_ns)
            account = row.accounts[self._slot]
            if not account.waiting:
                quota.wake_up(account, row.clock, now_ns)
            account.background = background
            found = self._look(row, account, now_ns)
        if found.granted:
            return Grant(0, self._borrowed)
        return self._wait(found, began_ns, deadline_ns, cancelled)

    def _wait(
        self, found: _Outlook, began_ns: int, deadline_ns: int | None, cancelled: Callable[[], bool] | None
    ) -> Grant:
        """Sleeps until the device is handed over or may be taken."""
        if found.waker is not None:
            futex.wake(found.waker)
        if self.on_wait is not None:
            self.on_wait()
        while True:
            sleep_ns = found.sleep_ns
            if deadline_ns is not None:
                sleep_ns = min(sleep_ns, deadline_ns - time.monotonic_ns())
            self._give_up_if(deadline_ns, cancelled)
            futex.wait(found.word, found.expected, sleep_ns)
            now_ns = time.monotonic_ns()
            if self._changed() is None and self._file.take_up(self._slot):
                self._borrowed, self.entitled_ns = self._file.handed_over(self._slot)
                self._credit_ns = 0
                return Grant(now_ns - began_ns, self._borrowed)
            before = self.shares
            with self._file.locked():
                row = self._load(now_ns)
                account = row.accounts[self._slot]
                if not account.waiting and row.holder != self._slot:
                    quota.wake_up(account, row.clock, now_ns)  # its grant was void
                found = self._look(row, account, now_ns)
            if found.waker is not None:
                futex.wake(found.waker)
            if self.shares is not before and self.on_change is not None:
                self.on_change()
            if found.granted:
                return Grant(now_ns - began_ns, self._borrowed)

    def _look(self, row: _Row, account: Account, now_ns: int) -> _Outlook:
        """Takes the device if it is this one's turn; else hands it on and says how long to sleep, and on what."""
        granted = row.holder == self._slot or self._try(row, account, now_ns)
        word = self._file.words[self._slot]
        expected = word.value
        sleep_ns = account.ready_in_ns(row.clock, now_ns) or account.window_ns
        sleep_ns = min(sleep_ns, account.window_ns // (_LINGER_PART if row.lingering else 1))
        waker = None
        if granted:
            self._hold(row, account, now_ns)
        else:
            waker = self._next(row, now_ns)
        self._store(row, account, now_ns)
        return _Outlook(granted, sleep_ns, word, expected, waker)

    def _try(self, row: _Row, account: Account, now_ns: int) -> bool:
        if row.holder != NOBODY:
            return False
        chosen = quota.choose(row.clock, row.accounts, now_ns)
        if chosen is None or chosen[0] != self._slot:
            return False
        quota.start(account, row.clock, self._slot, borrowed=chosen[1])
        row.holder, row.borrowed = self._slot, chosen[1]
        return True

    def _hold(self, row: _Row, account: Account, now_ns: int) -> None:
        """Notes what this holder may do until it has to look at the row again."""
        self._borrowed = row.borrowed
        self.entitled_ns = max(0, account.lag_ns(row.clock))
        alone = not any(other.waiting for other in row.accounts.values())
        self._credit_ns = quota.credit_ns(account, row.clock, now_ns, borrowed=row.borrowed) if alone else 0

    def renew(self, device_ns: int) -> Grant:
        """Ends a segment, charges it and goes on with the next: at once if this instance is still the one to run."""
        device_ns += self._pending_ns
        if device_ns < self._credit_ns and self._changed() is None and not self._file.is_wanted():
            self._pending_ns = device_ns
            return _KEPT_BORROWED if self._borrowed else _KEPT
        self._pending_ns = 0
        now_ns = time.monotonic_ns()
        with self._file.locked():
            row = self._load(now_ns)
            account = self._held(row)
            quota.charge(account, row.clock, now_ns, device_ns=device_ns, borrowed=row.borrowed)
            row.holder = NOBODY
            account.waiting, account.holding = True, False
            found = self._look(row, account, now_ns)
        if found.granted:
            return _KEPT_BORROWED if self._borrowed else _KEPT
        return self._wait(found, now_ns, None, None)

    def release(self, device_ns: int, *, linger: bool = False) -> None:
        """Ends a segment, charges it and leaves the device to others.

        Args:
            device_ns: Device time measured.
            linger: The next batch is at hand and `acquire` (or `withdraw`) follows at once: the instance counts as
                waiting meanwhile, so the moment between two batches does not cost it its turn (an eighth of a window
                at most).
        """
        device_ns += self._pending_ns
        self._pending_ns = 0
        now_ns = time.monotonic_ns()
        with self._file.locked():
            row = self._load(now_ns)
            account = self._held(row)
            quota.charge(account, row.clock, now_ns, device_ns=device_ns, borrowed=row.borrowed)
            row.holder = NOBODY
            account.background = False
            quota.go_idle(account, row.clock)
            account.waiting = linger
            word = self._next(row, now_ns)
            self._store(row, account, now_ns, lingers=linger)
        if word is not None:
            futex.wake(word)

    def withdraw(self) -> None:
        """Wants the device no more, after `release(linger=True)`; nothing happens when it did not wait."""
        now_ns = time.monotonic_ns()
        with self._file.locked():
            row = self._load(now_ns)
            account = row.accounts[self._slot]
            if row.holder == self._slot:  # handed over in this very moment
                row.holder = NOBODY
            if account.waiting or account.holding:
                quota.go_idle(account, row.clock)
            # The others may have slept because this one was to run first.
            word = self._next(row, now_ns)
            self._store(row, account, now_ns)
        if word is not None:
            futex.wake(word)

    def _held(self, row: _Row) -> Account:
        if row.holder != self._slot:
            raise GateError(str(self._file.path), "the device is not held")
        return row.accounts[self._slot]

    def _give_up_if(self, deadline_ns: int | None, cancelled: Callable[[], bool] | None) -> None:
        late = deadline_ns is not None and time.monotonic_ns() >= deadline_ns
        if not late and (cancelled is None or not cancelled()):
            return
        self.withdraw()
        raise GateTimeoutError(str(self._file.path), "the deadline passed" if late else "the wait was cancelled")

    def _load(self, now_ns: int) -> _Row:
        """Reads the row, drops the dead, moves the clock on and puts changed shares into force."""
        row = self._file.load()
        accounts = row.accounts
        for slot in list(accounts):
            if slot == getattr(self, "_slot", NOBODY):
                continue
            account = accounts[slot]
            if not self._file.slot_lives(slot):
                del accounts[slot]
                self._file.clear_slot(slot)
                if row.holder == slot:
                    row.holder = NOBODY
            elif row.granted == slot:
                # Whoever was handed the device takes it up at once, unless it is stopped or the host is very busy.
                if row.holder != slot:
                    row.granted = NOBODY
                elif now_ns - row.stamps_ns[slot] > account.window_ns:
                    row.holder = row.granted = NOBODY
                    quota.go_idle(account, row.clock)
                    self._file.store_slot(slot, account, row.pids[slot], row.stamps_ns[slot])
            elif account.waiting:
                # A waiter wakes at least once a window, unless it is stopped (SIGSTOP, a debugger).
                patience_ns = account.window_ns * _STALE_WINDOWS
                if slot in row.lingering:
                    patience_ns = account.window_ns // _LINGER_PART
                if now_ns - row.stamps_ns[slot] > patience_ns:
                    del accounts[slot]
        quota.advance(row.clock, accounts, now_ns)
        own = accounts.get(getattr(self, "_slot", NOBODY))
        changed = self._changed() if own is not None else None
        if own is not None and changed is not None:
            quota.reshape(
                own,
                row.clock,
                now_ns,
                request_permille=changed.request_permille,
                limit_permille=changed.limit_permille,
                window_ns=changed.window_ns,
            )
            self.shares = changed
        return row

    def _changed(self) -> Shares | None:
        if self.refresh is None:
            return None
        shares = self.refresh()
        return shares if shares is not self.shares and shares != self.shares else None

    def _store(self, row: _Row, account: Account, now_ns: int, *, lingers: bool = False) -> None:
        self.debt_ns = account.debt_ns(row.clock)
        self._file.store_slot(self._slot, account, self._pid, now_ns, lingers=lingers)
        self._file.store_row(row)

    def _next(self, row: _Row, now_ns: int) -> ctypes.c_uint32 | None:
        """Hands a free device to the waiter that should run next and returns the word to wake it by.

        Whoever lingers has not come back yet: it is woken, and the device waits for it.
        """
        if row.holder != NOBODY:
            return None
        chosen = quota.choose(row.clock, row.accounts, now_ns)
        if chosen is None or chosen[0] == getattr(self, "_slot", NOBODY):
            return None
        slot, borrowed = chosen
        if slot not in row.lingering:
            account = row.accounts[slot]
            quota.start(account, row.clock, slot, borrowed=borrowed)
            row.holder, row.borrowed = slot, borrowed
            self._file.store_slot(slot, account, row.pids[slot], now_ns, granted=True)
        word = self._file.words[slot]
        word.value = (word.value + 1) & 0xFFFFFFFF
        return word
