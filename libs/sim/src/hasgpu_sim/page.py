"""A self-contained HTML page of runs: tables, and rate, shares and late requests over time, policies side by side."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 880, 170, 46, 22
_COLOURS = ("#0b6e4f", "#c1121f", "#1d4e89", "#e09f3e", "#6a4c93", "#7f7f7f", "#14213d")
_STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:980px;margin:2em auto;padding:0 1em;color:#1b1b1b}
table{border-collapse:collapse;margin:1em 0}td,th{padding:.2em .8em;border-bottom:1px solid #ddd;text-align:right}
td:first-child,th:first-child{text-align:left}svg{display:block;margin:.4em 0 1.2em}h2{margin-top:2em}
.key span{margin-right:1.2em;white-space:nowrap}.key i{display:inline-block;width:1.2em;height:3px;margin-right:.4em;
vertical-align:middle}@media(prefers-color-scheme:dark){body{background:#111;color:#ddd}td,th{border-color:#333}}"""


@dataclass(frozen=True, slots=True)
class Chart:
    """Lines over time."""

    title: str
    unit: str
    lines: Mapping[str, Sequence[tuple[float, float]]]
    """By name: (seconds, value)."""


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of words and figures, the first the heads."""

    title: str
    rows: Sequence[Sequence[str]]
    note: str = ""


def render(title: str, intro: Sequence[str], parts: Sequence[Chart | Table]) -> str:
    """Returns the page; it needs nothing from elsewhere."""
    body = [f"<h1>{html.escape(title)}</h1>", *(f"<p>{html.escape(text)}</p>" for text in intro)]
    body += [_table(part) if isinstance(part, Table) else _chart(part) for part in parts]
    head = f"<meta charset='utf-8'><title>{html.escape(title)}</title><style>{_STYLE}</style>"
    return f"<!doctype html><html lang='en'><head>{head}</head><body>{''.join(body)}</body></html>\n"


def _table(table: Table) -> str:
    heads = "".join(f"<th>{html.escape(cell)}</th>" for cell in table.rows[0])
    rows = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in table.rows[1:]
    )
    note = f"<p>{html.escape(table.note)}</p>" if table.note else ""
    return f"<h2>{html.escape(table.title)}</h2>{note}<table><tr>{heads}</tr>{rows}</table>"


def _chart(chart: Chart) -> str:
    points = [point for line in chart.lines.values() for point in line]
    end_s = max((at_s for at_s, _ in points), default=1.0) or 1.0
    top = max((value for _, value in points), default=1.0) * 1.05 or 1.0
    width, height = _WIDTH - _LEFT - 8, _HEIGHT - _BOTTOM - 8

    def place(at_s: float, value: float) -> str:
        return f"{_LEFT + at_s / end_s * width:.1f},{8 + height - value / top * height:.1f}"

    lines, keys = [], []
    for index, (name, line) in enumerate(chart.lines.items()):
        colour = _COLOURS[index % len(_COLOURS)]
        path = " ".join(place(at_s, value) for at_s, value in line)
        lines.append(f"<polyline fill='none' stroke='{colour}' stroke-width='1.5' points='{path}'/>")
        keys.append(f"<span><i style='background:{colour}'></i>{html.escape(name)}</span>")
    axis = (
        f"<path d='M{_LEFT} 8V{8 + height}H{_LEFT + width}' stroke='currentColor' fill='none' opacity='.4'/>"
        f"<text x='{_LEFT - 4}' y='16' text-anchor='end' font-size='11' fill='currentColor'>{top:.3g}</text>"
        f"<text x='{_LEFT - 4}' y='{8 + height}' text-anchor='end' font-size='11' fill='currentColor'>0</text>"
        f"<text x='{_LEFT + width}' y='{_HEIGHT - 4}' text-anchor='end' font-size='11' fill='currentColor'>"
        f"{end_s:.0f} s</text>"
    )
    title = f"<h2>{html.escape(chart.title)} <small>({html.escape(chart.unit)})</small></h2>"
    return (
        f"{title}<div class='key'>{''.join(keys)}</div>"
        f"<svg viewBox='0 0 {_WIDTH} {_HEIGHT}' width='100%' role='img'>{axis}{''.join(lines)}</svg>"
    )
