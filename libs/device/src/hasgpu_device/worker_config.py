"""What a worker process is told: a JSON file, written by the node agent, read once by the worker."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from hasgpu_core.errors import InvalidError
from hasgpu_core.function import ModelFormat, TensorSpec

from hasgpu_device.errors import ConfigError

SYSTEM_PREFIX = "hasgpu."
"""Parameters whose names begin so are for the system, not for the handler."""


@dataclass(frozen=True, slots=True)
class WorkerConfig:
    """One worker's configuration."""

    instance: str
    function: str
    function_revision: int
    format: ModelFormat
    entry: str
    """The file inside `artifact_dir` that is loaded."""
    artifact_dir: str
    """The artifact's files, unpacked and verified."""
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    max_batch: int
    control_path: str
    """The instance's control block; made by the agent before the worker starts."""
    gate_path: str
    """The row's gate; likewise."""
    status_path: str
    """Where the worker writes its status."""
    device_model: str = "cpu"
    gpu: str = "cpu0"
    device_cores: float = 1.0
    """Cores of the whole device; for a CPU device."""
    backend: str = "cpu"
    """"cpu", "cuda" or "emulated"."""
    mode: str = ""
    """How a CUDA device is shared, as the agent's probe found it (`hasgpu_device.backends.cuda`)."""
    gpu_uuid: str = ""
    """Of a CUDA device."""
    sm_rungs_pct: tuple[int, ...] = ()
    """Widths of the partitions that the device can give, ascending."""
    ledger_path: str = ""
    """The device's ledger of SMs in use, for the time in which partitions may overlap; empty: it has none."""
    profile_path: str = ""
    """An emulated device's latencies (`hasgpu_core.profile`)."""
    parameters: Mapping[str, str] = field(default_factory=dict)
    """Handed to a Python handler's load() as keyword arguments, but for those that begin with `hasgpu.`."""
    execution_timeout_ms: int = 30_000
    """Longest a batch may hold the device before the worker takes itself for hung."""
    memory_bytes: int = 0
    """Promised by the allocation; 0: not known. A CPU device does not enforce it."""
    listen_host: str = "127.0.0.1"
    advertise_host: str = ""
    """What others dial; empty: the host listened on."""
    orphan_timeout_s: float = 60.0
    """A worker whose agent has not touched the control block for so long ends itself; 0: never."""

    @property
    def entry_path(self) -> Path:
        """The file that is loaded."""
        return Path(self.artifact_dir) / self.entry

    @property
    def handler_parameters(self) -> Mapping[str, str]:
        """The parameters that are the handler's own; those that begin with `hasgpu.` are for the system."""
        return {name: value for name, value in self.parameters.items() if not name.startswith(SYSTEM_PREFIX)}

    def validate(self) -> None:
        """Raises InvalidError, naming the field, the bound and what came."""
        for name, value, low, high in (
            ("max_batch", self.max_batch, 1, 1_024),
            ("execution_timeout_ms", self.execution_timeout_ms, 1, 3_600_000),
            ("device_cores", self.device_cores, 0.01, 4_096),
            ("orphan_timeout_s", self.orphan_timeout_s, 0, 1e9),
            ("memory_bytes", self.memory_bytes, 0, 1 << 60),
        ):
            if not low <= value <= high:
                raise InvalidError(name, expected=f"{low}..{high}", got=str(value))
        for where, tensors in (("inputs", self.inputs), ("outputs", self.outputs)):
            if not tensors:
                raise InvalidError(where, expected="at least one tensor", got="none")
            for tensor in tensors:
                tensor.validate(where)

    def save(self, path: Path | str) -> None:
        """Writes the configuration, atomically."""
        document: dict[str, Any] = {item.name: getattr(self, item.name) for item in fields(self)}
        document["format"] = self.format.value
        document["parameters"] = dict(self.parameters)
        for key in ("inputs", "outputs"):
            document[key] = [
                {"name": spec.name, "datatype": spec.datatype, "shape": list(spec.shape)} for spec in document[key]
            ]
        write_json(path, document)

    @classmethod
    def load(cls, path: Path | str) -> WorkerConfig:
        """Reads a configuration.

        Raises:
            ConfigError: The file can't be read, is not JSON, lacks a key, has an unknown one, or a value can't be.
        """
        try:
            document = json.loads(Path(path).read_bytes())
        except OSError as error:
            raise ConfigError(str(path), error.strerror or str(error)) from error
        except ValueError as error:
            raise ConfigError(str(path), f"not JSON: {error}") from error
        if not isinstance(document, dict):
            raise ConfigError(str(path), f"expected an object, got {type(document).__name__}")
        known = {item.name for item in fields(cls)}
        if unknown := sorted(set(document) - known):
            raise ConfigError(str(path), f"unknown key {unknown[0]!r}")
        try:
            for key in ("inputs", "outputs"):
                document[key] = tuple(
                    TensorSpec(spec["name"], spec["datatype"], tuple(int(dim) for dim in spec["shape"]))
                    for spec in document[key]
                )
            document["format"] = ModelFormat(document["format"])
            document["sm_rungs_pct"] = tuple(int(rung) for rung in document.get("sm_rungs_pct", ()))
            config = cls(**document)
            config.validate()
        except KeyError as error:
            raise ConfigError(str(path), f"lacks {error}") from error
        except (TypeError, ValueError, InvalidError) as error:
            raise ConfigError(str(path), str(error)) from error
        return config


def write_json(path: Path | str, document: Mapping[str, Any]) -> None:
    """Writes a JSON file so that a reader sees the old or the new one, never a part."""
    path = Path(path)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_text(json.dumps(document, indent=1))
    draft.replace(path)
