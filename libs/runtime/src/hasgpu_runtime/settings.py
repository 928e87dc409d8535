"""Reading configuration from environment variables, once; and the part of it that every service has."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, urlsplit

from hasgpu_core.errors import InvalidError

DEFAULT_LISTEN = "127.0.0.1:0"
EVERY_ADDRESS = ("0.0.0.0", "[::]")  # noqa: S104  recognised, not bound
LOG_LEVELS = ("debug", "info", "warning", "error")
LOG_FORMATS = ("text", "json", "auto")


@dataclass(frozen=True, slots=True)
class CommonSettings:
    """What every service can be told."""

    nats_url: str = "nats://127.0.0.1:4222"
    """HASGPU_NATS_URL: of the bus. HASGPU_NATS_PASSWORD_FILE names a file with the password of its user
    (default: hasgpu)."""
    redis_url: str = "redis://127.0.0.1:6379/0"
    """HASGPU_REDIS_URL: of the store. HASGPU_REDIS_PASSWORD_FILE names a file with the password of its user
    (default: none)."""
    listen: str = DEFAULT_LISTEN
    """HASGPU_LISTEN; host:port of its gRPC server, port 0 takes a free one."""
    advertise: str = ""
    """HASGPU_ADVERTISE; host:port that others dial, port 0: the one listened on. Empty: what it listens on; where that
    is every address of the host, the host's name."""
    log_level: str = "info"
    """HASGPU_LOG_LEVEL; records below it are not written."""
    log_format: str = "text"
    """HASGPU_LOG_FORMAT; "text" for people, "json" for one object a line, "auto": text on a terminal, else json."""
    metrics_port: int = 0
    """HASGPU_METRICS_PORT; of the Prometheus endpoint, on the host of HASGPU_LISTEN, 0: none."""


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
    listens = address(environ, "HASGPU_LISTEN", listen)
    return CommonSettings(
        nats_url=with_password(
            url(environ, "HASGPU_NATS_URL", default.nats_url, ("nats", "tls")),
            environ,
            "HASGPU_NATS_PASSWORD_FILE",
            user="hasgpu",
        ),
        redis_url=with_password(
            url(environ, "HASGPU_REDIS_URL", default.redis_url, ("redis", "rediss", "unix")),
            environ,
            "HASGPU_REDIS_PASSWORD_FILE",
        ),
        listen=listens,
        advertise=_advertise(environ, listens),
        log_level=choice(environ, "HASGPU_LOG_LEVEL", default.log_level, LOG_LEVELS),
        log_format=choice(environ, "HASGPU_LOG_FORMAT", default.log_format, LOG_FORMATS),
        metrics_port=integer(environ, "HASGPU_METRICS_PORT", default.metrics_port, 0, 65_535),
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


def _advertise(environ: Mapping[str, str], listens: str) -> str:
    if text(environ, "HASGPU_ADVERTISE", ""):
        return address(environ, "HASGPU_ADVERTISE", "")
    # "Every address" is none that others could dial.
    return f"{socket.gethostname()}:0" if listens.rpartition(":")[0] in EVERY_ADDRESS else ""


def with_password(given: str, environ: Mapping[str, str], name: str, *, user: str = "") -> str:
    """Returns a URL with the password in the file that a variable names; without the variable, the URL as it is.

    Args:
        given: The URL.
        environ: Environment variables.
        name: The variable.
        user: For a URL that names none.
    """
    file = text(environ, name, "")
    if not file:
        return given
    try:
        password = Path(file).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidError(name, expected="a file with a password", got=f"{file}: {error}") from error
    if not password:
        raise InvalidError(name, expected="a file with a password", got=f"{file}, which is empty")
    parts = urlsplit(given)
    named, _, host = parts.netloc.rpartition("@")
    user = named.partition(":")[0] or quote(user, safe="")
    return parts._replace(netloc=f"{user}:{quote(password, safe='')}@{host}").geturl()
