"""Operators of a model as it was loaded: what a handler calls on one row of input, exported and read as a table.

A program of `torch.export` is read as it is. Of a Python handler the outermost calls of `torch.nn.Module`s are recorded
while it answers one random row, and each module is exported with the arguments it got. TorchScript can't be exported.
"""

from __future__ import annotations

import logging
import random
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from hasgpu_core.errors import InvalidError, ModelError

from hasgpu_device import tensors
from hasgpu_device.models import Model
from hasgpu_device.operators import OperatorRow, export_model, operators_of
from hasgpu_device.worker_config import WorkerConfig

CALLS_MAX = 256
"""Outermost calls of modules that one answer may make."""
EXPORTS_MAX = 8
"""Different modules and shapes among them: each costs an export of some seconds."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a module that no other module made."""

    module: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def signature(self) -> tuple[object, ...]:
        """Equal for calls that have the same operators."""
        import torch

        leaves = torch.utils._pytree.tree_leaves((self.args, self.kwargs))
        return id(self.module), *(tuple(x.shape) if isinstance(x, torch.Tensor) else repr(x)[:64] for x in leaves)


def extract(model: Model, config: WorkerConfig) -> list[OperatorRow]:
    """Returns the operators of a loaded model at batch 1, in order of execution.

    To be called in the thread that runs the model, while it runs nothing else: the model is run once.

    Raises:
        InvalidError: It can't be exported, or runs nothing that could be; the message says why.
        ModelError: It failed on random input.
    """
    if model.emulated:
        raise InvalidError("model", expected="one that is loaded", got="an emulated one, which has no operators")
    with _quiet():
        if model.program is not None:
            return operators_of(model.program)
        calls = record_calls(model, config)
        if not calls:
            raise InvalidError(
                "model", expected="a handler that calls a torch.nn.Module", got="one that calls none on random input"
            )
        exported: dict[tuple[object, ...], list[OperatorRow]] = {}
        rows: list[OperatorRow] = []
        for call in calls:
            key = call.signature
            if key not in exported:
                if len(exported) >= EXPORTS_MAX:
                    raise InvalidError(
                        "model",
                        expected=f"at most {EXPORTS_MAX} different modules and shapes in one answer",
                        got="more",
                    )
                exported[key] = _export(call)
            rows += exported[key]
        return rows


def record_calls(model: Model, config: WorkerConfig) -> list[Call]:
    """Runs the model on one random row and returns the outermost calls of modules; raises ModelError, InvalidError."""
    import torch

    calls: list[Call] = []
    depth = 0
    original = torch.nn.Module.__call__

    def recording(module: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal depth
        if depth == 0:
            if len(calls) >= CALLS_MAX:
                raise InvalidError("model", expected=f"at most {CALLS_MAX} calls of modules in one answer", got="more")
            calls.append(Call(module, args, kwargs))
        depth += 1
        try:
            return original(module, *args, **kwargs)
        finally:
            depth -= 1

    batch = tensors.random_inputs(config.inputs, 1, random.Random(1))  # noqa: S311  made-up input, not a secret
    # Hooks of modules see no call of a method that is not theirs, nor the keyword arguments of one that is anyone's.
    torch.nn.Module.__call__ = recording  # put back below
    try:
        model.infer(batch, 1)
    except ModelError as error:
        if isinstance(error.__cause__, InvalidError):
            raise error.__cause__ from error
        raise
    finally:
        torch.nn.Module.__call__ = original
    return calls


def _export(call: Call) -> list[OperatorRow]:
    import torch

    module = call.module
    name = type(module).__name__
    if isinstance(module, torch.jit.ScriptModule):
        raise InvalidError("model", expected="one that torch.export can take", got=f"TorchScript ({name})")
    own = next((parameter.device for parameter in module.parameters()), torch.device("cpu"))

    def fresh(value: Any) -> Any:
        # What was made under inference mode can't be traced, and a bridged module got its input before it was moved.
        return value.detach().clone().to(own) if isinstance(value, torch.Tensor) else value

    args, kwargs = torch.utils._pytree.tree_map(fresh, (_plain(call.args), _plain(call.kwargs)))
    with _unhooked(module), torch.no_grad():
        try:
            return operators_of(export_model(module, args, kwargs))
        except InvalidError as error:
            raise InvalidError(f"model, module {name}", expected=error.expected, got=error.got) from error


def _plain(value: Any) -> Any:
    """Makes dicts of other mappings (a tokenizer's answer), which torch does not look into."""
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    return type(value)(map(_plain, value)) if type(value) in (list, tuple) else value


@contextmanager
def _unhooked(module: Any) -> Iterator[None]:
    """Takes the hooks off for a while: they are the system's, and are no part of the graph."""
    kept = []
    for part in module.modules():
        for name in ("_forward_pre_hooks", "_forward_hooks"):
            hooks = getattr(part, name)
            kept.append((hooks, list(hooks.items())))
            hooks.clear()
    try:
        yield
    finally:
        for hooks, items in kept:
            hooks.update(items)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps what torch warns of itself while it exports out of the worker's log."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
