"""Models of the three formats behind one call: named arrays in, named arrays out.

**Python.** The entry is a file with `infer(batch)` and, if it likes, `load(**parameters)`. `load` runs once and may
set globals, or return an object. An object with an `infer` method serves in the module's place; any other object that
is not None is handed to the module's `infer` as second argument if that takes two. `batch` is a dict of numpy arrays,
BYTES as object arrays of `bytes`, rows along the first dimension; `infer` returns a dict of arrays, tensors or lists,
one for each output declared. It runs under `torch.inference_mode`. Files beside the entry can be imported. Such code is
trusted: it runs in the worker. `load` gets the device ("cpu", "cuda:0") as keyword `device` when its signature names
it. On a GPU the modules found in the handler are moved there, and a module that is given CPU tensors answers with CPU
tensors: a handler written for the CPU works unchanged, and one that moves its inputs itself pays no second copy.

**TorchScript** (`torch.jit.load`) and **torch.export** (`torch.export.load`): inputs go in as tensors by position, in
the order declared. A dict that comes out is taken by name, a tuple, list or single tensor by position. A program
exported with a fixed batch refuses every other; export it with a dynamic first dimension to serve batches.

Outputs that are not declared are dropped. Nothing here unpickles what came over the network: of what a program brings
beside its graph only tensors are read, and one with pickled objects or compiled libraries is refused. Its graph may
still name any function of torch, so it is trusted like a handler.
"""

from __future__ import annotations

import importlib.util
import inspect
import os
import sys
import traceback
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from hasgpu_core.errors import InvalidError, ModelError
from hasgpu_core.function import ModelFormat, TensorSpec

from hasgpu_device import cutting, tensors
from hasgpu_device.errors import DeviceFaultError, LoadError
from hasgpu_device.tensors import Array
from hasgpu_device.worker_config import WorkerConfig

HANDLER_MODULE = "hasgpu_handler"


class Target(Protocol):
    """Where a model is loaded to, when that is not the CPU."""

    @property
    def device(self) -> str:
        """As torch names it."""
        ...

    def place(self, module: Any) -> None:
        """Moves a `torch.nn.Module` there, in place."""
        ...

    def run_export(self, graph_module: Any) -> Callable[..., Any]:
        """Returns a function that runs an exported program there, from CPU tensors."""
        ...

    def run_script(self, module: Any) -> Callable[..., Any]:
        """Returns a function that runs a TorchScript module that is there, from CPU tensors."""
        ...

    def replace_chain(self, module: Any) -> bool:
        """Takes over how a chain of layers runs; False when it can't, and the module's layers are hooked."""
        ...


class Model:
    """A loaded model.

    Args:
        call: Named arrays in, named outputs out, unchecked.
        outputs: What the function declares.
        boundaries_count: Layers before which a batch may be interrupted; -1: before every computation.
        note: What is to be known about it, for the worker's status.
        emulated: Its outputs are made up.
        program: The `torch.export` program that it was loaded from; None: it is of another format.
    """

    def __init__(
        self,
        call: Callable[[dict[str, Array]], object],
        outputs: Sequence[TensorSpec],
        *,
        boundaries_count: int,
        note: str = "",
        emulated: bool = False,
        program: Any = None,
    ) -> None:
        self._call = call
        self._outputs = tuple(outputs)
        self.boundaries_count = boundaries_count
        self.note = note
        self.emulated = emulated
        self.program = program

    def infer(self, batch: dict[str, Array], rows: int) -> dict[str, Array]:
        """Runs a batch.

        Args:
            batch: Inputs by name, `rows` along the first dimension of each.
            rows: Size of the batch.

        Returns:
            The outputs declared, of the declared types, with as many rows.

        Raises:
            ModelError: The model raised, or its answer is not what the function declares.
            DeviceFaultError: The device failed.
        """
        try:
            answer = self._call(batch)
        except (ModelError, DeviceFaultError):
            raise
        except (Exception, SystemExit) as error:
            # User code may raise anything; it fails its batch, not the worker.
            raise ModelError(describe(error)) from error
        if not isinstance(answer, Mapping):
            raise ModelError(f"infer returned {type(answer).__name__}, expected a dict of outputs")
        outputs: dict[str, Array] = {}
        for spec in self._outputs:
            if spec.name not in answer:
                given = ", ".join(repr(name) for name in answer) or "nothing"
                raise ModelError(f"output {spec.name!r} is missing; the model returned {given}")
            try:
                outputs[spec.name] = tensors.conform(answer[spec.name], spec, rows)
            except InvalidError as error:
                raise ModelError(str(error)) from error
        return outputs


def load(config: WorkerConfig, boundary: Callable[[], None], target: Target | None = None) -> Model:
    """Loads a worker's model.

    Args:
        config: Which.
        boundary: Called between the model's layers.
        target: Where to; None: it stays on the CPU.

    Raises:
        LoadError: It can't be loaded; the message says why, fit for the user who deployed it.
        DeviceFaultError: The device failed.
    """
    if not config.entry_path.is_file():
        raise LoadError(f"the artifact has no file {config.entry!r}")
    loader = {
        ModelFormat.PYTHON: _load_python,
        ModelFormat.TORCHSCRIPT: _load_torchscript,
        ModelFormat.TORCH_EXPORT: _load_export,
    }[config.format]
    try:
        return loader(config, boundary, target)
    except (LoadError, DeviceFaultError):
        raise
    except (Exception, SystemExit) as error:
        # User code and torch's loaders may raise anything.
        raise LoadError(f"loading {config.entry!r} failed: {describe(error)}") from error


def describe(error: BaseException) -> str:
    """Says what was raised, and where in the user's own code."""
    text = f"{type(error).__name__}: {error}".strip().rstrip(":")
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith((_OWN_FOLDER, "<frozen "))  # the latter: Python's own import
    ]
    if frames:
        last = frames[-1]
        text += f" ({Path(last.filename).name}, line {last.lineno}, in {last.name})"
    return text[:4_000]


_OWN_FOLDER = str(Path(__file__).parent)


def _load_python(config: WorkerConfig, boundary: Callable[[], None], target: Target | None) -> Model:
    folder = str(config.entry_path.parent.resolve())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    spec = importlib.util.spec_from_file_location(HANDLER_MODULE, config.entry_path)
    if spec is None or spec.loader is None:
        raise LoadError(f"{config.entry!r} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[HANDLER_MODULE] = module
    spec.loader.exec_module(module)
    load_function = getattr(module, "load", None)
    state = None
    if callable(load_function):
        parameters: dict[str, str] = dict(config.handler_parameters)
        if _names_device(load_function):
            # A parameter of the function's own by that name stays the user's.
            parameters.setdefault("device", target.device if target is not None else "cpu")
        state = load_function(**parameters)
    handler = state if callable(getattr(state, "infer", None)) else module
    infer = getattr(handler, "infer", None)
    if not callable(infer):
        raise LoadError(f"{config.entry!r} has no function infer(batch), and load() returned no object with one")
    takes_state = handler is module and state is not None and _positional_count(infer) >= 2
    modules = cutting.find_modules([vars(module), state])
    if target is not None:
        for found in modules:
            target.place(found)
            cutting.bridge(found, target.device)
        modules = [found for found in modules if not target.replace_chain(found)]
    hooked = cutting.hook_boundaries(modules, boundary)
    import torch

    def call(batch: dict[str, Array]) -> object:
        with torch.inference_mode():
            return infer(batch, state) if takes_state else infer(batch)

    return Model(call, config.outputs, boundaries_count=hooked)


def _names_device(function: Callable[..., object]) -> bool:
    parameter = inspect.signature(function).parameters.get("device")
    return parameter is not None and parameter.kind in (
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
        inspect.Parameter.KEYWORD_ONLY,
    )


def _positional_count(function: Callable[..., object]) -> int:
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(parameter.kind in kinds for parameter in inspect.signature(function).parameters.values())


def _load_torchscript(config: WorkerConfig, boundary: Callable[[], None], target: Target | None) -> Model:
    del boundary  # its interpreter runs as one piece
    import torch

    with warnings.catch_warnings():
        # The format is offered because models in it exist; that torch has deprecated it is not the server's news.
        warnings.simplefilter("ignore", DeprecationWarning)
        # Straight to its place: a traced program may name its device in constants, which only the loader maps.
        module = torch.jit.load(str(config.entry_path), map_location=target.device if target is not None else "cpu")
    module.eval()
    run = target.run_script(module) if target is not None else module
    return Model(_positional(run, config), config.outputs, boundaries_count=0)


def _load_export(config: WorkerConfig, boundary: Callable[[], None], target: Target | None) -> Model:
    import torch

    _refuse_code(config.entry_path)
    with _tensors_only():
        program = torch.export.load(str(config.entry_path))
    graph_module = program.module()
    run = target.run_export(graph_module) if target is not None else cutting.interruptible(graph_module, boundary)
    return Model(_positional(run, config), config.outputs, boundaries_count=-1, program=program)


def _refuse_code(path: Path) -> None:
    """Raises LoadError for an exported program whose archive has files that torch would run or unpickle."""
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            parts = name.split("/")
            if "aotinductor" in parts or any(part.startswith(_PICKLED_CONSTANT) for part in parts):
                raise LoadError(f"{path.name!r} holds {name!r}, which would run code when it is loaded")


_PICKLED_CONSTANT = "opaque_obj"
_TENSORS_ONLY, _ANYTHING = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"


@contextmanager
def _tensors_only() -> Iterator[None]:
    """Has `torch.load` refuse whatever is no tensor or plain value: `torch.export.load` asks it to take everything."""
    before = {name: os.environ.pop(name, None) for name in (_TENSORS_ONLY, _ANYTHING)}
    os.environ[_TENSORS_ONLY] = "1"
    try:
        yield
    finally:
        del os.environ[_TENSORS_ONLY]
        os.environ.update({name: value for name, value in before.items() if value is not None})


def _positional(run: Callable[..., Any], config: WorkerConfig) -> Callable[[dict[str, Array]], object]:
    import torch

    for spec in (*config.inputs, *config.outputs):
        if spec.datatype == "BYTES":
            raise LoadError(f"{spec.name!r} is BYTES, which only Python handlers can take or give")
    names = [spec.name for spec in config.outputs]

    def call(batch: dict[str, Array]) -> object:
        inputs = []
        for spec in config.inputs:
            tensor = torch.from_numpy(np.ascontiguousarray(batch[spec.name]))
            inputs.append(tensor.to(torch.bfloat16) if spec.datatype == "BF16" else tensor)
        with torch.inference_mode():
            answer = run(*inputs)
        if isinstance(answer, Mapping):
            return answer
        if isinstance(answer, torch.Tensor):
            answer = (answer,)
        if not isinstance(answer, (tuple, list)):
            raise ModelError(f"the model returned {type(answer).__name__}, expected tensors")
        if len(answer) < len(names):
            raise ModelError(f"the model returned {len(answer)} tensors, the function declares {len(names)} outputs")
        return dict(zip(names, answer, strict=False))

    return call
