"""URLs as they may be shown."""

from __future__ import annotations

from urllib.parse import urlsplit


def without_secret(url: str) -> str:
    """Returns the URL without user and password, for logs and errors."""
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
