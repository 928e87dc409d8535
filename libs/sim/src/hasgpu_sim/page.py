"""A self-contained HTML page of runs: tables, and rate, shares and late requests over time, policies side by side."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 880, 170, 46, 22
DECADES = 4
_COLOURS = ("#0b6e4f", "#c1121f", "#1d4e89", "#e09f3e", "#6a4c93", "#7f7f7f", "#14213d")
_STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:1100px;margin:2em auto;padding:0 1em;color:#1b1b1b}
table{border-collapse:collapse;margin:1em 0;font-size:.9em}.wide{overflow-x:auto}
td,th{padding:.2em .8em;border-bottom:1px solid #ddd;text-align:right}
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
    end_s: float = 0.0
    """Where the time axis ends; 0: at the last value."""
    logarithmic: bool = False
    """The value axis spans powers of ten, at most DECADES of them; smaller values lie on its foot."""


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of words and figures, the first the heads."""

    title: str
    rows: Sequence[Sequence[str]]
    note: str = ""


Part = Chart | Table


def render(title: str, intro: Sequence[str], parts: Sequence[Part]) -> str:
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
    return f"<h2>{html.escape(table.title)}</h2>{note}<div class='wide'><table><tr>{heads}</tr>{rows}</table></div>"


def _chart(chart: Chart) -> str:
    points = [point for line in chart.lines.values() for point in line]
    end_s = chart.end_s or max((at_s for at_s, _ in points), default=1.0) or 1.0
    top = _round_up(max((value for _, value in points), default=1.0) or 1.0)
    foot = 0.0
    if chart.logarithmic:
        least = min((value for _, value in points if value > 0), default=top)
        top = 10.0 ** math.ceil(math.log10(top) - 1e-9)
        foot = max(10.0 ** math.floor(math.log10(least)), top / 10**DECADES) if least < top else top / 10
    width, height = _WIDTH - _LEFT - 8, _HEIGHT - _BOTTOM - 8

    def place(at_s: float, value: float) -> str:
        part = math.log(max(value, foot) / foot) / math.log(top / foot) if foot else value / top
        return f"{_LEFT + at_s / end_s * width:.1f},{8 + height - part * height:.1f}"

    lines, keys = [], []
    for index, (name, line) in enumerate(chart.lines.items()):
        colour = _COLOURS[index % len(_COLOURS)]
        dash = "" if index < len(_COLOURS) else " stroke-dasharray='5 3'"
        path = " ".join(place(at_s, value) for at_s, value in line)
        lines.append(
            f"<polyline fill='none' stroke='{colour}' stroke-width='1.5'{dash} points='{path}'>"
            f"<title>{html.escape(name)}</title></polyline>"
        )
        keys.append(f"<span><i style='background:{colour}'></i>{html.escape(name)}</span>")
    title = f"<h2>{html.escape(chart.title)} <small>({html.escape(chart.unit)})</small></h2>"
    return (
        f"{title}<div class='key'>{''.join(keys)}</div>"
        f"<svg viewBox='0 0 {_WIDTH} {_HEIGHT}' width='100%' role='img'>{_axes(end_s, top, foot)}{''.join(lines)}</svg>"
    )


def _axes(end_s: float, top: float, foot: float) -> str:
    """Both axes with marks at fifths of the height (powers of ten, if it has a foot) and round times."""
    width, height = _WIDTH - _LEFT - 8, _HEIGHT - _BOTTOM - 8
    out = [f"<path d='M{_LEFT} 8V{8 + height}H{_LEFT + width}' stroke='currentColor' fill='none' opacity='.4'/>"]
    steps = round(math.log10(top / foot)) if foot else 5
    for step in range(steps + 1):
        y = 8 + height - step / steps * height
        if step:
            out.append(f"<path d='M{_LEFT} {y:.1f}h{width}' stroke='currentColor' opacity='.12'/>")
        value = foot * 10**step if foot else top * step / steps
        out.append(_text(_LEFT - 4, y + 4, f"{value:,.6g}", "end"))
    step_s = _round_up(end_s / 6)
    unit, unit_s = ("h", 3600.0) if end_s >= 4 * 3600 else ("min", 60.0) if end_s >= 600 else ("s", 1.0)
    step_s = max(1.0, _round_up(end_s / 6 / unit_s)) * unit_s if unit_s > 1 else step_s
    at_s = 0.0
    while at_s <= end_s * 1.0001:
        x = _LEFT + at_s / end_s * width
        anchor = "start" if not at_s else "end" if at_s + step_s / 3 > end_s else "middle"
        out.append(_text(x, _HEIGHT - 4, f"{at_s / unit_s:g} {unit}", anchor))
        at_s += step_s
    return "".join(out)


def _text(x: float, y: float, words: str, anchor: str) -> str:
    return f"<text x='{x:.1f}' y='{y:.1f}' text-anchor='{anchor}' font-size='11' fill='currentColor'>{words}</text>"


def _round_up(value: float) -> float:
    """Returns the next of 1, 1.5, 2, 2.5, 3, 4, 5, 6, 8 and 10 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in (1, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10, 20) if step * power >= value * 0.99999)
