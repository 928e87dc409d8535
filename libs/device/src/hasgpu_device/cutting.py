"""Finds places between a model's layers where a batch may be interrupted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

MAX_DEPTH = 4
"""How deep a handler's attributes, dicts and lists are searched for modules."""
MAX_OBJECTS = 10_000
_LEAVES = (str, bytes, int, float, type, ModuleType, FunctionType, MethodType, BuiltinFunctionType)
"""Holds no module worth searching for; objects that can be called (a pipeline) are searched all the same."""


def find_modules(root: object) -> list[Any]:
    """Finds the `torch.nn.Module`s of a handler: among its attributes and in dicts, lists and tuples, nested.

    A module's own children are not listed.
    """
    import torch

    found: dict[int, Any] = {}
    seen: set[int] = set()

    def search(value: object, depth: int) -> None:
        if id(value) in seen or len(seen) >= MAX_OBJECTS:
            return
        seen.add(id(value))
        if isinstance(value, torch.nn.Module):
            found[id(value)] = value
            return
        if depth < MAX_DEPTH:
            for child in _children(value):
                search(child, depth + 1)

    search(root, 0)
    return list(found.values())


def _children(value: object) -> Iterator[object]:
    if isinstance(value, dict):
        yield from list(value.values())
    elif isinstance(value, (list, tuple, set)):
        yield from value
    elif not isinstance(value, _LEAVES):
        yield from list(getattr(value, "__dict__", {}).values())
        for name in getattr(type(value), "__slots__", ()):
            if isinstance(name, str) and hasattr(value, name):
                yield getattr(value, name)


def hook_boundaries(modules: list[Any], boundary: Callable[[], None]) -> int:
    """Calls `boundary` before each innermost layer of the modules; returns how many were hooked.

    TorchScript modules are left out: they run as one segment.
    """
    import torch

    def before(*_: object) -> None:
        boundary()

    hooked: set[int] = set()
    for root in modules:
        for module in root.modules():
            if (
                id(module) in hooked
                or isinstance(module, torch.jit.ScriptModule)
                or any(True for _ in module.children())
            ):
                continue
            module.register_forward_pre_hook(before)
            hooked.add(id(module))
    return len(hooked)


def bridge(module: Any, device: str) -> None:
    """Lets a module that lies on a device be called with CPU tensors: they are moved there, and its answer back.

    Tensors that are on the device already stay there, and so does the answer when none had to be moved. TorchScript
    modules take no hooks and are left alone.
    """
    import torch

    if isinstance(module, torch.jit.ScriptModule):
        return
    tree = torch.utils._pytree
    moved_inputs: list[bool] = []

    def before(_: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        moved = False

        def move(value: Any) -> Any:
            nonlocal moved
            # A number as a tensor goes along with tensors of any device, and is no input's content.
            if isinstance(value, torch.Tensor) and value.device.type == "cpu" and value.ndim:
                moved = True
                return value.to(device)
            return value

        args, kwargs = tree.tree_map(move, args), tree.tree_map(move, kwargs)
        # A call that raised has left its mark: it does no harm below, but must not pile up.
        del moved_inputs[:-MAX_DEPTH]
        moved_inputs.append(moved)
        return args, kwargs

    def after(_: object, args: object, kwargs: object, answer: Any) -> Any:
        if not moved_inputs.pop():
            return answer
        return tree.tree_map(lambda value: value.cpu() if isinstance(value, torch.Tensor) else value, answer)

    module.register_forward_pre_hook(before, with_kwargs=True)
    module.register_forward_hook(after, with_kwargs=True)


def interruptible(graph_module: Any, boundary: Callable[[], None]) -> Callable[..., Any]:
    """Returns a function that runs an fx graph node by node and calls `boundary` before each computation."""
    import torch

    class Interruptible(torch.fx.Interpreter):
        """Runs node by node."""

        def run_node(self, n: Any) -> Any:
            """Runs one node."""
            if n.op.startswith("call_"):
                boundary()
            return super().run_node(n)

    run: Callable[..., Any] = Interruptible(graph_module).run
    return run
