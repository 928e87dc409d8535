"""How a sweep shows its progress: a live line on a terminal, lines of text elsewhere; always on standard error."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import click

from hasgpu_cli.profiling.sweep import Progress


@contextlib.contextmanager
def progress_display(function: str, *, live: bool) -> Iterator[Callable[[Progress], None]]:
    """Gives what to call with each step.

    Args:
        function: Its name.
        live: Standard error is a terminal and nothing else is to be read there.
    """
    if not live:
        yield lambda step: click.echo(f"{function}: {line(step)}", err=True)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
    from rich.progress import Progress as Bar

    state = TextColumn("{task.fields[state]}")
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=30), MofNCompleteColumn(), state)
    with Bar(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(function, total=None, state="starting")

        def show(step: Progress) -> None:
            left = "" if step.left_s is None else f"  [dim]{step.left_s:.0f} s left[/]"
            bar.update(task, total=step.total_count, completed=step.done_count, state=step.text + left)

        yield show


def line(step: Progress) -> str:
    """A step as a line of text."""
    left = "" if step.left_s is None else f", {step.left_s:.0f} s left"
    return f"{step.done_count}/{step.total_count}  {step.text}{left}"
