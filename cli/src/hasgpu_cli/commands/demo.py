"""`hasgpu demo`."""

from __future__ import annotations

from pathlib import Path

import click

from hasgpu_cli.client import Target
from hasgpu_cli.options import target_options


@click.command("demo")
@click.option("--out", default="out/demo", show_default=True, type=click.Path(path_type=Path), help="Where to write.")
@click.option(
    "--seconds", "replay_s", default=90.0, show_default=True, type=click.FloatRange(min=5), help="Of the replay."
)
@click.option("--devices", default="cpu", show_default=True, help="As for `up`.")
@click.option("--examples", type=click.Path(path_type=Path), help="Folder of the examples [found beside the command].")
@click.option("--keep", is_flag=True, help="Leave the system up, and its files, when done.")
@target_options()
def demo_command(target: Target, out: Path, replay_s: float, devices: str, examples: Path | None, keep: bool) -> None:
    """Run the whole system once with real models under HAS-GPU's load, and write report.json and report.html.

    It uses a temporary folder of its own (or DIR with --home, where `hasgpu --home DIR top` can watch it) and stops
    what it started. Exit status 1 when an answer is wrong or something does not work.
    """
    from hasgpu_cli.demo.runner import DemoOptions, run_demo

    context = click.get_current_context()
    given = context.params.get("home") or context.find_root().params.get("home")
    home = target.home if given else None
    run_demo(DemoOptions(out=out, replay_s=replay_s, devices=devices, examples=examples, keep=keep, home=home))
