"""The simulator's gate charges what the live gate's arithmetic charges, segment by segment."""

from __future__ import annotations

from random import Random

import pytest
from hasgpu_device import quota
from hasgpu_device.quota import Account, RowClock
from hasgpu_device.segments import SEGMENT_NS
from hasgpu_sim.physics import CREDIT_S, SEGMENT_S, WINDOW_S, Bucket, Gate

WINDOW_NS = round(WINDOW_S * 1e9)


class LiveRow:
    """A row of one member, in virtual time: what `gate_core` and `segments` do with the arithmetic, nobody waiting."""

    def __init__(self, request_permille: int, limit_permille: int) -> None:
        self.account = Account(request_permille, limit_permille, WINDOW_NS)
        self.clock = RowClock()
        self.now_ns = 0
        quota.join(self.account, self.clock, 0)
        quota.go_idle(self.account, self.clock)

    def _advance(self, now_ns: int) -> None:
        self.now_ns = now_ns
        quota.advance(self.clock, {0: self.account}, now_ns)

    def run(self, at_ns: int, device_ns: int) -> tuple[int, int]:
        """Returns how long a batch takes and what it borrows."""
        account, clock = self.account, self.clock
        self._advance(at_ns)
        quota.wake_up(account, clock, at_ns)
        left_ns, borrowed_ns = device_ns, 0
        while left_ns:
            chosen = quota.choose(clock, {0: account}, self.now_ns)
            if chosen is None:
                self._advance(self.now_ns + max(1, account.ready_in_ns(clock, self.now_ns)))
                continue
            borrowed = chosen[1]
            quota.start(account, clock, 0, borrowed=borrowed)
            credit_ns = quota.credit_ns(account, clock, self.now_ns, borrowed=borrowed)
            used_ns = min(left_ns, SEGMENT_NS)
            while used_ns < min(left_ns, credit_ns):
                used_ns = min(left_ns, used_ns + SEGMENT_NS)
            self._advance(self.now_ns + used_ns)
            quota.charge(account, clock, self.now_ns, device_ns=used_ns, borrowed=borrowed)
            account.waiting, account.holding = True, False
            borrowed_ns += used_ns if borrowed else 0
            left_ns -= used_ns
        quota.go_idle(account, clock)
        return self.now_ns - at_ns, borrowed_ns


def test_the_constants_are_those_of_the_live_gate() -> None:
    assert round(SEGMENT_S * 1e9) == SEGMENT_NS
    assert CREDIT_S == WINDOW_S / quota.CREDIT_PART


@pytest.mark.parametrize(
    ("request_permille", "limit_permille"),
    [(10, 1000), (25, 1000), (100, 1000), (500, 1000), (1000, 1000), (200, 200), (100, 400)],
)
def test_a_batch_takes_and_borrows_what_it_does_live(request_permille: int, limit_permille: int) -> None:
    live, gate, rng = LiveRow(request_permille, limit_permille), Gate(Bucket(), Bucket()), Random(5)
    at_ns, live_borrowed_s, borrowed_s = 0, 0.0, 0.0
    for _ in range(200):
        at_ns += round(rng.expovariate(5.0) * 1e9)
        device_ns = round(rng.uniform(0.5, 60.0) * 1e6)
        live_took_ns, live_ns = live.run(at_ns, device_ns)
        took_s, own_borrowed_s = gate.run(
            at_ns / 1e9, device_ns / 1e9, request_permille=request_permille, limit_permille=limit_permille, alone=True
        )
        live_borrowed_s, borrowed_s = live_borrowed_s + live_ns / 1e9, borrowed_s + own_borrowed_s
        assert took_s == pytest.approx(live_took_ns / 1e9, abs=2 * SEGMENT_S * 1000 / limit_permille)
        at_ns += max(live_took_ns, round(took_s * 1e9))
    assert borrowed_s == pytest.approx(live_borrowed_s, rel=0.02, abs=SEGMENT_S)
