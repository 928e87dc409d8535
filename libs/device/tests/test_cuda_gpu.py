"""What only a GPU proves of the worker's side: events and graphs on green streams, limits, timing."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hasgpu_core.errors import UnsupportedError
from hasgpu_core.function import ModelFormat, TensorSpec
from hasgpu_device.backends.cuda import staging
from hasgpu_device.backends.cuda.backend import CudaBackend
from hasgpu_device.backends.cuda.driver import CudaDriver
from hasgpu_device.backends.cuda.rungs import RungSet
from hasgpu_device.control import ControlBlock, Shares
from hasgpu_device.gate import GateMember, RowGate
from hasgpu_device.segments import SegmentRunner
from hasgpu_device.worker_config import WorkerConfig

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(300),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

MakeConfig = Callable[..., WorkerConfig]
WIDTHS = (25, 50, 100)


class WithoutMps(CudaBackend):
    """Green contexts in a process that has the GPU to itself, where MPS is not needed to bound it."""

    def _open(self) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(CudaDriver, "is_mps_client", lambda *_: True)
            super()._open()


@pytest.fixture(scope="module")
def rungs() -> RungSet:
    torch.cuda.init()
    driver = CudaDriver()
    device = driver.device(0)
    driver.use_primary_context(device)
    try:
        return RungSet(driver, device, WIDTHS)
    except UnsupportedError as error:
        pytest.skip(str(error))


def test_the_split_is_as_the_driver_says(rungs: RungSet) -> None:
    split = rungs.split
    assert split.count * split.group_sms + split.rest_sms == torch.cuda.get_device_properties(0).multi_processor_count
    assert split.count >= 4


def timed_ms(stream: Any, work: Callable[[], object]) -> float:
    times = []
    with torch.cuda.stream(stream):
        for _ in range(6):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            work()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end))
    return min(times[1:])


def test_a_narrow_rung_is_slower_and_so_is_a_graph_of_it(rungs: RungSet) -> None:
    matrix = torch.randn(4096, 4096, device="cuda", dtype=torch.float16)
    out = torch.empty_like(matrix)
    streams = {width: torch.cuda.ExternalStream(rungs.find(width, 0).stream, device=0) for width in WIDTHS}
    eager = {width: timed_ms(stream, lambda: torch.mm(matrix, matrix, out=out)) for width, stream in streams.items()}
    assert eager[25] > 2 * eager[100]
    replay = {}
    for width, stream in streams.items():
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            graph.capture_begin(capture_error_mode="thread_local")
            torch.mm(matrix, matrix, out=out)
            graph.capture_end()
        # Launched on another rung's stream: it stays on the SMs of its capture.
        replay[width] = timed_ms(streams[100], graph.replay)
    assert replay[25] > 2 * replay[100]


def test_staged_weights_arrive() -> None:
    mover = staging.Staging("cuda:0", buffer_bytes=1 << 20)
    module = torch.nn.Linear(1500, 1500)
    wanted = module.weight.detach().clone()
    mover.move_module(module)
    assert module.weight.device.type == "cuda"
    assert torch.equal(module.weight.cpu(), wanted)
    odd = torch.randn(7, 5).t()
    assert torch.equal(mover.move(odd).cpu(), odd)


class Rig:
    def __init__(self, config: WorkerConfig) -> None:
        self.backend = WithoutMps(config, environ={})
        self.control = ControlBlock.create(config.control_path, Shares(1000, 1000))
        RowGate.create(config.gate_path).close()
        self.member = GateMember(config.gate_path, self.control.read_shares())
        self.runner = SegmentRunner(self.backend, self.member, self.control)
        self.model = self.backend.load(config, self.runner.boundary)
        self.backend.setup()
        self.runner.poll()
        self.note = self.backend.warm_up(
            self.model, lambda work: self.runner.run(work, background=True)[0], self.runner.poll
        )

    def close(self) -> None:
        torch.cuda.set_stream(torch.cuda.default_stream())
        self.member.close()
        self.control.close()


@pytest.fixture
def rig(make_config: MakeConfig, tmp_path: Path, rungs: RungSet) -> Iterator[Rig]:
    torch.manual_seed(0)
    layers = [layer for _ in range(24) for layer in (torch.nn.Linear(4096, 4096), torch.nn.ReLU())]
    module = torch.nn.Sequential(*layers).eval()
    folder = tmp_path / "artifact"
    folder.mkdir(exist_ok=True)
    dynamic = ({0: torch.export.Dim("batch", min=1, max=2048)},)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.export.save(torch.export.export(module, (torch.ones(2, 4096),), dynamic_shapes=dynamic), folder / "m.pt2")
    spec = TensorSpec("x", "FP32", (-1, 4096))
    config = make_config(
        format=ModelFormat.TORCH_EXPORT,
        entry="m.pt2",
        inputs=(spec,),
        outputs=(TensorSpec("y", "FP32", (-1, 4096)),),
        backend="cuda",
        mode="mps+green",
        sm_rungs_pct=WIDTHS,
        max_batch=1024,
        memory_bytes=16 << 30,
    )
    made = Rig(config)
    yield made
    made.close()


def test_graphs_are_cut_timed_and_switched(rig: Rig) -> None:
    assert "run eagerly" not in rig.note
    batch = {"x": np.random.default_rng(0).standard_normal((1024, 4096)).astype("f4")}
    runs = {}
    answers = {}
    for width in WIDTHS:
        rig.control.write_shares(Shares(1000, 1000, width))
        rig.runner.poll()
        for _ in range(4):
            answers[width], runs[width] = rig.runner.run(lambda: rig.model.infer(batch, 1024))
    np.testing.assert_allclose(answers[25]["y"], answers[100]["y"], rtol=1e-2, atol=1e-3)
    assert runs[25].device_ns > 1.5 * runs[100].device_ns
    assert runs[25].segments_count > 1
    began_ns = time.monotonic_ns()
    rig.backend.apply_sm(100)
    assert time.monotonic_ns() - began_ns < 1_000_000_000
    assert rig.backend.quiesce(30)


def test_running_out_of_memory_is_survived(rig: Rig) -> None:
    with pytest.raises(torch.OutOfMemoryError):
        rig.runner.run(lambda: torch.empty(64 << 30, dtype=torch.uint8, device="cuda"))
    batch = {"x": np.zeros((1, 4096), "f4")}
    outputs, _ = rig.runner.run(lambda: rig.model.infer(batch, 1))
    assert outputs["y"].shape == (1, 4096)
