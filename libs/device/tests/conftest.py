from __future__ import annotations

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
