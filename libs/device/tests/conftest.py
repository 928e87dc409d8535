from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from hasgpu_core.function import ModelFormat, TensorSpec
from hasgpu_device.worker_config import WorkerConfig

MakeConfig = Callable[..., WorkerConfig]


@pytest.fixture
def make_config(tmp_path: Path) -> MakeConfig:
    """Makes a worker's configuration around an artifact in `tmp_path/artifact`."""

    def make(source: str | None = None, **changes: object) -> WorkerConfig:
        artifact = tmp_path / "artifact"
        artifact.mkdir(exist_ok=True)
        if source is not None:
            (artifact / "handler.py").write_text(source)
        values: dict[str, object] = {
            "instance": "echo-1",
            "function": "echo",
            "function_revision": 3,
            "format": ModelFormat.PYTHON,
            "entry": "handler.py",
            "artifact_dir": str(artifact),
            "inputs": (TensorSpec("x", "FP32", (-1, 4)),),
            "outputs": (TensorSpec("y", "FP32", (-1, 4)),),
            "max_batch": 4,
            "control_path": str(tmp_path / "control"),
            "gate_path": str(tmp_path / "row.gate"),
            "status_path": str(tmp_path / "status.json"),
            "device_model": "cpu-1c",
        }
        return WorkerConfig(**(values | changes))  # type: ignore[arg-type]

    return make


@pytest.fixture(scope="session")
def fake_cuda_libraries(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Builds the stand-ins for libcuda: "new", and "old" without green contexts."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler (cc) to build the fake libcuda with")
    folder = tmp_path_factory.mktemp("fake_cuda")
    source = Path(__file__).parent / "fake_cuda" / "libcuda.c"
    libraries = {}
    for name, flags in (("new", []), ("old", ["-DOLD_DRIVER"])):
        libraries[name] = folder / f"libcuda-{name}.so"
        subprocess.run([compiler, "-shared", "-fPIC", *flags, "-o", libraries[name], source], check=True)
    return libraries


class FakeCuda:
    """A copy of the fake libcuda of its own, as its state belongs to the file that is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        self._library = ctypes.CDLL(self.path)

    def set(self, name: str, value: object) -> None:
        self._library.fake_cuda_set(name.encode(), str(value).encode())

    def get(self, name: str) -> int:
        return int(self._library.fake_cuda_get(name.encode()))

    def green(self, context: int, what: str) -> int:
        return int(self._library.fake_cuda_green(ctypes.c_void_p(context), what.encode()))


@pytest.fixture
def fake_cuda(fake_cuda_libraries: dict[str, Path], tmp_path: Path) -> FakeCuda:
    path = tmp_path / "libcuda.so"
    shutil.copy(fake_cuda_libraries["new"], path)
    return FakeCuda(path)
