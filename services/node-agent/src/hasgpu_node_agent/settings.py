"""The node agent's settings, read once from the environment."""

from __future__ import annotations

import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from hasgpu_core.errors import InvalidError

NODE_PATTERN = re.compile(r"[a-zA-Z0-9]([a-zA-Z0-9_-]{0,61}[a-zA-Z0-9])?")
"""A node's name becomes a token of a NATS subject and a folder."""


@dataclass(frozen=True, slots=True)
class DeviceSetting:
    """One entry of HASGPU_DEVICES."""

    kind: str
    """"cpu"."""
    cores: int | None = None
    """Of a CPU device; None: all that this process may use."""


@dataclass(frozen=True, slots=True)
class AgentSettings:
    """What only the node agent has."""

    node: str
    devices: tuple[DeviceSetting, ...]
    state_dir: Path
    """The agent's own folder below it is named after the node."""
    stop_workers_on_exit: bool = True
    """On SIGTERM and SIGINT the workers are drained and stopped; a killed agent leaves them running in any case."""


def load(environ: Mapping[str, str]) -> AgentSettings:
    """Returns the settings; raises InvalidError, naming the variable, the bound and what came."""
    node = environ.get("HASGPU_NODE") or default_node(socket.gethostname())
    if not NODE_PATTERN.fullmatch(node):
        raise InvalidError("HASGPU_NODE", expected="1 to 63 of a-z, A-Z, 0-9, _ and -, not at an end", got=repr(node))
    stop = environ.get("HASGPU_STOP_WORKERS_ON_EXIT", "1")
    if stop not in ("0", "1"):
        raise InvalidError("HASGPU_STOP_WORKERS_ON_EXIT", expected="0 or 1", got=repr(stop))
    return AgentSettings(
        node=node,
        devices=parse_devices(environ.get("HASGPU_DEVICES") or "cpu"),
        state_dir=default_state_dir(environ),
        stop_workers_on_exit=stop == "1",
    )


def default_state_dir(environ: Mapping[str, str]) -> Path:
    """Returns HASGPU_STATE_DIR, else `hasgpu` in the user's folder for state."""
    given = environ.get("HASGPU_STATE_DIR")
    if given:
        return Path(given).expanduser()
    base = environ.get("XDG_STATE_HOME")
    return (Path(base) if base else Path.home() / ".local" / "state") / "hasgpu"


def default_node(host: str) -> str:
    """Returns a node name for a host name: what a subject can't hold becomes a hyphen."""
    return re.sub(r"[^a-zA-Z0-9_-]+", "-", host).strip("-_")[:63] or "node"


def parse_devices(text: str) -> tuple[DeviceSetting, ...]:
    """Parses `cpu`, `cpu:cores=2`, several separated by `;`. Raises InvalidError."""
    devices = tuple(_parse_device(entry.strip()) for entry in text.split(";") if entry.strip())
    if not devices:
        raise InvalidError("HASGPU_DEVICES", expected="at least one device", got=repr(text))
    return devices


def _parse_device(entry: str) -> DeviceSetting:
    kind, _, rest = entry.partition(":")
    if kind != "cpu":
        raise InvalidError("HASGPU_DEVICES", expected="cpu or cpu:cores=N", got=repr(entry))
    cores: int | None = None
    for option in (o for o in rest.split(",") if o):
        name, _, value = option.partition("=")
        if name != "cores" or not value.isdecimal() or not 1 <= int(value) <= 1_024:
            raise InvalidError("HASGPU_DEVICES", expected="cores=1..1024", got=repr(option))
        cores = int(value)
    return DeviceSetting(kind=kind, cores=cores)
