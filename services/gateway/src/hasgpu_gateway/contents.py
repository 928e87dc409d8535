"""Typed contents to raw contents, and counting the elements of raw BYTES."""

from __future__ import annotations

import struct
from collections.abc import Iterable

from hasgpu_core.errors import InvalidError

FIELDS = {
    "BOOL": ("bool_contents", "?"),
    "INT8": ("int_contents", "b"),
    "INT16": ("int_contents", "h"),
    "INT32": ("int_contents", "i"),
    "INT64": ("int64_contents", "q"),
    "UINT8": ("uint_contents", "B"),
    "UINT16": ("uint_contents", "H"),
    "UINT32": ("uint_contents", "I"),
    "UINT64": ("uint64_contents", "Q"),
    "FP32": ("fp32_contents", "f"),
    "FP64": ("fp64_contents", "d"),
    "BYTES": ("bytes_contents", ""),
}
"""Datatype to (field of InferTensorContents, struct code); FP16 and BF16 have none: they travel only as raw."""

ALL_FIELDS = tuple(dict.fromkeys(field for field, _ in FIELDS.values()))

_LENGTH = struct.Struct("<I")


def contents_to_raw(contents: object, datatype: str, element_count: int, where: str) -> bytes:
    """Returns the raw form of typed contents; raises InvalidError naming `where`.

    Args:
        contents: An InferTensorContents.
        datatype: The tensor's, already found to be the declared one.
        element_count: Product of the shape.
        where: Begins every message, e.g. "input 'text'".
    """
    if datatype not in FIELDS:
        raise InvalidError(f"{where}: contents of {datatype}", expected="raw_input_contents", got="typed contents")
    wanted, code = FIELDS[datatype]
    filled = [field for field in ALL_FIELDS if len(getattr(contents, field))]
    if any(field != wanted for field in filled):
        raise InvalidError(f"{where}: contents of {datatype}", expected=wanted, got=" and ".join(filled))
    values = getattr(contents, wanted)
    if len(values) != element_count:
        raise InvalidError(
            f"{where}: number of elements in {wanted}",
            expected=f"{element_count} (the product of its shape)",
            got=str(len(values)),
        )
    if datatype == "BYTES":
        return join_bytes(values)
    try:
        return struct.pack(f"<{element_count}{code}", *values)
    except struct.error:
        bits = 8 * struct.calcsize(f"<{code}")
        low, high = (0, 2**bits - 1) if code.isupper() else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        outside = next(value for value in values if not low <= value <= high)
        raise InvalidError(f"{where}: {wanted} of {datatype}", expected=f"{low}..{high}", got=str(outside)) from None


def join_bytes(elements: Iterable[bytes]) -> bytes:
    """Returns the raw form of BYTES elements: each behind its length, uint32 little-endian."""
    return b"".join(part for element in elements for part in (_LENGTH.pack(len(element)), element))


def check_bytes(raw: bytes, element_count: int, where: str) -> None:
    """Walks raw BYTES; raises InvalidError unless it holds exactly `element_count` elements."""
    size = len(raw)
    at = 0
    unpack = _LENGTH.unpack_from
    for index in range(element_count):
        if at + 4 > size:
            raise InvalidError(
                f"{where}: elements in raw contents",
                expected=f"{element_count} (the product of its shape)",
                got=str(index),
            )
        at += 4 + unpack(raw, at)[0]
        if at > size:
            raise InvalidError(
                f"{where}: raw contents of element {index}",
                expected=f"{at - size} more bytes, as its length prefix says",
                got=f"the end at byte {size}",
            )
    if at != size:
        raise InvalidError(
            f"{where}: raw contents", expected=f"{at} bytes for {element_count} elements", got=f"{size} bytes"
        )
