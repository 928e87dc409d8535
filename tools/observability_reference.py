"""Writes the catalogues of metrics and spans into docs/observability.md; `--check` fails when the page is stale.

python tools/observability_reference.py [--check]
"""

from __future__ import annotations

import sys
from pathlib import Path

from hasgpu_runtime.metric_catalogue import CATALOGUE, PROCESS_SERIES, Kind, MetricSpec
from hasgpu_runtime.trace_catalogue import HORIZONTAL_CHAIN, REQUEST_CHAIN, SPANS, VERTICAL_CHAIN, Link, SpanInfo

PAGE = Path(__file__).parent.parent / "docs/observability.md"
TOOL = "tools/observability_reference.py"


def metric_line(spec: MetricSpec) -> str:
    """Returns a metric's line of the table."""
    labels = ", ".join(f"`{attribute}`" for attribute in spec.attributes) or "–"
    kind = spec.kind.value
    if spec.kind is Kind.HISTOGRAM:
        kind += f", {spec.buckets[0]:g} to {spec.buckets[-1]:g}"
    return f"| `{spec.prometheus}` | {kind} | {spec.unit or '0 or 1'} | {labels} | {spec.description} |"


def metrics() -> str:
    """Returns all tables, by who offers the metrics."""
    lines: list[str] = []
    for services in dict.fromkeys(spec.services for spec in CATALOGUE.values()):
        title = services[0] if len(services) == 1 else "several: " + ", ".join(services)
        lines += [f"**{title}**", "", "| name | kind | unit | labels | meaning |", "|---|---|---|---|---|"]
        lines += [metric_line(spec) for spec in CATALOGUE.values() if spec.services == services]
        lines.append("")
    processes = ", ".join(f"`{name}`" for name in PROCESS_SERIES)
    lines += [f"**Every process**, by prometheus_client: {processes}.", ""]
    return "\n".join(lines)


def span_line(name: str, info: SpanInfo) -> str:
    """Returns a span's line of the table."""
    attributes = ", ".join(f"`{attribute}`" for attribute in info.attributes) or "–"
    return f"| `{name}` | {info.service or 'any'} | {info.kind} | {info.meaning} | {attributes} |"


def tree(chain: tuple[Link, ...]) -> str:
    """Returns a chain as an indented list."""
    depths: dict[str, int] = {}
    lines: list[str] = []
    for link in chain:
        depths[link.name] = depths[link.parent] + 1 if link.parent else 0
        lines.append(f"{'    ' * depths[link.name]}{link.name:<{60 - 4 * depths[link.name]}}{link.service}")
    return "\n".join(["```", *lines, "```", ""])


def spans() -> str:
    """Returns the chains and the table."""
    parts = [
        "A request that was answered:\n",
        tree(REQUEST_CHAIN),
        "A decision that changes the share of an instance (one of the policy is a child of `scaler.demand`):\n",
        tree(VERTICAL_CHAIN),
        "A decision that adds an instance:\n",
        tree(HORIZONTAL_CHAIN),
        "| span | service | kind | what it covers | attributes that it always has |",
        "|---|---|---|---|---|",
    ]
    return "\n".join(parts) + "\n" + "\n".join(span_line(name, info) for name, info in SPANS.items()) + "\n"


def replaced(text: str, name: str, part: str) -> str:
    """Returns a page with the part between the marks of that name replaced; raises ValueError without such marks."""
    begin, end = f"<!-- {name}: begin (written by {TOOL}) -->\n", f"<!-- {name}: end -->\n"
    before, begun, rest = text.partition(begin)
    _, ended, after = rest.partition(end)
    if not begun or not ended:
        raise ValueError(f"expected the lines {begin.strip()!r} and, below it, {end.strip()!r}")
    return before + begin + part + end + after


def main() -> int:
    """Writes or checks."""
    text = PAGE.read_text(encoding="utf-8")
    try:
        new = replaced(replaced(text, "metrics", metrics()), "spans", spans())
    except ValueError as error:
        print(f"{PAGE}: {error}")
        return 1
    if new == text:
        return 0
    if "--check" in sys.argv:
        print(f"docs/observability.md is stale; run python {TOOL}")
        return 1
    PAGE.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
