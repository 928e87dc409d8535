"""A model as a list of steps that can be run from any one to any other: what is cut, captured and run as graphs.

An fx graph (a `torch.export` program, a traced chain of layers) has its computations as steps. Anything else that can
be called with tensors is one step.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, Protocol

SCALARS = (int, float, bool, str, type(None))


class Program(Protocol):
    """Steps over named values."""

    steps_count: int

    def start(self, inputs: Sequence[Any]) -> dict[str, Any]:
        """Returns the values before the first step: the inputs and whatever the program holds."""
        ...

    def step(self, index: int, values: dict[str, Any]) -> None:
        """Runs one step: reads values, adds its own, drops those that no later step needs."""
        ...

    def live(self, index: int) -> tuple[str, ...]:
        """Names of the values that steps before `index` made and that it or later ones, or the answer, need."""
        ...

    def answer(self, values: dict[str, Any]) -> Any:
        """Returns the program's answer after the last step."""
        ...


class CallProgram:
    """A function of tensors as a single step."""

    steps_count = 1

    def __init__(self, call: Callable[..., Any]) -> None:
        self._call = call

    def start(self, inputs: Sequence[Any]) -> dict[str, Any]:
        """The inputs."""
        return {"inputs": tuple(inputs)}

    def step(self, index: int, values: dict[str, Any]) -> None:
        """Calls the function."""
        values["answer"] = self._call(*values["inputs"])

    def live(self, index: int) -> tuple[str, ...]:
        """Nothing is live before the only step; after it, the answer."""
        return () if index == 0 else ("answer",)

    def answer(self, values: dict[str, Any]) -> Any:
        """What the function returned."""
        return values["answer"]


class FxProgram:
    """An fx graph module; each of its computations is a step.

    Args:
        graph_module: A `torch.fx.GraphModule`, such as `torch.export` gives.
    """

    def __init__(self, graph_module: Any) -> None:
        import torch

        self.module = graph_module
        self._graph = graph_module.graph
        self._interpreter = torch.fx.Interpreter(graph_module)
        nodes = list(self._graph.nodes)
        self._placeholders = [node for node in nodes if node.op == "placeholder"]
        self._constants = [node for node in nodes if node.op == "get_attr"]
        self._steps = [node for node in nodes if node.op.startswith("call_")]
        self._output = next(node for node in nodes if node.op == "output")
        self.steps_count = len(self._steps)
        self._dies_after, self._last_use = self._lifetimes()

    def _lifetimes(self) -> tuple[list[list[Any]], dict[Any, int]]:
        """Which values no step after each one needs; and the last step that needs each."""
        last_use: dict[Any, int] = {}
        for index, node in enumerate(self._steps):
            last_use.setdefault(node, index)
            for used in node.all_input_nodes:
                last_use[used] = index
        for used in self._output.all_input_nodes:
            last_use[used] = self.steps_count
        dies_after: list[list[Any]] = [[] for _ in self._steps]
        kept = {*self._placeholders, *self._constants}
        for node, index in last_use.items():
            if index < self.steps_count and node not in kept:
                dies_after[index].append(node)
        return dies_after, last_use

    def start(self, inputs: Sequence[Any]) -> dict[str, Any]:
        """Binds the inputs by position, as the program was exported."""
        flat = self._graph.process_inputs(*inputs)
        if len(flat) != len(self._placeholders):
            raise TypeError(f"the program takes {len(self._placeholders)} inputs, got {len(flat)}")
        values = {node.name: value for node, value in zip(self._placeholders, flat, strict=True)}
        for node in self._constants:
            values[node.name] = self._run(node, values)
        return values

    def _run(self, node: Any, values: dict[str, Any]) -> Any:
        interpreter = self._interpreter
        interpreter.env = {used: values[used.name] for used in node.all_input_nodes}
        try:
            return interpreter.run_node(node)
        finally:
            interpreter.env = {}

    def step(self, index: int, values: dict[str, Any]) -> None:
        """Runs one computation."""
        node = self._steps[index]
        values[node.name] = self._run(node, values)
        for dead in self._dies_after[index]:
            values.pop(dead.name, None)

    def live(self, index: int) -> tuple[str, ...]:
        """As in `Program`; inputs and constants are not among them."""
        return tuple(node.name for node in self._steps[:index] if self._last_use[node] >= index)

    def answer(self, values: dict[str, Any]) -> Any:
        """The program's answer in the structure it was exported with."""
        interpreter = self._interpreter
        interpreter.env = {used: values[used.name] for used in self._output.all_input_nodes}
        try:
            args, _ = interpreter.fetch_args_kwargs_from_env(self._output)
        finally:
            interpreter.env = {}
        return self._graph.process_outputs(args[0])


def run(program: Program, inputs: Sequence[Any], before_step: Callable[[int], None] | None = None) -> Any:
    """Runs a program from beginning to end, calling `before_step` before each step."""
    values = program.start(inputs)
    for index in range(program.steps_count):
        if before_step is not None:
            before_step(index)
        program.step(index, values)
    return program.answer(values)


def retarget(graph_module: Any, device: str) -> None:
    """Makes a graph that was exported for one device compute on another: devices named in it are replaced.

    Parameters and buffers are moved by `staging`; constants that are held as plain attributes are moved here.
    """
    import torch

    target = torch.device(device)

    def swap(value: Any) -> Any:
        return target if isinstance(value, torch.device) else value

    for node in graph_module.graph.nodes:
        if node.op == "get_attr":
            holder_path, _, name = node.target.rpartition(".")
            holder = operator.attrgetter(holder_path)(graph_module) if holder_path else graph_module
            value = getattr(holder, name)
            if isinstance(value, torch.Tensor) and name not in holder._parameters and name not in holder._buffers:
                setattr(holder, name, value.to(target))
        if node.op.startswith("call_"):
            node.args = torch.fx.node.map_aggregate(node.args, swap)
            node.kwargs = torch.fx.node.map_aggregate(node.kwargs, swap)
    graph_module.recompile()


def traced_chain(module: Any) -> Any | None:
    """Returns an fx graph of a chain of torch's own layers, None when the module is anything else.

    Only `torch.nn.Sequential` of layers from `torch.nn`, nested, in evaluation mode: nothing in it decides by values.
    """
    import torch

    if type(module) is not torch.nn.Sequential or module.training:
        return None
    for child in module.modules():
        if not type(child).__module__.startswith("torch.nn.modules.") or isinstance(child, torch.nn.RNNBase):
            return None
    return torch.fx.symbolic_trace(module)
