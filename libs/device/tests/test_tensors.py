import random

import numpy as np
import pytest
from hasgpu_core.errors import InvalidError
from hasgpu_core.function import DATATYPE_SIZE_BYTES, TensorSpec
from hasgpu_device import tensors
from hypothesis import given
from hypothesis import strategies as st

NUMERIC = [name for name in DATATYPE_SIZE_BYTES if name not in ("BYTES", "BF16")]


@pytest.mark.parametrize("datatype", NUMERIC)
@pytest.mark.parametrize("shape", [(1,), (3, 2), (0, 4), (2, 1, 3)])
def test_numbers_come_back(datatype: str, shape: tuple[int, ...]) -> None:
    array = np.arange(np.prod(shape)).reshape(shape).astype(tensors.DTYPE[datatype])
    raw = tensors.encode(array, datatype)
    assert len(raw) == array.size * DATATYPE_SIZE_BYTES[datatype]
    np.testing.assert_array_equal(tensors.decode("x", datatype, shape, raw), array)


@given(st.lists(st.binary(max_size=20), max_size=10))
def test_bytes_come_back(elements: list[bytes]) -> None:
    array = np.empty(len(elements), dtype=object)
    array[:] = elements
    raw = tensors.encode(array, "BYTES")
    assert tensors.decode("x", "BYTES", [len(elements)], raw).tolist() == elements


def test_bytes_are_length_prefixed() -> None:
    array = np.array([b"ab", b""], dtype=object)
    assert tensors.encode(array, "BYTES") == b"\x02\0\0\0ab\0\0\0\0"


@given(st.binary(max_size=60), st.integers(0, 6))
def test_bad_bytes_never_crash(raw: bytes, count: int) -> None:
    try:
        array = tensors.decode("x", "BYTES", [count], raw)
    except InvalidError:
        return
    assert tensors.encode(array, "BYTES") == raw


def test_bf16_agrees_with_torch() -> None:
    import torch

    values = np.array([0.0, -0.0, 1.0, 1.00390625, 3.1415927, 1e-40, 3.4e38, np.inf, -np.inf, np.nan], dtype="f4")
    expected = torch.from_numpy(values).to(torch.bfloat16)
    raw = tensors.encode(values, "BF16")
    got = np.frombuffer(raw, "<u2")
    np.testing.assert_array_equal(got[:-1], expected.view(torch.uint16).numpy()[:-1])
    back = tensors.decode("x", "BF16", [10], raw)
    np.testing.assert_array_equal(back, expected.float().numpy())
    assert back.dtype == np.float32


@pytest.mark.parametrize(
    ("datatype", "shape", "raw", "message"),
    [
        ("FP32", [2, 2], b"\0" * 15, "16 bytes"),
        ("FP32", [2, 2], b"\0" * 17, "got 17"),
        ("FP31", [1], b"", "datatype"),
        ("FP32", [-1], b"", "dimensions >= 0"),
        ("BYTES", [1], b"\x05\0\0\0ab", "element 0"),
        ("BYTES", [1], b"\x01\0\0\0ab", "1 bytes more"),
        ("BYTES", [1 << 40], b"", "elements"),
        ("UINT8", [1] * 40, b"\0", "shape"),
    ],
)
def test_what_does_not_fit_is_refused(datatype: str, shape: list[int], raw: bytes, message: str) -> None:
    with pytest.raises(InvalidError, match=message):
        tensors.decode("x", datatype, shape, raw)


def test_outputs_of_every_kind_conform() -> None:
    import torch

    spec = TensorSpec("y", "FP32", (-1, 2))
    for value in (np.ones((3, 2), "f4"), torch.ones(3, 2), [[1, 1]] * 3, torch.ones(3, 2, dtype=torch.bfloat16)):
        np.testing.assert_array_equal(tensors.conform(value, spec, 3), np.ones((3, 2), "f4"))
    text = tensors.conform(["ä", b"b"], TensorSpec("t", "BYTES", (-1,)), 2)
    assert text.tolist() == ["ä".encode(), b"b"]


@pytest.mark.parametrize(
    ("value", "spec", "message"),
    [
        (np.ones((3, 2)), TensorSpec("y", "FP32", (-1, 2)), "float32.*float64"),
        (np.ones((2, 2), "f4"), TensorSpec("y", "FP32", (-1, 2)), "batch of 3"),
        (np.ones((3,), "f4"), TensorSpec("y", "FP32", (-1, 2)), "shape"),
        (None, TensorSpec("y", "FP32", (-1, 2)), "y"),
        ([["a", "b"]] * 3, TensorSpec("y", "FP32", (-1, 2)), "expected numbers .FP32., got list .could not"),
        ([1, 2, 3], TensorSpec("y", "BYTES", (-1,)), "bytes or text"),
    ],
)
def test_outputs_that_do_not_conform_are_refused(value: object, spec: TensorSpec, message: str) -> None:
    with pytest.raises(InvalidError, match=message):
        tensors.conform(value, spec, 3)


def test_random_inputs_fit_their_specs() -> None:
    specs = [TensorSpec(name, name, (-1, 3, -1)) for name in DATATYPE_SIZE_BYTES]
    batch = tensors.random_inputs(specs, 4, random.Random(1))
    for spec in specs:
        array = batch[spec.name]
        assert array.shape == (4, 3, 16)
        raw = tensors.encode(array, spec.datatype)
        assert tensors.decode(spec.name, spec.datatype, array.shape, raw).shape == array.shape


def test_concatenation_copies_and_is_writable() -> None:
    array = tensors.decode("x", "FP32", [1, 2], b"\0" * 8)
    tensors.concatenate([array])[0, 0] = 1
    joined = tensors.concatenate([array, array])
    joined[0, 0] = 1
    assert joined.shape == (2, 2)
    assert array[0, 0] == 0
