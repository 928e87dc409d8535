"""The token gate of a row: instances that share an SM range in time pass it before every segment.

One shared file a row (`gate_file`). A short critical section under `flock` (`gate_core`) decides by the arithmetic of
`hasgpu_device.quota`; a waiter sleeps on its slot's futex word, for one window at most. Whoever gives the device up
hands it to the next: it writes the grant into that slot and wakes its owner, who has only to take it up; a grant that
is not taken up within a window is void. While nobody waits, a holder goes on by its credit without the critical
section. Each instance holds a kernel lock on its slot for as long as it lives (an open-file-description lock): it falls
when the process dies, `kill -9` included, so the device of a dead holder is free again when the next waiter looks,
within one window.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Self

from hasgpu_device import futex, gate_file, quota
from hasgpu_device.control import Shares
from hasgpu_device.errors import GateError, GateTimeoutError
from hasgpu_device.gate_core import Operation, Outcome, make_core
from hasgpu_device.gate_file import SLOTS, GateFile
from hasgpu_device.quota import NOBODY, Account


class Grant(NamedTuple):
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


class RowGate:
    """A row's gate as its maker sees it. The node agent makes one file a row; workers attach to it."""

    def __init__(self, path: Path, file: GateFile) -> None:
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
            gate_file.make(path, time.monotonic_ns())
        return cls.open(path)

    @classmethod
    def open(cls, path: Path | str) -> RowGate:
        """Opens a gate; GateError when the file is missing or is something else."""
        return cls(Path(path), GateFile(Path(path)))

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
        self._file = GateFile(Path(path))
        self.shares = shares
        self.refresh: Callable[[], Shares] | None = None
        self.on_wait: Callable[[], None] | None = None
        self.on_change: Callable[[], None] | None = None
        self.entitled_ns = 0
        self.debt_ns = 0
        self._background = False
        self._borrowed = False
        self._credit_ns = 0
        self._pending_ns = 0
        try:
            self._slot = self._attach(shares)
        except GateError:
            self._file.close()
            raise
        self._core = make_core(self._file, self._slot, os.getpid())

    def _attach(self, shares: Shares) -> int:
        with self._file.locked():
            # In the section, so that it lies behind all that the row has seen, unless the host was restarted since.
            now_ns = time.monotonic_ns()
            row = self._file.load()
            for slot in range(SLOTS):
                if not self._file.take_slot(slot):
                    continue
                if row.holder == slot:  # left behind by one that died
                    row.holder = NOBODY
                row.accounts.pop(slot, None)
                quota.advance(row.clock, row.accounts, now_ns)
                row.in_use = max(row.in_use, slot + 1)
                account = Account(shares.request_permille, shares.limit_permille, shares.window_ns)
                quota.join(account, row.clock, now_ns)
                self._file.store_slot(slot, account, os.getpid(), now_ns)
                self._file.store_row(row)
                return slot
        raise GateError(str(self._file.path), f"all {SLOTS} slots are taken")

    def close(self) -> None:
        """Leaves the gate; the device is given up if it was held."""
        if self._file.descriptor < 0:
            return
        self._core.step(Operation.WITHDRAW, time.monotonic_ns())
        with self._file.locked():
            self._file.clear_slot(self._slot)
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def poll(self) -> None:
        """Puts changed shares into force while the instance is idle."""
        changed = self._changed()
        if changed is not None:
            self._step(Operation.POLL, changed=changed)

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
        changed = self._changed()
        found = self._step(Operation.ACQUIRE, began_ns, changed=changed, background=background)
        if found.granted:
            return self._hold(found, 0)
        expected, sleep_ns = found.expected, found.sleep_ns
        if changed is not None and self.on_change is not None:
            self.on_change()
        return self._wait(expected, sleep_ns, began_ns, deadline_ns, cancelled)

    def _wait(
        self,
        expected: int,
        sleep_ns: int,
        began_ns: int,
        deadline_ns: int | None = None,
        cancelled: Callable[[], bool] | None = None,
    ) -> Grant:
        """Sleeps until the device is handed over or may be taken."""
        if self.on_wait is not None:
            self.on_wait()
        while True:
            if deadline_ns is not None:
                sleep_ns = min(sleep_ns, deadline_ns - time.monotonic_ns())
            self._give_up_if(deadline_ns, cancelled)
            # Shares that changed before this one was known to wait: whoever changed them woke nobody.
            changed = self._changed()
            if changed is None:
                found = self._core.sleep(expected, sleep_ns)
                changed = self._changed()
                if found.granted:
                    grant = self._hold(found, time.monotonic_ns() - began_ns)
                    if changed is not None:
                        self._step(Operation.POLL, changed=changed)
                    return grant
            found = self._step(Operation.LOOK, changed=changed)
            if changed is not None and self.on_change is not None:
                self.on_change()
            if found.granted:
                return self._hold(found, time.monotonic_ns() - began_ns)
            expected, sleep_ns = found.expected, found.sleep_ns

    def _step(
        self, operation: Operation, now_ns: int | None = None, *, changed: Shares | None, background: bool = False
    ) -> Outcome:
        found = self._core.step(
            operation,
            time.monotonic_ns() if now_ns is None else now_ns,
            background=background,
            changed=changed,
        )
        if changed is not None:
            self.shares = changed
        self.debt_ns = found.debt_ns
        return found

    def _hold(self, found: Outcome, wait_ns: int) -> Grant:
        """Notes what this holder may do until it has to look at the row again."""
        self._borrowed = bool(found.borrowed)
        self._credit_ns = found.credit_ns
        self.entitled_ns = found.entitled_ns
        self.debt_ns = found.debt_ns
        return Grant(wait_ns, self._borrowed)

    def renew(self, device_ns: int) -> Grant:
        """Ends a segment, charges it and goes on with the next: at once if this instance is still the one to run."""
        device_ns += self._pending_ns
        changed = self._changed()
        if device_ns < self._credit_ns and changed is None and not self._file.is_wanted():
            self._pending_ns = device_ns
            return _KEPT_BORROWED if self._borrowed else _KEPT
        self._pending_ns = 0
        now_ns = time.monotonic_ns()
        found = self._core.step(Operation.RENEW, now_ns, device_ns=device_ns, changed=changed)
        if changed is not None:
            self.shares = changed
        if found.granted:
            self._hold(found, 0)
            return _KEPT_BORROWED if self._borrowed else _KEPT
        self.debt_ns = found.debt_ns
        expected, sleep_ns = found.expected, found.sleep_ns
        if changed is not None and self.on_change is not None:
            self.on_change()
        return self._wait(expected, sleep_ns, now_ns)

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
        found = self._core.step(Operation.RELEASE, time.monotonic_ns(), device_ns=device_ns, lingers=linger)
        self.debt_ns = found.debt_ns

    def withdraw(self) -> None:
        """Wants the device no more, after `release(linger=True)`; nothing happens when it did not wait."""
        self._step(Operation.WITHDRAW, changed=None)

    def _give_up_if(self, deadline_ns: int | None, cancelled: Callable[[], bool] | None) -> None:
        late = deadline_ns is not None and time.monotonic_ns() >= deadline_ns
        if not late and (cancelled is None or not cancelled()):
            return
        self.withdraw()
        raise GateTimeoutError(str(self._file.path), "the deadline passed" if late else "the wait was cancelled")

    def _changed(self) -> Shares | None:
        if self.refresh is None:
            return None
        shares = self.refresh()
        return shares if shares is not self.shares and shares != self.shares else None
