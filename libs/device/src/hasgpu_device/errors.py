"""Errors of the device layer.

HasgpuError (hasgpu_core)
├── ControlBlockError     the file is not a control block, or of another version
├── GateError             the file is not a row's gate, or the gate is full
│   └── GateTimeoutError  the device was not to be had before the caller's deadline, or the caller gave up
├── LedgerError           the file is not a device's ledger of SMs, or the ledger is full
├── ConfigError           a worker's configuration can't be read
├── MpsError              the MPS control daemon refused a command, answered nonsense, died or is somebody else's
│   └── MpsTimeoutError   it did not answer in time
├── LoadError             a model can't be loaded; its message is fit for the user who deployed it
└── DeviceFaultError      the device or its sharing failed; the worker ends, its batches go elsewhere
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


class LedgerError(HasgpuError):
    """The file is not a device's ledger of SMs, or the ledger is full."""

    def __init__(self, path: str, reason: str) -> None:
        self.path = path
        self.reason = reason
        super().__init__(f"ledger {path}: {reason}")


class ConfigError(HasgpuError):
    """A worker's configuration can't be read."""

    def __init__(self, path: str, reason: str) -> None:
        self.path = path
        self.reason = reason
        super().__init__(f"worker configuration {path}: {reason}")


class LoadError(HasgpuError):
    """A model can't be loaded; the message is fit for the user who deployed it."""


class MpsError(HasgpuError):
    """The MPS control daemon refused a command, answered nonsense, died or is somebody else's.

    Args:
        command: As given to the control program.
        reason: In words.
        answer: What the control program printed.
        exit_code: Of the control program; None: it did not end by itself.
    """

    def __init__(self, command: str, reason: str, *, answer: str = "", exit_code: int | None = None) -> None:
        self.command = command
        self.reason = reason
        self.answer = answer
        self.exit_code = exit_code
        text = f"MPS {command!r}: {reason}"
        if exit_code:
            text += f" (exit code {exit_code})"
        if answer.strip():
            text += f"; it said {answer.strip()[-400:]!r}"
        super().__init__(text)


class MpsTimeoutError(MpsError):
    """The control daemon did not answer in time."""


class DeviceFaultError(HasgpuError):
    """The device, or the MPS server before it, failed in a way that this process does not survive.

    Args:
        code: The driver's CUresult; 0 where the fault was found by hasgpu itself.
        name: Such as "CUDA_ERROR_ILLEGAL_ADDRESS" or "MPS_NOT_IN_USE"; what the agent's fault table goes by.
        text: What it means, and what was being done.
    """

    def __init__(self, code: int, name: str, text: str) -> None:
        self.code = code
        self.name = name
        self.text = text
        super().__init__(f"{name} ({code}): {text}" if code else f"{name}: {text}")
