"""Tensors of the Open Inference Protocol as numpy arrays and back.

Raw contents are little-endian, row-major and unpadded. BYTES elements are each preceded by their length as a 4-byte
little-endian number; as arrays they are of dtype object and hold `bytes`. numpy knows no BF16: such tensors are float32
arrays, widened on the way in and rounded to the nearest (ties to even) on the way out.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from hasgpu_core.errors import InvalidError
from hasgpu_core.function import DATATYPE_SIZE_BYTES, TensorSpec

Array = npt.NDArray[Any]

DTYPE: Mapping[str, np.dtype[Any]] = {
    "BOOL": np.dtype("?"),
    "UINT8": np.dtype("u1"),
    "UINT16": np.dtype("<u2"),
    "UINT32": np.dtype("<u4"),
    "UINT64": np.dtype("<u8"),
    "INT8": np.dtype("i1"),
    "INT16": np.dtype("<i2"),
    "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"),
    "FP16": np.dtype("<f2"),
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
    "BF16": np.dtype("<f4"),
    "BYTES": np.dtype(object),
}
"""What an array of each datatype looks like to a model."""

_MAX_DIMENSIONS = 32
_LENGTH_BYTES = 4


def decode(name: str, datatype: str, shape: Sequence[int], raw: bytes) -> Array:
    """Makes an array of raw contents; it may be read-only and share the bytes.

    Raises:
        InvalidError: The datatype is unknown, the shape can't be, or the bytes do not fit both.
    """
    if datatype not in DTYPE:
        raise InvalidError(f"tensor {name!r}: datatype", expected=" or ".join(DTYPE), got=repr(datatype))
    if len(shape) > _MAX_DIMENSIONS or any(dim < 0 for dim in shape):
        raise InvalidError(f"tensor {name!r}: shape", expected="dimensions >= 0", got=str(list(shape)))
    count = math.prod(shape)
    if datatype == "BYTES":
        return _decode_bytes(name, count, raw).reshape(tuple(shape))
    size_bytes = count * DATATYPE_SIZE_BYTES[datatype]
    if len(raw) != size_bytes:
        raise InvalidError(
            f"tensor {name!r}: contents",
            expected=f"{size_bytes} bytes ({datatype} of shape {list(shape)})",
            got=f"{len(raw)}",
        )
    if datatype == "BF16":
        wide = np.frombuffer(raw, dtype="<u2").astype("<u4") << 16
        return wide.view("<f4").reshape(tuple(shape))
    return np.frombuffer(raw, dtype=DTYPE[datatype]).reshape(tuple(shape))


def _decode_bytes(name: str, count: int, raw: bytes) -> Array:
    if count * _LENGTH_BYTES > len(raw):
        raise InvalidError(
            f"tensor {name!r}: contents", expected=f"{count} BYTES elements", got=f"only {len(raw)} bytes"
        )
    elements = np.empty(count, dtype=object)
    offset = 0
    for index in range(count):
        start = offset + _LENGTH_BYTES
        end = start + int.from_bytes(raw[offset:start], "little")
        if start > len(raw) or end > len(raw):
            raise InvalidError(
                f"tensor {name!r}: BYTES element {index}", expected=f"to end within {len(raw)} bytes", got=f"end {end}"
            )
        elements[index] = raw[start:end]
        offset = end
    if offset != len(raw):
        raise InvalidError(
            f"tensor {name!r}: contents", expected=f"{count} BYTES elements", got=f"{len(raw) - offset} bytes more"
        )
    return elements


def encode(array: Array, datatype: str) -> bytes:
    """Makes raw contents of an array that `conform` has passed."""
    if datatype == "BYTES":
        parts: list[bytes] = []
        for element in array.reshape(-1):
            parts += (len(element).to_bytes(_LENGTH_BYTES, "little"), element)
        return b"".join(parts)
    if datatype == "BF16":
        bits = np.ascontiguousarray(array, dtype="<f4").view("<u4").astype("<u8")
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")
        # Rounding could turn a NaN into infinity: keep its sign and make it a quiet one.
        quiet = ((bits >> 16) | 0x40).astype("<u2")
        return np.where(np.isnan(array), quiet, rounded).astype("<u2").tobytes()
    return np.ascontiguousarray(array, dtype=DTYPE[datatype]).tobytes()


def conform(value: object, spec: TensorSpec, rows: int) -> Array:
    """Checks a model's output against its spec.

    Args:
        value: An array, a torch tensor or a nested list.
        spec: What the function declares.
        rows: The batch.

    Returns:
        An array of the declared type.

    Raises:
        InvalidError: Type or shape are not as declared.
    """
    what = f"output {spec.name!r}"
    if hasattr(value, "detach"):
        value = _from_torch(value)
    if spec.datatype == "BYTES":
        array = _object_array(what, value)
    elif isinstance(value, np.ndarray):
        array = value
        if array.dtype != DTYPE[spec.datatype]:
            raise InvalidError(
                f"{what}: type", expected=f"{DTYPE[spec.datatype].name} ({spec.datatype})", got=array.dtype.name
            )
    else:
        try:
            array = np.asarray(value, dtype=DTYPE[spec.datatype])
        except (TypeError, ValueError, OverflowError) as error:
            raise InvalidError(
                f"{what}: contents", expected=f"numbers ({spec.datatype})", got=f"{type(value).__name__} ({error})"
            ) from error
    expected = (rows, *spec.shape[1:])
    fits = len(array.shape) == len(expected) and all(
        want in (-1, got) for want, got in zip(expected, array.shape, strict=True)
    )
    if not fits:
        raise InvalidError(
            f"{what}: shape", expected=f"{list(expected)} for a batch of {rows}", got=str(list(array.shape))
        )
    return array


def _from_torch(tensor: Any) -> Array:
    tensor = tensor.detach().cpu()
    if str(tensor.dtype) == "torch.bfloat16":
        tensor = tensor.float()
    array: Array = tensor.numpy()
    return array


def _object_array(what: str, value: object) -> Array:
    """An object array of bytes, of bytes or text in lists or arrays."""
    array: Array = value if isinstance(value, np.ndarray) else np.array(value, dtype=object)
    out = np.empty(array.shape, dtype=object)
    flat, flat_out = array.reshape(-1), out.reshape(-1)
    for index, element in enumerate(flat):
        if isinstance(element, str):
            flat_out[index] = element.encode()
        elif isinstance(element, bytes):
            flat_out[index] = bytes(element)
        else:
            raise InvalidError(f"{what}: element {index}", expected="bytes or text", got=type(element).__name__)
    return out


def concatenate(arrays: Sequence[Array]) -> Array:
    """Joins along the first dimension; the result is writable and a copy."""
    return arrays[0].copy() if len(arrays) == 1 else np.concatenate(arrays)


_SENTENCES = (
    b"the quick brown fox jumps over the lazy dog",
    b"a share of the device is given for a while",
    b"requests wait in a queue until the batch is full",
    b"small models answer quickly",
)
VARIABLE_DIMENSION = 16
"""What a variable dimension is in made-up tensors."""
_LARGEST_INTEGER = 9


def random_inputs(specs: Sequence[TensorSpec], rows: int, rng: random.Random) -> dict[str, Array]:
    """Makes a batch to measure with: normal floats, integers 0..9, short sentences; variable dimensions are 16."""
    generator = np.random.default_rng(rng.getrandbits(64))
    batch: dict[str, Array] = {}
    for spec in specs:
        shape = (rows, *(VARIABLE_DIMENSION if dim == -1 else dim for dim in spec.shape[1:]))
        if spec.datatype == "BYTES":
            array = np.empty(shape, dtype=object)
            array.reshape(-1)[:] = [rng.choice(_SENTENCES) for _ in range(array.size)]
        elif spec.datatype == "BOOL":
            array = generator.integers(0, 2, shape).astype(bool)
        elif DTYPE[spec.datatype].kind == "f":
            array = generator.standard_normal(shape).astype(DTYPE[spec.datatype])
        else:
            array = generator.integers(0, _LARGEST_INTEGER + 1, shape).astype(DTYPE[spec.datatype])
        batch[spec.name] = array
    return batch
