"""Prints what a distribution of this workspace needs from outside it, a requirement a line, for an image's first layer.

    python third_party.py hasgpu-gateway [hasgpu-...]

Follows dependencies inside the workspace (extras too) through the pyproject.toml files below the current folder, so an
image needs these alone, not the code, until its third-party layer stands. Standard library only.
"""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_REQUIREMENT = re.compile(r"(?P<name>[A-Za-z0-9._-]+)\s*(\[(?P<extras>[^]]*)\])?")


def read_workspace(root: Path) -> Mapping[str, Mapping[str, Any]]:
    """Returns the [project] tables below a folder by distribution name."""
    tables = (tomllib.loads(file.read_text(encoding="utf-8")) for file in sorted(root.glob("**/pyproject.toml")))
    return {table["project"]["name"]: table["project"] for table in tables if "project" in table}


def third_party(workspace: Mapping[str, Mapping[str, Any]], names: Sequence[str]) -> list[str]:
    """Returns the requirements from outside the workspace, sorted.

    Args:
        workspace: As `read_workspace` returns it.
        names: Distributions, each with extras or without.

    Raises:
        KeyError: One that is named hasgpu-... has no pyproject.toml here.
    """
    found: set[str] = set()
    seen: set[str] = set()
    waiting = list(names)
    while waiting:
        requirement = waiting.pop()
        match = _REQUIREMENT.match(requirement)
        if match is None or not match["name"].startswith("hasgpu-"):
            found.add(requirement)
            continue
        if requirement in seen:
            continue
        seen.add(requirement)
        project = workspace[match["name"]]
        waiting += project.get("dependencies", [])
        for extra in filter(None, (match["extras"] or "").replace(" ", "").split(",")):
            waiting += project["optional-dependencies"][extra]
    return sorted(found)


if __name__ == "__main__":
    try:
        sys.stdout.write("\n".join(third_party(read_workspace(Path()), sys.argv[1:])) + "\n")
    except KeyError as error:
        sys.exit(f"third_party.py: no pyproject.toml of {error} below {Path().absolute()}")
