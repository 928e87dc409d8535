"""Sends a function's requests for the load generator, and compares what comes back."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hasgpu_core.function import DATATYPE_SIZE_BYTES, TensorSpec

from hasgpu_cli.load import OK, Answer
from hasgpu_cli.tensors import Tensor, infer_request, pack_bytes, response_tensors, to_array

if TYPE_CHECKING:
    import grpc.aio
    import numpy.typing as npt

LARGEST_ERROR = 1e-4
"""An output element further than this from the reference is wrong."""
SAMPLES_COUNT = 16
WORDS = [
    "a",
    "share",
    "of",
    "the",
    "device",
    "in",
    "space",
    "and",
    "time",
    "grows",
    "and",
    "shrinks",
    "with",
    "the",
    "load",
    "that",
    "each",
    "function",
    "sees",
]


@dataclass(frozen=True, slots=True)
class Sample:
    """One request and, where it is known, the right answer (of the first output)."""

    inputs: Sequence[Tensor]
    expected: npt.NDArray[Any] | None = None


class FunctionSender:
    """Sends sample `index % len(samples)` of a function over a channel."""

    def __init__(
        self, channel: grpc.aio.Channel, function: str, samples: Sequence[Sample], *, timeout_s: float
    ) -> None:
        from hasgpu.inference.v2 import inference_pb2_grpc

        self._stub = inference_pb2_grpc.GRPCInferenceServiceStub(channel)
        self._samples = samples
        self._requests = [infer_request(function, sample.inputs) for sample in samples]
        self._timeout_s = timeout_s

    async def send(self, index: int) -> Answer:
        """Sends one request; a gRPC error becomes its status, and never raises."""
        import grpc

        at = index % len(self._samples)
        try:
            response = await self._stub.ModelInfer(self._requests[at], timeout=self._timeout_s)
        except grpc.aio.AioRpcError as error:
            return Answer(error.code().name, error.details() or "")
        expected = self._samples[at].expected
        if expected is None:
            return Answer(OK)
        difference = largest_difference(response_tensors(response)[0], expected)
        return Answer(OK, f"off by {difference:.2g}", wrong=not difference <= LARGEST_ERROR)


def largest_difference(tensor: Tensor, expected: npt.NDArray[Any]) -> float:
    """The largest absolute difference of any element; infinite when the shapes differ."""
    import numpy as np

    array = to_array(tensor)
    if array.size != expected.size:
        return math.inf
    return float(np.abs(array.reshape(expected.shape) - expected).max())


def random_samples(specs: Sequence[TensorSpec], rng: random.Random, count: int = SAMPLES_COUNT) -> list[Sample]:
    """Makes requests of one row: words for BYTES, random numbers otherwise; variable dimensions are 1."""
    return [Sample([_random_tensor(spec, rng) for spec in specs]) for _ in range(count)]


def _random_tensor(spec: TensorSpec, rng: random.Random) -> Tensor:
    shape = tuple(1 if dim == -1 else dim for dim in spec.shape)
    size = math.prod(shape)
    if spec.datatype == "BYTES":
        texts = [" ".join(rng.choices(WORDS, k=rng.randint(4, 16))).encode() for _ in range(size)]
        return Tensor(spec.name, "BYTES", shape, pack_bytes(texts))
    if spec.datatype in ("FP16", "FP32", "FP64"):
        import numpy as np

        values = np.random.default_rng(rng.randrange(1 << 32)).standard_normal(size)
        dtype = {"FP16": "<f2", "FP32": "<f4", "FP64": "<f8"}[spec.datatype]
        return Tensor(spec.name, spec.datatype, shape, values.astype(dtype).tobytes())
    width = DATATYPE_SIZE_BYTES[spec.datatype]
    one = [rng.randrange(2) for _ in range(size)]
    return Tensor(spec.name, spec.datatype, shape, b"".join(value.to_bytes(width, "little") for value in one))
