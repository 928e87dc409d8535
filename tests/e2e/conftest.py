"""One running system for all e2e tests, traced into a collector."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hasgpu_system import FUNCTIONS, System
from otlp_sink import OtlpSink


@pytest.fixture(scope="session")
def sink() -> Iterator[OtlpSink]:
    collector = OtlpSink()
    yield collector
    collector.stop()


@pytest.fixture(scope="session")
def system(tmp_path_factory: pytest.TempPathFactory, sink: OtlpSink) -> Iterator[System]:
    running = System(
        tmp_path_factory.mktemp("home"),
        env={"OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{sink.port}", "OTEL_EXPORTER_OTLP_INSECURE": "true"},
    )
    try:
        running.up()
        running.cli("deploy", str(FUNCTIONS / "tricky" / "function.yaml"), "--wait")
        yield running
    finally:
        running.down()
