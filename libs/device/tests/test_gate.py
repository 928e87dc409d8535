"""The gate between real processes. Shares are compared as ratios of device time, which a busy host does not change."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hasgpu_device.control import ControlBlock, Shares
from hasgpu_device.errors import GateError, GateTimeoutError
from hasgpu_device.gate import SLOTS, GateMember, RowGate

MS = 1_000_000

TENANT = """
import json, sys, time
from hasgpu_device.control import Shares
from hasgpu_device.gate import GateMember
path, request, limit, seconds, segment_ms, linger = sys.argv[1:]
member = GateMember(path, Shares(int(request), int(limit)))
print("attached", flush=True)
sys.stdin.readline()
end = time.monotonic_ns() + int(float(seconds) * 1e9)
used = borrowed = count = 0
while time.monotonic_ns() < end:
    grant = member.acquire()
    start = time.thread_time_ns()
    while (spent := time.thread_time_ns() - start) < float(segment_ms) * 1e6:
        pass
    member.release(spent, linger=linger == "1")
    used += spent
    borrowed += spent if grant.borrowed else 0
    count += 1
member.close()
print(json.dumps({"used": used, "borrowed": borrowed, "count": count}), flush=True)
"""

HOLDER = """
import sys, time
from hasgpu_device.control import Shares
from hasgpu_device.gate import GateMember
member = GateMember(sys.argv[1], Shares(500, 500))
member.acquire()
print("held", flush=True)
time.sleep(600)
"""


def run_tenants(path: Path, tenants: list[tuple[int, int]], seconds: float = 3.0) -> list[dict[str, int]]:
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", TENANT, str(path), str(request), str(limit), str(seconds), "4", "1"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for request, limit in tenants
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "attached\n"
    results = []
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in processes:
        out, _ = process.communicate(timeout=60)
        results.append(json.loads(out))
    return results


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[RowGate]:
    with RowGate.create(tmp_path / "row0.gate") as gate:
        yield gate


def test_saturating_processes_get_their_shares(gate: RowGate) -> None:
    big, small = run_tenants(gate.path, [(750, 750), (250, 250)])
    ratio = big["used"] / (big["used"] + small["used"])
    assert ratio == pytest.approx(0.75, abs=0.06)
    assert gate.members() == ()


def test_a_borrower_takes_only_what_is_left(gate: RowGate) -> None:
    steady, greedy = run_tenants(gate.path, [(300, 300), (100, 1000)])
    assert steady["borrowed"] == 0
    # 0.3 of the whole device on an idle host; up to three quarters of what a busy host leaves of it.
    part = steady["used"] / (steady["used"] + greedy["used"])
    assert 0.22 <= part <= 0.83


def test_beyond_the_request_a_segment_is_borrowed(gate: RowGate) -> None:
    with gate.attach(Shares(100, 1000)) as greedy, gate.attach(Shares(500, 500, window_ns=10_000 * MS)) as steady:
        greedy.acquire()
        greedy.release(400 * MS)
        debt_ns = greedy.debt_ns
        assert greedy.acquire().borrowed
        assert greedy.renew(5 * MS).borrowed
        greedy.release(5 * MS)
        assert 0 < greedy.debt_ns <= debt_ns
        # Somebody entitled wants the device: the borrower stands back.
        steady.acquire()
        steady.release(0, linger=True)
        with pytest.raises(GateTimeoutError):
            greedy.acquire(deadline_ns=time.monotonic_ns())


def test_the_device_of_a_killed_holder_is_free_again(gate: RowGate) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(gate.path)], stdout=subprocess.PIPE)
    assert holder.stdout is not None
    holder.stdout.readline()
    with gate.attach(Shares(500, 500)) as member:
        with pytest.raises(GateTimeoutError, match="deadline"):
            member.acquire(deadline_ns=time.monotonic_ns() + 100 * MS)
        assert [view.holding for view in gate.members()] == [True, False]
        os.kill(holder.pid, signal.SIGKILL)
        holder.communicate()
        member.acquire(deadline_ns=time.monotonic_ns() + 20_000 * MS)
        assert [(view.pid, view.holding) for view in gate.members()] == [(os.getpid(), True)]
        member.release(MS)


def test_lingering_without_coming_back_does_not_block_the_others(gate: RowGate) -> None:
    shares = Shares(400, 400, window_ns=400 * MS)
    with gate.attach(shares) as stopped, gate.attach(shares) as other:
        time.sleep(0.01)
        stopped.acquire()
        # It claims to wait, with unused quota, and does not come.
        stopped.release(0, linger=True)
        assert not other.acquire(deadline_ns=time.monotonic_ns() + 20_000 * MS).borrowed
        other.release(MS)


def test_a_stopped_waiter_does_not_block_the_others(gate: RowGate) -> None:
    script = HOLDER.replace("Shares(500, 500)", "Shares(500, 500, window_ns=5_000_000)")
    with gate.attach(Shares(100, 100, window_ns=5 * MS)) as member:
        member.acquire()
        waiter = subprocess.Popen([sys.executable, "-c", script, str(gate.path)], stdout=subprocess.PIPE)
        try:
            end = time.monotonic() + 60
            while not any(view.waiting for view in gate.members()):
                assert time.monotonic() < end
                time.sleep(0.002)
            os.kill(waiter.pid, signal.SIGSTOP)
            member.release(0)
            member.acquire(deadline_ns=time.monotonic_ns() + 20_000 * MS)
            assert [view.pid for view in gate.members() if view.holding] == [os.getpid()]
            member.release(0)
        finally:
            waiter.kill()
            waiter.communicate()


def test_withdrawing_lets_the_others_on(gate: RowGate) -> None:
    with gate.attach(Shares(900, 900)) as first, gate.attach(Shares(100, 100)) as second:
        first.acquire()
        first.release(0, linger=True)
        first.withdraw()
        second.acquire(deadline_ns=time.monotonic_ns() + 20_000 * MS)
        second.release(0)


def test_never_two_at_once(gate: RowGate) -> None:
    holding = []
    overlaps = []

    def work(index: int) -> None:
        with gate.attach(Shares(300, 1000)) as member:
            for _ in range(60):
                member.acquire()
                holding.append(index)
                overlaps.append(len(holding))
                time.sleep(0.0005)
                holding.remove(index)
                member.release(MS // 2)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(overlaps) == 180
    assert set(overlaps) == {1}


def test_a_wait_can_be_cancelled(gate: RowGate) -> None:
    with gate.attach(Shares(500, 500)) as holder, gate.attach(Shares(500, 500)) as waiter:
        holder.acquire()
        calls = []
        with pytest.raises(GateTimeoutError, match="cancelled"):
            waiter.acquire(cancelled=lambda: len(calls) > 2 or calls.append(1) is not None)
        holder.release(MS)


def test_changed_shares_are_in_force_at_the_next_segment(gate: RowGate, tmp_path: Path) -> None:
    with (
        ControlBlock.create(tmp_path / "control", Shares(10, 10)) as control,
        gate.attach(control.read_shares()) as member,
    ):
        member.refresh = control.read_shares
        member.acquire()
        member.release(5 * MS)
        # Half a second of waiting at 10 ‰, a few milliseconds at 1000 ‰.
        control.write_shares(Shares(1000, 1000, 50))
        member.acquire(deadline_ns=time.monotonic_ns() + 400 * MS)
        assert member.shares == Shares(1000, 1000, 50, epoch=2)
        control.write_shares(Shares(300, 400, 50))
        member.renew(MS)
        member.release(MS)
        assert member.shares.epoch == 3
        control.write_shares(Shares(200, 400, 50))
        member.poll()
        assert member.shares.request_permille == 200
        assert [(view.request_permille, view.limit_permille) for view in gate.members()] == [(200, 400)]


def test_a_waiter_that_is_poked_sees_changed_shares_at_once(gate: RowGate, tmp_path: Path) -> None:
    minute = 10_000 * MS
    with (
        ControlBlock.create(tmp_path / "control", Shares(10, 10, window_ns=minute)) as control,
        gate.attach(control.read_shares()) as member,
    ):
        member.refresh = control.read_shares
        changes = []
        member.on_change = lambda: changes.append(member.shares.epoch)
        member.acquire()
        member.release(10_000 * MS)
        thread = threading.Thread(target=member.acquire)
        thread.start()
        while not gate.poke(os.getpid()):
            time.sleep(0.001)
        # In debt by a thousand seconds: nothing but the change lets it on.
        epoch = control.write_shares(Shares(10, 1000, window_ns=minute))
        assert gate.poke(os.getpid())
        thread.join(60)
        assert not thread.is_alive()
        assert changes == [epoch]
        assert not gate.poke(os.getpid())
        member.release(0)


def test_shares_changed_between_two_batches_are_acknowledged_while_it_waits(gate: RowGate) -> None:
    with gate.attach(Shares(10, 10, window_ns=10_000 * MS)) as member:
        member.acquire()
        member.release(10_000 * MS)
        later = Shares(20, 20, window_ns=10_000 * MS)
        member.refresh = lambda: later
        changes = []
        member.on_change = lambda: changes.append(member.shares)
        with pytest.raises(GateTimeoutError):
            member.acquire(deadline_ns=time.monotonic_ns())
        assert changes == [later]


def test_shares_changed_just_before_the_wait_are_seen(gate: RowGate) -> None:
    minute = 10_000 * MS
    with gate.attach(Shares(10, 10, window_ns=minute)) as member:
        member.acquire()
        member.release(10_000 * MS)
        later = Shares(10, 1000, window_ns=minute)
        asked = []

        def refresh() -> Shares:
            # The first question is asked before the gate knows that this one waits; nobody wakes it afterwards.
            asked.append(1)
            return member.shares if len(asked) == 1 else later

        member.refresh = refresh
        assert member.acquire(deadline_ns=time.monotonic_ns() + 5_000 * MS).borrowed
        member.release(0)


def test_alone_with_the_whole_device_nothing_waits(gate: RowGate) -> None:
    with gate.attach(Shares(1000, 1000)) as member:
        member.acquire(deadline_ns=time.monotonic_ns() + 20_000 * MS)
        waits = [member.renew(0).kept for _ in range(200)]
        member.release(0)
    assert all(waits)


def test_releasing_what_is_not_held_is_refused(gate: RowGate) -> None:
    with gate.attach(Shares(500, 500)) as member, pytest.raises(GateError, match="not held"):
        member.release(1)


def test_slots_are_used_again_and_have_a_bound(gate: RowGate) -> None:
    members = [gate.attach(Shares(10, 10)) for _ in range(SLOTS)]
    with pytest.raises(GateError, match="64 slots"):
        gate.attach(Shares(10, 10))
    members.pop().close()
    members.append(gate.attach(Shares(10, 10)))
    for member in members:
        member.close()
    assert gate.members() == ()


def test_creating_twice_keeps_the_members(gate: RowGate) -> None:
    with gate.attach(Shares(500, 500)), RowGate.create(gate.path) as again:
        assert len(again.members()) == 1


@pytest.mark.parametrize("content", [b"", b"x" * 8320, b"HASGPURG" + bytes(8312)])
def test_something_else_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "gate"
    path.write_bytes(content)
    with pytest.raises(GateError, match="not a gate"):
        RowGate.create(path)
    with pytest.raises(GateError, match="not a gate"):
        GateMember(path, Shares(1, 1))


def test_another_version_is_refused(gate: RowGate) -> None:
    content = bytearray(gate.path.read_bytes())
    content[8:12] = (99).to_bytes(4, "little")
    gate.path.write_bytes(content)
    with pytest.raises(GateError, match="version 99, this program knows 2"):
        GateMember(gate.path, Shares(1, 1))


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(GateError, match="No such file"):
        RowGate.open(tmp_path / "nothing")


def test_a_forked_child_does_not_keep_its_parent_alive(gate: RowGate) -> None:
    script = HOLDER.replace(
        "time.sleep(600)", "import os\npid = os.fork()\nprint(pid, flush=True) if pid else None\ntime.sleep(600)"
    )
    holder = subprocess.Popen([sys.executable, "-c", script, str(gate.path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    holder.stdout.readline()
    child = int(holder.stdout.readline())
    try:
        os.kill(holder.pid, signal.SIGKILL)
        holder.wait()
        with gate.attach(Shares(500, 500)) as member:
            member.acquire(deadline_ns=time.monotonic_ns() + 20_000 * MS)
            member.release(0)
    finally:
        os.kill(child, signal.SIGKILL)
        holder.stdout.close()
