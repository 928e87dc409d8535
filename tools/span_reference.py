"""Writes the catalogue of spans into docs/observability.md; `--check` fails when the page is stale.

python tools/span_reference.py [--check]
"""

from __future__ import annotations

import sys
from pathlib import Path

from hasgpu_runtime.trace_catalogue import HORIZONTAL_CHAIN, REQUEST_CHAIN, SPANS, VERTICAL_CHAIN, Link, SpanInfo

PAGE = Path(__file__).parent.parent / "docs/observability.md"
BEGIN, END = "<!-- spans: begin (written by tools/span_reference.py) -->\n", "<!-- spans: end -->\n"


def line(name: str, info: SpanInfo) -> str:
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


def tables() -> str:
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
    return "\n".join(parts) + "\n" + "\n".join(line(name, info) for name, info in SPANS.items()) + "\n"


def main() -> int:
    """Writes or checks."""
    text = PAGE.read_text(encoding="utf-8")
    before, begun, rest = text.partition(BEGIN)
    _, ended, after = rest.partition(END)
    if not begun or not ended:
        print(f"{PAGE}: expected the lines {BEGIN.strip()!r} and {END.strip()!r}")
        return 1
    new = before + BEGIN + tables() + END + after
    if new == text:
        return 0
    if "--check" in sys.argv:
        print("docs/observability.md is stale; run python tools/span_reference.py")
        return 1
    PAGE.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
