"""Real worker processes over real gRPC."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import numpy as np
import pytest
import torch
from hasgpu.common.v1 import common_pb2
from hasgpu.node_agent.v1 import node_agent_pb2 as pb
from hasgpu.node_agent.v1 import node_agent_pb2_grpc
from hasgpu_core.function import ModelFormat, TensorSpec
from hasgpu_core.resources import InstanceState
from hasgpu_device.control import ControlBlock, Shares
from hasgpu_device.gate import RowGate
from hasgpu_device.status import EXIT_HUNG, EXIT_LOAD_FAILED, WorkerStatus
from hasgpu_device.worker_config import WorkerConfig
from hasgpu_device.worker_server import WorkerServer

MakeConfig = Callable[..., WorkerConfig]

ECHO = """
import time
def infer(batch):
    x = batch["x"]
    command = int(x[0, 0])
    if command == 13:
        raise RuntimeError("unlucky")
    if command == 14:
        time.sleep(600)
    if command == 15:
        raise MemoryError
    if command == 16:
        time.sleep(0.3)
    if command == 17:
        start = time.thread_time()
        while time.thread_time() - start < 0.06:
            pass
    return {"y": x * 2}
"""
FAILED = (InstanceState.FAILED,)


class Worker:
    """A worker process under test, with the agent's side of its files."""

    def __init__(self, config: WorkerConfig, folder: Path, shares: Shares) -> None:
        self.config = config
        self.control = ControlBlock.create(config.control_path, shares)
        RowGate.create(config.gate_path).close()
        config.save(folder / "config.json")
        command = [sys.executable, "-m", "hasgpu_device.worker", "--config", str(folder / "config.json")]
        self.process = subprocess.Popen(command)
        self._batch = 0

    @contextmanager
    def attended(self) -> Iterator[None]:
        """The agent lives inside the block."""
        over = threading.Event()

        def beat() -> None:
            while not over.wait(0.2):
                self.control.beat_agent()

        agent = threading.Thread(target=beat)
        agent.start()
        try:
            yield
        finally:
            over.set()
            agent.join()

    def wait_for(self, *states: InstanceState) -> WorkerStatus:
        end = time.monotonic() + 60
        while time.monotonic() < end:
            status = WorkerStatus.load(self.config.status_path)
            if status is not None and status.state in states:
                return status
            assert self.process.poll() is None or states == FAILED, "the worker ended"
            time.sleep(0.02)
        raise AssertionError(f"not {states}: {WorkerStatus.load(self.config.status_path)}")

    def stub(self) -> node_agent_pb2_grpc.WorkerServiceStub:
        return node_agent_pb2_grpc.WorkerServiceStub(self.channel)

    def connect(self) -> None:
        status = self.wait_for(InstanceState.READY)
        assert status.pid == self.process.pid
        self.channel = grpc.insecure_channel(status.address)

    def execute(self, *requests: pb.ExecuteRequest) -> list[pb.ExecuteResponse]:
        return list(self.stub().Execute(iter(requests), timeout=60))

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self.control.close()
        if hasattr(self, "channel"):
            self.channel.close()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Worker]]:
    workers = []

    def begin(config: WorkerConfig, shares: Shares | None = None) -> Worker:
        worker = Worker(config, tmp_path, shares or Shares(1000, 1000))
        workers.append(worker)
        return worker

    yield begin
    for worker in workers:
        worker.close()


def item(value: float, rows: int = 1, size: int = 4) -> pb.BatchItem:
    array = np.full((rows, size), value, "f4")
    return pb.BatchItem(
        rows=rows, inputs=[pb.Tensor(name="x", datatype="FP32", shape=array.shape, raw=array.tobytes())]
    )


def batch(number: int, *items: pb.BatchItem, deadline_unix_ns: int = 0) -> pb.ExecuteRequest:
    return pb.ExecuteRequest(batch=number, items=items, deadline_unix_ns=deadline_unix_ns)


def values(result: pb.ItemResult) -> list[float]:
    return np.frombuffer(result.outputs[0].raw, "f4").tolist()


def kinds(response: pb.ExecuteResponse) -> list[int]:
    return [result.error.kind for result in response.results]


def test_a_worker_serves_and_drains(start: Callable[..., Worker], make_config: MakeConfig) -> None:
    worker = start(make_config(ECHO))
    worker.connect()
    good, mixed, raising, large = worker.execute(
        batch(7, item(1), item(2, rows=2)),
        batch(8, item(3), item(4, size=5), item(5)),
        batch(9, item(13), item(1)),
        batch(10, item(6, rows=5)),
    )
    assert good.batch == 7
    assert [values(result) for result in good.results] == [[2.0] * 4, [4.0] * 8]
    assert list(good.results[1].outputs[0].shape) == [2, 4]
    assert (good.segments_count, good.sm_pct, good.request_permille) == (1, 100, 1000)
    assert good.execute_ns > 0
    assert good.started_unix_ns > 0
    assert kinds(mixed) == [0, pb.ERROR_KIND_INPUT, 0]
    assert values(mixed.results[2]) == [10.0] * 4
    assert kinds(raising) == [pb.ERROR_KIND_MODEL] * 2
    assert "RuntimeError: unlucky" in raising.results[0].error.message
    assert kinds(large) == [pb.ERROR_KIND_INPUT]
    late, memory = worker.execute(batch(1, item(1), deadline_unix_ns=time.time_ns() - 1), batch(2, item(15)))
    assert kinds(late) == [pb.ERROR_KIND_EXPIRED]
    assert kinds(memory) == [pb.ERROR_KIND_MODEL]

    described = worker.stub().GetWorker(pb.GetWorkerRequest(), timeout=60)
    assert (described.instance, described.function, described.function_revision) == ("echo-1", "echo", 3)
    assert described.state == common_pb2.INSTANCE_STATE_READY
    assert described.batches_count == 6
    assert [observation.batch for observation in described.observations] == [3, 2]
    assert all(o.HasField("gate_wait_ns") and o.gate_wait_ns <= o.latency_ns for o in described.observations)
    assert not worker.stub().GetWorker(pb.GetWorkerRequest(), timeout=60).observations

    measured = worker.stub().Measure(pb.MeasureRequest(batch=2, repetitions_count=3), timeout=60)
    assert measured.repetitions_count == 3
    assert measured.latency_ns > 0
    assert measured.device_time_ns > 0
    with pytest.raises(grpc.RpcError, match=r"expected 1\.\.4"):
        worker.stub().Measure(pb.MeasureRequest(batch=5), timeout=60)

    table = worker.stub().ListOperators(pb.ListOperatorsRequest(), timeout=60).table
    assert not table.rows
    assert "got one that calls none" in table.reason

    assert worker.stub().DrainWorker(pb.DrainWorkerRequest(), timeout=60).abandoned_count == 0
    assert worker.wait_for(InstanceState.DRAINING).pid == worker.process.pid
    (refused,) = worker.execute(batch(11, item(1)))
    assert kinds(refused) == [pb.ERROR_KIND_DRAINING]
    with pytest.raises(grpc.RpcError, match="draining"):
        worker.stub().Measure(pb.MeasureRequest(batch=1), timeout=60)
    counters = worker.control.read_counters()
    assert counters.state is InstanceState.DRAINING
    assert counters.used_ns > 0
    assert counters.heartbeat_unix_ns > 0
    worker.process.send_signal(signal.SIGTERM)
    assert worker.process.wait(60) == 0


def test_a_quiet_stream_outlives_the_pings_of_its_caller(start: Callable[..., Worker], make_config: MakeConfig) -> None:
    worker = start(make_config(ECHO))
    address = worker.wait_for(InstanceState.READY).address
    options = (("grpc.keepalive_time_ms", 1_000), ("grpc.http2.max_pings_without_data", 0))
    go_on = threading.Event()

    def requests() -> Iterator[pb.ExecuteRequest]:
        go_on.wait(5)
        yield batch(1, item(1))

    with grpc.insecure_channel(address, options=options) as channel:
        (answer,) = node_agent_pb2_grpc.WorkerServiceStub(channel).Execute(requests(), timeout=60)
    assert answer.batch == 1


def test_streams_are_served_while_shares_change(start: Callable[..., Worker], make_config: MakeConfig) -> None:
    worker = start(make_config(ECHO), Shares(10, 10))
    worker.connect()
    epoch = worker.control.write_shares(Shares(900, 1000, 50))
    end = time.monotonic() + 30
    while worker.control.read_counters().applied_epoch != epoch:
        assert time.monotonic() < end
        time.sleep(0.005)
    (answer,) = worker.execute(batch(1, item(1)))
    assert (answer.sm_pct, answer.request_permille) == (50, 900)
    worker.control.write_shares(Shares(900, 1000, 50, draining=True))
    worker.wait_for(InstanceState.DRAINING)
    worker.control.write_shares(Shares(900, 1000, 50))
    worker.wait_for(InstanceState.READY)
    answers = worker.execute(*(batch(number, item(number % 10)) for number in range(200)))
    assert [answer.batch for answer in answers] == list(range(200))
    assert all(not result.HasField("error") for answer in answers for result in answer.results)


def test_a_batch_expires_at_the_gate(start: Callable[..., Worker], make_config: MakeConfig) -> None:
    worker = start(make_config(ECHO), Shares(1, 1))
    worker.connect()
    # The first one overdraws the request for a minute to come.
    calls = worker.stub().Execute(
        iter([batch(1, item(17)), batch(2, item(1), deadline_unix_ns=time.time_ns() + 5_000_000_000)]), timeout=60
    )
    assert kinds(next(calls)) == [0]
    expired = next(calls)
    assert kinds(expired) == [pb.ERROR_KIND_EXPIRED]
    assert "before the device was free" in expired.results[0].error.message
    # A caller that goes away while its batch waits leaves nothing behind.
    gone = worker.stub().Execute(iter([batch(3, item(1))]), timeout=60)
    end = time.monotonic() + 30
    for wanted in (1, 0):
        while worker.stub().GetWorker(pb.GetWorkerRequest(), timeout=60).in_flight_count != wanted:
            assert time.monotonic() < end
            time.sleep(0.005)
        gone.cancel()
    worker.control.write_shares(Shares(1000, 1000))
    (answer,) = worker.execute(batch(4, item(1)))
    assert kinds(answer) == [0]


def test_sigterm_finishes_what_is_running(start: Callable[..., Worker], make_config: MakeConfig) -> None:
    worker = start(make_config(ECHO))
    worker.connect()
    calls = worker.stub().Execute(iter([batch(number, item(16)) for number in range(3)]), timeout=60)
    first = next(calls)
    worker.process.send_signal(signal.SIGTERM)
    answers = [first, *calls]
    assert [kinds(answer) for answer in answers] == [[0]] * 3
    assert worker.process.wait(60) == 0


def test_a_hung_batch_ends_the_worker(start: Callable[..., Worker], make_config: MakeConfig) -> None:
    worker = start(make_config(ECHO, execution_timeout_ms=1_000))
    worker.connect()
    hung, behind = worker.execute(batch(1, item(14)), batch(2, item(1)))
    assert kinds(hung) == [pb.ERROR_KIND_HUNG]
    assert kinds(behind) == [pb.ERROR_KIND_DRAINING]
    assert worker.process.wait(60) == EXIT_HUNG
    assert "1000 ms" in worker.wait_for(*FAILED).reason


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("def load():\n    raise OSError('no weights')\ndef infer(batch): pass", "OSError: no weights"),
        ("", "no function"),
    ],
)
def test_a_model_that_can_not_be_loaded(
    start: Callable[..., Worker], make_config: MakeConfig, source: str, message: str
) -> None:
    worker = start(make_config(source))
    assert message in worker.wait_for(*FAILED).reason
    assert worker.process.wait(60) == EXIT_LOAD_FAILED


def test_a_warm_up_that_fails_is_told_and_does_no_harm(start: Callable[..., Worker], make_config: MakeConfig) -> None:
    source = "def infer(batch):\n    assert (batch['x'] == 1).all()\n    return {'y': batch['x']}"
    worker = start(make_config(source))
    worker.connect()
    assert "warm-up" in worker.wait_for(InstanceState.READY).reason
    (answer,) = worker.execute(batch(1, item(1)))
    assert kinds(answer) == [0]


def test_an_orphan_ends_itself(start: Callable[..., Worker], make_config: MakeConfig) -> None:
    worker = start(make_config(ECHO, orphan_timeout_s=4.0))
    with worker.attended():  # loading may take longer than that on a busy host
        worker.connect()
    assert worker.process.wait(60) == 0


async def test_a_host_whose_clock_was_set_back_ends_orphans_all_the_same(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(ECHO, orphan_timeout_s=4.0)
    with ControlBlock.create(config.control_path) as control:
        server = WorkerServer(config, control, pid=1)
        set_back_ns = time.time_ns() - 3_600 * 10**9
        monkeypatch.setattr(time, "time_ns", lambda: set_back_ns)
        assert not server._is_orphan(time.monotonic_ns() + 10**9)
        assert server._is_orphan(time.monotonic_ns() + 5 * 10**9)


def test_a_worker_without_its_files_says_so(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(ECHO)
    config.save(tmp_path / "config.json")
    command = [sys.executable, "-m", "hasgpu_device.worker", "--config", str(tmp_path / "config.json")]
    assert subprocess.run(command, check=False).returncode == EXIT_LOAD_FAILED
    status = WorkerStatus.load(config.status_path)
    assert status is not None
    assert "control block" in status.reason


def test_torch_models_are_served(start: Callable[..., Worker], make_config: MakeConfig, tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 64), torch.nn.ReLU(), torch.nn.Linear(64, 4)).eval()
    expected = model(torch.full((3, 4), 0.5)).detach().numpy()
    folder = tmp_path / "artifact"
    folder.mkdir()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.save(torch.jit.trace(model, torch.ones(2, 4)), folder / "model.pt")
    shapes = ({0: torch.export.Dim("batch", min=1, max=64)},)
    torch.export.save(torch.export.export(model, (torch.ones(2, 4),), dynamic_shapes=shapes), folder / "model.pt2")
    for name, kind in (("model.pt", ModelFormat.TORCHSCRIPT), ("model.pt2", ModelFormat.TORCH_EXPORT)):
        Path(tmp_path / "status.json").unlink(missing_ok=True)
        worker = start(make_config(format=kind, entry=name, inputs=(TensorSpec("x", "FP32", (-1, 4)),)))
        worker.connect()
        (answer,) = worker.execute(batch(1, item(0.5), item(0.5, rows=2)))
        got = [value for result in answer.results for value in values(result)]
        np.testing.assert_allclose(got, expected.reshape(-1), atol=1e-5)
        worker.close()


@contextmanager
def killed(process: subprocess.Popen[bytes]) -> Iterator[None]:
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    yield


def test_a_killed_worker_leaves_the_row_to_the_others(
    start: Callable[..., Worker], make_config: MakeConfig, tmp_path: Path
) -> None:
    worker = start(make_config(ECHO))
    worker.connect()
    call = worker.stub().Execute(iter([batch(1, item(14))]), timeout=60)
    end = time.monotonic() + 30
    with RowGate.open(worker.config.gate_path) as gate:
        while not any(view.holding for view in gate.members()):
            assert time.monotonic() < end
            time.sleep(0.005)
        with killed(worker.process), gate.attach(Shares(500, 500)) as member:
            member.acquire(deadline_ns=time.monotonic_ns() + 20_000_000_000)
            member.release(0)
    with pytest.raises(grpc.RpcError):
        next(call)
