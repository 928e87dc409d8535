"""Tensors to and from the wire."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hasgpu_cli import tensors
from hasgpu_core.errors import InvalidError
from hasgpu_core.function import DATATYPE_SIZE_BYTES, TensorSpec


@pytest.mark.parametrize("datatype", sorted(set(DATATYPE_SIZE_BYTES) - {"BYTES"}))
def test_json_there_and_back(datatype: str) -> None:
    tensor = tensors.from_json(TensorSpec("x", datatype, (-1, 2)), "[[0, 1], [1, 0]]")
    assert tensor.shape == (2, 2)
    assert len(tensor.raw) == 4 * DATATYPE_SIZE_BYTES[datatype]
    assert tensors.to_array(tensor).tolist() == [[0, 1], [1, 0]]


def test_strings_there_and_back() -> None:
    tensor = tensors.from_json(TensorSpec("x", "BYTES", (-1, 2)), '[["a", ""], ["\\u00e9", "longer"]]')
    assert tensor.shape == (2, 2)
    assert tensors.to_json_value(tensor) == [["a", ""], ["é", "longer"]]
    assert tensor.raw[:5] == b"\x01\x00\x00\x00a"


@pytest.mark.parametrize(
    ("datatype", "text", "says"),
    [
        ("FP32", "[1,", "expected JSON"),
        ("FP32", "[[1], [2, 3]]", "FP32 values"),
        ("FP32", '["a"]', "FP32 values"),
        ("UINT8", "[256]", "UINT8"),
        ("UINT8", "[-1]", "UINT8"),
        ("INT32", "[1.5]", "INT32 cannot hold"),
        ("BYTES", "[1]", "expected strings"),
        ("BYTES", '[["a"], ["b", "c"]]', "lists of equal length"),
    ],
)
def test_values_that_do_not_fit(datatype: str, text: str, says: str) -> None:
    with pytest.raises(InvalidError) as raised:
        tensors.from_json(TensorSpec("x", datatype, (-1,)), text)
    assert says in str(raised.value)


def test_files(tmp_path: Path) -> None:
    spec = TensorSpec("x", "FP32", (-1, 3))
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    np.save(tmp_path / "a.npy", array)
    (tmp_path / "a.raw").write_bytes(array.tobytes())
    for name in ("a.npy", "a.raw"):
        tensor = tensors.from_file(spec, tmp_path / name)
        assert tensor.shape == (2, 3)
        assert np.array_equal(tensors.to_array(tensor), array)
    (tmp_path / "odd.raw").write_bytes(b"12345")
    with pytest.raises(InvalidError, match="a multiple of 12 bytes"):
        tensors.from_file(spec, tmp_path / "odd.raw")
    np.save(tmp_path / "wide.npy", array.astype(np.float64))
    with pytest.raises(InvalidError, match="expected FP32, got float64"):
        tensors.from_file(spec, tmp_path / "wide.npy")
    assert tensors.from_file(TensorSpec("d", "UINT8", (-1, -1)), tmp_path / "odd.raw").shape == (1, 5)
    text = tensors.from_file(TensorSpec("t", "BYTES", (-1,)), tmp_path / "odd.raw")
    assert tensors.unpack_bytes(text.raw) == [b"12345"]


def test_bf16_rounds_to_nearest() -> None:
    tensor = tensors.from_json(TensorSpec("x", "BF16", (-1,)), "[1.0, 3.14159, -2.5]")
    assert tensors.to_array(tensor).tolist() == [1.0, 3.140625, -2.5]


def test_cut_off_strings_are_refused() -> None:
    with pytest.raises(InvalidError, match="cut off"):
        tensors.unpack_bytes(b"\x05\x00\x00\x00abc")


def test_summaries() -> None:
    many = tensors.from_json(TensorSpec("x", "FP32", (-1,)), "[1, 2, 3, 4, 5]")
    assert tensors.summarise(many) == "1 2 3 4 ...  (min 1, mean 3, max 5)"
    assert tensors.summarise(tensors.from_json(TensorSpec("x", "BYTES", (-1,)), '["a"]')) == "'a'"
