from __future__ import annotations

import io
import json
import pickle
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hasgpu_core.errors import ModelError
from hasgpu_core.function import ModelFormat, TensorSpec
from hasgpu_device import cutting, models
from hasgpu_device.errors import ConfigError, LoadError
from hasgpu_device.worker_config import WorkerConfig

MakeConfig = Callable[..., WorkerConfig]
X = {"x": np.arange(8, dtype="f4").reshape(2, 4)}


def no_boundary() -> None:
    return None


class Doubler(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(4, 4, bias=False)
        self.linear.weight.data = 2 * torch.eye(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.linear(x))


@pytest.mark.parametrize(
    "source",
    [
        "def infer(batch): return {'y': batch['x'] * 2}",
        "def load(): return 2\ndef infer(batch, factor): return {'y': batch['x'] * factor}",
        "F = 0\ndef load():\n    global F\n    F = 2\ndef infer(batch): return {'y': batch['x'] * F}",
        "class M:\n    def infer(self, b): return {'y': (b['x'] * 2).tolist(), 'more': 1}\ndef load(): return M()",
        "from helper import twice\ndef infer(batch): return {'y': twice(batch['x'])}",
        "import torch\ndef infer(batch): return {'y': torch.from_numpy(batch['x']) * 2}",
    ],
)
def test_python_handlers(make_config: MakeConfig, source: str) -> None:
    config = make_config(source)
    (Path(config.artifact_dir) / "helper.py").write_text("def twice(x): return x * 2")
    outputs = models.load(config, no_boundary).infer(X, 2)
    assert list(outputs) == ["y"]
    np.testing.assert_array_equal(outputs["y"], X["x"] * 2)


def test_parameters_reach_load(make_config: MakeConfig) -> None:
    source = "def load(factor): return float(factor)\ndef infer(batch, f): return {'y': batch['x'] * numpy.float32(f)}"
    config = make_config("import numpy\n" + source, parameters={"factor": "3"})
    np.testing.assert_array_equal(models.load(config, no_boundary).infer(X, 2)["y"], X["x"] * 3)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("raise ValueError('no luck')", r"ValueError: no luck \(handler.py, line 1"),
        ("import nothing_of_that_name", "ModuleNotFoundError"),
        ("def infer(batch", r"SyntaxError: '\(' was never closed \(handler.py, line 1\)$"),
        ("x = 1", "no function infer"),
        ("def load(a): pass\ndef infer(batch): pass", "TypeError"),
        ("import sys\nsys.exit(3)", "SystemExit"),
    ],
)
def test_handlers_that_can_not_be_loaded(make_config: MakeConfig, source: str, message: str) -> None:
    with pytest.raises(LoadError, match=message):
        models.load(make_config(source), no_boundary)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("raise KeyError('k')", r"KeyError: 'k' \(handler.py, line 3, in infer\)"),
        ("raise SystemExit(1)", "SystemExit"),
        ("return None", "returned NoneType"),
        ("return {'z': batch['x']}", "'y' is missing; the model returned 'z'"),
        ("return {'y': batch['x'][:1]}", "for a batch of 2"),
        ("return {'y': batch['x'].astype('f8')}", "float64"),
    ],
)
def test_handlers_that_fail_a_batch(make_config: MakeConfig, body: str, message: str) -> None:
    model = models.load(make_config(f"\ndef infer(batch):\n    {body}"), no_boundary)
    with pytest.raises(ModelError, match=message):
        model.infer(X, 2)


def test_a_missing_entry_is_told(make_config: MakeConfig) -> None:
    with pytest.raises(LoadError, match=r"no file 'handler\.py'"):
        models.load(make_config(), no_boundary)


@pytest.mark.parametrize("kind", [ModelFormat.TORCHSCRIPT, ModelFormat.TORCH_EXPORT])
def test_garbage_is_no_model(make_config: MakeConfig, kind: ModelFormat) -> None:
    config = make_config(format=kind, entry="model.bin")
    config.entry_path.write_bytes(b"garbage" * 100)
    with pytest.raises(LoadError, match=r"loading 'model\.bin' failed"):
        models.load(config, no_boundary)


def save_torchscript(path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.save(torch.jit.trace(Doubler().eval(), torch.ones(2, 4)), path)


def save_export(path: Path, *, dynamic: bool) -> None:
    shapes = ({0: torch.export.Dim("batch", min=1, max=64)},) if dynamic else None
    program = torch.export.export(Doubler().eval(), (torch.ones(2, 4),), dynamic_shapes=shapes)
    torch.export.save(program, path)


def test_torchscript(make_config: MakeConfig) -> None:
    config = make_config(format=ModelFormat.TORCHSCRIPT, entry="model.pt")
    save_torchscript(config.entry_path)
    model = models.load(config, no_boundary)
    np.testing.assert_allclose(model.infer(X, 2)["y"], X["x"] * 2)
    with pytest.raises(ModelError):
        model.infer({"x": np.ones((2, 3), "f4")}, 2)


def test_torch_export_is_interruptible(make_config: MakeConfig) -> None:
    config = make_config(format=ModelFormat.TORCH_EXPORT, entry="model.pt2")
    save_export(config.entry_path, dynamic=True)
    calls = []
    model = models.load(config, lambda: calls.append(1))
    for rows in (1, 2, 3):
        batch = {"x": np.ones((rows, 4), "f4")}
        np.testing.assert_allclose(model.infer(batch, rows)["y"], 2 * batch["x"])
    assert len(calls) >= 6


def test_an_export_with_a_fixed_batch_refuses_others(make_config: MakeConfig) -> None:
    config = make_config(format=ModelFormat.TORCH_EXPORT, entry="model.pt2")
    save_export(config.entry_path, dynamic=False)
    model = models.load(config, no_boundary)
    model.infer(X, 2)
    with pytest.raises(ModelError, match="size"):
        model.infer({"x": np.ones((3, 4), "f4")}, 3)


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, sprung: Path) -> None:
        self.sprung = sprung

    def __reduce__(self) -> tuple[Callable[..., None], tuple[Path]]:
        return (Path.mkdir, (self.sprung,))


def rewrite(path: Path, name: str, content: bytes) -> None:
    """Puts a file into a program's archive, in place of the one that is there."""
    with zipfile.ZipFile(path) as archive:
        files = {info.filename: archive.read(info) for info in archive.infolist()}
    root = next(iter(files)).split("/")[0]
    files[f"{root}/{name}"] = content
    with zipfile.ZipFile(path, "w") as archive:
        for filename, data in files.items():
            archive.writestr(filename, data)


@pytest.mark.parametrize("hidden_in", ["sample inputs", "a constant", "a library"])
def test_an_export_brings_no_pickles_and_no_libraries(make_config: MakeConfig, tmp_path: Path, hidden_in: str) -> None:
    config = make_config(format=ModelFormat.TORCH_EXPORT, entry="model.pt2")
    save_export(config.entry_path, dynamic=True)
    sprung = tmp_path / "sprung"
    if hidden_in == "sample inputs":
        saved = io.BytesIO()
        torch.save((Trap(sprung),), saved)
        rewrite(config.entry_path, "data/sample_inputs/model.pt", saved.getvalue())
    elif hidden_in == "a constant":
        rewrite(config.entry_path, "data/constants/opaque_obj_0", pickle.dumps(Trap(sprung)))
        meta = {"path_name": "opaque_obj_0", "is_param": False, "use_pickle": True, "tensor_meta": None}
        constants = json.dumps({"config": {"c": meta}}).encode()
        rewrite(config.entry_path, "data/constants/model_constants_config.json", constants)
    else:
        rewrite(config.entry_path, "data/aotinductor/model/x.so", b"")
    with pytest.raises(LoadError, match=r"Weights only load failed|would run code"):
        models.load(config, no_boundary)
    assert not sprung.exists()


def test_bytes_are_for_python_handlers(make_config: MakeConfig) -> None:
    config = make_config(format=ModelFormat.TORCHSCRIPT, entry="model.pt", inputs=(TensorSpec("x", "BYTES", (-1,)),))
    save_torchscript(config.entry_path)
    with pytest.raises(LoadError, match="BYTES"):
        models.load(config, no_boundary)


def test_modules_of_a_handler_are_found_and_hooked(make_config: MakeConfig) -> None:
    source = """
import torch
class Holder:
    def __init__(self):
        self.layers = {"a": [torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU())]}
    def __call__(self, x):
        return x
    def infer(self, batch):
        x = torch.from_numpy(batch["x"])
        return {"y": OTHER(self.layers["a"][0](x))}
OTHER = torch.nn.Identity()
def load():
    return Holder()
"""
    calls = []
    model = models.load(make_config(source), lambda: calls.append(1))
    assert model.boundaries_count == 3
    model.infer(X, 2)
    assert len(calls) == 3


def test_searching_for_modules_ends_in_circles() -> None:
    circle: dict[str, object] = {}
    circle["self"] = circle
    circle["module"] = torch.nn.ReLU()
    assert cutting.find_modules(circle) == [circle["module"]]


def test_a_configuration_comes_back(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(parameters={"a": "b"}, device_cores=1.5, orphan_timeout_s=5)
    config.save(tmp_path / "config.json")
    assert WorkerConfig.load(tmp_path / "config.json") == config


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"max_batch": 4', '"max_batch": 0', "max_batch: expected 1..1024, got 0"),
        ('"max_batch": 4', '"max_batch": "x"', "'str'"),
        ('"format": "python"', '"format": "onnx"', "onnx"),
        ('"entry"', '"entrance"', "unknown key 'entrance'"),
        ('"FP32"', '"FP31"', "FP31"),
        ("{", "", "not JSON"),
    ],
)
def test_bad_configurations_are_told(make_config: MakeConfig, tmp_path: Path, old: str, new: str, message: str) -> None:
    path = tmp_path / "config.json"
    make_config().save(path)
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(ConfigError, match=message):
        WorkerConfig.load(path)


def test_a_missing_configuration_or_key_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        WorkerConfig.load(tmp_path / "nothing.json")
    (tmp_path / "part.json").write_text('{"instance": "a"}')
    with pytest.raises(ConfigError, match="lacks 'inputs'"):
        WorkerConfig.load(tmp_path / "part.json")
