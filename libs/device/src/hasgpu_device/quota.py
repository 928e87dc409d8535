"""The gate's arithmetic: who of a row's instances runs next, and what it is charged. Pure; time comes as arguments.

**Guarantee.** Each instance has a bucket of device time that fills at its request's rate, holds at most one window's
worth and may be overdrawn: a segment is charged what it took, and the debt is carried. With device time in its bucket
an instance is *entitled*. Over T seconds a busy instance uses `request * T`, give or take one window's worth and one
segment.

**Order.** Among entitled waiters the one whose unused quota is largest *relative to its request* goes first. The
relative quota is a time (for how long the instance has not used its share), here called *lag*.

**Turns.** Changing over from one instance to another costs the row some tens of microseconds, so an instance that is
entitled keeps the device for a turn, its share of a window but a quarter of the window at most, before the order is
looked at again. A turn never goes on beyond its quota: over-use stays below one segment.

**Overload.** Buckets fill by the row's own clock. It follows the host's monotonic clock while the row keeps up. When
every instance that waits or runs lags a whole window behind (the host itself is short of time), the row clock slows
down to what was delivered; so the shares of what there is stay in the ratio of the requests, and no instance's unused
quota is cut off at its cap while another's is not.

**Borrowing.** A second bucket at the limit's rate bounds all use. Without quota but within its limit, an instance may
run while nobody entitled waits; such a segment costs it nothing of its guarantee. Borrowers share the idle time in the
ratio of their requests (start-time fair queueing, Goyal, Vin and Cheng, SIGCOMM 1996).

Amounts are integers: device time in a bucket is in ns·‰ (nanoseconds times 1000), so filling is exact.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

PERMILLE = 1_000
UNLIMITED_PERMILLE = 1_000
"""At this limit the second bucket is not looked at: nobody can use more than the whole device."""
FOREVER_NS = 1 << 62
TURN_PART = 4
"""A turn is this part of a window: long beside a change-over, short beside what a waiter can bear."""
CREDIT_PART = 4
"""While nobody waits, up to this part of a window is charged in one."""
NOBODY = -1


@dataclass(slots=True)
class RowClock:
    """What a row's instances share."""

    virtual_ns: int = 0
    """The row clock."""
    seen_ns: int = 0
    """Monotonic time up to which it has been moved on."""
    borrow_ns: int = 0
    """Start tag of the borrowed segment that ran last."""
    turn: int = NOBODY
    """Key of the instance whose turn it is."""
    turn_left_ns: int = 0
    """Device time left of that turn."""


@dataclass(slots=True)
class Account:
    """One instance's part in a row."""

    request_permille: int
    limit_permille: int
    window_ns: int
    waiting: bool = False
    """It wants the device. Instances that neither wait nor hold are idle."""
    holding: bool = False
    background: bool = False
    """The segment wanted may run beyond the limit while the row is idle (warm-up before an instance is ready)."""
    quota: int = 0
    """In its bucket, ns·‰; negative: debt."""
    settled_ns: int = 0
    """Row clock at which `quota` was right."""
    allowance: int = 0
    """In the limit's bucket, ns·‰; negative: debt."""
    allowance_seen_ns: int = 0
    """Monotonic time at which `allowance` was right."""
    idle_since_ns: int = 0
    """Row clock at which it last became idle."""
    idle_lag_ns: int = 0
    """Its lag then."""
    borrow_tag_ns: int = 0
    """Virtual time at which its next borrowed segment may start."""

    def lag_ns(self, clock: RowClock) -> int:
        """For how long, on the row clock, its share has not been used; positive: entitled."""
        return self.quota // self.request_permille + clock.virtual_ns - self.settled_ns

    def debt_ns(self, clock: RowClock) -> int:
        """Device time by which the request is overdrawn."""
        return max(0, -self.lag_ns(clock) * self.request_permille // PERMILLE)

    def entitled(self, clock: RowClock, now_ns: int) -> bool:
        """Tells whether it may run by its guarantee."""
        return self.within_limit(now_ns) and self.lag_ns(clock) > 0

    def within_limit(self, now_ns: int) -> bool:
        """Tells whether it is inside its limit."""
        return (
            self.limit_permille >= UNLIMITED_PERMILLE
            or self.limit_permille == self.request_permille  # the first bucket bounds it already
            or self.allowance + (now_ns - self.allowance_seen_ns) * self.limit_permille > 0
        )

    def settle(self, clock: RowClock, now_ns: int) -> None:
        """Fills both buckets up to now."""
        self.quota += (clock.virtual_ns - self.settled_ns) * self.request_permille
        self.settled_ns = clock.virtual_ns
        grown = self.allowance + max(0, now_ns - self.allowance_seen_ns) * self.limit_permille
        self.allowance = min(grown, self.window_ns * self.limit_permille)
        self.allowance_seen_ns = now_ns

    def ready_in_ns(self, clock: RowClock, now_ns: int) -> int:
        """After how long it may run at the earliest, by its guarantee or by borrowing; 0: now."""
        if self.background:
            return 0
        if self.limit_permille == self.request_permille:
            return max(-self.lag_ns(clock) + 1, 0)
        if self.within_limit(now_ns):
            return 0
        allowance = self.allowance + (now_ns - self.allowance_seen_ns) * self.limit_permille
        return -allowance // self.limit_permille + 1


def join(account: Account, clock: RowClock, now_ns: int) -> None:
    """Starts an instance with empty buckets: it comes to its share from now on and owes nothing."""
    account.quota = 0
    account.settled_ns = clock.virtual_ns
    account.allowance = 0
    account.allowance_seen_ns = now_ns
    account.idle_since_ns = clock.virtual_ns
    account.idle_lag_ns = 0
    account.borrow_tag_ns = clock.borrow_ns


def advance(clock: RowClock, accounts: Mapping[int, Account], now_ns: int) -> None:
    """Moves the row clock on to now; to be called before any account changes.

    Args:
        clock: The row's clock.
        accounts: All live instances of the row, as they were since the last call.
        now_ns: Monotonic time. If it lies before the last call the clock stands still, and goes on from there: only
            the host's restart is a reason; one who comes late passes the time of the last call.
    """
    elapsed_ns = max(0, now_ns - clock.seen_ns)
    clock.seen_ns = now_ns
    # What the least-lagging busy instance lacks to a full window: beyond that everybody lags, so the row is overloaded.
    room_ns = FOREVER_NS
    busy = [account for account in accounts.values() if account.waiting or account.holding]
    if busy:
        room_ns = max(account.window_ns - account.lag_ns(clock) for account in busy)
    clock.virtual_ns += min(elapsed_ns, max(0, room_ns))


def wake_up(account: Account, clock: RowClock, now_ns: int) -> None:
    """An idle instance wants the device: what it left unused expires beyond one window.

    What an overloaded row owed it when it paused is kept for a window.
    """
    account.settle(clock, now_ns)
    cap_ns = account.window_ns
    if clock.virtual_ns - account.idle_since_ns < account.window_ns:
        cap_ns = max(cap_ns, account.idle_lag_ns)
    account.quota = min(account.quota, cap_ns * account.request_permille)
    account.waiting = True


def go_idle(account: Account, clock: RowClock) -> None:
    """The instance neither waits nor holds any more."""
    account.waiting = account.holding = False
    account.idle_since_ns = clock.virtual_ns
    account.idle_lag_ns = account.lag_ns(clock)


def choose(clock: RowClock, accounts: Mapping[int, Account], now_ns: int) -> tuple[int, bool] | None:
    """Says who runs next on a free device.

    Args:
        clock: The row's clock, moved on to now.
        accounts: All live instances; those that wait are weighed.
        now_ns: Monotonic time.

    Returns:
        The key of the instance and whether it borrows; None while nobody may run.
    """
    turn = accounts.get(clock.turn) if clock.turn_left_ns > 0 else None
    if turn is not None and turn.waiting and turn.entitled(clock, now_ns):
        return clock.turn, False
    best: tuple[int, int] | None = None
    for key, account in accounts.items():
        if account.waiting and account.entitled(clock, now_ns):
            candidate = (-account.lag_ns(clock), key)
            best = candidate if best is None else min(best, candidate)
    if best is not None:
        return best[1], False
    for key, account in accounts.items():
        if not account.waiting:
            continue
        may_borrow = account.limit_permille > account.request_permille and account.within_limit(now_ns)
        if may_borrow or account.background:
            candidate = (max(account.borrow_tag_ns, clock.borrow_ns), key)
            best = candidate if best is None else min(best, candidate)
    return None if best is None else (best[1], True)


def start(account: Account, clock: RowClock, key: int, *, borrowed: bool) -> None:
    """The instance chosen holds the device from now on.

    Args:
        account: Whose.
        clock: The row's clock.
        key: Of the account.
        borrowed: As `choose` said.
    """
    account.waiting, account.holding = False, True
    if borrowed:
        clock.turn = NOBODY
    elif clock.turn != key or clock.turn_left_ns <= 0:
        own_ns = account.window_ns * account.request_permille // PERMILLE
        clock.turn, clock.turn_left_ns = key, min(account.window_ns // TURN_PART, own_ns)


def credit_ns(account: Account, clock: RowClock, now_ns: int, *, borrowed: bool) -> int:
    """Returns how much device time the holder may use before it has to be charged, while nobody else waits."""
    credit_ns = account.window_ns // CREDIT_PART
    if not borrowed:
        credit_ns = min(credit_ns, account.lag_ns(clock) * account.request_permille // PERMILLE)
    if account.limit_permille < UNLIMITED_PERMILLE and not account.background:
        allowance = account.allowance + (now_ns - account.allowance_seen_ns) * account.limit_permille
        credit_ns = min(credit_ns, allowance // PERMILLE)
    return max(0, credit_ns)


def charge(account: Account, clock: RowClock, now_ns: int, *, device_ns: int, borrowed: bool) -> None:
    """Charges a segment.

    Args:
        account: Whose.
        clock: The row's clock, moved on to now.
        now_ns: Monotonic time.
        device_ns: Device time measured.
        borrowed: As `choose` said when the segment began.
    """
    account.settle(clock, now_ns)
    if not account.background or not borrowed:
        account.allowance -= device_ns * PERMILLE
    if borrowed:
        start_ns = max(account.borrow_tag_ns, clock.borrow_ns)
        clock.borrow_ns = start_ns
        account.borrow_tag_ns = start_ns + device_ns * PERMILLE // account.request_permille
    else:
        account.quota -= device_ns * PERMILLE
        clock.turn_left_ns -= device_ns


def reshape(
    account: Account, clock: RowClock, now_ns: int, *, request_permille: int, limit_permille: int, window_ns: int
) -> None:
    """Gives an instance other shares. Device time saved or owed stays what it is, up to the new window's worth."""
    account.settle(clock, now_ns)
    account.request_permille = request_permille
    account.limit_permille = limit_permille
    account.window_ns = window_ns
    account.quota = min(account.quota, window_ns * request_permille)
    account.allowance = min(account.allowance, window_ns * limit_permille)
    account.idle_lag_ns = account.lag_ns(clock)
