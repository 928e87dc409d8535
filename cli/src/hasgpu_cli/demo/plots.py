"""The report's pictures, as SVG text whose colours are CSS variables, so that they follow the page's light or dark."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hasgpu_cli.demo.report_data import DemoRun, FunctionRun
from hasgpu_cli.rates import rate_curve

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

RATE_BIN_S = 2.0
STYLE: Mapping[str, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "hasgpu",
    "font.family": "sans-serif",
    "font.size": 9,
    "legend.fontsize": 9,
}
INK, FAINT, GOOD, BAD = "#010101", "#020202", "#030303", "#040404"
"""Stand-ins that no figure uses otherwise; replaced by the page's variables."""
SERIES = ("#050501", "#050502", "#050503", "#050504", "#050505", "#050506", "#050507", "#050508")
VARIABLES = {
    INK: "var(--ink)",
    FAINT: "var(--faint)",
    GOOD: "var(--good)",
    BAD: "var(--bad)",
    **{colour: f"var(--series-{index})" for index, colour in enumerate(SERIES)},
}


def rate_picture(run: DemoRun, function: FunctionRun) -> str:
    """Requests a second against the capacity of the ready instances, as the scaler saw both."""
    figure, axes = _figure(2.6)
    colour = _colour(run, function.name)
    curve = rate_curve(function.due_s, RATE_BIN_S)
    if curve:
        curve.append((curve[-1][0] + RATE_BIN_S, 0.0))
    times, rates = [at_s for at_s, _ in curve], [rate for _, rate in curve]
    axes.fill_between(times, rates, step="post", color=colour, alpha=0.25, linewidth=0)
    axes.step(times, rates, where="post", color=colour, linewidth=1.2, label="requests sent")
    seen = [(sample.at_s, sample.loads[function.name]) for sample in run.samples if function.name in sample.loads]
    if seen:
        moments = [at_s for at_s, _ in seen]
        predicted = [load.predicted_rps for _, load in seen]
        capacity = [load.capacity_rps for _, load in seen]
        axes.step(moments, predicted, where="post", color=BAD, linewidth=1.0, linestyle=":", label="predicted")
        axes.step(moments, capacity, where="post", color=GOOD, linewidth=1.6, label="capacity inside the SLO")
    axes.set_ylabel("requests / s")
    axes.set_ylim(bottom=0)
    _finish(axes, run)
    return _svg(figure)


def shares_picture(run: DemoRun) -> str:
    """What instances may use of the device over time (their limits), stacked by instance."""
    figure, axes = _figure(3.0)
    names = sorted({(item.function, item.instance) for sample in run.samples for item in sample.instances})
    times = [sample.at_s for sample in run.samples]
    rows = [
        [sum(100 * i.allowed_share for i in sample.instances if i.instance == instance) for sample in run.samples]
        for _, instance in names
    ]
    if rows:
        colours = [_colour(run, name) for name, _ in names]
        stack = axes.stackplot(times, *rows, colors=colours, labels=[instance for _, instance in names], step="post")
        earlier: dict[str, int] = {}
        for (name, _), area in zip(names, stack, strict=True):
            area.set_alpha(max(0.25, 0.85 - 0.22 * earlier.get(name, 0)))
            earlier[name] = earlier.get(name, 0) + 1
    axes.set_ylabel("allowed, % of the device")
    axes.set_ylim(0, max([100.0, *(sum(column) for column in zip(*rows, strict=True))]))
    _finish(axes, run)
    return _svg(figure)


def latency_picture(run: DemoRun, function: FunctionRun) -> str:
    """Every request's latency at its due time, and the objective."""
    figure, axes = _figure(2.6)
    answered = [outcome for outcome in function.outcomes if outcome.ok]
    slo_ms = function.summary.slo_ms
    for met, colour in ((True, _colour(run, function.name)), (False, BAD)):
        chosen = [outcome for outcome in answered if (outcome.latency_s * 1e3 <= slo_ms) is met]
        axes.scatter(
            [outcome.due_s for outcome in chosen],
            [outcome.latency_s * 1e3 for outcome in chosen],
            s=6,
            color=colour,
            alpha=0.7,
            linewidths=0,
            label="in time" if met else "late",
        )
    failed = [outcome.due_s for outcome in function.outcomes if not outcome.ok]
    if failed:
        axes.scatter(failed, [slo_ms] * len(failed), marker="x", s=18, color=BAD, label="not answered")
    axes.axhline(slo_ms, color=BAD, linewidth=1.2, linestyle="--", label=f"SLO {slo_ms} ms")
    axes.set_ylabel("latency, ms")
    axes.set_ylim(bottom=0)
    _finish(axes, run)
    return _svg(figure)


def _colour(run: DemoRun, name: str) -> str:
    """A function's colour, the same in every picture."""
    names = [function.name for function in run.functions]
    return SERIES[names.index(name) % len(SERIES)] if name in names else FAINT


def _figure(height_in: float) -> tuple[Figure, Axes]:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(dict(STYLE)):
        figure = Figure(figsize=(9.0, height_in), layout="constrained")
        axes = figure.add_subplot()
    figure.patch.set_alpha(0)
    axes.patch.set_alpha(0)
    return figure, axes


def _finish(axes: Axes, run: DemoRun) -> None:
    axes.set_xlim(0, run.duration_s)
    axes.set_xlabel("seconds since the replay began", color=INK)
    axes.axvline(run.replay_s, color=FAINT, linewidth=1)
    axes.tick_params(colors=INK, labelcolor=INK)
    axes.yaxis.label.set_color(INK)
    axes.grid(axis="y", color=FAINT, linewidth=0.6, alpha=0.5)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_color(FAINT)
        spine.set_visible(side in ("left", "bottom"))
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        axes.legend(handles, labels, loc="lower left", bbox_to_anchor=(0, 1), ncols=4, frameon=False, labelcolor=INK)


def _svg(figure: Figure) -> str:
    from matplotlib import rc_context

    buffer = io.StringIO()
    with rc_context(dict(STYLE)):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r'(<svg[^>]*?) (?:width|height)="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) (?:width|height)="[^"]*"', r"\1", text, count=1)
    return _recolour(text)


def _recolour(text: str) -> str:
    """Puts CSS variables for the stand-ins; attributes become styles, because var() works only there."""
    text = re.sub(r'\b(fill|stroke)="(#0[1-5]0[0-9]0[0-9])"', r'style="\1: \2"', text)
    for colour, variable in VARIABLES.items():
        text = text.replace(colour, variable)
    return text


def pictures(run: DemoRun) -> Sequence[dict[str, str]]:
    """For each function its pictures."""
    return [
        {"name": function.name, "rate": rate_picture(run, function), "latency": latency_picture(run, function)}
        for function in run.functions
    ]
