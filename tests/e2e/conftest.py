"""One running system for all e2e tests, traced into a collector."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Iterator

import pytest
from hasgpu_system import FUNCTIONS, System, eventually, running_system
from otlp_sink import OtlpSink

IDLE_TO_ZERO_S = 3
"""As the system's scaler is told; only functions with `min: 0` mind."""
RETIRE_S = 5
"""The same, for parked instances that nobody needs."""


@pytest.fixture(scope="session")
def sink() -> Iterator[OtlpSink]:
    collector = OtlpSink()
    yield collector
    collector.stop()


@pytest.fixture(scope="session")
def system(tmp_path_factory: pytest.TempPathFactory, sink: OtlpSink) -> Iterator[System]:
    env = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{sink.port}",
        "OTEL_EXPORTER_OTLP_INSECURE": "true",
        "HASGPU_SCALER_IDLE_TO_ZERO_S": str(IDLE_TO_ZERO_S),
        "HASGPU_SCALER_RETIRE_S": str(RETIRE_S),
    }
    with running_system(tmp_path_factory.mktemp("home"), env=env, function="tricky") as running:
        yield running


@pytest.fixture(scope="session")
def scale(system: System) -> Callable[..., None]:
    """Scales by hand once there is room: what an earlier test deleted gives its room back within seconds."""

    def run(*arguments: str) -> None:
        def done() -> bool:
            return system.cli("scale", *arguments, check=False).returncode == 0

        eventually(done, within_s=30)

    return run


@pytest.fixture(scope="module")
def copy_of_tricky(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., pathlib.Path]:
    """Makes the folder of a function that is `tricky` but for some keys of its declaration; gives the YAML's path."""

    def make(**changes: str) -> pathlib.Path:
        folder = tmp_path_factory.mktemp("function")
        lines = (FUNCTIONS / "tricky" / "function.yaml").read_text().splitlines()
        kept = [line for line in lines if line.split(":")[0] not in changes]
        (folder / "function.yaml").write_text(
            "\n".join([*kept, *(f"{key}: {value}" for key, value in changes.items())])
        )
        (folder / "handler.py").write_text((FUNCTIONS / "tricky" / "handler.py").read_text())
        return folder / "function.yaml"

    return make
