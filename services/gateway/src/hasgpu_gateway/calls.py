"""Values on a request's way: what was asked, what came back."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from enum import Enum


@dataclass(frozen=True, slots=True)
class TensorData:
    """One tensor with its contents."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    raw: bytes
    """As in the Open Inference Protocol's raw contents: little-endian, row-major."""


@dataclass(frozen=True, slots=True)
class InferCall:
    """A request that was found valid."""

    function: str
    request_id: str
    """The caller's; empty when not given."""
    rows: int
    """The first dimension of every input."""
    inputs: tuple[TensorData, ...]
    """In the order of the function's declaration."""
    signature: Hashable
    """Calls of one batch agree in it: every shape beyond the batch dimension."""
    outputs: tuple[str, ...]
    """Outputs asked for, in that order."""
    timeout_s: float | None
    """The caller's `timeout` parameter; None: not given."""

    @property
    def size_bytes(self) -> int:
        """Of all its contents."""
        return sum(len(tensor.raw) for tensor in self.inputs)


class FailureKind(Enum):
    """Why an item of a batch has no outputs."""

    MODEL = "model"
    """The handler raised, or its answer does not fit the function's outputs."""
    INPUT = "input"
    EXPIRED = "expired"
    DRAINING = "draining"
    HUNG = "hung"


@dataclass(frozen=True, slots=True)
class Failure:
    """An item's error, as the worker told it."""

    kind: FailureKind
    message: str


@dataclass(frozen=True, slots=True)
class Answer:
    """An item's outputs."""

    outputs: tuple[TensorData, ...]
    emulated: bool = False
    """They were made up by an emulated device."""


@dataclass(frozen=True, slots=True)
class BatchAnswer:
    """A worker's answer to one batch."""

    batch: int
    items: tuple[Answer | Failure, ...]
    started_unix_ns: int = 0
    line_ns: int = 0
    gate_wait_ns: int = 0
    execute_ns: int = 0
