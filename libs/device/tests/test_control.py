import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hasgpu_core.errors import InvalidError
from hasgpu_core.resources import InstanceState
from hasgpu_device.control import ControlBlock, Counters, Shares
from hasgpu_device.errors import ControlBlockError


def test_shares_come_back_and_the_epoch_grows(tmp_path: Path) -> None:
    path = tmp_path / "control"
    with ControlBlock.create(path, Shares(200, 500, 50)) as agent, ControlBlock.open(path) as worker:
        assert worker.read_shares() == Shares(200, 500, 50, epoch=1)
        assert agent.write_shares(Shares(300, 300, 75, window_ns=20_000_000, draining=True)) == 2
        assert worker.read_shares() == Shares(300, 300, 75, 20_000_000, draining=True, epoch=2)


def test_creating_twice_keeps_what_is_there(tmp_path: Path) -> None:
    with ControlBlock.create(tmp_path / "control", Shares(200, 500)) as block:
        block.write_shares(Shares(300, 500))
        block.write_usage(1, used_ns=7)
    with ControlBlock.create(tmp_path / "control", Shares(900, 900)) as block:
        assert block.read_shares() == Shares(300, 500, epoch=2)
        assert block.read_counters().used_ns == 7


def test_counters_come_back(tmp_path: Path) -> None:
    counters = Counters(3, 10, 11, 12, 13, 14, 15, 16, InstanceState.DRAINING, 17)
    with ControlBlock.create(tmp_path / "control") as block:
        assert block.read_counters() == Counters()
        block.write_usage(3, 10, 11, 12, 13, 14, 15, 16)
        block.write_state(InstanceState.DRAINING, 17)
        assert block.read_counters() == counters
        block.beat_worker()
        later = block.read_counters()
        assert (later.state, later.pid, later.used_ns) == (InstanceState.DRAINING, 17, 10)
        assert later.heartbeat_monotonic_ns > 0


def test_heartbeats_move_on(tmp_path: Path) -> None:
    with ControlBlock.create(tmp_path / "control") as block:
        first = block.read_agent_heartbeat()
        block.beat_agent()
        second = block.read_agent_heartbeat()
        assert first is not None
        assert second is not None
        assert second.monotonic_ns > first.monotonic_ns
        block.beat_worker()
        assert block.read_counters().heartbeat_unix_ns > 0


@pytest.mark.parametrize("content", [b"", b"x" * 4096, b"HASGPUCB", b"HASGPUCB\x63\0\0\0" + bytes(4084)])
def test_something_else_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "control"
    path.write_bytes(content)
    with pytest.raises(ControlBlockError, match="control"):
        ControlBlock.open(path)
    with pytest.raises(ControlBlockError):
        ControlBlock.create(path)


def test_another_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "control"
    ControlBlock.create(path).close()
    content = bytearray(path.read_bytes())
    content[8:12] = (99).to_bytes(4, "little")
    path.write_bytes(content)
    with pytest.raises(ControlBlockError, match="version 99, this program knows 2"):
        ControlBlock.open(path)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ControlBlockError, match="No such file"):
        ControlBlock.open(tmp_path / "nothing")


@pytest.mark.parametrize(
    "shares",
    [
        Shares(0, 10),
        Shares(10, 5),
        Shares(10, 1001),
        Shares(1, 1, sm_pct=0),
        Shares(1, 1, sm_pct=60, first_pct=41),
        Shares(1, 1, window_ns=10),
    ],
)
def test_impossible_shares_are_refused(tmp_path: Path, shares: Shares) -> None:
    with ControlBlock.create(tmp_path / "control", Shares(5, 6)) as block:
        with pytest.raises(InvalidError, match="expected"):
            block.write_shares(shares)
        assert block.read_shares() == Shares(5, 6, epoch=1)


def test_a_half_written_copy_leaves_the_value_before(tmp_path: Path) -> None:
    path = tmp_path / "control"
    with ControlBlock.create(path, Shares(100, 100)) as block:
        block.write_shares(Shares(200, 200))
    content = bytearray(path.read_bytes())
    # Sequence 2 lies in the first copy; what a writer killed in the middle would leave.
    assert int.from_bytes(content[64:72], "little") == 2
    content[80:90] = b"\xff" * 10
    path.write_bytes(content)
    with ControlBlock.open(path) as block:
        assert block.read_shares() == Shares(100, 100, epoch=1)
        assert block.write_shares(Shares(300, 300)) == 2
        assert block.read_shares().request_permille == 300


WRITER = """
import sys
from hasgpu_device.control import ControlBlock, Shares
block = ControlBlock.open(sys.argv[1])
print("go", flush=True)
share = 1
while True:
    share = share % 100 + 1
    block.write_shares(Shares(share, share * 2, share, share * 1_000_000))
"""


def test_a_reader_never_sees_a_half_written_group(tmp_path: Path) -> None:
    path = tmp_path / "control"
    with ControlBlock.create(path, Shares(1, 2, 1, 1_000_000)) as block:
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE)
        assert writer.stdout is not None
        try:
            writer.stdout.readline()
            epochs = []
            while len(epochs) < 3_000:
                shares = block.read_shares()
                assert shares.limit_permille == 2 * shares.request_permille
                assert shares.window_ns == shares.sm_pct * 1_000_000 == shares.request_permille * 1_000_000
                epochs.append(shares.epoch)
            assert epochs == sorted(epochs)
        finally:
            os.kill(writer.pid, signal.SIGKILL)
            writer.communicate()
        assert block.write_shares(Shares(5, 5)) > epochs[-1]


def test_state_and_heartbeat_may_come_from_two_threads(tmp_path: Path) -> None:
    with ControlBlock.create(tmp_path / "control") as block:
        threads = [
            threading.Thread(target=lambda: [block.write_state(InstanceState.READY, n) for n in range(200)]),
            threading.Thread(target=lambda: [block.beat_worker() for _ in range(200)]),
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        counters = block.read_counters()
        assert (counters.state, counters.pid) == (InstanceState.READY, 199)
        assert counters.heartbeat_unix_ns > 0


def test_the_bell_wakes_whoever_waits_and_is_not_lost_on_who_is_about_to(tmp_path: Path) -> None:
    with ControlBlock.create(tmp_path / "control") as agent, ControlBlock.open(tmp_path / "control") as worker:
        seen = worker.bell()
        agent.write_shares(Shares(100, 100))
        worker.wait_for_bell(seen, 60)  # rung before: it does not sleep
        assert worker.bell() != seen
        seen = worker.bell()
        woken = threading.Event()

        def wait() -> None:
            while worker.bell() == seen:
                worker.wait_for_bell(seen, 60)
            woken.set()

        waiter = threading.Thread(target=wait)
        waiter.start()
        agent.ring()
        assert woken.wait(30)
        waiter.join()
        worker.wait_for_bell(worker.bell(), 0.001)  # nobody rings: it comes back all the same
