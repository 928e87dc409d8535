"""Tensors of the Open Inference Protocol: from what a user types, to raw bytes, and back."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hasgpu_core.errors import InvalidError
from hasgpu_core.function import DATATYPE_SIZE_BYTES, TensorSpec

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from hasgpu.inference.v2 import inference_pb2 as oip

NUMPY_DTYPES: Mapping[str, str] = {
    "BOOL": "?",
    "UINT8": "<u1",
    "UINT16": "<u2",
    "UINT32": "<u4",
    "UINT64": "<u8",
    "INT8": "<i1",
    "INT16": "<i2",
    "INT32": "<i4",
    "INT64": "<i8",
    "FP16": "<f2",
    "FP32": "<f4",
    "FP64": "<f8",
}
"""BF16 has no NumPy type and is handled by its bits; BYTES carry lengths."""
SHOWN_COUNT = 4


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor as it goes over the wire."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    raw: bytes
    """Little-endian, row-major."""


def pack_bytes(elements: Sequence[bytes]) -> bytes:
    """Each element with its length in 4 bytes before it."""
    return b"".join(struct.pack("<I", len(element)) + element for element in elements)


def unpack_bytes(raw: bytes) -> list[bytes]:
    """The opposite of pack_bytes; raises InvalidError when the lengths do not fit."""
    elements, at = [], 0
    while at < len(raw):
        if at + 4 > len(raw) or at + 4 + (size := struct.unpack_from("<I", raw, at)[0]) > len(raw):
            raise InvalidError(
                "a BYTES tensor", expected="elements with their lengths", got=f"{len(raw)} bytes cut off"
            )
        elements.append(raw[at + 4 : at + 4 + size])
        at += 4 + size
    return elements


def from_json(spec: TensorSpec, text: str) -> Tensor:
    """Makes a tensor of a JSON value: (nested) lists of numbers, booleans or strings. Raises InvalidError."""
    import numpy as np

    try:
        value = json.loads(text)
    except ValueError as error:
        raise InvalidError(f"--input {spec.name}", expected="JSON", got=f"{text[:60]!r} ({error})") from error
    if spec.datatype == "BYTES":
        shape, flat = _flatten(spec, value)
        if not all(isinstance(element, str) for element in flat):
            raise InvalidError(f"--input {spec.name}", expected="strings", got=text[:60])
        return Tensor(spec.name, "BYTES", shape, pack_bytes([element.encode() for element in flat]))
    try:
        array = np.array(value)
        if array.dtype.kind not in "biuf":
            raise ValueError(f"{array.dtype} elements")
        converted = _to_bf16(array) if spec.datatype == "BF16" else array.astype(NUMPY_DTYPES[spec.datatype])
        if array.dtype.kind in "iuf" and spec.datatype[0] in "UI" and not np.array_equal(converted, array):
            raise ValueError(f"values that {spec.datatype} cannot hold")
    except (ValueError, OverflowError, TypeError) as error:
        raise InvalidError(
            f"--input {spec.name}", expected=f"{spec.datatype} values in JSON", got=str(error)
        ) from error
    return Tensor(spec.name, spec.datatype, converted.shape, converted.tobytes())


def from_file(spec: TensorSpec, path: Path) -> Tensor:
    """Makes a tensor of a .npy file, or of a file's raw bytes.

    Raw bytes of a BYTES input are one element. For other datatypes they are the tensor itself; at most one dimension
    of the function's shape may be variable then.

    Raises:
        InvalidError: Not readable, another datatype, or a size that fits no shape.
    """
    import numpy as np

    try:
        if path.suffix == ".npy":
            array = np.load(path, allow_pickle=False)
            expected = "u2" if spec.datatype == "BF16" else NUMPY_DTYPES.get(spec.datatype, "O")
            if array.dtype != np.dtype(expected):
                raise InvalidError(f"--file {spec.name}", expected=spec.datatype, got=f"{array.dtype} in {path}")
            return Tensor(spec.name, spec.datatype, array.shape, np.ascontiguousarray(array).tobytes())
        raw = path.read_bytes()
    except (OSError, ValueError) as error:
        raise InvalidError(f"--file {spec.name}", expected="a readable file", got=f"{path}: {error}") from error
    if spec.datatype == "BYTES":
        return Tensor(spec.name, "BYTES", (1,) * len(spec.shape), pack_bytes([raw]))
    return Tensor(spec.name, spec.datatype, _infer_shape(spec, len(raw)), raw)


def to_array(tensor: Tensor) -> npt.NDArray[Any]:
    """Decodes a tensor; BYTES give an object array of bytes, BF16 gives float32."""
    import numpy as np

    if tensor.datatype == "BYTES":
        array = np.empty(math.prod(tensor.shape), dtype=object)
        array[:] = unpack_bytes(tensor.raw)
        return array.reshape(tensor.shape)
    if tensor.datatype == "BF16":
        bits = np.frombuffer(tensor.raw, dtype="<u2").astype(np.uint32) << 16
        return bits.view(np.float32).reshape(tensor.shape)
    return np.frombuffer(tensor.raw, dtype=NUMPY_DTYPES[tensor.datatype]).reshape(tensor.shape)


def to_json_value(tensor: Tensor) -> Any:
    """A tensor as nested lists; bytes that are not UTF-8 come with backslash escapes."""
    array = to_array(tensor)
    if tensor.datatype != "BYTES":
        return array.tolist()
    return _nest([element.decode("utf-8", errors="backslashreplace") for element in array.flat], tensor.shape)


def summarise(tensor: Tensor) -> str:
    """One line: the first values, and the range when there are more."""
    import numpy as np

    array = to_array(tensor).reshape(-1)
    if tensor.datatype == "BYTES":
        shown = ", ".join(repr(element.decode("utf-8", errors="backslashreplace")[:60]) for element in array[:3])
        return shown + (f", ... ({array.size})" if array.size > 3 else "")
    first = " ".join(f"{value:.6g}" for value in array[:SHOWN_COUNT].tolist())
    if array.size <= SHOWN_COUNT or tensor.datatype == "BOOL":
        return first + (" ..." if array.size > SHOWN_COUNT else "")
    wide = array.astype(np.float64)
    return f"{first} ...  (min {wide.min():.6g}, mean {wide.mean():.6g}, max {wide.max():.6g})"


def infer_request(
    function: str, inputs: Sequence[Tensor], *, outputs: Sequence[str] = (), timeout_us: int = 0
) -> oip.ModelInferRequest:
    """Builds a ModelInfer request with raw contents."""
    from hasgpu.inference.v2 import inference_pb2 as oip

    request = oip.ModelInferRequest(
        model_name=function,
        inputs=[
            oip.ModelInferRequest.InferInputTensor(name=t.name, datatype=t.datatype, shape=t.shape) for t in inputs
        ],
        outputs=[oip.ModelInferRequest.InferRequestedOutputTensor(name=name) for name in outputs],
        raw_input_contents=[t.raw for t in inputs],
    )
    if timeout_us:
        request.parameters["timeout"].int64_param = timeout_us
    return request


def response_tensors(response: oip.ModelInferResponse) -> list[Tensor]:
    """The outputs of a response with raw contents."""
    if len(response.raw_output_contents) != len(response.outputs):
        raise InvalidError(
            "the response",
            expected=f"raw contents of {len(response.outputs)} outputs",
            got=str(len(response.raw_output_contents)),
        )
    return [
        Tensor(output.name, output.datatype, tuple(output.shape), raw)
        for output, raw in zip(response.outputs, response.raw_output_contents, strict=True)
    ]


def _flatten(spec: TensorSpec, value: Any) -> tuple[tuple[int, ...], list[Any]]:
    shape: tuple[int, ...] = ()
    level = [value]
    while level and all(isinstance(item, list) for item in level):
        lengths = {len(item) for item in level}
        if len(lengths) != 1:
            raise InvalidError(
                f"--input {spec.name}", expected="lists of equal length", got=f"lengths {sorted(lengths)}"
            )
        shape = (*shape, lengths.pop())
        level = [element for item in level for element in item]
    return shape, level


def _nest(flat: list[Any], shape: tuple[int, ...]) -> Any:
    for size in reversed(shape[1:]):
        flat = [flat[at : at + size] for at in range(0, len(flat), size)] if size else []
    return flat


def _infer_shape(spec: TensorSpec, size_bytes: int) -> tuple[int, ...]:
    fixed = math.prod(dim for dim in spec.shape if dim != -1) * DATATYPE_SIZE_BYTES[spec.datatype]
    if spec.shape.count(-1) == 1 and size_bytes and size_bytes % fixed == 0:
        return tuple(size_bytes // fixed if dim == -1 else dim for dim in spec.shape)
    if spec.shape.count(-1) > 1 and all(dim == -1 for dim in spec.shape[1:]) and size_bytes % fixed == 0 and size_bytes:
        return (*(1,) * (len(spec.shape) - 1), size_bytes // fixed)
    raise InvalidError(
        f"--file {spec.name}",
        expected=f"a multiple of {fixed} bytes for {spec.datatype} {list(spec.shape)}",
        got=f"{size_bytes} bytes",
    )


def _to_bf16(array: npt.NDArray[Any]) -> npt.NDArray[np.uint16]:
    """Rounds to nearest, ties to even."""
    import numpy as np

    bits = np.ascontiguousarray(array, dtype=np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")
