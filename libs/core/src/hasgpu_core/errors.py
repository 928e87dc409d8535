"""Errors of the domain.

HasgpuError
├── InvalidError          the caller gave something that can't be; says what, what was expected, what came
│   └── ProfileFileError  a profile file can't be read; says line and column
├── NotFoundError         no such function, instance, node, ...
├── AlreadyExistsError    the name is taken
├── ConflictError         the state moved on since it was read (compare-and-set)
├── FencedError           a newer leader writes; this one must stop
├── UnavailableError      can't be served now; may carry a retry hint
│   └── QueueFullError    the function's queue is at its bound
├── DeadlineError         the request's deadline passed while it waited
├── CapacityError         an allocation does not fit; says what is free
├── ModelError            the function's own code or model failed
├── UnsupportedError      known, but not offered here
└── IntegrityError        bytes do not match their digest

`hasgpu_runtime.rpc` maps each to its gRPC status.
"""

from __future__ import annotations


class HasgpuError(Exception):
    """Root of all errors that hasgpu raises on purpose; `str()` is fit to be shown to a user."""


class InvalidError(HasgpuError):
    """The caller gave something that can't be."""

    def __init__(self, what: str, *, expected: str = "", got: str = "") -> None:
        self.what = what
        self.expected = expected
        self.got = got
        text = what
        if expected:
            text += f": expected {expected}"
        if got:
            text += f"{', ' if expected else ': '}got {got}"
        super().__init__(text)


class ProfileFileError(InvalidError):
    """A profile file can't be read.

    Attributes:
        line: 1 and up; 1 is the header.
        column: Name of the column, or the header's key.
    """

    def __init__(self, line: int, column: str, *, expected: str, got: str) -> None:
        self.line = line
        self.column = column
        super().__init__(f"profile file, line {line}, {column}", expected=expected, got=got)


class NotFoundError(HasgpuError):
    """Nothing goes by that name."""

    def __init__(self, kind: str, name: str, hint: str = "") -> None:
        self.kind = kind
        self.name = name
        super().__init__(f"{kind} {name!r} is not found" + (f"; {hint}" if hint else ""))


class AlreadyExistsError(HasgpuError):
    """The name is taken."""

    def __init__(self, kind: str, name: str, hint: str = "") -> None:
        self.kind = kind
        self.name = name
        super().__init__(f"{kind} {name!r} already exists" + (f"; {hint}" if hint else ""))


class ConflictError(HasgpuError):
    """The state moved on since it was read."""

    def __init__(self, key: str, *, expected_revision: int, actual_revision: int) -> None:
        self.key = key
        self.expected_revision = expected_revision
        self.actual_revision = actual_revision
        super().__init__(f"{key} is at revision {actual_revision}, not {expected_revision}: read it again")


class FencedError(HasgpuError):
    """A newer leader writes; this one must stop."""

    def __init__(self, lease: str, *, token: int, current_token: int) -> None:
        self.lease = lease
        self.token = token
        self.current_token = current_token
        super().__init__(f"lease {lease!r} has moved on to token {current_token}; {token} may not write any more")


class UnavailableError(HasgpuError):
    """Can't be served now."""

    def __init__(self, message: str, *, retry_after_s: float | None = None) -> None:
        self.retry_after_s = retry_after_s
        super().__init__(message + (f"; retry after {retry_after_s:.1f} s" if retry_after_s is not None else ""))


class QueueFullError(UnavailableError):
    """The function's queue is at its bound."""


class DeadlineError(HasgpuError):
    """The request's deadline passed while it waited."""


class CapacityError(HasgpuError):
    """An allocation does not fit; the message says what is free."""


class ModelError(HasgpuError):
    """The function's own code or model failed."""


class UnsupportedError(HasgpuError):
    """Known, but not offered here."""


class IntegrityError(HasgpuError):
    """Bytes do not match their digest."""

    def __init__(self, *, expected_sha256: str, got_sha256: str) -> None:
        self.expected_sha256 = expected_sha256
        self.got_sha256 = got_sha256
        super().__init__(f"the artifact's sha256 is {got_sha256}, but {expected_sha256} was declared")
