"""Digests of artifacts."""

from __future__ import annotations

import hashlib
import re

from hasgpu_core.errors import IntegrityError, InvalidError

_SHA256 = re.compile(r"[0-9a-f]{64}")


def check_digest(sha256: str) -> None:
    """Raises InvalidError unless it is a sha256 in lower-case hex."""
    if not _SHA256.fullmatch(sha256):
        raise InvalidError("sha256", expected="64 lower-case hex digits", got=repr(sha256))


def verify(sha256: str, data: bytes) -> None:
    """Raises IntegrityError when the data has another digest."""
    got = hashlib.sha256(data).hexdigest()
    if got != sha256:
        raise IntegrityError(expected_sha256=sha256, got_sha256=got)
