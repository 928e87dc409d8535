"""Reading configuration from environment variables, once; and the part of it that every service has."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from hasgpu_core.errors import InvalidError

DEFAULT_LISTEN = "127.0.0.1:0"
LOG_LEVELS = ("debug", "info", "warning", "error")
LOG_FORMATS = ("text", "json")


@dataclass(frozen=True, slots=True)
class CommonSettings:
    """What every service can be told."""

    nats_url: str = "nats://127.0.0.1:4222"
    """HASGPU_NATS_URL."""
    redis_url: str = "redis://127.0.0.1:6379/0"
    """HASGPU_REDIS_URL."""
    listen: str = DEFAULT_LISTEN
    """HASGPU_LISTEN; host:port of its gRPC server, port 0 takes a free one."""
    advertise: str = ""
    """HASGPU_ADVERTISE; host:port that others dial, empty: what it listens on."""
    log_level: str = "info"
    """HASGPU_LOG_LEVEL."""
    log_format: str = "text"
    """HASGPU_LOG_FORMAT; "text" or "json"."""


def environment() -> Mapping[str, str]:
    """Returns the process's environment as it is now."""
    return dict(os.environ)


def load_common(environ: Mapping[str, str], *, listen: str = DEFAULT_LISTEN) -> CommonSettings:
    """Reads the common settings; raises InvalidError naming the variable, the bound and what came.

    Args:
        environ: Environment variables.
        listen: The service's default address.
    """
    default = CommonSettings()
    advertise = text(environ, "HASGPU_ADVERTISE", "")
    return CommonSettings(
        nats_url=url(environ, "HASGPU_NATS_URL", default.nats_url, ("nats", "tls")),
        redis_url=url(environ, "HASGPU_REDIS_URL", default.redis_url, ("redis", "rediss", "unix")),
        listen=address(environ, "HASGPU_LISTEN", listen),
        advertise=address(environ, "HASGPU_ADVERTISE", "") if advertise else "",
        log_level=choice(environ, "HASGPU_LOG_LEVEL", default.log_level, LOG_LEVELS),
        log_format=choice(environ, "HASGPU_LOG_FORMAT", default.log_format, LOG_FORMATS),
    )


def text(environ: Mapping[str, str], name: str, default: str) -> str:
    """Returns a variable, or the default when it is unset or empty."""
    return environ.get(name, "").strip() or default


def number(environ: Mapping[str, str], name: str, default: float, low: float, high: float) -> float:
    """Returns a number within bounds, these included."""
    given = text(environ, name, "")
    if not given:
        return default
    expected = f"a number in {low:g}..{high:g}"
    try:
        value = float(given)
    except ValueError as error:
        raise InvalidError(name, expected=expected, got=repr(given)) from error
    if not low <= value <= high:
        raise InvalidError(name, expected=expected, got=repr(given))
    return value


def integer(environ: Mapping[str, str], name: str, default: int, low: int, high: int) -> int:
    """Returns a whole number within bounds, these included."""
    given = text(environ, name, "")
    if not given:
        return default
    expected = f"a whole number in {low}..{high}"
    try:
        value = int(given)
    except ValueError as error:
        raise InvalidError(name, expected=expected, got=repr(given)) from error
    if not low <= value <= high:
        raise InvalidError(name, expected=expected, got=repr(given))
    return value


def choice(environ: Mapping[str, str], name: str, default: str, choices: tuple[str, ...]) -> str:
    """Returns one of several words, in lower case."""
    value = text(environ, name, default).lower()
    if value not in choices:
        raise InvalidError(name, expected=" or ".join(choices), got=repr(value))
    return value


def address(environ: Mapping[str, str], name: str, default: str) -> str:
    """Returns a host:port."""
    value = text(environ, name, default)
    host, _, port = value.rpartition(":")
    if not host or not port.isdigit() or int(port) > 65_535:
        raise InvalidError(name, expected="host:port", got=repr(value))
    return value


def url(environ: Mapping[str, str], name: str, default: str, schemes: tuple[str, ...]) -> str:
    """Returns a URL of one of the schemes."""
    value = text(environ, name, default)
    scheme, found, rest = value.partition("://")
    if not found or not rest or scheme not in schemes:
        raise InvalidError(name, expected=" or ".join(f"{scheme}://..." for scheme in schemes), got=repr(value))
    return value
