"""The Open Inference Protocol's messages: what is valid, and what the answer looks like.

Only shapes and byte counts are looked at; tensor values pass through untouched.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from hasgpu.inference.v2 import inference_pb2 as pb
from hasgpu_core.errors import InvalidError, ModelError, UnsupportedError
from hasgpu_core.events import FunctionEvent
from hasgpu_core.function import DATATYPE_SIZE_BYTES, TensorSpec

from hasgpu_gateway.calls import Answer, InferCall, TensorData
from hasgpu_gateway.contents import check_bytes, contents_to_raw
from hasgpu_gateway.errors import UnknownModelError

_US_PER_S = 1e6
_MAX_REQUEST_TIMEOUT_US = 24 * 3_600 * 1_000_000


@dataclass(frozen=True, slots=True)
class Signature:
    """A function's declaration, prepared for checking requests against it."""

    function: str
    revision: int
    max_batch: int
    inputs: Mapping[str, TensorSpec]
    outputs: Mapping[str, TensorSpec]
    output_names: tuple[str, ...]

    @staticmethod
    def of(event: FunctionEvent) -> Signature:
        """Prepares the declaration of a function."""
        spec = event.spec
        return Signature(
            function=spec.name,
            revision=event.revision,
            max_batch=spec.max_batch,
            inputs={tensor.name: tensor for tensor in spec.inputs},
            outputs={tensor.name: tensor for tensor in spec.outputs},
            output_names=tuple(tensor.name for tensor in spec.outputs),
        )


def check_version(version: str, name: str, revision: int) -> None:
    """Accepts "" and the revision served.

    Raises:
        InvalidError: It is not an integer >= 0.
        UnknownModelError: It is another revision.
    """
    if not version:
        return
    if not (version.isascii() and version.isdigit()):
        raise InvalidError("model_version", expected="empty or an integer >= 0", got=repr(version))
    if int(version) != revision:
        raise UnknownModelError(name, version, revision)


def parse_infer(request: pb.ModelInferRequest, signature: Signature) -> InferCall:
    """Returns the call; raises InvalidError (what, expected, got), UnknownModelError or UnsupportedError.

    Reserved parameters (`sequence_*`, `priority`, `headers`, `binary_data_output`, `triton_*`) and unknown ones are
    ignored; only `timeout` has a meaning here.
    """
    check_version(request.model_version, signature.function, signature.revision)
    raws = request.raw_input_contents
    tensors = request.inputs
    if len(raws) and len(raws) != len(tensors):
        raise InvalidError(
            "raw_input_contents", expected=f"{len(tensors)} entries, one for each input", got=str(len(raws))
        )
    found: dict[str, TensorData] = {}
    rows = 0
    for index, tensor in enumerate(tensors):
        name = tensor.name
        spec = signature.inputs.get(name)
        if spec is None:
            raise InvalidError("input name", expected=" or ".join(map(repr, signature.inputs)), got=repr(name))
        if name in found:
            raise InvalidError(f"input {name!r}", expected="once", got="twice")
        shape = _check_shape(tensor, spec, signature.max_batch)
        if found and shape[0] != rows:
            first = next(iter(found))
            raise InvalidError(f"input {name!r}: rows", expected=f"{rows} as in {first!r}", got=str(shape[0]))
        rows = shape[0]
        raw = _raw_of(tensor, spec.datatype, shape, raws[index] if len(raws) else None)
        found[name] = TensorData(name, spec.datatype, shape, raw)
    missing = [name for name in signature.inputs if name not in found]
    if missing:
        raise InvalidError(
            "inputs",
            expected=" and ".join(map(repr, signature.inputs)),
            got=f"none named {' or '.join(map(repr, missing))}",
        )
    inputs = tuple(found[name] for name in signature.inputs)
    return InferCall(
        function=signature.function,
        request_id=request.id,
        rows=rows,
        inputs=inputs,
        signature=tuple(tensor.shape[1:] for tensor in inputs),
        outputs=_outputs_of(request, signature),
        timeout_s=_timeout_of(request),
    )


def _check_shape(tensor: pb.ModelInferRequest.InferInputTensor, spec: TensorSpec, max_batch: int) -> tuple[int, ...]:
    """Returns the shape; its rank, fixed dimensions, rows and the datatype are as declared."""
    if tensor.datatype != spec.datatype:
        raise InvalidError(f"input {spec.name!r}: datatype", expected=spec.datatype, got=repr(tensor.datatype))
    if tensor.parameters and "shared_memory_region" in tensor.parameters:
        raise UnsupportedError(f"input {spec.name!r}: shared memory is not offered; send its contents")
    shape = tuple(tensor.shape)
    if len(shape) != len(spec.shape):
        raise InvalidError(
            f"input {spec.name!r}: shape",
            expected=f"{len(spec.shape)} dimensions {list(spec.shape)}",
            got=str(list(shape)),
        )
    if not 1 <= shape[0] <= max_batch:
        raise InvalidError(
            f"input {spec.name!r}: rows (first dimension)",
            expected=f"1..{max_batch} (the function's max_batch)",
            got=str(shape[0]),
        )
    for got, declared in zip(shape, spec.shape, strict=True):
        if got != declared and (declared != -1 or got < 0):
            raise InvalidError(
                f"input {spec.name!r}: shape", expected=f"{list(spec.shape)} (-1: any size)", got=str(list(shape))
            )
    return shape


def _raw_of(
    tensor: pb.ModelInferRequest.InferInputTensor, datatype: str, shape: tuple[int, ...], raw: bytes | None
) -> bytes:
    """Returns the contents in raw form, of the size that shape and datatype ask for."""
    where = f"input {tensor.name!r}"
    element_count = 1
    for dim in shape:
        element_count *= dim
    if raw is None:
        if not tensor.HasField("contents") and element_count:
            raise InvalidError(f"{where}: contents", expected="raw_input_contents or contents", got="neither")
        return contents_to_raw(tensor.contents, datatype, element_count, where)
    if tensor.HasField("contents"):
        raise InvalidError(f"{where}: contents", expected="either raw_input_contents or contents", got="both")
    if datatype == "BYTES":
        check_bytes(raw, element_count, where)
    elif len(raw) != element_count * DATATYPE_SIZE_BYTES[datatype]:
        raise InvalidError(
            f"{where}: raw contents of {datatype} {list(shape)}",
            expected=f"{element_count * DATATYPE_SIZE_BYTES[datatype]} bytes",
            got=f"{len(raw)} bytes",
        )
    return raw


def _outputs_of(request: pb.ModelInferRequest, signature: Signature) -> tuple[str, ...]:
    """Returns the names of the outputs asked for; all when none is named."""
    if not len(request.outputs):
        return signature.output_names
    names = []
    for output in request.outputs:
        if output.name not in signature.outputs:
            raise InvalidError("output name", expected=" or ".join(map(repr, signature.outputs)), got=repr(output.name))
        if output.name in names:
            raise InvalidError(f"output {output.name!r}", expected="once", got="twice")
        for unsupported in ("classification", "shared_memory_region"):
            if output.parameters and unsupported in output.parameters:
                raise UnsupportedError(f"output {output.name!r}: the parameter {unsupported!r} is not offered")
        names.append(output.name)
    return tuple(names)


def _timeout_of(request: pb.ModelInferRequest) -> float | None:
    """Returns the `timeout` parameter (microseconds on the wire) in seconds; None: absent or 0."""
    if not request.parameters or "timeout" not in request.parameters:
        return None
    parameter = request.parameters["timeout"]
    kind = parameter.WhichOneof("parameter_choice")
    if kind not in ("int64_param", "uint64_param"):
        raise InvalidError("parameter 'timeout'", expected="int64_param (microseconds)", got=str(kind))
    timeout_us = parameter.int64_param if kind == "int64_param" else parameter.uint64_param
    if not 0 <= timeout_us <= _MAX_REQUEST_TIMEOUT_US:
        raise InvalidError("parameter 'timeout'", expected=f"0..{_MAX_REQUEST_TIMEOUT_US} us", got=str(timeout_us))
    return timeout_us / _US_PER_S if timeout_us else None


def build_response(call: InferCall, answer: Answer, revision: int) -> pb.ModelInferResponse:
    """Returns the response: outputs in the order asked for, always as raw contents.

    Outputs that an emulated device made up are marked by the parameter `emulated`.

    Raises:
        ModelError: The worker left out an output that was asked for.
    """
    response = pb.ModelInferResponse(model_name=call.function, model_version=str(revision), id=call.request_id)
    if answer.emulated:
        response.parameters["emulated"].bool_param = True
    outputs = {tensor.name: tensor for tensor in answer.outputs}
    for name in call.outputs:
        tensor = outputs.get(name)
        if tensor is None:
            raise ModelError(
                f"function {call.function!r} gave no output {name!r}, only {', '.join(map(repr, outputs))}"
            )
        response.outputs.add(name=name, datatype=tensor.datatype, shape=tensor.shape)
        response.raw_output_contents.append(tensor.raw)
    return response


def build_metadata(event: FunctionEvent) -> pb.ModelMetadataResponse:
    """Returns a function's metadata; shapes begin with the batch dimension, -1."""
    spec = event.spec
    kind = pb.ModelMetadataResponse.TensorMetadata
    return pb.ModelMetadataResponse(
        name=spec.name,
        versions=[str(event.revision)],
        platform=f"hasgpu_{spec.format.value.replace('-', '_')}",
        inputs=[kind(name=t.name, datatype=t.datatype, shape=t.shape) for t in spec.inputs],
        outputs=[kind(name=t.name, datatype=t.datatype, shape=t.shape) for t in spec.outputs],
        properties={
            "slo_ms": str(spec.slo_ms),
            "timeout_ms": str(spec.timeout_ms),
            "max_batch": str(spec.max_batch),
            "artifact_sha256": spec.artifact.sha256,
        },
    )
