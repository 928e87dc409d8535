"""A batch between the wire and the model: items are decoded and joined, outputs split and encoded.

An item that can't be decoded, or does not fit the function or the rest of its batch, fails alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hasgpu.node_agent.v1 import node_agent_pb2 as pb
from hasgpu_core.errors import InvalidError
from hasgpu_core.function import TensorSpec

from hasgpu_device import tensors
from hasgpu_device.tensors import Array


@dataclass(frozen=True, slots=True)
class JoinedBatch:
    """What the model gets, and which rows are whose."""

    inputs: dict[str, Array]
    """Empty when no item could be decoded."""
    rows: int
    rows_by_item: dict[int, tuple[int, int]]
    """Index of an item: its first row and the row after its last."""
    errors: dict[int, pb.ItemError]
    """Index of an item that can't be run: why."""


def item_error(kind: pb.ErrorKind.ValueType, message: str) -> pb.ItemError:
    """Makes an error; long messages are cut."""
    return pb.ItemError(kind=kind, message=message[:4_000])


def join(request: pb.ExecuteRequest, specs: Sequence[TensorSpec], *, max_batch: int) -> JoinedBatch:
    """Decodes a batch's items and joins their tensors along the first dimension."""
    decoded: list[tuple[int, dict[str, Array]]] = []
    errors: dict[int, pb.ItemError] = {}
    rows = 0
    rows_by_item: dict[int, tuple[int, int]] = {}
    for index, item in enumerate(request.items):
        try:
            arrays = decode_item(item, specs)
            if decoded:
                _agree(arrays, decoded[0][1])
            if rows + item.rows > max_batch:
                raise InvalidError("rows of the batch", expected=f"at most {max_batch}", got=str(rows + item.rows))
        except InvalidError as error:
            errors[index] = item_error(pb.ERROR_KIND_INPUT, str(error))
            continue
        rows_by_item[index] = (rows, rows + item.rows)
        rows += item.rows
        decoded.append((index, arrays))
    inputs = (
        {spec.name: tensors.concatenate([arrays[spec.name] for _, arrays in decoded]) for spec in specs}
        if decoded
        else {}
    )
    return JoinedBatch(inputs, rows, rows_by_item, errors)


def decode_item(item: pb.BatchItem, specs: Sequence[TensorSpec]) -> dict[str, Array]:
    """Decodes one item's tensors and checks them against the function's inputs.

    Raises:
        InvalidError: A tensor is missing, unknown, double, of the wrong type or shape, or its bytes do not fit.
    """
    if item.rows < 1:
        raise InvalidError("rows", expected="at least 1", got="0")
    given: dict[str, pb.Tensor] = {}
    for tensor in item.inputs:
        if tensor.name in given:
            raise InvalidError(f"input {tensor.name!r}", expected="once", got="twice")
        given[tensor.name] = tensor
    arrays: dict[str, Array] = {}
    for spec in specs:
        found = given.pop(spec.name, None)
        if found is None:
            raise InvalidError(f"input {spec.name!r} is missing")
        if found.datatype != spec.datatype:
            raise InvalidError(f"input {spec.name!r}: datatype", expected=spec.datatype, got=repr(found.datatype))
        expected = (item.rows, *spec.shape[1:])
        shape = tuple(found.shape)
        if len(shape) != len(expected) or any(want not in (-1, got) for want, got in zip(expected, shape, strict=True)):
            raise InvalidError(f"input {spec.name!r}: shape", expected=str(list(expected)), got=str(list(shape)))
        arrays[spec.name] = tensors.decode(spec.name, found.datatype, shape, found.raw)
    if given:
        raise InvalidError(f"input {next(iter(given))!r}", expected=" or ".join(repr(s.name) for s in specs))
    return arrays


def _agree(arrays: dict[str, Array], first: dict[str, Array]) -> None:
    for name, array in arrays.items():
        if array.shape[1:] != first[name].shape[1:]:
            raise InvalidError(
                f"input {name!r}: shape",
                expected=f"{list(first[name].shape[1:])} behind the batch, as in the rest of the batch",
                got=str(list(array.shape[1:])),
            )


def split(
    batch: JoinedBatch, outputs: dict[str, Array], specs: Sequence[TensorSpec], count: int
) -> list[pb.ItemResult]:
    """Gives each of the `count` items its rows of the outputs, or its error."""
    results = []
    for index in range(count):
        if index in batch.errors:
            results.append(pb.ItemResult(error=batch.errors[index]))
            continue
        start, end = batch.rows_by_item[index]
        result = pb.ItemResult()
        for spec in specs:
            part = outputs[spec.name][start:end]
            result.outputs.add(
                name=spec.name, datatype=spec.datatype, shape=part.shape, raw=tensors.encode(part, spec.datatype)
            )
        results.append(result)
    return results


def fail(batch: JoinedBatch | None, error: pb.ItemError, count: int) -> list[pb.ItemResult]:
    """Gives all items that have no error of their own this one."""
    own = batch.errors if batch is not None else {}
    return [pb.ItemResult(error=own.get(index, error)) for index in range(count)]
