"""Functions: what a user deploys."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

from hasgpu_core.errors import InvalidError

NAME_PATTERN = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
"""A DNS label: function names become NATS subject tokens, file names and Redis keys."""

MIB = 1024 * 1024

DATATYPE_SIZE_BYTES: Mapping[str, int] = {
    "BOOL": 1,
    "UINT8": 1,
    "UINT16": 2,
    "UINT32": 4,
    "UINT64": 8,
    "INT8": 1,
    "INT16": 2,
    "INT32": 4,
    "INT64": 8,
    "FP16": 2,
    "FP32": 4,
    "FP64": 8,
    "BF16": 2,
    "BYTES": 0,
}
"""Open Inference Protocol datatypes and the size of an element; BYTES elements carry their own length."""


class ModelFormat(Enum):
    """How a model is packaged."""

    PYTHON = "python"
    """A Python file with `load()` and `infer(batch)`."""
    TORCHSCRIPT = "torchscript"
    TORCH_EXPORT = "torch-export"


class SloClass(Enum):
    """How much a function's objective counts when GPUs run out; `docs/scaling.md` has the order of who suffers."""

    CRITICAL = "critical"
    """Served first; takes room from the other two."""
    STANDARD = "standard"
    BEST_EFFORT = "best-effort"
    """Served with what the others leave."""

    @property
    def rank(self) -> int:
        """0 for those served first."""
        return _SLO_CLASSES.index(self)


_SLO_CLASSES = (SloClass.CRITICAL, SloClass.STANDARD, SloClass.BEST_EFFORT)


def slo_class_of(text: str) -> SloClass:
    """Returns the class of that name; empty: standard. Raises InvalidError, naming the classes."""
    for one in _SLO_CLASSES:
        if text == one.value:
            return one
    if text:
        raise InvalidError("slo_class", expected=" or ".join(one.value for one in _SLO_CLASSES), got=repr(text))
    return SloClass.STANDARD


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One input or output of a function."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    """The first dimension is the batch and is -1; others are fixed or -1 (variable)."""

    def validate(self, where: str) -> None:
        """Raises InvalidError when the spec can't be."""
        if not self.name:
            raise InvalidError(f"{where}.name", expected="a name", got="nothing")
        if self.datatype not in DATATYPE_SIZE_BYTES:
            raise InvalidError(
                f"{where}.datatype of {self.name!r}",
                expected=" or ".join(DATATYPE_SIZE_BYTES),
                got=repr(self.datatype),
            )
        if not self.shape or self.shape[0] != -1:
            raise InvalidError(
                f"{where}.shape of {self.name!r}",
                expected="-1 (the batch) as first dimension",
                got=str(list(self.shape)),
            )
        if any(dim == 0 or dim < -1 for dim in self.shape):
            raise InvalidError(
                f"{where}.shape of {self.name!r}", expected="dimensions >= 1 or -1", got=str(list(self.shape))
            )


@dataclass(frozen=True, slots=True)
class Artifact:
    """A model's files: one tar archive, addressed by its digest."""

    sha256: str
    """Lower-case hex."""
    size_bytes: int


@dataclass(frozen=True, slots=True)
class FunctionSpec:
    """What a user declares of a function."""

    name: str
    format: ModelFormat
    artifact: Artifact
    entry: str
    """The file inside the artifact that is loaded."""
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    slo_ms: int
    """Latency objective, request to response at the gateway."""
    slo_permille: int = 950
    """Share of requests that should meet the objective."""
    timeout_ms: int = 30_000
    """Longest a request without a deadline of its own may wait and run."""
    max_batch: int = 8
    """Largest number of items (rows) in one batch."""
    min_instances: int = 1
    """0 lets the function scale to zero; its next request then waits for a cold start."""
    max_instances: int = 8
    standby: int = 0
    """Ready instances parked at the smallest quota."""
    memory_bytes: int = 512 * MIB
    max_queue: int = 1_000
    """Requests that may wait at one gateway."""
    parameters: Mapping[str, str] = field(default_factory=dict)
    """Handed to a Python handler's load() as keyword arguments."""
    execution_timeout_ms: int = 30_000
    """Longest a batch may take on the device before its worker is taken for hung."""
    advisory: bool = False
    """The scaler decides and shows what it would do, and does nothing: shares and instances are set by hand."""
    slo_class: SloClass = SloClass.STANDARD
    """Who goes without when GPUs run out: the lower class."""
    weight: int = 100
    """Of functions of one class: those with less covered of their need, by weight, get room first."""

    @property
    def slo_s(self) -> float:
        """The objective in seconds."""
        return self.slo_ms / 1e3

    def validate(self) -> None:
        """Raises InvalidError, naming the field, the bound and what came."""
        if not NAME_PATTERN.fullmatch(self.name):
            raise InvalidError("name", expected="1 to 63 of a-z, 0-9 and -, not at an end", got=repr(self.name))
        if not re.fullmatch(r"[0-9a-f]{64}", self.artifact.sha256):
            raise InvalidError("artifact.sha256", expected="64 lower-case hex digits", got=repr(self.artifact.sha256))
        if not self.entry or self.entry.startswith("/") or ".." in self.entry.split("/"):
            raise InvalidError("entry", expected="a relative path inside the artifact", got=repr(self.entry))
        for where, tensors in (("inputs", self.inputs), ("outputs", self.outputs)):
            if not tensors:
                raise InvalidError(where, expected="at least one tensor", got="none")
            for tensor in tensors:
                tensor.validate(where)
            names = [tensor.name for tensor in tensors]
            if len(set(names)) != len(names):
                raise InvalidError(where, expected="distinct names", got=str(names))
        for name, value, low, high in (
            ("slo_ms", self.slo_ms, 1, 600_000),
            ("slo_permille", self.slo_permille, 1, 1_000),
            ("timeout_ms", self.timeout_ms, 1, 3_600_000),
            ("max_batch", self.max_batch, 1, 1_024),
            ("min_instances", self.min_instances, 0, 1_000),
            ("max_instances", self.max_instances, 1, 1_000),
            ("standby", self.standby, 0, 100),
            ("memory_bytes", self.memory_bytes, MIB, 1 << 50),
            ("max_queue", self.max_queue, 1, 1_000_000),
            ("execution_timeout_ms", self.execution_timeout_ms, 1, 3_600_000),
            ("weight", self.weight, 1, 10_000),
        ):
            if not low <= value <= high:
                raise InvalidError(name, expected=f"{low}..{high}", got=str(value))
        if self.min_instances > self.max_instances:
            raise InvalidError(
                "min_instances", expected=f"at most max_instances ({self.max_instances})", got=str(self.min_instances)
            )


def workload_digest(spec: FunctionSpec) -> str:
    """Returns what a function's profile is keyed by, lower-case hex.

    It covers what decides the device work of a batch: the artifact, its entry and format, and the parameters handed
    to `load()`. Name, objective and scaling bounds are left out, so a redeploy of the same artifact needs no new run.
    """
    what = [spec.artifact.sha256, spec.format.value, spec.entry, sorted(spec.parameters.items())]
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()
