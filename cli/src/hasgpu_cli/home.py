"""Where a system keeps its files, and what it writes there about itself."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from hasgpu_core.errors import HasgpuError, InvalidError

from hasgpu_cli.processes import ProcessId

RUN_FILE_VERSION = 1


@dataclass(frozen=True, slots=True)
class Home:
    """The folder of one system; systems with different homes run side by side."""

    path: Path

    @property
    def run_file(self) -> Path:
        """What runs; there only while (or after) something does."""
        return self.path / "run.json"

    @property
    def stack_file(self) -> Path:
        """How the system was started."""
        return self.path / "stack.json"

    @property
    def targets_file(self) -> Path:
        """Where the services serve their metrics, as Prometheus reads it (file_sd_configs)."""
        return self.path / "prometheus-targets.json"

    @property
    def logs(self) -> Path:
        """One file a service."""
        return self.path / "logs"

    @property
    def state(self) -> Path:
        """Instances, profiles and models."""
        return self.path / "state"

    @property
    def brokers(self) -> Path:
        """Data of NATS and Redis."""
        return self.path / "brokers"


def find_home(given: str | None) -> Home:
    """Returns the home: the option, else HASGPU_HOME, else $XDG_STATE_HOME/hasgpu, else ~/.local/state/hasgpu."""
    if given or (given := os.environ.get("HASGPU_HOME")):
        return Home(Path(given).expanduser().resolve())
    base = os.environ.get("XDG_STATE_HOME")
    return Home((Path(base) if base else Path.home() / ".local" / "state") / "hasgpu")


@dataclass(frozen=True, slots=True)
class UnitRecord:
    """One process that the supervisor keeps running."""

    name: str
    kind: str
    """"broker" or "service"."""
    address: str
    """host:port."""
    log: str
    state: str = "waiting"
    """"waiting", "running", "backing off" or "stopped"."""
    process: ProcessId | None = None
    restarts_count: int = 0
    reason: str = ""
    """Why it is not running, or why it was last restarted."""
    metrics: str = ""
    """host:port of its metrics; empty: it has none."""


@dataclass(frozen=True, slots=True)
class RunRecord:
    """run.json: what runs, by whom, and where it listens."""

    supervisor: ProcessId
    nats_url: str
    redis_url: str
    units: Mapping[str, UnitRecord] = field(default_factory=dict)
    stopping: bool = False

    def with_unit(self, unit: UnitRecord) -> RunRecord:
        """Returns a copy with one unit put in."""
        return replace(self, units={**self.units, unit.name: unit})

    def address(self, name: str) -> str:
        """The host:port of a unit; empty when there is none."""
        return self.units[name].address if name in self.units else ""


def write_json(path: Path, value: Any, *, private: bool = False) -> None:
    """Writes atomically: a reader sees the old file or the new one; a private file is for its owner alone."""
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600 if private else 0o666)
    with open(descriptor, "w", encoding="utf-8") as file:
        file.write(json.dumps(value, indent=1) + "\n")
    temporary.replace(path)


def write_run_record(home: Home, record: RunRecord) -> None:
    """Writes run.json atomically; the brokers' URLs in it may hold passwords."""
    write_json(home.run_file, {"version": RUN_FILE_VERSION, **asdict(record)}, private=True)


def read_run_record(home: Home) -> RunRecord | None:
    """Reads run.json; None when there is none.

    Raises:
        InvalidError: It is there and not readable.
    """
    try:
        raw = json.loads(home.run_file.read_text(encoding="utf-8"))
        if raw["version"] != RUN_FILE_VERSION:
            raise InvalidError(f"{home.run_file}: version", expected=str(RUN_FILE_VERSION), got=str(raw["version"]))
        units = {name: _unit(unit) for name, unit in raw["units"].items()}
        return RunRecord(
            ProcessId(**raw["supervisor"]), raw["nats_url"], raw["redis_url"], units, stopping=raw["stopping"]
        )
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InvalidError(f"{home.run_file} is not readable", got=f"{type(error).__name__}: {error}") from error


def _unit(raw: Mapping[str, Any]) -> UnitRecord:
    process = ProcessId(**raw["process"]) if raw["process"] else None
    return UnitRecord(**{**raw, "process": process})


class NotUpError(HasgpuError):
    """No system runs in this home."""

    def __init__(self, home: Home) -> None:
        super().__init__(f"nothing runs in {home.path}: is hasgpu up? (`hasgpu up` starts it)")
