"""Asks a Prometheus every query of the dashboards and rules, and says which return data.

    python tools/query_dashboards.py [--prometheus http://127.0.0.1:9090] [--function NAME]

Some have none on a healthy system (power of a CPU device, instances without a place); the status is 1 when Prometheus
refuses a query or an expression has no data that is not among these.
"""

from __future__ import annotations

import argparse
import json
import sys
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).parent.parent / "deploy/compose/observability"
MAY_BE_EMPTY = (
    "hasgpu_function_cost",
    "hasgpu_gpu_memory_used",
    "hasgpu_gpu_power",
    "hasgpu_gpu_temperature",
    "hasgpu_gpu_sm_clock",
    "hasgpu_gpu_utilisation",
    "hasgpu_instances_unplaced",
    "hasgpu_prediction_correction",
    'outcome!="in_time"',
)
"""Without a price, without a driver that tells, without anything wrong."""


def ask(address: str, expression: str) -> list[Any]:
    """Returns what a query finds now; raises ValueError with Prometheus's own words when it is refused."""
    query = urllib.parse.urlencode({"query": expression})
    try:
        with urllib.request.urlopen(f"{address}/api/v1/query?{query}", timeout=10) as answer:
            return list(json.load(answer)["data"]["result"])
    except urllib.error.HTTPError as error:
        raise ValueError(error.read().decode()) from error


def queries() -> Iterator[tuple[str, str, bool]]:
    """Yields a name, an expression, and whether it should return data on a healthy system."""
    for path in sorted((FOLDER / "grafana/dashboards").glob("*.json")):
        for panel in json.loads(path.read_text(encoding="utf-8"))["panels"]:
            for target in panel.get("targets", ()):
                yield f"{path.stem}: {panel['title']}", target["expr"], True
    for path in sorted((FOLDER / "prometheus/rules").glob("*.yml")):
        for group in yaml.safe_load(path.read_text(encoding="utf-8"))["groups"]:
            for rule in group["rules"]:
                yield f"{path.stem}: {rule.get('alert') or rule['record']}", rule["expr"], "record" in rule


def main() -> int:
    """Asks and tells."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prometheus", default="http://127.0.0.1:9090")
    parser.add_argument("--function", default=".*")
    options = parser.parse_args()
    devices = ask(options.prometheus, "hasgpu_gpu_info")
    if not devices:
        print("Prometheus has no hasgpu_gpu_info: is a node agent scraped?")
        return 1
    variables = {
        "$__rate_interval": "1m",
        "$__range": "5m",
        "$function": options.function,
        "$node": devices[0]["metric"]["node"],
        "$gpu": devices[0]["metric"]["gpu"],
    }
    bad = asked = 0
    for title, template, expected in queries():
        expression = template
        for name, value in variables.items():
            expression = expression.replace(name, value)
        asked += 1
        try:
            count = len(ask(options.prometheus, expression))
        except ValueError as error:
            print(f"REFUSED  {title}: {error}")
            bad += 1
            continue
        excused = not expected or any(name in expression for name in MAY_BE_EMPTY)
        word = f"{count:4d}" if count else "none" if excused else "NONE"
        bad += not count and not excused
        print(f"{word}  {title}: {expression}")
    print(f"{asked} queries, {bad} of them refused or without data that should be there")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
