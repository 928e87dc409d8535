"""The CUDA backend on a fake driver and a stand-in for torch.cuda: everything but the device's own behaviour."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from hasgpu_core.errors import UnsupportedError
from hasgpu_core.function import ModelFormat, TensorSpec
from hasgpu_device import backends
from hasgpu_device.backends.cuda import torch_device
from hasgpu_device.backends.cuda.backend import CudaBackend
from hasgpu_device.control import ControlBlock, Shares
from hasgpu_device.errors import DeviceFaultError, LoadError
from hasgpu_device.gate import GateMember, RowGate
from hasgpu_device.segments import SegmentRunner
from hasgpu_device.worker_config import WorkerConfig

MakeConfig = Callable[..., WorkerConfig]


class Event:
    """A mark in host time."""

    def __init__(self, **_: object) -> None:
        self.ns = 0

    def record(self, stream: object = None) -> None:
        if Torch.fails is not None:
            raise Torch.fails
        self.ns = time.thread_time_ns()  # what a busy host withholds is no work of the layers

    def synchronize(self) -> None:
        if Torch.fails is not None:
            raise Torch.fails

    def elapsed_time(self, other: Event) -> float:
        return (other.ns - self.ns) / 1e6


class Stream:
    def __init__(self, pointer: int = 1, device: int = 0) -> None:
        self.cuda_stream = pointer


class Recorder:
    def __init__(self, streams: dict[tuple[int, int], Stream], driver: object) -> None:
        self.streams = streams

    def record(self, rung: tuple[int, int], work: Callable[[], None]) -> Callable[[], None]:
        assert rung in self.streams
        Torch.captured.append(rung)

        def replay() -> None:
            Torch.replayed.append(rung)
            work()

        return replay


class Torch:
    """What was done to torch.cuda."""

    stream: Any = None
    fails: BaseException | None = None
    fraction = 0.0
    captured: ClassVar[list[tuple[int, int]]] = []
    replayed: ClassVar[list[tuple[int, int]]] = []


class OnCpu(CudaBackend):
    """Computes on the CPU, as there is no device."""

    @property
    def device(self) -> str:
        return "cpu"


@pytest.fixture
def kept_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the backend sets for torch is taken back."""
    for name in (*torch_device.ALLOCATOR_SETTINGS, "CUBLAS_WORKSPACE_CONFIG"):
        monkeypatch.setenv(name, "")


@pytest.fixture
def fake_torch(monkeypatch: pytest.MonkeyPatch, kept_environment: None) -> None:
    Torch.stream, Torch.fails, Torch.fraction, Torch.captured, Torch.replayed = None, None, 0.0, [], []
    cuda = torch.cuda
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    for name in ("init", "set_device", "synchronize"):
        monkeypatch.setattr(cuda, name, lambda *_: None)
    monkeypatch.setattr(cuda, "set_stream", lambda stream: setattr(Torch, "stream", stream))
    monkeypatch.setattr(cuda, "ExternalStream", Stream)
    monkeypatch.setattr(cuda, "Stream", lambda device: Stream())
    monkeypatch.setattr(cuda, "Event", Event)
    properties = type("Properties", (), {"total_memory": 80 << 30})
    monkeypatch.setattr(cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(cuda, "memory_reserved", lambda _: 0)
    monkeypatch.setattr(cuda, "set_per_process_memory_fraction", lambda part, _: setattr(Torch, "fraction", part))
    monkeypatch.setattr(torch_device, "TorchRecorder", Recorder)


@pytest.fixture
def cuda_config(make_config: MakeConfig) -> MakeConfig:
    def make(source: str | None = None, **changes: object) -> WorkerConfig:
        values = {"backend": "cuda", "mode": "mps+green", "sm_rungs_pct": (25, 50, 100), "memory_bytes": 8 << 30}
        return make_config(source, **(values | changes))

    return make


def exported(folder: Path) -> torch.nn.Module:
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4)).eval()
    folder.mkdir(exist_ok=True)
    dynamic = ({0: torch.export.Dim("batch", min=1, max=8)},)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.export.save(torch.export.export(module, (torch.ones(2, 4),), dynamic_shapes=dynamic), folder / "m.pt2")
    return module


class Rig:
    """A backend with its way to the gate."""

    def __init__(self, config: WorkerConfig, fake_cuda: Any, environ: dict[str, str] | None = None) -> None:
        self.config = config
        self.backend = OnCpu(config, environ=environ or {}, library=fake_cuda.path)
        self.control = ControlBlock.create(config.control_path, Shares(1000, 1000))
        RowGate.create(config.gate_path).close()
        self.member = GateMember(config.gate_path, self.control.read_shares())
        self.runner = SegmentRunner(self.backend, self.member, self.control)

    def set_up(self) -> Any:
        self.runner.poll()
        self.backend.setup_loader()
        model = self.backend.load(self.config, self.runner.boundary)
        self.backend.setup()
        self.runner.poll()
        return model

    def warm_up(self, model: Any) -> str:
        return self.backend.warm_up(model, lambda work: self.runner.run(work, background=True)[0], self.runner.poll)

    def infer(self, model: Any, rows: int) -> Any:
        batch = {"x": np.random.default_rng(rows).standard_normal((rows, 4)).astype("f4")}
        (outputs, run) = self.runner.run(lambda: model.infer(batch, rows))
        assert run.device_ns > 0
        return batch["x"], outputs["y"]

    def close(self) -> None:
        self.member.close()
        self.control.close()


@pytest.fixture
def make_rig(fake_torch: None, fake_cuda: Any, cuda_config: MakeConfig) -> Iterator[Callable[..., Rig]]:
    rigs = []

    def make(source: str | None = None, environ: dict[str, str] | None = None, **changes: object) -> Rig:
        rigs.append(Rig(cuda_config(source, **changes), fake_cuda, environ))
        return rigs[-1]

    yield make
    for rig in rigs:
        rig.close()


def test_without_cuda_it_says_so(cuda_config: MakeConfig, kept_environment: None) -> None:
    if torch.version.cuda is not None:
        pytest.skip("this torch has CUDA")
    backend = backends.create(cuda_config("def infer(batch): return batch"))
    assert backend.name == "cuda"
    assert isinstance(backend, backends.WarmsUp)
    assert isinstance(backend, backends.Quiesces)
    with pytest.raises(LoadError, match=r"no CUDA device: torch .* is built without CUDA"):
        backend.load(cuda_config(), lambda: None)
    with pytest.raises(UnsupportedError, match=r"expected mps\+green or .*got 'mig'"):
        backends.create(cuda_config(mode="mig"))


def test_a_missing_driver_is_told(fake_torch: None, cuda_config: MakeConfig, tmp_path: Path) -> None:
    config = cuda_config("def infer(batch): return batch")
    with pytest.raises(LoadError, match="no CUDA device: the driver's library can't be loaded"):
        CudaBackend(config, environ={}, library=str(tmp_path / "none.so")).load(config, lambda: None)


def test_an_exported_program_runs_by_graphs(make_rig: Callable[..., Rig], tmp_path: Path, fake_cuda: Any) -> None:
    module = exported(tmp_path / "artifact")
    rig = make_rig(format=ModelFormat.TORCH_EXPORT, entry="m.pt2", max_batch=8)
    model = rig.set_up()
    assert rig.warm_up(model) == ""
    rungs = {(0, 100), *((first, 50) for first in (0, 25, 50)), *((first, 25) for first in (0, 25, 50, 75))}
    assert Torch.captured[:4] == [(0, 100)] * 4
    assert set(Torch.captured) == rungs
    assert (fake_cuda.get("green"), Torch.fraction) == (8, 0.1)
    Torch.replayed.clear()
    for rows in (1, 3, 8):
        x, y = rig.infer(model, rows)
        np.testing.assert_allclose(y, module(torch.from_numpy(x)).detach().numpy(), atol=1e-5)
    assert Torch.replayed == [(0, 100)] * 3
    # Another share: another rung's stream and graphs, acknowledged, without a reload.
    epoch = rig.control.write_shares(Shares(1000, 1000, 25, first_pct=50))
    rig.runner.poll()
    assert rig.control.read_counters().applied_epoch == epoch
    stream = Torch.stream
    Torch.replayed.clear()
    x, y = rig.infer(model, 2)
    np.testing.assert_allclose(y, module(torch.from_numpy(x)).detach().numpy(), atol=1e-5)
    assert Torch.replayed == [(50, 25)]
    assert stream.cuda_stream == rig.backend._rungs.find(25, 50).stream  # type: ignore[union-attr]
    rig.control.write_shares(Shares(1000, 1000, 30))
    with pytest.raises(UnsupportedError, match="no SM range of 30 % at 0 %: widths are 25 %, 50 %, 100 %"):
        rig.runner.poll()


def test_captures_end_with_time_and_memory(
    make_rig: Callable[..., Rig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = exported(tmp_path / "artifact")
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: (8 << 30) if len(Torch.captured) >= 2 else 0)
    rig = make_rig(format=ModelFormat.TORCH_EXPORT, entry="m.pt2", max_batch=2)
    model = rig.set_up()
    note = rig.warm_up(model)
    assert "eager for want of time or memory to capture: batches of 2 at 50 % from 0 %" in note
    assert Torch.captured == [(0, 100)] * 2
    rig.control.write_shares(Shares(1000, 1000, 50))
    rig.runner.poll()
    x, y = rig.infer(model, 2)
    np.testing.assert_allclose(y, module(torch.from_numpy(x)).detach().numpy(), atol=1e-5)


def test_a_rung_that_can_not_be_captured_leaves_the_others(
    make_rig: Callable[..., Rig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exported(tmp_path / "artifact")
    rig = make_rig(format=ModelFormat.TORCH_EXPORT, entry="m.pt2", max_batch=1, sm_rungs_pct=(50, 100))
    model = rig.set_up()
    record = Recorder.record

    def refuse(self: Recorder, rung: tuple[int, int], work: Callable[[], None]) -> Callable[[], None]:
        if rung == (50, 50):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return record(self, rung, work)

    monkeypatch.setattr(Recorder, "record", refuse)
    assert "batches of 1 at 50 % from 50 % (CUDA out of memory)" in rig.warm_up(model)
    assert Torch.captured == [(0, 100), (0, 50)]
    Torch.replayed.clear()
    rig.infer(model, 1)
    assert Torch.replayed == [(0, 100)]


def test_a_variable_dimension_is_not_captured(make_rig: Callable[..., Rig], tmp_path: Path) -> None:
    torch.manual_seed(0)
    (tmp_path / "artifact").mkdir()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.save(torch.jit.script(torch.nn.ReLU()), tmp_path / "artifact" / "m.pt")
    spec = (TensorSpec("x", "FP32", (-1, -1)),)
    rig = make_rig(
        format=ModelFormat.TORCHSCRIPT,
        entry="m.pt",
        inputs=spec,
        outputs=(TensorSpec("y", "FP32", (-1, -1)),),
        memory_bytes=0,
    )
    model = rig.set_up()
    note = rig.warm_up(model)
    assert "runs eagerly: input 'x' has a variable dimension" in note
    assert "memory is not limited" in note
    x, y = rig.infer(model, 3)
    np.testing.assert_allclose(y, np.maximum(x, 0))


HANDLER = """
import numpy as np, torch
seen = []
def load(device):
    global model
    seen.append(device)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4)).eval()
def infer(batch):
    if batch["x"][0, 0] == 99:
        raise RuntimeError("CUDA out of memory")
    return {"y": model(torch.from_numpy(np.ascontiguousarray(batch["x"]))).numpy()}
"""


def test_a_handler_gets_its_device_and_its_chain_a_graph(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig(HANDLER, max_batch=2)
    model = rig.set_up()
    assert rig.warm_up(model) == ""
    Torch.replayed.clear()
    x, y = rig.infer(model, 2)
    assert Torch.replayed == [(0, 100)]
    assert y.shape == x.shape
    import sys

    assert sys.modules["hasgpu_handler"].seen == ["cpu"]


def test_a_device_that_fails_is_named_once_and_for_all(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig(HANDLER)
    model = rig.set_up()
    error = torch.AcceleratorError("CUDA error: unspecified launch failure\nhints")
    error.error_code = 719
    Torch.fails = error
    with pytest.raises(DeviceFaultError, match="CUDA_ERROR_LAUNCH_FAILED \\(719\\)") as caught:
        rig.infer(model, 1)
    Torch.fails = None
    with pytest.raises(DeviceFaultError) as again:
        rig.backend.apply_sm(50)
    assert again.value is caught.value
    assert rig.backend.quiesce(1)


def test_outside_mps_it_does_not_start(make_rig: Callable[..., Rig], fake_cuda: Any) -> None:
    fake_cuda.set("mps", 0)
    with pytest.raises(DeviceFaultError, match="MPS_NOT_IN_USE"):
        make_rig(HANDLER).set_up()


def test_a_fixed_width_is_not_changed(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig(HANDLER, mode="mps+pct", environ={"CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": "100"})
    model = rig.set_up()
    rig.infer(model, 1)
    rig.backend.apply_sm(100, 50)
    with pytest.raises(UnsupportedError, match="from 100 % to 50 %; a replacement has to be started"):
        rig.backend.apply_sm(50)


def test_without_a_model_the_device_is_opened_all_the_same(make_rig: Callable[..., Rig]) -> None:
    backend = make_rig(HANDLER).backend
    backend.apply_sm(25, 50)
    backend.setup()
    assert Torch.stream is backend._streams[50, 25]
    backend.start_segment()
    assert backend.running_ns() == 0
    assert backend.stop_segment() > 0


def test_timeshare_keeps_the_first_width(make_rig: Callable[..., Rig], fake_cuda: Any) -> None:
    fake_cuda.set("mps", 0)
    rig = make_rig(HANDLER, mode="timeshare")
    rig.control.write_shares(Shares(1000, 1000, 50))
    rig.infer(rig.set_up(), 1)
    with pytest.raises(UnsupportedError, match="from 50 % to 25 %"):
        rig.backend.apply_sm(25)


def test_the_device_is_idle_before_the_end(make_rig: Callable[..., Rig], fake_cuda: Any) -> None:
    rig = make_rig(HANDLER)
    assert rig.backend.quiesce(0)
    rig = make_rig(HANDLER)
    rig.set_up()
    fake_cuda.set("fail_call", "cuStreamQuery")
    fake_cuda.set("fail_code", 600)
    assert not rig.backend.quiesce(0.05)
    fake_cuda.set("fail_code", 0)
    assert rig.backend.quiesce(30)


def test_the_environment_is_prepared() -> None:
    environ = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True,max_split_size_mb:64"}
    torch_device.prepare_environment(environ)
    assert environ["PYTORCH_CUDA_ALLOC_CONF"] == "max_split_size_mb:64,expandable_segments:False"
    assert environ["PYTORCH_ALLOC_CONF"] == "expandable_segments:False"
    assert environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:2:16:8"
