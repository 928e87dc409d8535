"""Tenants of one row that come, run, leave and are killed at random: what `test_gate_churn.py` runs.

    python gate_churn.py GATE WITNESS SECONDS SEED

Whoever has the device locks the file WITNESS for as long; when that is locked already two have it. In the end, when
nobody is killed any more, each tenant has to run some more segments. Prints "ok", the number of those killed and the
segments of each; otherwise what went wrong.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import random
import signal
import struct
import sys
import time
import traceback

from hasgpu_device import native
from hasgpu_device.control import Shares
from hasgpu_device.errors import GateTimeoutError
from hasgpu_device.gate import GateMember

TENANTS = 6
MORE = 3
"""Segments that each tenant has to run in the end."""
MS = 1_000_000
COUNT = struct.Struct("<q")
counts = mmap.mmap(-1, mmap.PAGESIZE)
"""Segments that each tenant has run, shared with the forked ones."""


def count(place: int) -> int:
    return int(COUNT.unpack_from(counts, place * COUNT.size)[0])


def some_shares(rng: random.Random) -> Shares:
    request = rng.choice([50, 100, 150])
    return Shares(request, rng.choice([request, 400, 1000]), window_ns=rng.choice([20, 40]) * MS)


def segment(witness: int, rng: random.Random) -> None:
    fcntl.flock(witness, fcntl.LOCK_EX | fcntl.LOCK_NB)
    if rng.random() < 0.5:
        time.sleep(rng.random() * 0.003)
    fcntl.flock(witness, fcntl.LOCK_UN)


def batch(member: GateMember, witness: int, rng: random.Random, place: int) -> bool:
    """Runs some segments; returns whether the tenant is to leave, while it has the device."""
    deadline_ns = time.monotonic_ns() + rng.choice([1, 30, 60_000]) * MS
    try:
        member.acquire(deadline_ns=deadline_ns, background=rng.random() < 0.05)
    except GateTimeoutError:
        return False
    for _ in range(rng.randint(0, 4)):
        segment(witness, rng)
        member.renew(rng.randint(0, 3 * MS))
    segment(witness, rng)
    COUNT.pack_into(counts, place * COUNT.size, count(place) + 1)
    if rng.random() < 0.1:
        return True
    lingers = rng.random() < 0.4
    member.release(rng.randint(0, 2 * MS), linger=lingers)
    if lingers and rng.random() < 0.5:
        member.withdraw()
    return False


def tenant(gate: str, witness_path: str, place: int, rng: random.Random) -> None:
    # Opened before the gate's file, so that the kernel closes it before that one when the process is killed.
    witness = os.open(witness_path, os.O_RDWR)
    if rng.random() < 0.4:
        os.environ["HASGPU_NATIVE_GATE"] = "0"  # both cores share a row
        native.load.cache_clear()
    while True:
        with GateMember(gate, some_shares(rng)) as member:
            member.refresh = lambda: some_shares(rng) if rng.random() < 0.1 else member.shares
            for _ in range(rng.randint(1, 30)):
                if rng.random() < 0.05:
                    member.poll()
                if batch(member, witness, rng, place):
                    break


def start(gate: str, witness_path: str, place: int, rng: random.Random) -> int:
    own = random.Random(rng.random())
    pid = os.fork()
    if pid == 0:
        try:
            tenant(gate, witness_path, place, own)
        finally:
            traceback.print_exc()
            os._exit(3)
    return pid


def play(gate: str, witness_path: str, seconds: float, rng: random.Random, pids: list[int]) -> str:
    """Returns what went wrong, or "ok" and figures."""
    pids += [start(gate, witness_path, place, rng) for place in range(TENANTS)]
    kills = 0
    end_s = time.monotonic() + seconds
    while time.monotonic() < end_s:
        time.sleep(rng.random() * 0.08)
        place = rng.randrange(TENANTS)
        if rng.random() < 0.2:
            os.kill(pids[place], signal.SIGSTOP)
            time.sleep(rng.random() * 0.3)
            os.kill(pids[place], signal.SIGCONT)
            continue
        os.kill(pids[place], signal.SIGKILL)
        _, status = os.waitpid(pids[place], 0)
        if not os.WIFSIGNALED(status):
            return f"tenant {place} ended by itself: {status}"
        kills += 1
        pids[place] = start(gate, witness_path, place, rng)
    before = [count(place) for place in range(TENANTS)]
    late_s = time.monotonic() + 60
    while any(count(place) < before[place] + MORE for place in range(TENANTS)):
        time.sleep(0.02)
        if any(os.waitpid(pid, os.WNOHANG)[0] for pid in pids):
            return "a tenant ended by itself"
        if time.monotonic() > late_s:
            return f"somebody starves: {before}, a minute later {[count(place) for place in range(TENANTS)]}"
    return f"ok {kills} {[count(place) for place in range(TENANTS)]}"


def main() -> None:
    gate, witness_path, seconds, seed = sys.argv[1:]
    pids: list[int] = []
    try:
        print(play(gate, witness_path, float(seconds), random.Random(int(seed)), pids))
    finally:
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            except (ProcessLookupError, ChildProcessError):
                continue


if __name__ == "__main__":
    main()
