"""What a simulation prints and writes: a table, JSON and a page."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hasgpu_core.errors import InvalidError
from hasgpu_sim.page import Chart, Part, Table, render

from hasgpu_cli.simulation.runs import Outcome

HEADS = (
    "load", "policy", "SLO ms", "requests", "late or dropped", "p50 ms", "p95 ms", "p99 ms", "GPU-s",
    "GPU-ms a request in time", "actions", "GPUs", "decide µs p50, p99",
)  # fmt: skip
CHARTS = (
    ("rate", "Rate", "requests a second"),
    ("capacity", "Capacity as each policy reckons it", "requests a second"),
    ("share", "Shares requested", "GPUs, logarithmic"),
    ("violations", "Late or dropped so far", "requests"),
)
MOST_CHARTED = 12
"""Loads that the page shows over time; figures are shown of all."""


def row(outcome: Outcome, result: Mapping[str, Any]) -> list[str]:
    """One line of the table."""
    bound = outcome.policy == "clairvoyant"
    cost = result["cost_per_good"]
    name = f"{outcome.case.title}, {result['function']}" if result["function"] else outcome.case.title
    slo = f"{result['slo_ms']:g}" if result["slo_ms"] else "several"
    return [
        name,
        outcome.policy,
        slo,
        str(result["requests"]),
        "-" if bound else f"{result['violations']} ({result['violation_rate']:.3%})",
        *("-" if bound else f"{result[key]:.1f}" for key in ("p50_ms", "p95_ms", "p99_ms")),
        f"{'at least ' if bound else ''}{result['gpu_seconds']:.2f}",
        "none in time" if cost is None else f"{cost * 1e3:.3f}",
        "-" if bound else str(result["actions"]),
        "-" if bound else str(result["gpus_peak"]),
        "-" if bound else f"{result['decide_us_p50']:.0f}, {result['decide_us_p99']:.0f}",
    ]


def document(outcomes: Sequence[Outcome], settings: Mapping[str, Any], notes: Sequence[str]) -> dict[str, Any]:
    """Returns the JSON: `runs`, one for each function where there are several, else for each load."""
    runs: list[Mapping[str, Any]] = []
    totals: list[Mapping[str, Any]] = []
    for outcome in outcomes:
        whole, *single = outcome.results
        runs += single or [whole]
        totals += [whole] if single else []
    found: dict[str, Any] = {"runs": runs, "settings": dict(settings), "notes": list(notes)}
    return {**found, "totals": totals} if totals else found


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Writes the JSON; raises InvalidError when it can't be written."""
    _write("--json", path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def write_page(path: Path, outcomes: Sequence[Outcome], intro: Sequence[str]) -> None:
    """Writes the page; raises InvalidError when it can't be written."""
    parts: list[Part] = [Table("Figures", [HEADS, *(row(o, result) for o in outcomes for result in o.results)])]
    ratios = cost_ratios(outcomes)
    if ratios:
        parts.insert(0, Table("Cost over that of the first policy, violations", ratios))
    titles = list(dict.fromkeys(outcome.case.title for outcome in outcomes))
    for title in titles[:MOST_CHARTED]:
        mine = [o for o in outcomes if o.case.title == title and o.lines]
        for key, head, unit in CHARTS:
            if key == "rate":
                lines = {"arrivals": mine[0].lines[key]} if mine else {}
            else:
                lines = {o.policy: o.lines[key] for o in mine}
            if lines:
                end_s = mine[0].case.duration_s
                parts.append(Chart(f"{head}: {title}", unit, lines, end_s=end_s, logarithmic=key == "share"))
    if len(titles) > MOST_CHARTED:
        intro = [*intro, f"Lines over time are shown of the first {MOST_CHARTED} of {len(titles)} loads."]
    _write("--html", path, render("Scaling policies, simulated", intro, parts))


def cost_ratios(outcomes: Sequence[Outcome]) -> list[Sequence[str]]:
    """Rows of cost per request in time over the first policy's (geometric mean over loads) and of violations."""
    policies = list(dict.fromkeys(outcome.policy for outcome in outcomes))
    if len(policies) < 2:
        return []
    costs = {(o.case.title, o.policy): o.results[0]["cost_per_good"] for o in outcomes}
    rows: list[Sequence[str]] = [("policy", f"cost / {policies[0]}'s", "late or dropped", "worst load")]
    for policy in policies:
        mine = [o for o in outcomes if o.policy == policy]
        pairs = [(costs[o.case.title, policy], costs.get((o.case.title, policies[0]))) for o in mine]
        logs = [math.log(cost / first) for cost, first in pairs if cost and first]
        ratio = f"{math.exp(sum(logs) / len(logs)):.3g}" if logs and len(logs) == len(pairs) else "-"
        rates = [o.results[0]["violation_rate"] for o in mine]
        if policy == "clairvoyant":
            rows.append((policy, ratio, "(a bound)", "-"))
            continue
        requests = sum(o.results[0]["requests"] for o in mine)
        late = sum(o.results[0]["violations"] for o in mine)
        rows.append((policy, ratio, f"{late / max(1, requests):.3%}", f"{max(rates):.3%}"))
    return rows


def _write(option: str, path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InvalidError(option, expected="a file that can be written", got=f"{path}: {error.strerror}") from error
