"""`hasgpu logs`."""

from __future__ import annotations

import difflib
import time
from pathlib import Path

import click
from hasgpu_core.errors import NotFoundError

from hasgpu_cli.client import Target
from hasgpu_cli.home import Home
from hasgpu_cli.options import target_options
from hasgpu_cli.up import tail

FOLLOW_PERIOD_S = 0.3


@click.command("logs")
@click.argument("name", required=False)
@click.option("-f", "--follow", is_flag=True, help="Go on with what is written from now on.")
@click.option("-n", "--lines", default=50, show_default=True, help="Lines from the end.")
@target_options()
def logs_command(target: Target, name: str | None, follow: bool, lines: int) -> None:
    """Show the log of a service or an instance; without NAME, the ends of all services' logs."""
    logs = find_logs(target.home)
    if name is None:
        chosen = {key: path for key, path in logs.items() if path.parent == target.home.logs}
    elif name in logs:
        chosen = {name: logs[name]}
    else:
        nearest = difflib.get_close_matches(name, logs, n=1)
        hint = f"did you mean {nearest[0]}?" if nearest else f"there are {', '.join(logs) or 'none'}"
        raise NotFoundError("log", name, hint)
    ends = {}
    for key, path in chosen.items():
        ends[key] = path.stat().st_size
        _show(key, tail(path, lines), several=len(chosen) > 1)
    while follow:
        time.sleep(FOLLOW_PERIOD_S)
        for key, path in chosen.items():
            ends[key] = _follow(key, path, ends[key], several=len(chosen) > 1)


def find_logs(home: Home) -> dict[str, Path]:
    """Logs by service and, where an instance's folder is left, by instance."""
    logs = {path.stem: path for path in sorted(home.logs.glob("*.log")) if path.exists()}
    for path in sorted(home.state.glob("*/instances/*/*.log")):
        logs.setdefault(path.parent.name, path)
    return logs


def _show(name: str, lines: list[str], *, several: bool) -> None:
    for line in lines:
        click.echo(f"{name:<14} | {line}" if several else line)


def _follow(name: str, path: Path, at: int, *, several: bool) -> int:
    """Prints whole lines written since `at`; returns where it stopped. A log that shrank is read from its start."""
    try:
        with path.open("rb") as file:
            if path.stat().st_size < at:
                at = 0
            file.seek(at)
            data = file.read()
    except OSError:
        return 0
    whole = data[: data.rfind(b"\n") + 1]
    _show(name, whole.decode(errors="replace").splitlines(), several=several)
    return at + len(whole)
