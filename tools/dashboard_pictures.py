"""Draws the dashboards from a Prometheus, for the documents: the same queries in the same places, drawn by matplotlib.

    python tools/dashboard_pictures.py [--prometheus URL] [--minutes 10] [--function NAME] [--out docs]

Grafana's own look differs; what is shown does not.
"""

from __future__ import annotations

import argparse
import json
import time
import urllib.parse
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib import pyplot as plt
from PIL import Image

mpl.use("Agg")

FOLDER = Path(__file__).parent.parent / "deploy/compose/observability/grafana/dashboards"
COLUMNS = 24
INCHES_PER_COLUMN, INCHES_PER_LINE = 0.62, 0.36
STEP_S = 5
DOTS_PER_INCH, PALETTE_SIZE = 95, 64
SCALES = {"s": ("s", 1.0), "percentunit": ("%", 100.0), "bytes": ("GiB", 1 / 2**30), "watt": ("W", 1.0)}
LONGEST_LEGEND = 8
COLOURS = plt.get_cmap("tab10").colors


@dataclass(frozen=True, slots=True)
class Source:
    """Where values come from."""

    address: str
    variables: dict[str, str]
    begin_s: float
    end_s: float

    def ask(self, expression: str, *, instant: bool) -> list[dict[str, Any]]:
        """Returns the series of a query, over the whole time or at its end."""
        for name, value in self.variables.items():
            expression = expression.replace(name, value)
        words: dict[str, Any] = {"query": expression}
        words |= {"time": self.end_s} if instant else {"start": self.begin_s, "end": self.end_s, "step": STEP_S}
        path = "query" if instant else "query_range"
        with urllib.request.urlopen(
            f"{self.address}/api/v1/{path}?{urllib.parse.urlencode(words)}", timeout=30
        ) as answer:
            return list(json.load(answer)["data"]["result"])


def label(target: dict[str, Any], metric: dict[str, str]) -> str:
    """Returns a series' legend."""
    text = str(target["legendFormat"])
    for name, value in metric.items():
        text = text.replace("{{" + name + "}}", value)
    return text if "{{" not in text and text != "__auto" else ", ".join(metric.values())


def draw_series(axis: Any, panel: dict[str, Any], source: Source) -> None:
    """Draws lines, or areas on each other."""
    unit, factor = SCALES.get(panel["fieldConfig"]["defaults"]["unit"], ("", 1.0))
    stacked = panel["fieldConfig"]["defaults"]["custom"]["stacking"]["mode"] == "normal"
    times = np.arange(source.begin_s, source.end_s + 1, STEP_S)
    base = np.zeros(len(times))
    names: list[tuple[str, Any]] = []
    for target in panel["targets"]:
        for number, series in enumerate(source.ask(target["expr"], instant=False)):
            at = {round(float(t)): float(v) * factor for t, v in series["values"]}
            values = np.array([at.get(round(t), np.nan) for t in times])
            colour = COLOURS[(len(names) if len(names) < len(COLOURS) else number) % len(COLOURS)]
            minutes = (times - source.end_s) / 60
            if stacked:
                top = base + np.nan_to_num(values)
                axis.fill_between(minutes, base, top, color=colour, alpha=0.7, linewidth=0)
                base = top
            else:
                axis.plot(minutes, values, color=colour, linewidth=1.1)
            names.append((label(target, series["metric"]), colour))
    for name, colour in names[:LONGEST_LEGEND]:
        axis.plot([], [], color=colour, label=name)
    if not names:
        axis.text(0.5, 0.5, "no data", fontsize=8, ha="center", va="center", transform=axis.transAxes)
    else:
        axis.legend(fontsize=5.5, loc="upper left", framealpha=0.6, handlelength=1)
    axis.set_ylim(
        bottom=min(0.0, axis.get_ylim()[0]), top=factor * 1.02 if unit == "%" and axis.get_ylim()[1] < factor else None
    )
    axis.set_ylabel(unit, fontsize=6)
    axis.grid(alpha=0.25)


def draw_heatmap(axis: Any, panel: dict[str, Any], source: Source) -> None:
    """Draws how many values each bucket got."""
    series = source.ask(panel["targets"][0]["expr"], instant=False)
    rows = sorted((float(s["metric"]["le"]), {round(float(t)): float(v) for t, v in s["values"]}) for s in series)
    times = np.arange(source.begin_s, source.end_s + 1, STEP_S)
    below = np.array([[at.get(round(t), 0.0) for t in times] for _, at in rows])
    counts = np.diff(below, axis=0, prepend=0.0) if len(rows) else np.zeros((1, len(times)))
    axis.pcolormesh(
        (times - source.end_s) / 60, np.arange(len(counts)), np.ma.masked_less_equal(counts, 0), cmap="Spectral_r"
    )
    axis.set_yticks(range(len(rows)), [f"{bound:g}" for bound, _ in rows])


def draw_values(axis: Any, panel: dict[str, Any], source: Source) -> None:
    """Draws the newest values: in words, or as bars."""
    unit, factor = SCALES.get(panel["fieldConfig"]["defaults"]["unit"], ("", 1.0))
    found = [
        (label(target, series["metric"]), float(series["value"][1]) * factor)
        for target in panel["targets"]
        for series in source.ask(target["expr"], instant=True)
    ]
    kind = panel["type"]
    if kind == "bargauge":
        axis.barh([name for name, _ in found], [number for _, number in found], color=COLOURS[0])
        axis.set_xlim(0, factor)
        axis.set_xlabel(unit, fontsize=6)
        return
    axis.axis("off")
    if kind == "piechart":
        parts = [max(0.0, number) for _, number in found]
        axis.pie(parts, labels=[f"{name} {number:.0f} %" for name, number in found], textprops={"fontsize": 6})
    elif kind == "table" or panel["options"].get("textMode") == "name":
        axis.text(0.02, 0.95, "\n".join(name for name, _ in found), fontsize=6.5, va="top", transform=axis.transAxes)
    else:
        text = "\n".join(f"{number:.4g} {unit}" + (f"  {name}" if len(found) > 1 else "") for name, number in found)
        size = 15 if len(found) == 1 else 8
        axis.text(0.5, 0.5, text or "no data", fontsize=size, ha="center", va="center", transform=axis.transAxes)


def draw_mosaic(axis: Any, panel: dict[str, Any], source: Source) -> None:
    """Draws a column for each row, its instances above each other."""
    pieces = source.ask(panel["targets"][0]["expr"], instant=True)
    names = sorted({piece["metric"]["instance_id"] for piece in pieces})
    rows = sorted({piece["metric"]["row"] for piece in pieces}, key=int)
    tops = dict.fromkeys(rows, 0.0)
    for piece in sorted(pieces, key=lambda piece: str(piece["metric"]["instance_id"])):
        row, name, share = piece["metric"]["row"], piece["metric"]["instance_id"], 100 * float(piece["value"][1])
        colour = COLOURS[names.index(name) % len(COLOURS)]
        axis.bar(f"row {row}", share, bottom=tops[row], color=colour, width=0.95, edgecolor="white")
        axis.text(f"row {row}", tops[row] + share / 2, f"{name}  {share:.0f} %", ha="center", va="center", fontsize=6)
        tops[row] += share
    axis.set_ylim(0, 100)
    axis.set_ylabel("%", fontsize=6)


DRAW = {"timeseries": draw_series, "heatmap": draw_heatmap, "barchart": draw_mosaic}


def draw(dashboard: dict[str, Any], source: Source, path: Path) -> None:
    """Draws one dashboard into a file."""
    lines = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in dashboard["panels"])
    width, height = COLUMNS * INCHES_PER_COLUMN, lines * INCHES_PER_LINE
    figure = plt.figure(figsize=(width, height))
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        left, top = place["x"] / COLUMNS, 1 - place["y"] / lines
        if panel["type"] == "row":
            figure.text(left + 0.01, top - 0.5 / lines, panel["title"], fontsize=9, weight="bold", va="center")
            continue
        axis = figure.add_axes(
            (
                left + 0.035,
                top - (place["h"] - 0.9) / lines,
                place["w"] / COLUMNS - 0.05,
                (place["h"] - 1.9) / lines,
            )
        )
        axis.set_title(panel["title"], fontsize=7, loc="left")
        axis.tick_params(labelsize=5.5)
        DRAW.get(panel["type"], draw_values)(axis, panel, source)
    figure.savefig(path, dpi=DOTS_PER_INCH, facecolor="white")
    plt.close(figure)
    with Image.open(path) as picture:
        picture.convert("RGB").quantize(PALETTE_SIZE).save(path, optimize=True)


def main() -> None:
    """Draws all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prometheus", default="http://127.0.0.1:9090")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--function", default=".*")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent.parent / "docs")
    options = parser.parse_args()
    now_s = time.time()
    source = Source(options.prometheus, {}, now_s - 60 * options.minutes, now_s)
    (device, *_) = source.ask("hasgpu_gpu_info", instant=True)
    source.variables.update(
        {
            "$__rate_interval": "30s",
            "$__range": f"{options.minutes:g}m",
            "$function": options.function,
            "$node": device["metric"]["node"],
            "$gpu": device["metric"]["gpu"],
        }
    )
    for path in sorted(FOLDER.glob("*.json")):
        draw(json.loads(path.read_text(encoding="utf-8")), source, options.out / f"dashboard-{path.stem}.png")
        print(options.out / f"dashboard-{path.stem}.png")


if __name__ == "__main__":
    main()
