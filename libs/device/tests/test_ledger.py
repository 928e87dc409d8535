"""The ledger of SMs in use, between threads and processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hasgpu_core.errors import InvalidError
from hasgpu_device import ledger
from hasgpu_device.errors import LedgerError
from hasgpu_device.ledger import RangeView, SmLedger
from hypothesis import given, settings
from hypothesis import strategies as st

HOLDER = """
import sys, time
from hasgpu_device.ledger import SmLedger
ledger = SmLedger(sys.argv[1])
ledger.take(0, 50)
print("held", flush=True)
time.sleep(600)
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    ledger.create(tmp_path / "device.ledger")
    return tmp_path / "device.ledger"


@pytest.fixture
def two(path: Path) -> Iterator[tuple[SmLedger, SmLedger]]:
    with SmLedger(path) as first, SmLedger(path) as second:
        yield first, second


def wait_until_waiting(member: SmLedger, count: int) -> None:
    while sum(not view.holding for view in member.ranges()) < count:
        pass


def test_disjoint_ranges_are_held_at_once(two: tuple[SmLedger, SmLedger]) -> None:
    first, second = two
    first.take(0, 50)
    second.take(50, 50)
    assert set(first.ranges()) == {RangeView(0, 50, True), RangeView(50, 50, True)}
    first.give()
    second.give()
    assert first.ranges() == ()


def test_overlapping_ranges_wait_for_each_other(two: tuple[SmLedger, SmLedger]) -> None:
    first, second = two
    order = []
    first.take(0, 51)

    def rival() -> None:
        second.take(50, 50)
        order.append("second")
        second.give()

    thread = threading.Thread(target=rival)
    thread.start()
    wait_until_waiting(first, 1)
    order.append("first")
    first.give()
    thread.join(60)
    assert order == ["first", "second"]


def test_nobody_is_overtaken(path: Path) -> None:
    order = []
    with SmLedger(path) as narrow, SmLedger(path) as wide, SmLedger(path) as late:
        narrow.take(0, 50)

        def take(member: SmLedger, name: str, first: int, width: int) -> None:
            member.take(first, width)
            order.append(name)
            member.give()

        threads = [threading.Thread(target=take, args=(wide, "wide", 0, 100))]
        threads[0].start()
        wait_until_waiting(narrow, 1)
        # Free now, but the wide one came first and would starve if such were let pass.
        threads.append(threading.Thread(target=take, args=(late, "late", 50, 50)))
        threads[1].start()
        wait_until_waiting(narrow, 2)
        narrow.give()
        for thread in threads:
            thread.join(60)
    assert order == ["wide", "late"]


def test_the_range_of_a_killed_holder_is_free_again(path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(path)], stdout=subprocess.PIPE)
    assert holder.stdout is not None
    holder.stdout.readline()
    with SmLedger(path) as member:
        assert member.ranges() == (RangeView(0, 50, True),)
        os.kill(holder.pid, signal.SIGKILL)
        holder.communicate()
        member.take(25, 75)
        assert member.ranges() == (RangeView(25, 75, True),)


def test_a_forked_child_does_not_keep_its_parents_range(path: Path) -> None:
    script = HOLDER.replace(
        "time.sleep(600)", "import os\npid = os.fork()\nprint(pid, flush=True) if pid else None\ntime.sleep(600)"
    )
    assert script != HOLDER
    holder = subprocess.Popen([sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    holder.stdout.readline()
    child = int(holder.stdout.readline())
    try:
        os.kill(holder.pid, signal.SIGKILL)
        holder.wait()
        with SmLedger(path) as member:
            end = time.monotonic() + 60
            while member.ranges():  # the child may not have come to itself yet
                assert time.monotonic() < end
                time.sleep(0.01)
    finally:
        os.kill(child, signal.SIGKILL)
        holder.stdout.close()


@given(ranges=st.lists(st.tuples(st.integers(0, 99), st.integers(1, 100)), min_size=3, max_size=3))
@settings(max_examples=25, deadline=None)
def test_holders_never_exceed_the_device(
    tmp_path_factory: pytest.TempPathFactory, ranges: list[tuple[int, int]]
) -> None:
    path = tmp_path_factory.mktemp("ledger") / "device.ledger"
    ledger.create(path)
    held: list[int] = [0] * 100
    wrong: list[int] = []

    def work(first: int, width: int) -> None:
        with SmLedger(path) as member:
            for _ in range(8):
                member.take(first, width)
                for sm in range(first, first + width):
                    held[sm] += 1
                    if held[sm] > 1:
                        wrong.append(sm)
                for sm in range(first, first + width):
                    held[sm] -= 1
                member.give()

    threads = [threading.Thread(target=work, args=(first, min(width, 100 - first))) for first, width in ranges]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert wrong == []


@pytest.mark.parametrize(("first", "width"), [(-1, 10), (0, 0), (60, 41), (0, 101)])
def test_a_range_outside_the_device_is_refused(two: tuple[SmLedger, SmLedger], first: int, width: int) -> None:
    with pytest.raises(InvalidError, match="within 0"):
        two[0].take(first, width)


@pytest.mark.parametrize("content", [b"", b"x" * 8256, ledger.MAGIC + bytes(8248)])
def test_something_else_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "ledger"
    path.write_bytes(content)
    with pytest.raises(LedgerError, match="not a ledger"):
        ledger.create(path)
    path.unlink()
    with pytest.raises(LedgerError, match="No such file"):
        SmLedger(path)


def test_another_version_is_refused(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[8] = 9
    path.write_bytes(content)
    with pytest.raises(LedgerError, match="version 9, this program knows 1"):
        SmLedger(path)


def test_slots_have_a_bound(path: Path) -> None:
    members = [SmLedger(path) for _ in range(ledger.SLOTS)]
    with pytest.raises(LedgerError, match="256 slots"):
        SmLedger(path)
    for member in members:
        member.close()
    SmLedger(path).close()
