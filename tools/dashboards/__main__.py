"""Writes the Grafana dashboards; `--check` fails when the files are not what this would write.

    python -m tools.dashboards [--check]

Dashboards are data here, so that a panel is a few lines and every query names its metrics through the one catalogue.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

from tools.dashboards.function import FUNCTION
from tools.dashboards.gpu import ONE_GPU
from tools.dashboards.loops import LOOPS
from tools.dashboards.model import Dashboard, render
from tools.dashboards.overview import OVERVIEW

FOLDER = Path(__file__).parents[2] / "deploy/compose/observability/grafana/dashboards"
DASHBOARDS: Mapping[str, Dashboard] = {
    "overview.json": OVERVIEW,
    "function.json": FUNCTION,
    "gpu.json": ONE_GPU,
    "loops.json": LOOPS,
}


def main() -> int:
    """Writes or checks."""
    stale = []
    for file, dashboard in DASHBOARDS.items():
        path, text = FOLDER / file, render(dashboard)
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            stale.append(file)
            if "--check" not in sys.argv:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text, encoding="utf-8")
    if stale and "--check" in sys.argv:
        print(f"stale: {', '.join(stale)}; run python -m tools.dashboards")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
