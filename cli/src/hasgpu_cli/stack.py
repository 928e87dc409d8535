"""What a system consists of: which processes, with which environment, on which ports."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from hasgpu_core.errors import InvalidError, ProfileFileError, UnavailableError
from hasgpu_core.profile import Profile

from hasgpu_cli.home import Home, write_json
from hasgpu_cli.ports import free_port, is_free
from hasgpu_cli.supervisor import CommandUnit, Unit

DEFAULT_GATEWAY_PORT = 8001
HOST = "127.0.0.1"
MODULES: Mapping[str, str] = {
    "scheduler": "hasgpu_scheduler",
    "rapp": "hasgpu_rapp",
    "scaler": "hasgpu_scaler",
    "gateway": "hasgpu_gateway",
}
BROKER_RANK = 0
SERVICE_RANK = 1
LARGEST_NODES_COUNT = 64
LARGEST_GPUS_COUNT = 64
DEVICES = ("cpu", "cuda", "emulated")


@dataclass(frozen=True, slots=True)
class Stack:
    """How a system is started; kept in stack.json so that ports stay the same from one `up` to the next."""

    nodes_count: int = 1
    devices: str = "cpu"
    nats_url: str = ""
    """Of an external NATS; empty: one is started."""
    redis_url: str = ""
    gateway_port: int = 0
    log_level: str = "info"
    ports: Mapping[str, int] = field(default_factory=dict)
    """By unit."""
    env: Mapping[str, str] = field(default_factory=dict)
    """Further settings of all services."""

    def validate(self) -> None:
        """Raises InvalidError, naming the option, the bound and what came."""
        if not 1 <= self.nodes_count <= LARGEST_NODES_COUNT:
            raise InvalidError("--nodes", expected=f"1..{LARGEST_NODES_COUNT}", got=str(self.nodes_count))
        if not 0 <= self.gateway_port <= 65_535:
            raise InvalidError("--port", expected="1..65535", got=str(self.gateway_port))

    @property
    def unit_names(self) -> tuple[str, ...]:
        """All processes, brokers first."""
        brokers = [name for name, url in (("nats", self.nats_url), ("redis", self.redis_url)) if not url]
        return (*brokers, *self.service_names)

    @property
    def service_names(self) -> tuple[str, ...]:
        """The units that are services."""
        return (*MODULES, *(node_unit(index) for index in range(self.nodes_count)))


def devices_setting(devices: str, *, device: str, gpus: int | None, profile: Path | None) -> str:
    """Returns each node's HASGPU_DEVICES as the options of `up` describe it.

    Args:
        devices: As given by --devices; empty: not given.
        device: One of DEVICES, as given by --device; empty: not given.
        gpus: How many; None: not given. One emulated GPU, every CUDA GPU.
        profile: What emulated GPUs are emulated from; None: not given, they take the shipped profile.

    Raises:
        InvalidError: The options do not fit each other, are out of bounds, or the profile is missing or is none.
    """
    if devices and device:
        raise InvalidError("--devices", expected="not to be given beside --device", got=repr(devices))
    kind = device or "cpu"
    if profile is not None and kind != "emulated":
        raise InvalidError("--profile", expected="--device emulated with it", got=f"--device {kind}")
    if gpus is None:
        gpus = 1 if kind == "emulated" else 0
    elif kind == "cpu":
        raise InvalidError("--gpus", expected="--device emulated or cuda with it", got="--device cpu")
    elif not 1 <= gpus <= LARGEST_GPUS_COUNT:
        raise InvalidError("--gpus", expected=f"1..{LARGEST_GPUS_COUNT}", got=str(gpus))
    if kind == "cuda":
        return ";".join(f"cuda:gpu={index}" for index in range(gpus)) or "cuda"
    if kind == "emulated":
        return f"emulated:gpus={gpus}" + (f",profile={_checked_profile(profile)}" if profile is not None else "")
    return devices or "cpu"


def _checked_profile(path: Path) -> Path:
    """The file's absolute path; raises InvalidError when it can't be used."""
    path = path.expanduser().resolve()
    if {",", ";"} & set(str(path)):
        raise InvalidError("--profile", expected="a path without commas and semicolons", got=repr(str(path)))
    try:
        Profile.parse(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidError("--profile", expected="a profile file", got=f"{path}: {error}") from error
    except ProfileFileError as error:
        raise InvalidError(f"--profile {path}: {error}") from error
    return path


def node_unit(index: int) -> str:
    """The unit of a node's agent; the node itself is called `node<index>`."""
    return f"node-agent-{index}"


def metrics_port(unit: str) -> str:
    """The name of the port on which a service serves its metrics."""
    return f"{unit}/metrics"


def metrics_targets(stack: Stack) -> list[dict[str, Any]]:
    """Where the services serve their metrics, in the words of Prometheus' file_sd_configs."""
    return [
        {
            "targets": [f"{HOST}:{stack.ports[metrics_port(unit)]}"],
            "labels": {"job": f"hasgpu-{'node-agent' if unit.startswith('node-agent') else unit}"},
        }
        for unit in stack.service_names
    ]


def read_stack(home: Home) -> Stack:
    """Returns the stack of the last `up`, or a default one; a file that is not readable counts as none."""
    try:
        raw: dict[str, Any] = json.loads(home.stack_file.read_text(encoding="utf-8"))
        return Stack(**raw)
    except (OSError, ValueError, TypeError):
        return Stack()


def write_stack(home: Home, stack: Stack) -> None:
    """Writes stack.json atomically; the brokers' URLs in it may hold passwords."""
    write_json(home.stack_file, asdict(stack), private=True)


def assign_ports(stack: Stack, *, before: Mapping[str, int]) -> Stack:
    """Gives every unit a port, every service one more for its metrics: as before if that is free, else a new one.

    The gateway gets `gateway_port` when that is set, else 8001 when it is free, else any.

    Raises:
        UnavailableError: The port asked for is taken, or no port is free.
    """
    ports: dict[str, int] = {}
    for name in (*stack.unit_names, *map(metrics_port, stack.service_names)):
        if name == "gateway":
            if stack.gateway_port and not is_free(stack.gateway_port):
                raise UnavailableError(f"port {stack.gateway_port} is taken; choose another with --port")
            wanted = stack.gateway_port or DEFAULT_GATEWAY_PORT
        else:
            wanted = before.get(name, 0)
        free = wanted and wanted not in ports.values() and is_free(wanted)
        ports[name] = wanted if free else free_port(set(ports.values()))
    return replace(stack, ports=ports)


def service_units(home: Home, stack: Stack, *, nats_url: str, redis_url: str) -> Sequence[Unit]:
    """Builds the five services as processes of this Python."""
    common = {
        "HASGPU_HOME": str(home.path),
        "HASGPU_NATS_URL": nats_url,
        "HASGPU_REDIS_URL": redis_url,
        "HASGPU_STATE_DIR": str(home.state),
        "HASGPU_LOG_LEVEL": stack.log_level,
        **stack.env,
    }
    units = [_service(home, stack, name, module, common) for name, module in MODULES.items()]
    for index in range(stack.nodes_count):
        name = node_unit(index)
        node = {"HASGPU_NODE": f"node{index}", "HASGPU_DEVICES": stack.devices}
        units.append(_service(home, stack, name, "hasgpu_node_agent", common | node))
    return units


def _service(home: Home, stack: Stack, name: str, module: str, env: Mapping[str, str]) -> CommandUnit:
    address = f"{HOST}:{stack.ports[name]}"
    metrics = stack.ports[metrics_port(name)]
    return CommandUnit(
        name=name,
        kind="service",
        address=address,
        log=log_path(home, name),
        argv=(sys.executable, "-m", module),
        env={**env, "HASGPU_LISTEN": address, "HASGPU_METRICS_PORT": str(metrics)},
        metrics=f"{HOST}:{metrics}",
        rank=SERVICE_RANK,
    )


def log_path(home: Home, unit: str) -> Path:
    """Where a unit logs to."""
    return home.logs / f"{unit}.log"
