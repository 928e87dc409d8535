"""The gate's arithmetic under a clock moved by hand."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass, field

import pytest
from hasgpu_device import quota
from hasgpu_device.quota import Account, RowClock
from hypothesis import given, settings
from hypothesis import strategies as st

MS = 1_000_000
WINDOW = 40 * MS
SECOND = 1_000 * MS


@dataclass
class Tenant:
    """One simulated instance: how it uses the device, and what it got."""

    request: int
    limit: int
    segment_ns: int = 5 * MS
    spread: float = 0.3
    pause_ns: int = 0
    """Between two segments, off the gate; 0: it never leaves."""
    used_ns: int = 0
    wants_from_ns: int = 0
    segments: list[int] = field(default_factory=list)
    ends: list[tuple[int, int, bool]] = field(default_factory=list)
    """When a segment ended, what it took, whether it was borrowed."""
    waits_from_ns: int = 0
    entitled_waits_ns: list[int] = field(default_factory=list)
    """How long it waited for each segment while it was entitled."""


class RowSimulator:
    """Plays a row; `overhead_ns` is lost between two segments, `loss` stretches what a segment takes on the wall."""

    def __init__(self, tenants: list[Tenant], *, overhead_ns: int = 0, loss: float = 0.0, seed: int = 1) -> None:
        self.tenants = tenants
        self.now_ns = 12_345 * MS
        self.clock = RowClock(seen_ns=self.now_ns)
        self.random = random.Random(seed)
        self.overhead_ns = overhead_ns
        self.loss = loss
        self.accounts = {}
        for index, tenant in enumerate(tenants):
            self.accounts[index] = Account(tenant.request, tenant.limit, WINDOW)
            quota.join(self.accounts[index], self.clock, self.now_ns)
            tenant.wants_from_ns = self.now_ns

    def move(self, to_ns: int) -> None:
        self.now_ns = to_ns
        quota.advance(self.clock, self.accounts, self.now_ns)

    def run(self, duration_ns: int) -> None:
        end_ns = self.now_ns + duration_ns
        while self.now_ns < end_ns:
            self.move(self.now_ns)
            for index, tenant in enumerate(self.tenants):
                account = self.accounts[index]
                if not account.waiting and tenant.wants_from_ns <= self.now_ns:
                    quota.wake_up(account, self.clock, self.now_ns)
            chosen = quota.choose(self.clock, self.accounts, self.now_ns)
            if chosen is None:
                self.move(min(self.next_event_ns(), end_ns))
                continue
            self.run_segment(*chosen)

    def next_event_ns(self) -> int:
        times = []
        for index, tenant in enumerate(self.tenants):
            account = self.accounts[index]
            if account.waiting:
                times.append(self.now_ns + account.ready_in_ns(self.clock, self.now_ns))
            else:
                times.append(tenant.wants_from_ns)
        return max(min(times), self.now_ns + 1)

    def run_segment(self, index: int, borrowed: bool) -> None:
        tenant, account = self.tenants[index], self.accounts[index]
        lag_ns = max(0, account.lag_ns(self.clock))
        tenant.entitled_waits_ns.append(min(self.now_ns - max(tenant.waits_from_ns, tenant.wants_from_ns), lag_ns))
        quota.start(account, self.clock, index, borrowed=borrowed)
        device_ns = max(1, round(tenant.segment_ns * max(0.1, self.random.gauss(1, tenant.spread))))
        arrive_ns = self.now_ns + round(device_ns * (1 + self.loss)) + self.overhead_ns
        # Others may come while it runs.
        for other_index, other in enumerate(self.tenants):
            other_account = self.accounts[other_index]
            idle = not other_account.waiting and not other_account.holding
            if idle and self.now_ns < other.wants_from_ns < arrive_ns:
                self.move(other.wants_from_ns)
                quota.wake_up(other_account, self.clock, self.now_ns)
        self.move(arrive_ns)
        quota.charge(account, self.clock, self.now_ns, device_ns=device_ns, borrowed=borrowed)
        tenant.waits_from_ns = self.now_ns
        tenant.used_ns += device_ns
        tenant.segments.append(device_ns)
        tenant.ends.append((self.now_ns, device_ns, borrowed))
        if tenant.pause_ns:
            quota.go_idle(account, self.clock)
            tenant.wants_from_ns = self.now_ns + tenant.pause_ns
        else:
            account.waiting, account.holding = True, False


def shares(tenants: list[Tenant]) -> list[float]:
    total = sum(tenant.used_ns for tenant in tenants)
    return [1_000 * tenant.used_ns / total for tenant in tenants]


@given(
    request=st.integers(10, 1000),
    segment_ms=st.floats(0.2, 20),
    spread=st.floats(0, 0.5),
    seed=st.integers(0, 1_000),
)
@settings(max_examples=40, deadline=None)
def test_one_busy_tenant_uses_its_quota(request: int, segment_ms: float, spread: float, seed: int) -> None:
    tenant = Tenant(request, request, round(segment_ms * MS), spread)
    row = RowSimulator([tenant], seed=seed)
    row.run(2 * SECOND)
    longest = max(tenant.segments)
    # The last segment may reach beyond the end.
    elapsed = 2 * SECOND + longest
    assert tenant.used_ns <= elapsed * request / 1000 + WINDOW * request / 1000 + longest
    assert tenant.used_ns >= 2 * SECOND * request / 1000 - WINDOW * request / 1000 - longest


@given(
    weights=st.lists(st.integers(1, 20), min_size=2, max_size=5),
    limits=st.sampled_from(["request", "whole"]),
    segment_ms=st.lists(st.floats(0.5, 8), min_size=5, max_size=5),
    overhead_us=st.integers(0, 400),
    loss=st.sampled_from([0.0, 0.1, 1.0]),
    seed=st.integers(0, 1_000),
)
@settings(max_examples=40, deadline=None)
def test_a_full_busy_row_is_shared_as_asked(
    weights: list[int], limits: str, segment_ms: list[float], overhead_us: int, loss: float, seed: int
) -> None:
    total = sum(weights)
    requests = [max(10, 1000 * weight // total) for weight in weights]
    requests[0] += 1000 - sum(requests)
    if requests[0] < 10:
        return
    tenants = [
        Tenant(request, request if limits == "request" else 1000, round(ms * MS))
        for request, ms in zip(requests, segment_ms, strict=False)
    ]
    row = RowSimulator(tenants, overhead_ns=overhead_us * 1000, loss=loss, seed=seed)
    row.run(5 * SECOND)
    delivered = sum(tenant.used_ns for tenant in tenants)
    for tenant in tenants:
        expected = delivered * tenant.request / 1000
        slack = 2 * WINDOW * tenant.request / 1000 + 2 * max(max(other.segments) for other in tenants)
        assert abs(tenant.used_ns - expected) <= slack, shares(tenants)


@given(
    requests=st.lists(st.integers(10, 400), min_size=1, max_size=4),
    limits=st.lists(st.integers(0, 1000), min_size=4, max_size=4),
    segment_ms=st.lists(st.floats(0.3, 15), min_size=4, max_size=4),
    pause_ms=st.lists(st.sampled_from([0.0, 0.0, 3.0, 90.0]), min_size=4, max_size=4),
    seed=st.integers(0, 1_000),
)
@settings(max_examples=40, deadline=None)
def test_no_window_delivers_more_than_its_share(
    requests: list[int], limits: list[int], segment_ms: list[float], pause_ms: list[float], seed: int
) -> None:
    tenants = [
        Tenant(min(request, 1000 // len(requests)), max(request, limit), round(ms * MS), pause_ns=round(pause * MS))
        for request, limit, ms, pause in zip(requests, limits, segment_ms, pause_ms, strict=False)
    ]
    RowSimulator(tenants, seed=seed).run(3 * SECOND)
    for tenant in tenants:
        owned = [(end, took) for end, took, borrowed in tenant.ends if not borrowed]
        for permille, ends in ((tenant.request, owned), (tenant.limit, [end[:2] for end in tenant.ends])):
            for first, (start_ns, _) in enumerate(ends):
                inside = [took for end, took in ends[first:] if end <= start_ns + WINDOW]
                # Its share of this window, what it had left of the one before, and one segment.
                assert sum(inside) <= 2 * WINDOW * permille / 1000 + 2 * max(tenant.segments)


@given(
    weights=st.lists(st.integers(1, 10), min_size=2, max_size=8),
    segment_ms=st.floats(0.5, 5),
    overhead_us=st.sampled_from([0, 0, 100, 400]),
    seed=st.integers(0, 1_000),
)
@settings(max_examples=25, deadline=None)
def test_nobody_entitled_waits_longer_than_two_windows(
    weights: list[int], segment_ms: float, overhead_us: int, seed: int
) -> None:
    requests = [max(10, 1000 * weight // sum(weights) - 10) for weight in weights]
    tenants = [Tenant(request, 1000, round(segment_ms * MS)) for request in requests]
    RowSimulator(tenants, overhead_ns=overhead_us * 1000, seed=seed).run(3 * SECOND // 2)
    longest_ns = max(max(tenant.segments) for tenant in tenants)
    # A row that loses time between its segments is overloaded: everybody's turn comes later, and still comes.
    windows = 4 if overhead_us else 2
    for tenant in tenants:
        assert max(tenant.entitled_waits_ns) <= windows * WINDOW + longest_ns


def test_turns_spare_change_overs() -> None:
    tenants = [Tenant(250, 250, MS // 2, spread=0) for _ in range(4)]
    row = RowSimulator(tenants, overhead_ns=MS // 10)
    row.run(5 * SECOND)
    for tenant in tenants:
        tenant.ends.clear()
    row.run(5 * SECOND)
    order = sorted((end, index) for index, tenant in enumerate(tenants) for end, _, _ in tenant.ends)
    changes = sum(one != other for (_, one), (_, other) in itertools.pairwise(order))
    assert changes < len(order) / 5
    assert shares(tenants) == pytest.approx([250] * 4, abs=5)


def test_credit_ends_where_quota_or_limit_do() -> None:
    clock = RowClock()
    account = Account(500, 600, WINDOW)
    quota.join(account, clock, 0)
    quota.advance(clock, {0: account}, 4 * MS)
    account.settle(clock, 4 * MS)
    assert quota.credit_ns(account, clock, 4 * MS, borrowed=False) == 2 * MS
    quota.charge(account, clock, 4 * MS, device_ns=2 * MS, borrowed=False)
    assert quota.credit_ns(account, clock, 4 * MS, borrowed=False) == 0
    assert quota.credit_ns(account, clock, 4 * MS, borrowed=True) == round(0.4 * MS)
    account.limit_permille = 1000
    assert quota.credit_ns(account, clock, 4 * MS, borrowed=True) == WINDOW // quota.CREDIT_PART


def test_pauses_cost_only_the_one_that_pauses() -> None:
    tenants = [Tenant(700, 700, pause_ns=MS // 5), Tenant(100, 100), Tenant(100, 100)]
    RowSimulator(tenants).run(20 * SECOND)
    used = [1_000 * tenant.used_ns / (20 * SECOND) for tenant in tenants]
    assert used == pytest.approx([700, 100, 100], abs=4)
    busy = [Tenant(800, 800, pause_ns=MS // 5), Tenant(100, 100), Tenant(100, 100)]
    RowSimulator(busy, loss=0.2).run(20 * SECOND)
    assert min(tenant.used_ns for tenant in busy[1:]) / (20 * SECOND) > 0.8 * 0.1


def test_a_guarantee_holds_against_borrowers() -> None:
    steady = Tenant(200, 200)
    greedy = [Tenant(100, 1000), Tenant(100, 1000, segment_ns=8 * MS)]
    RowSimulator([steady, *greedy]).run(20 * SECOND)
    assert steady.used_ns / (20 * SECOND) == pytest.approx(0.2, abs=0.004)
    assert sum(tenant.used_ns for tenant in [steady, *greedy]) / (20 * SECOND) > 0.999
    # Equal requests borrow equally, though one's segments are longer.
    assert greedy[0].used_ns == pytest.approx(greedy[1].used_ns, rel=0.02)


def test_a_guarantee_holds_against_a_borrower_with_long_segments() -> None:
    steady, greedy = Tenant(300, 300), Tenant(10, 1000, segment_ns=90 * MS, spread=0)
    RowSimulator([steady, greedy]).run(60 * SECOND)
    assert steady.used_ns / (60 * SECOND) == pytest.approx(0.3, abs=0.01)


def test_a_limit_bounds_borrowing() -> None:
    tenant = Tenant(100, 400)
    RowSimulator([tenant]).run(20 * SECOND)
    assert tenant.used_ns / (20 * SECOND) == pytest.approx(0.4, abs=0.004)


def test_a_borrower_stays_behind_the_entitled() -> None:
    clock = RowClock()
    accounts = {0: Account(500, 500, WINDOW), 1: Account(500, 1000, WINDOW)}
    for account in accounts.values():
        quota.join(account, clock, 0)
    quota.advance(clock, accounts, 10 * MS)
    for account in accounts.values():
        quota.wake_up(account, clock, 10 * MS)
    quota.charge(accounts[1], clock, 10 * MS, device_ns=20 * MS, borrowed=False)
    assert quota.choose(clock, accounts, 10 * MS) == (0, False)
    accounts[0].waiting = False
    assert quota.choose(clock, accounts, 10 * MS) == (1, True)


def test_unused_quota_expires_with_the_window() -> None:
    clock = RowClock()
    account = Account(250, 250, WINDOW)
    quota.join(account, clock, 0)
    quota.advance(clock, {0: account}, 60 * SECOND)
    quota.wake_up(account, clock, 60 * SECOND)
    assert account.quota == WINDOW * 250


def test_debt_is_carried_and_kept_when_the_request_changes() -> None:
    clock = RowClock()
    account = Account(100, 100, WINDOW)
    quota.join(account, clock, 0)
    quota.charge(account, clock, 0, device_ns=8 * MS, borrowed=False)
    assert account.debt_ns(clock) == 8 * MS
    assert account.ready_in_ns(clock, 0) == 80 * MS + 1
    quota.reshape(account, clock, 0, request_permille=800, limit_permille=800, window_ns=WINDOW)
    assert account.debt_ns(clock) == 8 * MS
    assert account.ready_in_ns(clock, 0) == 10 * MS + 1


def test_the_clock_stands_still_when_time_goes_back() -> None:
    clock = RowClock(virtual_ns=500, seen_ns=10_000)
    quota.advance(clock, {}, 3_000)
    assert (clock.virtual_ns, clock.seen_ns) == (500, 3_000)


def test_warming_up_runs_beyond_the_limit_only_on_an_idle_row() -> None:
    clock = RowClock()
    accounts = {0: Account(10, 10, WINDOW, background=True), 1: Account(500, 500, WINDOW)}
    for account in accounts.values():
        quota.join(account, clock, 0)
    quota.charge(accounts[0], clock, 0, device_ns=8 * MS, borrowed=False)
    accounts[0].waiting = True
    assert quota.choose(clock, accounts, 0) == (0, True)
    debt_ns = accounts[0].debt_ns(clock)
    quota.charge(accounts[0], clock, 0, device_ns=8 * MS, borrowed=True)
    assert accounts[0].debt_ns(clock) == debt_ns
    quota.advance(clock, accounts, MS)
    quota.wake_up(accounts[1], clock, MS)
    assert quota.choose(clock, accounts, MS) == (1, False)
