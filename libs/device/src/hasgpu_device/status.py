"""`status.json`: what a worker process tells its agent about itself, beside its control block."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from hasgpu_core.resources import InstanceState

from hasgpu_device.worker_config import write_json

EXIT_LOAD_FAILED = 65
"""The model can't be loaded; the status says why."""
EXIT_HUNG = 70
"""A batch held the device for too long, or the worker broke; it is to be started again."""
EXIT_DEVICE_FAULT = 71
"""The device failed under the worker (`DeviceFaultError`); the status begins with the fault's name."""


@dataclass(frozen=True, slots=True)
class WorkerStatus:
    """A worker's own account of itself."""

    pid: int
    address: str
    """host:port of its WorkerService; empty until it listens."""
    state: InstanceState
    reason: str
    """In words; also says what was odd about a worker that is ready."""
    started_unix_ns: int

    def save(self, path: Path | str) -> None:
        """Writes it, atomically."""
        write_json(
            path,
            {
                "pid": self.pid,
                "address": self.address,
                "state": self.state.value,
                "reason": self.reason,
                "started_unix_ns": self.started_unix_ns,
            },
        )

    @classmethod
    def load(cls, path: Path | str) -> WorkerStatus | None:
        """Reads it; None when there is none yet or it is not one."""
        try:
            document = json.loads(Path(path).read_bytes())
            return cls(
                int(document["pid"]),
                str(document["address"]),
                InstanceState(document["state"]),
                str(document["reason"]),
                int(document["started_unix_ns"]),
            )
        except (OSError, ValueError, KeyError, TypeError):
            return None
