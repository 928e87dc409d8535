"""The evaluation as one HTML page without scripts: tables by family, batch, SM share and quota, and a scatter plot."""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from hasgpu_predictor.evaluation import Evaluation, Scored
from hasgpu_predictor.operators import Array

DOTS_MAX = 2_000
_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:64rem;margin:2rem auto;padding:0 1rem;color:#222}"
    "table{border-collapse:collapse;margin:.5rem 0 1.5rem}td,th{padding:.15rem .7rem;border-bottom:1px solid #ddd;"
    "text-align:right}td:first-child,th:first-child{text-align:left}svg{background:#fafafa;border:1px solid #ddd}"
)


def family_of(model: str) -> str:
    """Returns the name's first letters: `resnet` of `resnet50`, `regnet` of `regnet_x_1_6gf`, `vgg` of `vgg11_bn`."""
    found = re.match(r"(wide_)?[A-Za-z]+", model)
    return found[0] if found else model


def page(evaluation: Evaluation) -> str:
    """Returns the page."""
    figures = evaluation.summary()
    scored = evaluation.scored
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8><title>RaPP: predicted against measured</title>",
        f"<style>{_STYLE}</style><h1>RaPP: predicted against measured</h1>",
        f"<p>MAPE {figures['mape']:.2f} %, median {figures['median_ape']:.2f} %, 95th percentile "
        f"{figures['p95_ape']:.2f} %, {figures['coverage_90']:.1f} % of {figures['n']} rows in the 90 % interval, "
        f"{figures['monotone_violations']} surfaces that are not monotone.</p>",
        _scatter(list(scored.values())),
    ]
    families: dict[str, list[Scored]] = {}
    for model, part in scored.items():
        families.setdefault(family_of(model), []).append(part)
    parts.append(_table("family", {name: (_join(f, _ape), _join(f, _covered)) for name, f in sorted(families.items())}))
    for column, name in enumerate(("batch", "SM %", "quota %")):
        parts.append(_table(name, _by(list(scored.values()), column)))
    parts.append(_table("model", {model: (part.ape_pct, _covered(part)) for model, part in scored.items()}))
    rows = sorted(evaluation.importance_pct.items(), key=lambda item: -item[1])
    cells = "".join(f"<tr><td>{html.escape(name)}<td>{share:.1f}" for name, share in rows)
    parts.append(f"<h2>Feature importance</h2><table><tr><th>feature<th>%{cells}</table></html>\n")
    return "\n".join(parts)


def _ape(part: Scored) -> Array:
    return part.ape_pct


def _covered(part: Scored) -> Array:
    return part.covered.astype(np.float64)


def _join(parts: Sequence[Scored], what: Callable[[Scored], Array]) -> Array:
    return np.concatenate([what(part) for part in parts])


def _by(parts: Sequence[Scored], column: int) -> dict[str, tuple[Array, Array]]:
    places = np.concatenate([part.configurations[:, column] for part in parts])
    ape, covered = _join(parts, _ape), _join(parts, _covered)
    return {f"{value:g}": (ape[places == value], covered[places == value]) for value in np.unique(places)}


def _table(name: str, groups: Mapping[str, tuple[Array, Array]]) -> str:
    rows = "".join(
        f"<tr><td>{html.escape(group)}<td>{ape.mean():.2f}<td>{np.median(ape):.2f}<td>{100 * covered.mean():.1f}"
        f"<td>{len(ape)}"
        for group, (ape, covered) in groups.items()
    )
    return (
        f"<h2>By {html.escape(name)}</h2><table><tr><th>{html.escape(name)}<th>MAPE %<th>median %<th>in interval %"
        f"<th>rows{rows}</table>"
    )


def _scatter(parts: Sequence[Scored]) -> str:
    measured = np.log10(np.concatenate([part.measured_ms for part in parts]))
    predicted = np.log10(np.concatenate([part.predicted_ms for part in parts]))
    step = max(1, len(measured) // DOTS_MAX)
    low, high = float(min(measured.min(), predicted.min())), float(max(measured.max(), predicted.max()))
    size, scale = 480, 480 / max(1e-9, high - low)
    dots = "".join(
        f'<circle cx="{(x - low) * scale:.1f}" cy="{size - (y - low) * scale:.1f}" r="1.5"/>'
        for x, y in zip(measured[::step], predicted[::step], strict=True)
    )
    return (
        f'<figure><svg width="{size}" height="{size}" role="img" aria-label="predicted against measured">'
        f'<line x1="0" y1="{size}" x2="{size}" y2="0" stroke="#999"/>'
        f'<g fill="#1f6feb" fill-opacity=".4">{dots}</g></svg>'
        f"<figcaption>Measured (right) against predicted (up), logarithmic, {10**low:.3g} to {10**high:.3g} ms."
        "</figcaption></figure>"
    )
