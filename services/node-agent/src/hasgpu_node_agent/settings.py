"""The node agent's settings, read once from the environment."""

from __future__ import annotations

import re
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hasgpu_core.errors import InvalidError
from hasgpu_runtime.settings import number

NODE_PATTERN = re.compile(r"[a-zA-Z0-9]([a-zA-Z0-9_-]{0,61}[a-zA-Z0-9])?")
"""A node's name becomes a token of a NATS subject and a folder."""
MAX_EMULATED_GPUS = 64
MAX_GPU_INDEX = 64
CUDA_MODES = ("mps+green", "mps+pct", "mps+static", "timeshare")
_UUID = re.compile(r"GPU-[0-9a-fA-F-]{4,64}")
_EXPECTED = "cpu, cpu:cores=N, cuda, cuda:gpu=INDEX or UUID,mode=MODE or emulated:gpus=N,profile=FILE"


@dataclass(frozen=True, slots=True)
class DeviceSetting:
    """One entry of HASGPU_DEVICES."""

    kind: str
    """"cpu", "cuda" or "emulated"."""
    cores: int | None = None
    """Of a CPU device; None: all that this process may use."""
    gpus: int = 1
    """Emulated devices that this entry makes."""
    profile: str = ""
    """What they are emulated from: a profile file; empty: the shipped one."""
    gpu: str = ""
    """Index or UUID ("GPU-...") of an NVIDIA GPU; empty: all that there are."""
    mode: str = ""
    """How it is to be shared, of CUDA_MODES; empty: the best that it is proven to do."""


@dataclass(frozen=True, slots=True)
class AgentSettings:
    """What only the node agent has."""

    node: str
    """HASGPU_NODE; the node's name. "node*": the first of node1, node2, ... that no other agent of this state
    folder holds. Default: the host's name, with hyphens for what a node's can't hold."""
    devices: tuple[DeviceSetting, ...]
    """HASGPU_DEVICES; several separated by `;`: `cpu`, `cpu:cores=N`, `cuda`, `cuda:gpu=INDEX or UUID,mode=MODE` or
    `emulated:gpus=N,profile=FILE`. Default: `cpu`."""
    state_dir: Path
    """HASGPU_STATE_DIR; the agent's own folder below it is named after the node. Default: `$XDG_STATE_HOME/hasgpu`,
    else `~/.local/state/hasgpu`."""
    stop_workers_on_exit: bool = True
    """HASGPU_STOP_WORKERS_ON_EXIT, 0 or 1; on SIGTERM and SIGINT the workers are drained and stopped; a killed agent
    leaves them running in any case."""
    gpu_price_per_hour: float = 0.0
    """HASGPU_GPU_PRICE_PER_HOUR; of a whole GPU of this node, in any currency; what functions cost is reckoned from
    it. 0: no cost is told."""


def load(environ: Mapping[str, str]) -> AgentSettings:
    """Returns the settings; raises InvalidError, naming the variable, the bound and what came."""
    node = environ.get("HASGPU_NODE") or default_node(socket.gethostname())
    if not NODE_PATTERN.fullmatch(f"{node.removesuffix('*')}00" if node.endswith("*") else node):
        expected = "1 to 63 of a-z, A-Z, 0-9, _ and -, not at an end, or such a name's beginning and *"
        raise InvalidError("HASGPU_NODE", expected=expected, got=repr(node))
    stop = environ.get("HASGPU_STOP_WORKERS_ON_EXIT", "1")
    if stop not in ("0", "1"):
        raise InvalidError("HASGPU_STOP_WORKERS_ON_EXIT", expected="0 or 1", got=repr(stop))
    return AgentSettings(
        node=node,
        devices=parse_devices(environ.get("HASGPU_DEVICES") or "cpu"),
        state_dir=default_state_dir(environ),
        stop_workers_on_exit=stop == "1",
        gpu_price_per_hour=number(environ, "HASGPU_GPU_PRICE_PER_HOUR", 0.0, 0.0, 1e6),
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
    """Parses `cpu:cores=2`, `cuda:gpu=0,mode=mps+green`, `emulated:gpus=8,profile=FILE`, several separated by `;`.

    Raises InvalidError.
    """
    devices = tuple(_parse_device(entry.strip()) for entry in text.split(";") if entry.strip())
    if not devices:
        raise InvalidError("HASGPU_DEVICES", expected="at least one device", got=repr(text))
    return devices


def _parse_device(entry: str) -> DeviceSetting:
    kind, _, rest = entry.partition(":")
    options = [option for option in rest.split(",") if option]
    if kind == "cpu":
        return _parse_cpu(options)
    if kind == "cuda":
        return _parse_cuda(options)
    if kind == "emulated":
        return _parse_emulated(options)
    raise InvalidError("HASGPU_DEVICES", expected=_EXPECTED, got=repr(entry))


def _parse_cpu(options: Sequence[str]) -> DeviceSetting:
    cores: int | None = None
    for option in options:
        name, _, value = option.partition("=")
        if name != "cores" or not value.isdecimal() or not 1 <= int(value) <= 1_024:
            raise InvalidError("HASGPU_DEVICES", expected="cores=1..1024", got=repr(option))
        cores = int(value)
    return DeviceSetting(kind="cpu", cores=cores)


def _parse_cuda(options: Sequence[str]) -> DeviceSetting:
    gpu = mode = ""
    for option in options:
        name, _, value = option.partition("=")
        if name == "gpu" and (_UUID.fullmatch(value) or (value.isdecimal() and int(value) < MAX_GPU_INDEX)):
            gpu = value if value.startswith("GPU-") else str(int(value))
        elif name == "mode" and value in CUDA_MODES:
            mode = value
        else:
            expected = f"gpu=0..{MAX_GPU_INDEX - 1}, gpu=GPU-<uuid> or mode={'|'.join(CUDA_MODES)}"
            raise InvalidError("HASGPU_DEVICES", expected=expected, got=repr(option))
    return DeviceSetting(kind="cuda", gpu=gpu, mode=mode)


def _parse_emulated(options: Sequence[str]) -> DeviceSetting:
    gpus, profile = 1, ""
    for option in options:
        name, _, value = option.partition("=")
        if name == "gpus" and value.isdecimal() and 1 <= int(value) <= MAX_EMULATED_GPUS:
            gpus = int(value)
        elif name == "profile" and value:
            profile = value
        else:
            raise InvalidError(
                "HASGPU_DEVICES", expected=f"gpus=1..{MAX_EMULATED_GPUS} or profile=FILE", got=repr(option)
            )
    return DeviceSetting(kind="emulated", gpus=gpus, profile=profile)
