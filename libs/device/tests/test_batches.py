from __future__ import annotations

import re

import numpy as np
import pytest
from hasgpu.node_agent.v1 import node_agent_pb2 as pb
from hasgpu_core.function import TensorSpec
from hasgpu_device import batches

SPECS = (TensorSpec("x", "FP32", (-1, 2)), TensorSpec("t", "INT64", (-1, -1)))


def item(rows: int = 1, *, length: int = 3, value: float = 0.0) -> pb.BatchItem:
    return pb.BatchItem(
        rows=rows,
        inputs=[
            pb.Tensor(name="t", datatype="INT64", shape=[rows, length], raw=np.zeros((rows, length), "i8").tobytes()),
            pb.Tensor(name="x", datatype="FP32", shape=[rows, 2], raw=np.full((rows, 2), value, "f4").tobytes()),
        ],
    )


def test_items_are_joined_and_split_again() -> None:
    request = pb.ExecuteRequest(items=[item(1, value=1), item(3, value=2)])
    joined = batches.join(request, SPECS, max_batch=4)
    assert (joined.rows, joined.errors) == (4, {})
    np.testing.assert_array_equal(joined.inputs["x"][:, 0], [1, 2, 2, 2])
    results = batches.split(joined, joined.inputs, SPECS, 2)
    assert [list(result.outputs[0].shape) for result in results] == [[1, 2], [3, 2]]
    assert results[1].outputs[0].raw == request.items[1].inputs[1].raw


def test_one_bad_item_fails_alone() -> None:
    bad = item(2)
    bad.inputs[1].raw = b"\0" * 7
    request = pb.ExecuteRequest(items=[item(value=1), bad, item(value=2)])
    joined = batches.join(request, SPECS, max_batch=4)
    assert joined.rows == 2
    results = batches.split(joined, joined.inputs, SPECS, 3)
    assert [result.HasField("error") for result in results] == [False, True, False]
    assert results[1].error.kind == pb.ERROR_KIND_INPUT
    assert "16 bytes" in results[1].error.message
    assert np.frombuffer(results[2].outputs[0].raw, "f4").tolist() == [2, 2]


def break_name(broken: pb.BatchItem) -> None:
    broken.inputs[0].name = "z"


def break_type(broken: pb.BatchItem) -> None:
    broken.inputs[1].datatype = "FP64"


def break_shape(broken: pb.BatchItem) -> None:
    broken.inputs[1].shape[1] = 3


def break_rows(broken: pb.BatchItem) -> None:
    broken.rows = 2


def break_no_rows(broken: pb.BatchItem) -> None:
    broken.rows = 0


def double(broken: pb.BatchItem) -> None:
    broken.inputs.append(broken.inputs[0])


def add(broken: pb.BatchItem) -> None:
    broken.inputs.add(name="more")


def negate(broken: pb.BatchItem) -> None:
    broken.inputs[0].shape[1] = -3


@pytest.mark.parametrize(
    ("breaker", "message"),
    [
        (break_name, "'t' is missing"),
        (break_type, "FP32.*FP64"),
        (break_shape, "shape"),
        (break_rows, "shape"),
        (break_no_rows, "at least 1"),
        (double, "twice"),
        (add, "'more'"),
        (negate, "shape"),
    ],
)
def test_what_does_not_fit_the_function_is_told(breaker: object, message: str) -> None:
    broken = item()
    breaker(broken)  # type: ignore[operator]
    joined = batches.join(pb.ExecuteRequest(items=[broken]), SPECS, max_batch=4)
    assert joined.rows == 0
    assert joined.inputs == {}

    assert re.search(message, joined.errors[0].message)


def test_items_of_other_shapes_or_too_many_do_not_join() -> None:
    joined = batches.join(pb.ExecuteRequest(items=[item(), item(length=4), item(4), item(3)]), SPECS, max_batch=4)
    assert joined.rows == 4
    assert set(joined.errors) == {1, 2}
    assert "as in the rest of the batch" in joined.errors[1].message
    assert "at most 4" in joined.errors[2].message


def test_a_batch_wide_failure_keeps_the_items_own_errors() -> None:
    bad = item()
    bad.rows = 0
    joined = batches.join(pb.ExecuteRequest(items=[bad, item()]), SPECS, max_batch=4)
    results = batches.fail(joined, batches.item_error(pb.ERROR_KIND_MODEL, "boom" * 2_000), 2)
    assert [result.error.kind for result in results] == [pb.ERROR_KIND_INPUT, pb.ERROR_KIND_MODEL]
    assert len(results[1].error.message) == 4_000
