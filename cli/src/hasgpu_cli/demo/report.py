"""Writes report.json and report.html."""

from __future__ import annotations

from pathlib import Path

from hasgpu_cli.commands.scaling import describe_action
from hasgpu_cli.demo.report_data import DemoRun, report_json
from hasgpu_cli.home import write_json


def write_report(run: DemoRun, folder: Path) -> tuple[Path, Path]:
    """Writes both files, atomically each; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    data, page = folder / "report.json", folder / "report.html"
    write_json(data, report_json(run))
    temporary = page.with_suffix(".html.tmp")
    temporary.write_text(render_html(run), encoding="utf-8")
    temporary.replace(page)
    return data, page


def render_html(run: DemoRun) -> str:
    """The page: self-contained, no script, light or dark as the reader's system is."""
    import jinja2

    from hasgpu_cli.demo.plots import pictures, shares_picture

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )
    environment.filters["ms"] = lambda value: "–" if value is None else f"{value:.0f}"
    environment.filters["action"] = describe_action
    return environment.get_template("report.html.j2").render(
        run=run, report=report_json(run), shares=shares_picture(run), pictures=pictures(run)
    )
