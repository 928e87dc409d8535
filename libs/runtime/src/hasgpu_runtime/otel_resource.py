"""What every span and metric of a process says of the process: OpenTelemetry's resource."""

from __future__ import annotations

import os
import platform
import socket
import uuid
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from opentelemetry.sdk.resources import Resource

_PACKAGES = {"worker": "hasgpu-node-agent"}
"""Of services whose package has another name."""


def service_version(service: str) -> str:
    """Returns the version of a service's package; "unknown" where it is not installed."""
    try:
        return version(_PACKAGES.get(service, f"hasgpu-{service}"))
    except PackageNotFoundError:
        return "unknown"


def resource(service: str, *, instance: str = "", extra: Mapping[str, str] | None = None) -> Resource:
    """Returns the resource of this process.

    OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES have the last word, as the specification says.

    Args:
        service: "gateway", ...; exported as `hasgpu-<service>`.
        instance: Tells replicas apart; "": a random one.
        extra: Further attributes: of the device, say.
    """
    from opentelemetry.sdk.resources import OTELResourceDetector, Resource

    own: dict[str, str | int] = {
        "service.name": f"hasgpu-{service}",
        "service.namespace": "hasgpu",
        "service.version": service_version(service),
        "service.instance.id": instance or uuid.uuid4().hex,
        "host.name": socket.gethostname(),
        "host.arch": {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine()),
        "os.type": platform.system().lower(),
        "process.pid": os.getpid(),
        "process.runtime.name": platform.python_implementation().lower(),
        "process.runtime.version": platform.python_version(),
        "telemetry.sdk.language": "python",
        "telemetry.sdk.name": "opentelemetry",
        "telemetry.sdk.version": version("opentelemetry-sdk"),
    }
    return Resource({**own, **(extra or {})}).merge(OTELResourceDetector().detect())
