"""The page: what it shows is where it should be."""

from __future__ import annotations

import re

from hasgpu_sim.page import Chart, Table, render


def points(html: str) -> list[list[tuple[float, float]]]:
    lines = re.findall(r"<polyline[^>]* points='([^']*)'", html)
    return [[tuple(map(float, pair.split(","))) for pair in line.split()] for line in lines]  # type: ignore[misc]


def test_lines_are_drawn_to_scale() -> None:
    html = render("t", ["i"], [Chart("c", "u", {"a": [(0.0, 0.0), (50.0, 5.0), (100.0, 10.0)]}, end_s=100.0)])
    (line,) = points(html)
    (x0, y0), (x1, y1), (x2, y2) = line
    assert x1 - x0 == x2 - x1 > 100
    assert y0 > y1 > y2  # upwards
    assert abs((y0 - y1) - (y1 - y2)) < 0.2
    assert ">10</text>" in html
    assert ">100 s</text>" in html


def test_a_logarithmic_axis_shows_small_values_and_zero() -> None:
    lines = {"whole": [(0.0, 1.0)], "small": [(0.0, 0.01)], "none": [(0.0, 0.0)]}
    whole, small, none = (line[0][1] for line in points(render("t", [], [Chart("c", "u", lines, logarithmic=True)])))
    assert whole < small <= none
    empty = render("t", [], [Chart("c", "u", {"a": []}), Chart("d", "u", {"z": [(0.0, 0.0)]}, logarithmic=True)])
    assert empty.count("<svg") == 2


def test_words_are_escaped() -> None:
    html = render("a<b", ["c&d"], [Table("t<", [("h",), ("<script>",)], note="n>")])
    assert "<script>" not in html
    assert "a&lt;b" in html
