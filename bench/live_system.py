"""A live system of its own on emulated GPUs, for the benchmarks that need one: started, driven by the command, stopped.

The GPUs are emulated from the shipped profile with its times multiplied: what a small host adds to each request then
matters less, and requests become fewer.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
from hasgpu_cli.ports import free_port
from hasgpu_core.profile import Profile
from hasgpu_device import profiles
from hasgpu_device.worker_config import WorkerConfig


def slower(profile: Profile, factor: float) -> Profile:
    """Returns the profile of a device that takes `factor` times as long; segments stay as long as they are."""
    rows = tuple(
        replace(row, latency_us=row.latency_us * factor, device_time_us=row.device_time_us * factor)
        for row in profile.rows
    )
    header = replace(profile.header, source=f"{profile.header.source}; times multiplied by {factor:g}")
    return Profile(header, rows)


def control_path(pid: int) -> Path:
    """Returns where a worker's control block is. Raises psutil.Error, ValueError: it is gone, or is no worker yet."""
    command = psutil.Process(pid).cmdline()
    return Path(WorkerConfig.load(command[command.index("--config") + 1]).control_path)


class LiveSystem:
    """The system in a folder, driven by the command.

    Its gateway listens on a free port and not on the usual one: nobody else's client is to talk to it by mistake.
    """

    def __init__(self, folder: Path, gpus: int, profile: Profile) -> None:
        self.folder = folder
        self.home = folder / "home"
        self.profile = profile
        self._command = str(Path(sys.executable).parent / "hasgpu")
        path = folder / "slower.csv"
        path.write_text(profile.format(), encoding="utf-8")
        port = str(free_port())
        self.call("up", "--device", "emulated", "--gpus", str(gpus), "--profile", str(path), "--port", port)

    def call(self, *arguments: str) -> str:
        """Runs the command; SystemExit with what it said when it fails."""
        done = subprocess.run(
            [self._command, "--home", str(self.home), *arguments], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise SystemExit(f"hasgpu {' '.join(arguments)}: {done.stdout}{done.stderr}")
        return done.stdout

    def json(self, *arguments: str) -> Any:
        """Runs the command with --json."""
        return json.loads(self.call(*arguments, "--json"))

    def write_function(self, name: str, text: str) -> str:
        """Writes a function of this YAML, whose handler an emulated device never runs; returns its folder."""
        folder = self.folder / name
        folder.mkdir()
        (folder / "function.yaml").write_text(text, encoding="utf-8")
        (folder / "handler.py").write_text("", encoding="utf-8")
        return str(folder)

    def instances(self) -> list[dict[str, Any]]:
        """Of all functions."""
        return [instance for function in self.json("functions") for instance in function["instances"]]

    def control_paths(self) -> dict[str, Path]:
        """Returns where the control block of each instance is."""
        return {instance["instance"]: control_path(instance["pid"]) for instance in self.instances()}

    def roles(self) -> dict[str, list[int]]:
        """Returns the processes by what they do."""
        roles: dict[str, list[int]] = defaultdict(list)
        for unit in self.json("status")["units"]:
            roles["node-agent" if unit["name"].startswith("node-agent") else unit["name"]].append(unit["pid"])
        roles["supervisor"] = [self.json("status")["supervisor"]["pid"]]
        roles["workers"] = [instance["pid"] for instance in self.instances()]
        return roles


@contextmanager
def live_system(gpus: int, slow_down: float) -> Iterator[LiveSystem]:
    """Starts a system in a folder of its own, on the shipped profile made slower; stops it at the end."""
    with tempfile.TemporaryDirectory(prefix="hasgpu-bench-") as folder:
        system = LiveSystem(Path(folder), gpus, slower(profiles.shipped(), slow_down))
        try:
            yield system
        finally:
            system.call("down")


def write_results(path: Path, document: dict[str, Any]) -> None:
    """Writes a benchmark's figures."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
