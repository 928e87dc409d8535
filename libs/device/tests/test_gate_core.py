"""The gate's two cores decide alike: the same play on two pages leaves equal pages."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hasgpu_device import gate_file, native
from hasgpu_device.control import Shares
from hasgpu_device.errors import GateError
from hasgpu_device.gate import GateMember, RowGate
from hasgpu_device.gate_core import Core, NativeCore, Operation, PythonCore
from hypothesis import given, settings
from hypothesis import strategies as st

MS = 1_000_000
PID = 4_711


class Stage:
    """A gate whose members are driven by hand, in a time of their own."""

    def __init__(self, path: Path, kind: str, shares: list[Shares]) -> None:
        gate_file.make(path, 0)
        self.path = path
        self.members = [GateMember(path, share) for share in shares]
        self.cores: list[Core] = []
        for slot, member in enumerate(self.members):
            if kind == "native":
                library = native.load()
                assert library is not None
                self.cores.append(NativeCore(library, member._file, slot))
            else:
                self.cores.append(PythonCore(member._file, slot, PID))
        # Members joined by the host's clock; the play has its own.
        file = self.members[0]._file
        with file.locked():
            row = file.load()
            row.clock.seen_ns = row.clock.virtual_ns = row.clock.borrow_ns = 0
            for slot, account in row.accounts.items():
                account.settled_ns = account.allowance_seen_ns = account.idle_since_ns = account.borrow_tag_ns = 0
                account.quota = account.allowance = 0
                file.store_slot(slot, account, PID, 0)
            file.store_row(row)

    def page(self) -> bytes:
        return self.path.read_bytes()

    def close(self) -> None:
        for member in self.members:
            member._file.close()


def test_it_is_built_where_there_is_a_compiler() -> None:
    if sys.platform != "linux":
        pytest.skip("the native gate needs Linux")
    assert native.build().exists()
    native.load.cache_clear()
    assert native.load() is not None


def outcome(found: object) -> tuple[int, ...]:
    names = ("granted", "borrowed", "expected", "sleep_ns", "credit_ns", "entitled_ns", "debt_ns")
    return tuple(int(getattr(found, name)) for name in names)


def moves(core: Core, slot: int, rng: random.Random, row: gate_file.Row) -> Operation:
    own = row.accounts[slot]
    if row.holder == slot and row.granted != slot:
        return rng.choice([Operation.RENEW, Operation.RENEW, Operation.RELEASE])
    if own.waiting or row.granted == slot:
        return rng.choice([Operation.LOOK, Operation.LOOK, Operation.WITHDRAW])
    return rng.choice([Operation.ACQUIRE, Operation.ACQUIRE, Operation.POLL])


@given(
    shares=st.lists(st.tuples(st.integers(1, 1000), st.integers(0, 1000), st.integers(1, 200)), min_size=1, max_size=5),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=60, deadline=None)
def test_both_cores_leave_equal_pages(
    tmp_path_factory: pytest.TempPathFactory, shares: list[tuple[int, int, int]], seed: int
) -> None:
    if native.load() is None:
        pytest.skip("the native gate is not built")
    folder = tmp_path_factory.mktemp("cores")
    given_shares = [
        Shares(request, max(request, limit), window_ns=window_ms * MS) for request, limit, window_ms in shares
    ]
    stages = [Stage(folder / kind, kind, given_shares) for kind in ("python", "native")]
    try:
        rng = random.Random(seed)
        now_ns = 0
        assert stages[0].page() == stages[1].page()
        for _ in range(80):
            now_ns += rng.choice([0, 1, 1_000, MS, 5 * MS, 70 * MS, 3_000 * MS])
            slot = rng.randrange(len(shares))
            row = stages[0].members[slot]._file.load()
            operation = moves(stages[0].cores[slot], slot, rng, row)
            changed = None
            if rng.random() < 0.1:
                request = rng.randint(1, 1000)
                changed = Shares(request, rng.randint(request, 1000), window_ns=rng.randint(1, 100) * MS)
            arguments = {
                "device_ns": rng.choice([0, 1, MS // 3, 7 * MS, 100 * MS]),
                "background": rng.random() < 0.1,
                "lingers": rng.random() < 0.3,
                "changed": changed,
            }
            at_ns = max(0, now_ns - rng.choice([0, 0, 2 * MS]))  # kept from the section after looking at the clock
            found = [outcome(stage.cores[slot].step(operation, at_ns, **arguments)) for stage in stages]
            assert found[0] == found[1], operation
            assert stages[0].page().hex(" ", 8) == stages[1].page().hex(" ", 8), operation
    finally:
        for stage in stages:
            stage.close()


@pytest.fixture(params=["python", "native"])
def stage(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Stage]:
    if request.param == "native" and native.load() is None:
        pytest.skip("the native gate is not built")
    stage = Stage(tmp_path / "gate", request.param, [Shares(500, 500), Shares(500, 500)])
    yield stage
    stage.close()


def test_what_is_handed_over_is_taken_up(stage: Stage) -> None:
    first, second = stage.cores
    assert first.step(Operation.ACQUIRE, MS).granted
    waiting = second.step(Operation.ACQUIRE, 2 * MS)
    assert not waiting.granted
    expected = waiting.expected
    first.step(Operation.RELEASE, 3 * MS, device_ns=MS)
    assert stage.members[0]._file.load().granted == 1
    found = second.sleep(expected, 60_000 * MS)
    assert (found.granted, found.borrowed) == (1, 0)
    assert found.entitled_ns == 3 * MS
    assert stage.members[0]._file.load().granted == -1
    assert not second.sleep(0, 0).granted or stage.members[0]._file.load().holder == 1


def test_a_grant_that_is_not_taken_up_is_void_after_a_window(stage: Stage) -> None:
    first, second = stage.cores
    first.step(Operation.ACQUIRE, MS)
    second.step(Operation.ACQUIRE, 2 * MS)
    first.step(Operation.RELEASE, 3 * MS, device_ns=0)
    assert not first.step(Operation.ACQUIRE, 4 * MS).granted
    assert not first.step(Operation.LOOK, 43 * MS).granted
    assert first.step(Operation.LOOK, 44 * MS).granted
    # The late one notices and waits in line again.
    assert not second.step(Operation.LOOK, 45 * MS).granted
    first.step(Operation.RELEASE, 46 * MS, device_ns=0)
    assert second.step(Operation.LOOK, 47 * MS).granted


def test_one_who_comes_late_does_not_make_time_count_twice(stage: Stage) -> None:
    first, second = stage.cores
    first.step(Operation.POLL, 10 * MS)
    second.step(Operation.POLL, 4 * MS)
    first.step(Operation.ACQUIRE, 12 * MS)
    clock = stage.members[0]._file.load().clock
    assert (clock.virtual_ns, clock.seen_ns) == (12 * MS, 12 * MS)
    second.step(Operation.ACQUIRE, 3 * MS)
    assert stage.members[0]._file.load().stamps_ns[1] == 12 * MS, "or what it is granted would be void at once"


def test_the_first_after_a_restart_of_the_host_sets_the_clock(stage: Stage) -> None:
    file = stage.members[0]._file
    with file.locked():
        row = file.load()
        row.clock.seen_ns = 1 << 60
        file.store_row(row)
    with GateMember(stage.path, Shares(500, 500)) as member:
        assert file.load().clock.seen_ns < 1 << 60
        assert not member.acquire().borrowed
        member.release(MS)


def test_ending_what_is_not_held_is_refused(stage: Stage) -> None:
    with pytest.raises(GateError, match="not held"):
        stage.cores[0].step(Operation.RENEW, MS, device_ns=1)
    with RowGate.open(stage.path) as gate:
        assert not any(view.holding for view in gate.members())


def test_without_a_compiler_it_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(native, "path", lambda: tmp_path / "gate.so")
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(native.BuildError, match="no C compiler: looked for no-such-compiler"):
        native.build()
    monkeypatch.setenv("CC", "false")
    with pytest.raises(native.BuildError, match="ended with code 1"):
        native.build()
