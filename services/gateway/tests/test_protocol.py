"""What a request must look like, and what the caller is told otherwise."""

from __future__ import annotations

import struct
from collections.abc import Callable

import pytest
from hasgpu.inference.v2 import inference_pb2 as pb
from hasgpu_core.errors import InvalidError, ModelError, UnsupportedError
from hasgpu_core.events import FunctionEvent
from hasgpu_core.function import DATATYPE_SIZE_BYTES, Artifact, FunctionSpec, ModelFormat, TensorSpec
from hasgpu_gateway.calls import Answer, TensorData
from hasgpu_gateway.contents import join_bytes
from hasgpu_gateway.errors import UnknownModelError
from hasgpu_gateway.protocol import Signature, build_metadata, build_response, parse_infer


def event_of(*inputs: TensorSpec, outputs: tuple[TensorSpec, ...] = ()) -> FunctionEvent:
    spec = FunctionSpec(
        name="fn",
        format=ModelFormat.TORCH_EXPORT,
        artifact=Artifact("0" * 64, 1),
        entry="model.pt2",
        inputs=inputs,
        outputs=outputs or (TensorSpec("y", "FP32", (-1, 2)), TensorSpec("z", "INT64", (-1,))),
        slo_ms=100,
        max_batch=4,
    )
    return FunctionEvent(spec, 7, 0)


PAIR = event_of(TensorSpec("image", "FP32", (-1, 2)), TensorSpec("text", "BYTES", (-1, 1)))


def pair_request() -> pb.ModelInferRequest:
    request = pb.ModelInferRequest(model_name="fn", id="r1")
    request.inputs.add(name="image", datatype="FP32", shape=[2, 2])
    request.inputs.add(name="text", datatype="BYTES", shape=[2, 1])
    request.raw_input_contents.extend([struct.pack("<4f", 1, 2, 3, 4), join_bytes([b"a", b"bcd"])])
    return request


def parse(request: pb.ModelInferRequest, event: FunctionEvent = PAIR):
    return parse_infer(request, Signature.of(event))


def test_a_valid_request_passes_through_untouched() -> None:
    request = pair_request()
    call = parse(request)
    assert (call.function, call.request_id, call.rows) == ("fn", "r1", 2)
    assert [tensor.name for tensor in call.inputs] == ["image", "text"]
    assert [tensor.raw for tensor in call.inputs] == list(request.raw_input_contents)
    assert call.outputs == ("y", "z")
    assert call.timeout_s is None


def test_inputs_come_in_any_order_and_leave_in_the_declared_one() -> None:
    request = pair_request()
    swapped = pb.ModelInferRequest(model_name="fn")
    swapped.inputs.extend(reversed(request.inputs))
    swapped.raw_input_contents.extend(reversed(request.raw_input_contents))
    assert parse(swapped).inputs == parse(request).inputs


def test_calls_of_other_free_dimensions_do_not_share_a_batch() -> None:
    event = event_of(TensorSpec("x", "UINT8", (-1, -1)))

    def signature(rows: int, width: int):
        request = pb.ModelInferRequest(model_name="fn")
        request.inputs.add(name="x", datatype="UINT8", shape=[rows, width])
        request.raw_input_contents.append(bytes(rows * width))
        return parse(request, event).signature

    assert signature(1, 3) == signature(2, 3)
    assert signature(1, 3) != signature(1, 4)


def _set(path: str, value) -> Callable[[pb.ModelInferRequest], None]:
    def change(request: pb.ModelInferRequest) -> None:
        *parents, last = path.split(".")
        target = request
        for part in parents:
            target = target[int(part)] if part.isdigit() else getattr(target, part)
        if isinstance(value, list):
            del getattr(target, last)[:]
            getattr(target, last).extend(value)
        elif last.isdigit():
            target[int(last)] = value
        else:
            setattr(target, last, value)

    return change


def _mixed(request: pb.ModelInferRequest) -> None:
    request.inputs[0].contents.fp32_contents.extend([1, 2, 3, 4])


def _only_first(request: pb.ModelInferRequest) -> None:
    del request.inputs[1:]
    del request.raw_input_contents[1:]


def _twice(request: pb.ModelInferRequest) -> None:
    request.inputs.add().CopyFrom(request.inputs[0])
    request.raw_input_contents.append(request.raw_input_contents[0])


def _parameter(**choice):
    def change(request: pb.ModelInferRequest) -> None:
        request.parameters["timeout"].CopyFrom(pb.InferParameter(**choice))

    return change


def _no_contents(request: pb.ModelInferRequest) -> None:
    del request.raw_input_contents[:]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set("inputs.0.name", "picture"), "input name: expected 'image' or 'text', got 'picture'"),
        (_set("inputs.0.datatype", "FP64"), "input 'image': datatype: expected FP32, got 'FP64'"),
        (_set("inputs.0.shape", [2]), "input 'image': shape: expected 2 dimensions [-1, 2], got [2]"),
        (_set("inputs.0.shape", [2, 3]), "input 'image': shape: expected [-1, 2] (-1: any size), got [2, 3]"),
        (
            _set("inputs.0.shape", [5, 2]),
            "input 'image': rows (first dimension): expected 1..4 (the function's max_batch), got 5",
        ),
        (
            _set("inputs.0.shape", [0, 2]),
            "input 'image': rows (first dimension): expected 1..4 (the function's max_batch), got 0",
        ),
        (
            _set("inputs.0.shape", [-1, 2]),
            "input 'image': rows (first dimension): expected 1..4 (the function's max_batch), got -1",
        ),
        (_set("inputs.1.shape", [1, 1]), "input 'text': rows: expected 2 as in 'image', got 1"),
        (
            _set("raw_input_contents.0", b"123"),
            "input 'image': raw contents of FP32 [2, 2]: expected 16 bytes, got 3 bytes",
        ),
        (
            _set("raw_input_contents.1", join_bytes([b"a"])),
            "input 'text': elements in raw contents: expected 2 (the product of its shape), got 1",
        ),
        (
            _set("raw_input_contents.1", join_bytes([b"a", b"b", b"c"])),
            "input 'text': raw contents: expected 10 bytes for 2 elements, got 15 bytes",
        ),
        (
            _set("raw_input_contents.1", join_bytes([b"a"]) + struct.pack("<I", 9) + b"b"),
            "input 'text': raw contents of element 1: expected 8 more bytes, as its length prefix says, "
            "got the end at byte 10",
        ),
        (_set("raw_input_contents", [b""]), "raw_input_contents: expected 2 entries, one for each input, got 1"),
        (_mixed, "input 'image': contents: expected either raw_input_contents or contents, got both"),
        (_no_contents, "input 'image': contents: expected raw_input_contents or contents, got neither"),
        (_only_first, "inputs: expected 'image' and 'text', got none named 'text'"),
        (_twice, "input 'image': expected once, got twice"),
        (_set("model_version", "blue"), "model_version: expected empty or an integer >= 0, got 'blue'"),
        (_set("model_version", "-1"), "model_version: expected empty or an integer >= 0, got '-1'"),
        (_set("outputs", [pb.ModelInferRequest.InferRequestedOutputTensor(name="q")]), "got 'q'"),
        (
            _set("outputs", [pb.ModelInferRequest.InferRequestedOutputTensor(name="y")] * 2),
            "output 'y': expected once, got twice",
        ),
        (_parameter(string_param="5"), "parameter 'timeout': expected int64_param (microseconds), got string_param"),
        (_parameter(int64_param=-5), "parameter 'timeout': expected 0..86400000000 us, got -5"),
    ],
)
def test_an_invalid_request_is_told_what_was_wrong(change, message: str) -> None:
    request = pair_request()
    change(request)
    with pytest.raises(InvalidError) as caught:
        parse(request)
    assert message in str(caught.value)


def test_another_version_is_not_found() -> None:
    request = pair_request()
    request.model_version = "6"
    with pytest.raises(UnknownModelError, match="Request for unknown model: 'fn' version 6 is not found"):
        parse(request)
    request.model_version = "7"
    assert parse(request).rows == 2


@pytest.mark.parametrize("parameter", ["shared_memory_region"])
def test_shared_memory_is_refused_not_misread(parameter: str) -> None:
    request = pair_request()
    request.inputs[0].parameters[parameter].string_param = "region"
    with pytest.raises(UnsupportedError, match="shared memory"):
        parse(request)


def test_reserved_and_unknown_parameters_are_ignored() -> None:
    request = pair_request()
    request.parameters["triton_enable_empty_final_response"].bool_param = True
    request.parameters["priority"].uint64_param = 3
    request.parameters["sequence_id"].int64_param = 3
    request.parameters["mine"].string_param = "x"
    request.parameters["timeout"].int64_param = 250_000
    assert parse(request).timeout_s == 0.25


@pytest.mark.parametrize(
    ("datatype", "field", "values", "raw"),
    [
        ("BOOL", "bool_contents", [True, False], b"\x01\x00"),
        ("INT8", "int_contents", [-1, 5], b"\xff\x05"),
        ("INT16", "int_contents", [-2, 5], struct.pack("<2h", -2, 5)),
        ("INT32", "int_contents", [-2, 5], struct.pack("<2i", -2, 5)),
        ("INT64", "int64_contents", [-2, 5], struct.pack("<2q", -2, 5)),
        ("UINT8", "uint_contents", [2, 255], b"\x02\xff"),
        ("UINT16", "uint_contents", [2, 65535], struct.pack("<2H", 2, 65535)),
        ("UINT32", "uint_contents", [2, 5], struct.pack("<2I", 2, 5)),
        ("UINT64", "uint64_contents", [2, 5], struct.pack("<2Q", 2, 5)),
        ("FP32", "fp32_contents", [0.5, 2.0], struct.pack("<2f", 0.5, 2.0)),
        ("FP64", "fp64_contents", [0.1, 2.0], struct.pack("<2d", 0.1, 2.0)),
        ("BYTES", "bytes_contents", [b"ab", b""], b"\x02\x00\x00\x00ab\x00\x00\x00\x00"),
    ],
)
def test_typed_contents_become_raw(datatype: str, field: str, values: list, raw: bytes) -> None:
    event = event_of(TensorSpec("x", datatype, (-1,)))
    request = pb.ModelInferRequest(model_name="fn")
    tensor = request.inputs.add(name="x", datatype=datatype, shape=[2])
    getattr(tensor.contents, field).extend(values)
    assert parse(request, event).inputs[0].raw == raw

    getattr(tensor.contents, field).append(values[0])
    with pytest.raises(InvalidError, match=rf"number of elements in {field}: expected 2 .* got 3"):
        parse(request, event)
    wrong = "int64_contents" if field != "int64_contents" else "fp32_contents"
    getattr(tensor.contents, wrong).append(1)
    with pytest.raises(InvalidError, match=f"contents of {datatype}: expected {field}, got .*{wrong}"):
        parse(request, event)


@pytest.mark.parametrize("datatype", ["FP16", "BF16"])
def test_half_precision_travels_only_as_raw(datatype: str) -> None:
    event = event_of(TensorSpec("x", datatype, (-1,)))
    request = pb.ModelInferRequest(model_name="fn")
    tensor = request.inputs.add(name="x", datatype=datatype, shape=[2])
    tensor.contents.fp32_contents.extend([1, 2])
    with pytest.raises(InvalidError, match=f"contents of {datatype}: expected raw_input_contents"):
        parse(request, event)
    tensor.ClearField("contents")
    request.raw_input_contents.append(b"1234")
    assert parse(request, event).inputs[0].raw == b"1234"


def test_integers_outside_their_datatype_name_the_range() -> None:
    event = event_of(TensorSpec("x", "INT8", (-1,)))
    request = pb.ModelInferRequest(model_name="fn")
    request.inputs.add(name="x", datatype="INT8", shape=[1]).contents.int_contents.append(300)
    with pytest.raises(InvalidError, match=r"int_contents of INT8: expected -128\.\.127, got 300"):
        parse(request, event)


@pytest.mark.parametrize("datatype", sorted(DATATYPE_SIZE_BYTES))
def test_an_empty_variable_dimension_is_an_empty_tensor(datatype: str) -> None:
    event = event_of(TensorSpec("x", datatype, (-1, -1)))
    request = pb.ModelInferRequest(model_name="fn")
    request.inputs.add(name="x", datatype=datatype, shape=[1, 0])
    request.raw_input_contents.append(b"")
    assert parse(request, event).inputs[0].raw == b""


def test_the_response_keeps_the_order_asked_for_and_is_always_raw() -> None:
    request = pair_request()
    request.outputs.add(name="z")
    request.outputs.add(name="y")
    call = parse(request)
    answer = Answer((TensorData("y", "FP32", (2, 2), b"y" * 16), TensorData("z", "INT64", (2,), b"z" * 16)))
    response = build_response(call, answer, 7)
    assert [output.name for output in response.outputs] == ["z", "y"]
    assert list(response.raw_output_contents) == [b"z" * 16, b"y" * 16]
    assert not any(output.HasField("contents") for output in response.outputs)
    assert (response.model_name, response.model_version, response.id) == ("fn", "7", "r1")
    assert not response.parameters
    with pytest.raises(ModelError, match="no output 'z', only 'y'"):
        build_response(call, Answer(answer.outputs[:1]), 7)


def test_an_answer_that_was_made_up_says_so() -> None:
    outputs = (TensorData("y", "FP32", (2, 2), b"y" * 16), TensorData("z", "INT64", (2,), b"z" * 16))
    response = build_response(parse(pair_request()), Answer(outputs, emulated=True), 7)
    assert response.parameters["emulated"].bool_param


def test_metadata_begins_shapes_with_the_batch() -> None:
    metadata = build_metadata(PAIR)
    assert (metadata.name, list(metadata.versions), metadata.platform) == ("fn", ["7"], "hasgpu_torch_export")
    assert [(t.name, t.datatype, list(t.shape)) for t in metadata.inputs] == [
        ("image", "FP32", [-1, 2]),
        ("text", "BYTES", [-1, 1]),
    ]
