"""Errors of the node agent.

HasgpuError (hasgpu_core)
├── InvalidError
│   └── UnsafeArchiveError  an artifact's archive that must not be unpacked
└── UnavailableError
    └── ProfileError        a profiling run whose worker was lost
"""

from __future__ import annotations

from hasgpu_core.errors import InvalidError, UnavailableError


class UnsafeArchiveError(InvalidError):
    """The archive has an entry that would leave its folder, is of a refused kind, or is too large."""

    def __init__(self, entry: str, *, expected: str, got: str) -> None:
        self.entry = entry
        super().__init__(f"archive entry {entry!r}", expected=expected, got=got)


class ProfileError(UnavailableError):
    """The profiling worker was lost; the message says at which point and how."""
