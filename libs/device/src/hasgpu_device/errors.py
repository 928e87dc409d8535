"""Errors of the device layer.

HasgpuError (hasgpu_core)
├── ControlBlockError     the file is not a control block, or of another version
├── GateError             the file is not a row's gate, or the gate is full
│   └── GateTimeoutError  the device was not to be had before the caller's deadline, or the caller gave up
├── ConfigError           a worker's configuration can't be read
└── LoadError             a model can't be loaded; its message is fit for the user who deployed it
"""

from __future__ import annotations

from hasgpu_core.errors import HasgpuError


class ControlBlockError(HasgpuError):
    """The file is not a control block, or of another version."""

    def __init__(self, path: str, reason: str) -> None:
        self.path = path
        self.reason = reason
        super().__init__(f"control block {path}: {reason}")


class GateError(HasgpuError):
    """The file is not a row's gate, or the gate is full."""

    def __init__(self, path: str, reason: str) -> None:
        self.path = path
        self.reason = reason
        super().__init__(f"gate {path}: {reason}")


class GateTimeoutError(GateError):
    """The device was not to be had before the caller's deadline, or the caller gave up."""


class ConfigError(HasgpuError):
    """A worker's configuration can't be read."""

    def __init__(self, path: str, reason: str) -> None:
        self.path = path
        self.reason = reason
        super().__init__(f"worker configuration {path}: {reason}")


class LoadError(HasgpuError):
    """A model can't be loaded; the message is fit for the user who deployed it."""
