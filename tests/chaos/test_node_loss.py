"""A node is lost (agent and worker stop, without a word) and comes back: the instance moves, and is never two."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import grpc
import pytest
from hasgpu_system import SteadyLoad, System, eventually, running_system

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

MOVED_WITHIN_S = 60
TIDY_WITHIN_S = 60


@contextmanager
def stopped(*pids: int) -> Iterator[None]:
    """Holds processes still inside the block: they keep their sockets and locks and do nothing, like a lost host's."""
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            go_on(pid)


def go_on(pid: int) -> None:
    """Lets a stopped process go on; one that has ended is ignored."""
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGCONT)


def runs(pid: int) -> bool:
    """Whether a process is there and is no zombie."""
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def ready(system: System) -> list[dict[str, Any]]:
    """Those that serve; beside them some may be parked."""
    return [instance for instance in system.serving("tricky") if instance["state"] == "ready"]


def agent_pid(system: System, node: str) -> int:
    return system.pid(f"node-agent-{node.removeprefix('node')}")


@pytest.fixture
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    with running_system(tmp_path_factory.mktemp("home"), "--nodes", "2", function="tricky") as running:
        yield running


def test_a_lost_nodes_instance_moves_and_is_not_kept_twice(system: System) -> None:
    system.hold("tricky", 1, for_s=300)
    (before,) = ready(system)
    old_pid, agent = int(before["pid"]), agent_pid(system, before["node"])
    with SteadyLoad(system, "tricky", period_s=0.1, timeout_s=20) as load:
        time.sleep(1)
        lost_s = time.monotonic()
        with stopped(agent, old_pid):

            def moved() -> Any:
                return [i for i in ready(system) if i["node"] != before["node"]]

            (after,) = eventually(moved, within_s=MOVED_WITHIN_S)
            print(f"ready on {after['node']} after {time.monotonic() - lost_s:.1f} s")
            answered_before = load.ok_count

            def answered() -> bool:
                return load.ok_count >= answered_before + 20

            eventually(answered, within_s=MOVED_WITHIN_S)
            print(f"answered again after {time.monotonic() - lost_s:.1f} s")
            assert runs(old_pid)

        def tidy() -> bool:
            names = [instance["instance"] for instance in system.instances("tricky")]
            return not runs(old_pid) and len(ready(system)) == 1 and len(set(names)) == len(names)

        eventually(tidy, within_s=TIDY_WITHIN_S)
        print(f"the old worker is gone after {time.monotonic() - lost_s:.1f} s")
        assert runs(agent)
        answered_before = load.ok_count
        eventually(answered, within_s=30)
    print(f"{load.ok_count} of {load.sent_count} answered")
    (last,) = ready(system)
    assert last["node"] == after["node"]
    assert last["pid"] != old_pid
    assert {code for code, _ in load.errors} <= {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED}
    assert load.ok_count + len(load.errors) == load.sent_count


def test_down_ends_stopped_processes(system: System) -> None:
    instance = ready(system)[0]
    pids = [int(unit["pid"]) for unit in system.units()]
    pids.append(int(instance["pid"]))
    assert len(pids) >= 7
    agent = agent_pid(system, instance["node"])
    os.kill(int(instance["pid"]), signal.SIGSTOP)
    os.kill(agent, signal.SIGSTOP)
    system.down()
    assert not [pid for pid in pids if runs(pid)]
