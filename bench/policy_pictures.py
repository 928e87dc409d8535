"""The pictures of docs/scaling.md, drawn from the policy itself: `python bench/policy.py --only pictures`."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

from hasgpu_core.policy.hybrid import HybridPolicy, HybridSettings
from hasgpu_core.policy.hybrid.plan import Planner
from hasgpu_sim.arrivals import Process, RateStep, arrival_times_s
from hasgpu_sim.evaluate import LEAD_S, Settings, function_load, scenario_of
from hasgpu_sim.simulate import simulate
from hasgpu_sim.surface import Surface

_WIDTH, _HEIGHT, _LEFT, _TOP, _BOTTOM = 720, 260, 56, 40, 34
_COLOURS = ("#0b6e4f", "#c1121f", "#1d4e89", "#e09f3e")
Line = Sequence[tuple[float, float]]


def draw(surface: Surface, seed: int) -> dict[str, str]:
    """Returns SVG by file name."""
    return {"scaling-plans.svg": _plans(surface), "scaling-steps.svg": _steps(surface, seed)}


def _plans(surface: Surface) -> str:
    """What the cheapest plan for a rate reserves, for random and for evenly spaced arrivals."""
    settings = HybridSettings(lend=False)
    load = function_load("f", surface, 3.0, (0.0,), Settings(lend=False))
    planner = Planner(load.tables[0], surface.sm_pcts, load.spec.max_batch, settings.most_instances, settings)
    sm_pct = planner.best_sm_pct(settings.reference_rps, regular=False)
    assert sm_pct is not None
    lines: dict[str, Line] = {}
    for regular in (False, True):
        ladder = planner.ladder(sm_pct, regular=regular)
        points = []
        for tenth in range(5, 301):
            option = ladder.cheapest(tenth / 10)
            assert option is not None
            points.append((tenth / 10, 100 * option.cost(tenth / 10)))
        lines["evenly spaced arrivals" if regular else "Poisson arrivals"] = points
    title = f"Cheapest plan for a rate: {surface.model}, SLO {load.spec.slo_ms} ms, SM {sm_pct} %, nothing lent"
    return _svg(title, "requests per second", "% of a GPU", lines)


def _steps(surface: Surface, seed: int) -> str:
    """A load of steps, what the policy plans for, what it sustains and what it holds."""
    settings = Settings(lend=False, seed=seed)
    steps = (RateStep(60, 5), RateStep(40, 20), RateStep(200, 5))
    times = arrival_times_s(steps, Process.POISSON, random.Random(seed))
    load = function_load("f", surface, 3.0, times, settings)
    outcome = simulate(scenario_of([load], surface, 300.0, settings), HybridPolicy(HybridSettings(lend=False)))
    ticks = [(tick.at_s - LEAD_S, tick.decisions[0]) for tick in outcome.recording.ticks if tick.at_s >= LEAD_S]
    ticks = ticks[::5]
    lines: dict[str, Line] = {
        "observed rate": [(at_s, d.observed_rps or 0.0) for at_s, d in ticks],
        "planned for": [(at_s, d.predicted_rps or 0.0) for at_s, d in ticks],
        "sustained by ready shares": [(at_s, d.capacity_rps) for at_s, d in ticks],
    }
    return _svg(f"5, 20 and 5 rps, Poisson: {surface.model}, nothing lent", "seconds", "rps", lines)


def _svg(title: str, x_name: str, y_name: str, lines: Mapping[str, Line]) -> str:
    points = [point for line in lines.values() for point in line]
    end, top = max(x for x, _ in points), 1.05 * max(y for _, y in points)
    width, height = _WIDTH - _LEFT - 12, _HEIGHT - _TOP - _BOTTOM
    out = [
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {_WIDTH} {_HEIGHT}' font-family='sans-serif' "
        f"font-size='12' role='img' aria-label='{title}'><rect width='100%' height='100%' fill='#fff'/>",
        f"<text x='{_LEFT}' y='15' font-weight='bold'>{title}</text>",
        f"<path d='M{_LEFT} {_TOP}V{_TOP + height}H{_LEFT + width}' stroke='#888' fill='none'/>",
        f"<text x='{_LEFT - 6}' y='{_TOP + 5}' text-anchor='end'>{top:.3g}</text>",
        f"<text x='{_LEFT - 6}' y='{_TOP + height}' text-anchor='end'>0</text>",
        f"<text x='{_LEFT - 6}' y='{_TOP + 20}' text-anchor='end'>{y_name}</text>",
        f"<text x='{_LEFT + width}' y='{_HEIGHT - 16}' text-anchor='end'>{end:.3g} {x_name}</text>",
    ]
    for index, (name, line) in enumerate(lines.items()):
        colour = _COLOURS[index]
        path = " ".join(f"{_LEFT + x / end * width:.1f},{_TOP + height - y / top * height:.1f}" for x, y in line)
        out.append(f"<polyline points='{path}' fill='none' stroke='{colour}' stroke-width='1.6'/>")
        x = _LEFT + index * 210
        out.append(f"<path d='M{x} {_HEIGHT - 6}h16' stroke='{colour}' stroke-width='3'/>")
        out.append(f"<text x='{x + 21}' y='{_HEIGHT - 2}'>{name}</text>")
    return "\n".join([*out, "</svg>"]) + "\n"
