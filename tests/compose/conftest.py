"""These tests need a Docker engine and minutes: `make compose-test` runs them, `make test` leaves them out."""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import pytest
from compose_stack import ComposeStack

WANTED = "HASGPU_COMPOSE_TEST"
RESULTS = "HASGPU_COMPOSE_RESULTS"
"""A file for the figures."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if os.environ.get(WANTED) == "1":
        return
    here = pathlib.Path(__file__).parent
    for item in items:
        if item.path.is_relative_to(here):
            item.add_marker(pytest.mark.skip(reason=f"needs a Docker engine; make compose-test sets {WANTED}=1"))


@pytest.fixture(scope="session")
def figures() -> Iterator[dict[str, Any]]:
    """What was measured; printed, and written where RESULTS says, at the end."""
    measured: dict[str, Any] = {}
    yield measured
    text = json.dumps(measured, indent=1)
    print(text)
    if file := os.environ.get(RESULTS):
        pathlib.Path(file).write_text(text + "\n")


@pytest.fixture(scope="session")
def stack() -> Iterator[ComposeStack]:
    """A project that is not up yet, and taken down with its volumes at the end."""
    running = ComposeStack()
    running.down(volumes=True)  # of a run that was cut off
    try:
        yield running
    finally:
        if os.environ.get("HASGPU_COMPOSE_KEEP") != "1":
            running.down(volumes=True)
