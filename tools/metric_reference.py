"""Writes the catalogue of metrics into docs/observability.md; `--check` fails when the page is stale.

python tools/metric_reference.py [--check]
"""

from __future__ import annotations

import sys
from pathlib import Path

from hasgpu_runtime.metric_catalogue import CATALOGUE, PROCESS_SERIES, Kind, MetricSpec

PAGE = Path(__file__).parent.parent / "docs/observability.md"
BEGIN, END = "<!-- metrics: begin (written by tools/metric_reference.py) -->\n", "<!-- metrics: end -->\n"


def line(spec: MetricSpec) -> str:
    """Returns a metric's line of the table."""
    labels = ", ".join(f"`{attribute}`" for attribute in spec.attributes) or "–"
    kind = spec.kind.value
    if spec.kind is Kind.HISTOGRAM:
        kind += f", {spec.buckets[0]:g} to {spec.buckets[-1]:g}"
    return f"| `{spec.prometheus}` | {kind} | {spec.unit or '0 or 1'} | {labels} | {spec.description} |"


def table() -> str:
    """Returns all tables, by who offers the metrics."""
    lines: list[str] = []
    for services in dict.fromkeys(spec.services for spec in CATALOGUE.values()):
        title = services[0] if len(services) == 1 else "several: " + ", ".join(services)
        lines += [f"**{title}**", "", "| name | kind | unit | labels | meaning |", "|---|---|---|---|---|"]
        lines += [line(spec) for spec in CATALOGUE.values() if spec.services == services]
        lines.append("")
    processes = ", ".join(f"`{name}`" for name in PROCESS_SERIES)
    lines += [f"**Every process**, by prometheus_client: {processes}.", ""]
    return "\n".join(lines)


def main() -> int:
    """Writes or checks."""
    text = PAGE.read_text(encoding="utf-8")
    before, begun, rest = text.partition(BEGIN)
    _, ended, after = rest.partition(END)
    if not begun or not ended:
        print(f"{PAGE}: expected the lines {BEGIN.strip()!r} and {END.strip()!r}")
        return 1
    new = before + BEGIN + table() + END + after
    if new == text:
        return 0
    if "--check" in sys.argv:
        print("docs/observability.md is stale; run python tools/metric_reference.py")
        return 1
    PAGE.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
