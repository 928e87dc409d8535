"""Operators of loaded models: what handlers call is exported, and what can't be is told."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hasgpu_core.errors import InvalidError, ModelError
from hasgpu_core.function import ModelFormat, TensorSpec
from hasgpu_device import extraction, models
from hasgpu_device.worker_config import WorkerConfig

pytestmark = pytest.mark.filterwarnings("ignore:.isinstance.treespec:FutureWarning")  # of torch itself
Load = Callable[..., tuple[models.Model, WorkerConfig]]

CHAIN = """
import torch
class Answer(dict):
    pass
class Named(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = torch.nn.Linear(4, 8)
    def forward(self, *, given):
        return self.inner(given["x"])
first, second = Named(), torch.nn.Linear(8, 4)
def infer(batch):
    made = first(given=Answer(x=torch.from_numpy(batch["x"])))
    return {"y": second(made)}
"""


@pytest.fixture
def load(tmp_path: Path) -> Load:
    def make(code: str, **changes: object) -> tuple[models.Model, WorkerConfig]:
        (tmp_path / "handler.py").write_text(code)
        config = WorkerConfig(
            **{
                "instance": "f-0",
                "function": "f",
                "function_revision": 1,
                "format": ModelFormat.PYTHON,
                "entry": "handler.py",
                "artifact_dir": str(tmp_path),
                "inputs": (TensorSpec("x", "FP32", (-1, 4)),),
                "outputs": (TensorSpec("y", "FP32", (-1, 4)),),
                "max_batch": 8,
                "control_path": "",
                "gate_path": "",
                "status_path": "",
                **changes,
            }  # type: ignore[arg-type]  # of many kinds
        )
        return models.load(config, lambda: None), config

    return make


def test_the_outermost_modules_of_a_handler_are_exported_in_order(load: Load) -> None:
    rows = extraction.extract(*load(CHAIN))
    products = [row for row in rows if row.op in ("addmm", "mm", "linear")]
    assert [row.output_shape for row in products] == [(1, 8), (1, 4)]
    assert [row.flops for row in products] == [2 * 4 * 8, 2 * 8 * 4]


def test_a_module_called_again_counts_again_and_hooks_stay(load: Load) -> None:
    before = torch.nn.Module.__call__
    calls: list[int] = []
    model, config = load(
        "import torch\nnet = torch.nn.Linear(4, 4)\n"
        "def infer(batch):\n    return {'y': net(net(torch.from_numpy(batch['x'])))}\n"
    )
    net = sys.modules[models.HANDLER_MODULE].net  # type: ignore[attr-defined]  # of the handler above
    net.register_forward_pre_hook(lambda *_: calls.append(1))
    rows = extraction.extract(model, config)
    assert sum(row.op == "addmm" for row in rows) == 2
    assert len(calls) == 2, "the run on random input; not the export"
    net(torch.zeros(1, 4))
    assert len(calls) == 3
    assert torch.nn.Module.__call__ is before


@pytest.mark.parametrize(
    ("code", "told"),
    [
        ("def infer(batch):\n    return {'y': batch['x']}\n", r"calls a torch\.nn\.Module, got one that calls none"),
        (
            "import torch\nclass Odd(torch.nn.Module):\n    def forward(self, x):\n"
            "        return x + 1 if x.sum() > 0 else x - 1\nnet = Odd()\n"
            "def infer(batch):\n    return {'y': net(torch.from_numpy(batch['x']))}\n",
            r"module Odd: expected one that torch\.export can take",
        ),
        (
            "import torch\nnets = [torch.nn.Linear(4, 4) for _ in range(9)]\n"
            "def infer(batch):\n    x = torch.from_numpy(batch['x'])\n    for net in nets:\n        x = net(x)\n"
            "    return {'y': x}\n",
            "at most 8 different modules",
        ),
        (
            "import torch\nnet = torch.nn.Linear(4, 4)\ndef infer(batch):\n    x = torch.from_numpy(batch['x'])\n"
            "    for _ in range(300):\n        x = net(x)\n    return {'y': x}\n",
            "at most 256 calls",
        ),
    ],
)
def test_what_cannot_be_exported_is_told(load: Load, code: str, told: str) -> None:
    with pytest.raises(InvalidError, match=told):
        extraction.extract(*load(code))


def test_a_model_that_refuses_random_input_is_told(load: Load) -> None:
    with pytest.raises(ModelError, match="no picture"):
        extraction.extract(*load("def infer(batch):\n    raise ValueError('no picture')\n"))


def test_an_exported_program_is_read_as_it_is(load: Load, tmp_path: Path) -> None:
    program = torch.export.export(
        torch.nn.Linear(4, 4), (torch.zeros(2, 4),), dynamic_shapes=({0: torch.export.Dim("batch")},)
    )
    torch.export.save(program, tmp_path / "model.pt2")
    rows = extraction.extract(*load("", format=ModelFormat.TORCH_EXPORT, entry="model.pt2"))
    (product,) = [row for row in rows if row.op == "addmm"]
    assert product.output_shape == (1, 4), "a symbolic batch counts as 1"
    assert product.flops == 2 * 4 * 4


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript_is_told(load: Load, tmp_path: Path) -> None:
    torch.jit.script(torch.nn.Linear(4, 4)).save(str(tmp_path / "model.pt"))
    with pytest.raises(InvalidError, match=r"got TorchScript"):
        extraction.extract(*load("", format=ModelFormat.TORCHSCRIPT, entry="model.pt"))
