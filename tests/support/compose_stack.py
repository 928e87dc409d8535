"""The stack of deploy/compose on a real engine, driven as a user drives it: Compose, the command, published ports."""

from __future__ import annotations

import http.client
import json
import os
import pathlib
import secrets
import shutil
import socket
import subprocess
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from hasgpu_runtime.trace_catalogue import SeenSpan
from hasgpu_system import HASGPU, ROOT, System, free_port

FOLDER = ROOT / "deploy" / "compose"
PROJECT = "hasgpu-test"
ENGINE_SOCKET = os.environ.get("DOCKER_HOST", "unix:///var/run/docker.sock").removeprefix("unix://")
SERVICES = ("gateway", "scaler", "scheduler", "rapp", "node-agent")
LONGEST_UP_S = 300


def compose_command() -> list[str]:
    """`docker compose`, or docker-compose where that plugin is not installed."""
    plugin = subprocess.run(["docker", "compose", "version"], capture_output=True, check=False)
    if plugin.returncode == 0:
        return ["docker", "compose"]
    found = shutil.which("docker-compose")
    assert found, "neither `docker compose` nor docker-compose is installed"
    return [found]


class _EngineConnection(http.client.HTTPConnection):
    """HTTP over the engine's socket."""

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(30)
        self.sock.connect(ENGINE_SOCKET)


def ask_engine(path: str) -> Any:
    """GET of the Docker Engine API."""
    connection = _EngineConnection("engine")
    try:
        connection.request("GET", path)
        return json.loads(connection.getresponse().read())
    finally:
        connection.close()


@dataclass(frozen=True)
class Usage:
    """What the containers have used up to now."""

    cpu_ns: dict[str, int]
    memory_bytes: dict[str, int]
    """Without the page cache that could be dropped."""


@dataclass
class ComposeStack:
    """One project of Compose with ports of its own."""

    gateway_port: int = field(default_factory=free_port)
    jaeger_port: int = field(default_factory=free_port)

    def __post_init__(self) -> None:
        self._command = compose_command()
        self.env = {
            **os.environ,
            "COMPOSE_PROJECT_NAME": PROJECT,
            "GATEWAY_PORT": str(self.gateway_port),
            "JAEGER_PORT": str(self.jaeger_port),
            "TRACES_SAMPLER": "parentbased_traceidratio",
            "TRACES_SAMPLER_ARG": "0",  # the tests choose what is sampled; decisions are whatever the ratio
        }

    @property
    def version(self) -> str:
        """Of Compose."""
        return self.run("version", "--short").stdout.strip()

    def run(self, *args: str, check: bool = True, timeout_s: float = LONGEST_UP_S) -> subprocess.CompletedProcess[str]:
        """Runs Compose in its folder; a failure shows what it printed."""
        done = subprocess.run(
            [*self._command, *args],
            cwd=FOLDER,
            env=self.env,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        if check and done.returncode != 0:
            raise AssertionError(f"compose {' '.join(args)}: exit {done.returncode}\n{done.stdout}\n{done.stderr}")
        return done

    def script(self, name: str, *args: str) -> subprocess.CompletedProcess[str]:
        """Runs one of the scripts beside the Compose files."""
        env = {**self.env, "COMPOSE": " ".join(self._command)}
        return subprocess.run(
            [str(FOLDER / name), *args],
            env=env,
            capture_output=True,
            text=True,
            timeout=LONGEST_UP_S,
            check=False,
        )

    def up(self, *args: str) -> None:
        self.run("up", "--detach", *args)

    def down(self, *, volumes: bool = False) -> None:
        self.run("down", "--remove-orphans", *(("--volumes",) if volumes else ()))

    def container_ids(self, *services: str) -> list[str]:
        """Of those that were created, the ones that have ended too."""
        return self.run("ps", "--all", "--quiet", *services).stdout.split()

    def inspect(self, *services: str) -> list[dict[str, Any]]:
        return [ask_engine(f"/containers/{container}/json") for container in self.container_ids(*services)]

    def by_service(self) -> dict[str, list[dict[str, Any]]]:
        """What the engine says of every container, by service."""
        found: dict[str, list[dict[str, Any]]] = {}
        for container in self.inspect():
            found.setdefault(container["Config"]["Labels"]["com.docker.compose.service"], []).append(container)
        return found

    def all_healthy(self) -> bool:
        """Whether every service that has a health check is healthy and the two that prepare have succeeded."""
        states = self.by_service()
        prepared = all(c["State"]["ExitCode"] == 0 for name in ("init", "brokers-ready") for c in states[name])
        checked = [c["State"]["Health"]["Status"] for cs in states.values() for c in cs if "Health" in c["State"]]
        return prepared and len(checked) >= len(SERVICES) and set(checked) == {"healthy"}

    def docker(self, *args: str) -> str:
        return subprocess.run(["docker", *args], capture_output=True, text=True, check=True, timeout=120).stdout

    def crash(self, service: str) -> None:
        """Ends the service's process as a crash would: the restart policy has to bring it back."""
        (container, *_) = self.container_ids(service)
        # init is process 1, and its one child is the service
        self.docker(
            "exec", container, "python", "-c",
            "import os; os.kill(int(open('/proc/1/task/1/children').read().split()[0]), 9)",
        )  # fmt: skip

    def hasgpu(self, *args: str, check: bool = True, timeout_s: float = 300) -> subprocess.CompletedProcess[str]:
        """The command on the host, as the README has it."""
        done = subprocess.run(
            [str(HASGPU), "--gateway", f"localhost:{self.gateway_port}", *args],
            capture_output=True, text=True, timeout=timeout_s, check=False,
            env={**os.environ, "HASGPU_HOME": "/nonexistent"},
        )  # fmt: skip
        if check and done.returncode != 0:
            raise AssertionError(f"hasgpu {' '.join(args)}: exit {done.returncode}\n{done.stdout}\n{done.stderr}")
        return done

    def run_once(self, service: str, **environ: str) -> tuple[int, str]:
        """Runs a service with other settings until it ends; returns its exit code and what it printed.

        It is detached and waited for: attached, Compose 1.29 may miss the end of what ends at once.
        """
        name = f"{PROJECT}-once-{secrets.token_hex(4)}"
        settings = [part for key, value in environ.items() for part in ("-e", f"{key}={value}")]
        self.run("run", "--detach", "--no-deps", "--name", name, *settings, service)
        try:
            code = int(self.docker("wait", name))
            seen = subprocess.run(["docker", "logs", name], capture_output=True, text=True, check=True, timeout=120)
        finally:
            self.docker("rm", "--force", name)
        return code, seen.stdout + seen.stderr

    def tool(self, *args: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """The command in its container, where all services can be reached."""
        return self.run("run", "--rm", "-T", "cli", *args, check=check)

    def tool_json(self, *args: str) -> Any:
        return json.loads(self.tool(*args, "--json").stdout)

    @property
    def system(self) -> System:
        """For sending requests."""
        return System(pathlib.Path("/nonexistent"), port=self.gateway_port)

    def functions(self) -> dict[str, dict[str, Any]]:
        return {f["spec"]["name"]: f for f in json.loads(self.hasgpu("functions", "--json").stdout)}

    def usage(self) -> Usage:
        cpu, memory = {}, {}
        for container in self.inspect():
            if not container["State"]["Running"]:
                continue
            seen = ask_engine(f"/containers/{container['Id']}/stats?stream=false&one-shot=true")
            labels = container["Config"]["Labels"]
            name = f"{labels['com.docker.compose.service']}-{labels['com.docker.compose.container-number']}"
            used = seen["memory_stats"]
            cpu[name] = int(seen["cpu_stats"]["cpu_usage"]["total_usage"])
            memory[name] = int(used["usage"]) - int(used.get("stats", {}).get("inactive_file", 0))
        return Usage(cpu, memory)

    def _query(self, path: str) -> Any:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.jaeger_port}{path}", timeout=60) as answer:
            return json.load(answer)

    def traced_services(self) -> set[str]:
        return set(self._query("/api/services")["data"])

    def traces(self, service: str, limit: int) -> dict[str, list[SeenSpan]]:
        """The newest traces that a service has part in, by trace id."""
        found = self._query(f"/api/traces?service={service}&limit={limit}&lookback=1h")["data"]
        return {trace["traceID"].rjust(32, "0"): list(_spans(trace)) for trace in found}


def _spans(trace: dict[str, Any]) -> Iterator[SeenSpan]:
    """Reads Jaeger's JSON, and its plainer form with parents and services in the spans."""
    processes = trace.get("processes", {})
    for span in trace["spans"]:
        parents = [r["spanID"] for r in span.get("references", []) if r["refType"] == "CHILD_OF"]
        tags = span["tags"]
        yield SeenSpan(
            span["operationName"],
            span.get("service") or processes[span["processID"]]["serviceName"],
            span["spanID"],
            span.get("parentSpanID") or (parents[0] if parents else ""),
            set(tags) if isinstance(tags, dict) else {tag["key"] for tag in tags},
        )


@contextmanager
def taken_port() -> Iterator[int]:
    """A port of the loopback address that somebody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield int(listening.getsockname()[1])


def image_sizes(images: Sequence[str], base: str) -> list[dict[str, Any]]:
    """As `make images` prints them."""
    base_bytes = ask_engine(f"/images/{base}/json")["Size"]
    sizes = {image: ask_engine(f"/images/{image}/json")["Size"] for image in images}
    return [
        {"image": image, "mb": round(size / 1e6, 1), "beyond_base_mb": round((size - base_bytes) / 1e6, 1)}
        for image, size in sizes.items()
    ]
