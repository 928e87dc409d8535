"""Operators of a `torch.export` program, as rows for the latency predictor: FLOPs, bytes, groups, shapes at batch 1.

The columns are those of the published operator tables: `op` is the aten operator without its overload; FLOPs are 2 a
multiply-add for convolutions and matrix products, one an element of the outputs for the rest; bytes count activations
in, weights in and outputs, each once. The program is decomposed to core aten operators first, so that the same model
gives the same rows whatever it was written with.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from hasgpu_core.errors import InvalidError

MATRIX = frozenset({"addmm", "mm", "bmm", "baddbmm", "linear"})


@dataclass(frozen=True, slots=True)
class OperatorRow:
    """One operator, as `hasgpu_predictor.operators.Operator`; this layer imports no predictor."""

    op: str
    flops: int
    input_bytes: int
    weight_bytes: int
    output_bytes: int
    groups: int
    output_shape: tuple[int, ...]


def operators_of(program: Any) -> list[OperatorRow]:
    """Returns the rows of an exported program, in order of execution.

    Args:
        program: A `torch.export.ExportedProgram`. Its shapes are taken as they were exported; a symbolic batch counts
            as 1.

    Raises InvalidError for something that is no exported program or has no operator.
    """
    if not isinstance(program, torch.export.ExportedProgram):
        raise InvalidError("program", expected="a torch.export program", got=type(program).__name__)
    core = program.run_decompositions()
    weights = {
        *core.graph_signature.inputs_to_parameters,
        *core.graph_signature.inputs_to_buffers,
        *getattr(core.graph_signature, "inputs_to_lifted_tensor_constants", {}),
    }
    # Taking one of an operator's outputs is no operator.
    nodes = [node for node in core.graph.nodes if node.op == "call_function" and node.target is not operator.getitem]
    rows = [_row(node, weights) for node in nodes if _tensors(node)]
    if not rows:
        raise InvalidError("program", expected="at least one operator on tensors", got="none")
    return rows


def export_model(module: Any, example: Sequence[Any], named: Mapping[str, Any] | None = None) -> Any:
    """Exports a module for inference; raises InvalidError, naming the cause, for one that can't be exported.

    Args:
        module: A `torch.nn.Module`.
        example: Its arguments, batch 1.
        named: Its keyword arguments.
    """
    try:
        return torch.export.export(module.eval(), tuple(example), dict(named or {}))
    except (
        RuntimeError, ValueError, TypeError, AttributeError, NotImplementedError, LookupError, AssertionError,
    ) as error:  # fmt: skip
        cause = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InvalidError("model", expected="one that torch.export can take", got=cause) from error


def totals(rows: Sequence[OperatorRow]) -> Mapping[str, int]:
    """Returns FLOPs, FLOPs of convolutions and matrix products alone, bytes and the number of rows."""
    products = [row for row in rows if row.op == "convolution" or row.op in MATRIX]
    return {
        "flops": sum(row.flops for row in rows),
        "product_flops": sum(row.flops for row in products),
        "bytes": sum(row.input_bytes + row.weight_bytes + row.output_bytes for row in rows),
        "ops": len(rows),
    }


def as_table(model: str, rows: Sequence[OperatorRow]) -> list[dict[str, object]]:
    """Returns the rows as the columns of a `model_ops` file."""
    table: list[dict[str, object]] = []
    for index, row in enumerate(rows):
        shape = "x".join(map(str, row.output_shape))
        table.append({"model": model, "op_index": index, **asdict(row), "output_shape": shape})
    return table


def _row(node: Any, weights: set[str]) -> OperatorRow:
    name = node.target.overloadpacket.__name__ if hasattr(node.target, "overloadpacket") else str(node.target)
    output = _tensors(node)[0]
    given = weight = 0
    for source in node.all_input_nodes:
        size = sum(_bytes(value) for value in _tensors(source))
        if source.name in weights:
            weight += size
        else:
            given += size
    groups = int(node.args[8]) if name == "convolution" else 1
    shape = tuple(_size(size) for size in output.shape)
    written = sum(_bytes(value) for value in _tensors(node))
    return OperatorRow(name, _flops(name, node, shape), given, weight, written, groups, shape)


def _flops(name: str, node: Any, shape: tuple[int, ...]) -> int:
    count = math.prod(shape)
    if name == "convolution":
        kernel = node.args[1].meta["val"].shape  # (out, in / groups, *taps); transposed: (in, out / groups, *taps)
        depth = math.prod(_size(size) for size in kernel[1:])
        if node.args[6]:
            inside = math.prod(_size(size) for size in node.args[0].meta["val"].shape)
            return 2 * inside * depth
        return 2 * count * depth
    if name in MATRIX:
        left = node.args[1] if name in ("addmm", "baddbmm") else node.args[0]
        return 2 * count * int(_size(left.meta["val"].shape[-1]))
    return sum(math.prod(_size(size) for size in value.shape) for value in _tensors(node))


def _tensors(node: Any) -> list[Any]:
    value = node.meta.get("val")
    values = value if isinstance(value, tuple | list) else [value]
    return [item for item in values if isinstance(item, torch.Tensor)]


def _bytes(tensor: Any) -> int:
    return math.prod(_size(size) for size in tensor.shape) * int(tensor.element_size())


def _size(size: Any) -> int:
    return size if isinstance(size, int) else 1
