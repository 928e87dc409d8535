"""One pass through a gate's critical section, twice: in Python, and in C (`native/gate.c`) where it has been built.

Both work on the same page and decide by the same arithmetic (`hasgpu_device.quota`), so members of either kind may
share a row.
"""

from __future__ import annotations

import ctypes
from enum import IntEnum
from typing import NamedTuple, Protocol

from hasgpu_device import futex, native, quota
from hasgpu_device.control import Shares
from hasgpu_device.errors import GateError
from hasgpu_device.gate_file import GateFile, Row
from hasgpu_device.quota import NOBODY, Account

STALE_WINDOWS = 8
"""A waiter wakes at least once a window; one that has not for so many is stopped (SIGSTOP, a debugger)."""
LINGER_PART = 8
"""An instance that lingers for longer than this part of a window has lost its turn."""


class Operation(IntEnum):
    """What a member does at the gate."""

    POLL = 0
    """Puts changed shares into force."""
    ACQUIRE = 1
    """Wants the device, and takes it if it is its turn."""
    LOOK = 2
    """Looks again, after a sleep."""
    RENEW = 3
    """Ends a segment and wants the next."""
    RELEASE = 4
    """Ends a segment."""
    WITHDRAW = 5
    """Wants the device no more."""


class Outcome(Protocol):
    """What a pass came to."""

    @property
    def granted(self) -> int:
        """1: the device is held."""
        ...

    @property
    def borrowed(self) -> int:
        """1: beyond the request."""
        ...

    @property
    def expected(self) -> int:
        """What the member's futex word holds: to be slept on."""
        ...

    @property
    def sleep_ns(self) -> int:
        """How long to sleep at most, when nothing was granted."""
        ...

    @property
    def credit_ns(self) -> int:
        """Device time that may be used before the next pass, while nobody waits."""
        ...

    @property
    def entitled_ns(self) -> int:
        """For how long, on the row's clock, the member had been entitled to what it was granted."""
        ...

    @property
    def debt_ns(self) -> int:
        """Device time by which the request is overdrawn."""
        ...


class Core(Protocol):
    """A member's way into the critical section."""

    def step(
        self,
        operation: Operation,
        now_ns: int,
        *,
        device_ns: int = 0,
        background: bool = False,
        lingers: bool = False,
        changed: Shares | None = None,
    ) -> Outcome:
        """Makes one pass, and wakes whoever is to run next.

        Args:
            operation: What.
            now_ns: Monotonic time.
            device_ns: What the segment that ends has used.
            background: For ACQUIRE, as in `GateMember.acquire`.
            lingers: For RELEASE, as in `GateMember.release`.
            changed: Shares to be put into force first.

        Returns:
            What it came to; good until the next call.

        Raises:
            GateError: A segment was to end, and the device is not held.
        """
        ...

    def sleep(self, expected: int, sleep_ns: int) -> Outcome:
        """Sleeps while the member's word holds `expected`, and takes up what was handed over meanwhile."""
        ...


def make_core(file: GateFile, slot: int, pid: int) -> Core:
    """Returns the fastest core that there is here."""
    library = native.load()
    return PythonCore(file, slot, pid) if library is None else NativeCore(library, file, slot)


class _Order(ctypes.Structure):
    _fields_ = (
        ("operation", ctypes.c_int32),
        ("slot", ctypes.c_int32),
        ("background", ctypes.c_int32),
        ("lingers", ctypes.c_int32),
        ("request", ctypes.c_uint32),
        ("limit", ctypes.c_uint32),
        ("window_ns", ctypes.c_int64),
        ("now_ns", ctypes.c_int64),
        ("device_ns", ctypes.c_int64),
    )


class _Outcome(ctypes.Structure):
    _fields_ = (
        ("granted", ctypes.c_int32),
        ("borrowed", ctypes.c_int32),
        ("expected", ctypes.c_uint32),
        ("unused", ctypes.c_int32),
        ("sleep_ns", ctypes.c_int64),
        ("credit_ns", ctypes.c_int64),
        ("entitled_ns", ctypes.c_int64),
        ("debt_ns", ctypes.c_int64),
    )


_NOT_HELD = 1


class NativeCore:
    """The core in C. ctypes gives the interpreter's lock up for as long as a call takes."""

    def __init__(self, library: native.Library, file: GateFile, slot: int) -> None:
        self._file = file
        self._slot = slot
        self._order = _Order(slot=slot)
        self._outcome = _Outcome()
        # The mapping lives as long as the file object does, which this one holds.
        self._page = ctypes.addressof(ctypes.c_char.from_buffer(file.memory))
        self._by_order, self._by_outcome = ctypes.byref(self._order), ctypes.byref(self._outcome)
        self._step, self._sleep = library.step, library.sleep

    def step(
        self,
        operation: Operation,
        now_ns: int,
        *,
        device_ns: int = 0,
        background: bool = False,
        lingers: bool = False,
        changed: Shares | None = None,
    ) -> Outcome:
        """Makes one pass, as in `Core`."""
        order = self._order
        order.operation, order.now_ns, order.device_ns = operation, now_ns, device_ns
        order.background, order.lingers = background, lingers
        order.request = 0
        if changed is not None:
            order.request, order.limit = changed.request_permille, changed.limit_permille
            order.window_ns = changed.window_ns
        code = self._step(self._file.descriptor, self._page, self._by_order, self._by_outcome)
        if code:
            self._fail(code)
        outcome: Outcome = self._outcome
        return outcome

    def sleep(self, expected: int, sleep_ns: int) -> Outcome:
        """Sleeps, as in `Core`."""
        code = self._sleep(self._file.descriptor, self._page, self._slot, expected, sleep_ns, self._by_outcome)
        if code:
            self._fail(code)
        outcome: Outcome = self._outcome
        return outcome

    def _fail(self, code: int) -> None:
        reason = "the device is not held" if code == _NOT_HELD else "its lock can't be taken"
        raise GateError(str(self._file.path), reason)


class PythonOutcome(NamedTuple):
    """An `Outcome`."""

    granted: int = 0
    borrowed: int = 0
    expected: int = 0
    sleep_ns: int = 0
    credit_ns: int = 0
    entitled_ns: int = 0
    debt_ns: int = 0


class PythonCore:
    """The core in Python: for hosts without a C compiler, and what the other is tested against."""

    def __init__(self, file: GateFile, slot: int, pid: int) -> None:
        self._file = file
        self._slot = slot
        self._pid = pid
        self._operations = {
            Operation.ACQUIRE: self._acquire,
            Operation.LOOK: self._look_again,
            Operation.RENEW: self._renew,
            Operation.RELEASE: self._release,
            Operation.WITHDRAW: self._withdraw,
        }

    def step(
        self,
        operation: Operation,
        now_ns: int,
        *,
        device_ns: int = 0,
        background: bool = False,
        lingers: bool = False,
        changed: Shares | None = None,
    ) -> Outcome:
        """Makes one pass, as in `Core`."""
        with self._file.locked():
            row = self._file.load()
            # Another may have looked at the clock later and been here first: going back would count that time twice.
            now_ns = max(now_ns, row.clock.seen_ns)
            self._tidy(row, now_ns)
            own = row.accounts[self._slot]
            if changed is not None:
                quota.reshape(
                    own,
                    row.clock,
                    now_ns,
                    request_permille=changed.request_permille,
                    limit_permille=changed.limit_permille,
                    window_ns=changed.window_ns,
                )
            if operation in (Operation.RENEW, Operation.RELEASE) and row.holder != self._slot:
                raise GateError(str(self._file.path), "the device is not held")
            if operation is Operation.ACQUIRE:
                self._want(row, own, now_ns, background=background)
            if operation in (Operation.RENEW, Operation.RELEASE):
                quota.charge(own, row.clock, now_ns, device_ns=device_ns, borrowed=row.borrowed)
                row.holder = NOBODY
            if operation is Operation.RELEASE:
                own.background = False
                quota.go_idle(own, row.clock)
                own.waiting = lingers
            outcome, waker = PythonOutcome(), NOBODY
            if operation is not Operation.POLL:
                outcome, waker = self._operations[operation](row, own, now_ns)
            lingers = lingers and operation is Operation.RELEASE
            self._file.store_slot(self._slot, own, self._pid, now_ns, lingers=lingers)
            self._file.store_row(row)
            debt_ns = own.debt_ns(row.clock)
        if waker != NOBODY:
            futex.wake(self._file.words[waker])
        return outcome._replace(debt_ns=debt_ns)

    def sleep(self, expected: int, sleep_ns: int) -> Outcome:
        """Sleeps, as in `Core`."""
        futex.wait(self._file.words[self._slot], expected, sleep_ns)
        if not self._file.take_up(self._slot):
            return PythonOutcome()
        borrowed, lag_ns, debt_ns = self._file.handed_over(self._slot)
        return PythonOutcome(granted=1, borrowed=borrowed, entitled_ns=lag_ns, debt_ns=debt_ns)

    def _want(self, row: Row, own: Account, now_ns: int, *, background: bool) -> None:
        if not own.waiting:
            quota.wake_up(own, row.clock, now_ns)
        own.background = background

    def _acquire(self, row: Row, own: Account, now_ns: int) -> tuple[PythonOutcome, int]:
        return self._look(row, own, now_ns)

    def _look_again(self, row: Row, own: Account, now_ns: int) -> tuple[PythonOutcome, int]:
        if not own.waiting and row.holder != self._slot:
            quota.wake_up(own, row.clock, now_ns)  # what it was granted is void
        return self._look(row, own, now_ns)

    def _renew(self, row: Row, own: Account, now_ns: int) -> tuple[PythonOutcome, int]:
        own.waiting, own.holding = True, False
        return self._look(row, own, now_ns)

    def _release(self, row: Row, own: Account, now_ns: int) -> tuple[PythonOutcome, int]:
        return PythonOutcome(), self._hand_on(row, now_ns)

    def _withdraw(self, row: Row, own: Account, now_ns: int) -> tuple[PythonOutcome, int]:
        if row.holder == self._slot:  # handed over in this very moment
            row.holder = NOBODY
        if own.waiting or own.holding:
            quota.go_idle(own, row.clock)
        # The others may have slept because this one was to run first.
        return PythonOutcome(), self._hand_on(row, now_ns)

    def _look(self, row: Row, own: Account, now_ns: int) -> tuple[PythonOutcome, int]:
        """Takes the device if it is this one's turn; else hands it on and says how long to sleep."""
        granted = row.holder == self._slot
        if not granted and row.holder == NOBODY:
            chosen = quota.choose(row.clock, row.accounts, now_ns)
            if chosen is not None and chosen[0] == self._slot:
                self._start(row, self._slot, borrowed=chosen[1])
                granted = True
        sleep_ns = own.ready_in_ns(row.clock, now_ns) or own.window_ns
        outcome = PythonOutcome(
            granted=int(granted),
            borrowed=int(granted and row.borrowed),
            expected=self._file.words[self._slot].value,
            sleep_ns=min(sleep_ns, own.window_ns // (LINGER_PART if row.lingering - {self._slot} else 1)),
        )
        if not granted:
            return outcome, self._hand_on(row, now_ns)
        alone = not any(account.waiting for account in row.accounts.values())
        credit_ns = quota.credit_ns(own, row.clock, now_ns, borrowed=row.borrowed) if alone else 0
        return outcome._replace(credit_ns=credit_ns, entitled_ns=max(0, own.lag_ns(row.clock))), NOBODY

    def _start(self, row: Row, slot: int, *, borrowed: bool) -> None:
        quota.start(row.accounts[slot], row.clock, slot, borrowed=borrowed)
        row.holder, row.borrowed = slot, borrowed

    def _hand_on(self, row: Row, now_ns: int) -> int:
        """Hands a free device to the waiter that should run next and returns whom to wake.

        Whoever lingers has not come back yet: it is woken, and the device waits for it.
        """
        while row.holder == NOBODY:
            chosen = quota.choose(row.clock, row.accounts, now_ns)
            if chosen is None or chosen[0] == self._slot:
                return NOBODY
            slot, borrowed = chosen
            if not self._file.slot_lives(slot):
                self._drop(row, slot)
                continue
            if slot not in row.lingering:
                self._start(row, slot, borrowed=borrowed)
                self._file.store_slot(slot, row.accounts[slot], row.pids[slot], now_ns, granted=True)
            word = self._file.words[slot]
            word.value = (word.value + 1) & 0xFFFFFFFF
            return slot
        return NOBODY

    def _drop(self, row: Row, slot: int) -> None:
        del row.accounts[slot]
        row.lingering.discard(slot)
        self._file.clear_slot(slot)
        if row.holder == slot:
            row.holder = NOBODY

    def _tidy(self, row: Row, now_ns: int) -> None:
        """Lets go of what the dead and the stopped hold, and moves the clock on."""
        for slot in list(row.accounts):
            if slot == self._slot:
                continue
            account = row.accounts[slot]
            silent_ns = now_ns - row.stamps_ns[slot]
            if row.holder == slot and not self._file.slot_lives(slot):
                self._drop(row, slot)
            elif row.granted == slot:
                # Whoever was handed the device takes it up at once, unless it is stopped or the host is very busy.
                if row.holder == slot and silent_ns > account.window_ns:
                    row.holder = NOBODY
                    quota.go_idle(account, row.clock)
                    self._file.store_slot(slot, account, row.pids[slot], row.stamps_ns[slot])
            elif account.waiting:
                patience_ns = account.window_ns * STALE_WINDOWS
                if slot in row.lingering:
                    patience_ns = account.window_ns // LINGER_PART
                if silent_ns > patience_ns:
                    if self._file.slot_lives(slot):
                        del row.accounts[slot]
                    else:
                        self._drop(row, slot)
        quota.advance(row.clock, row.accounts, now_ns)
