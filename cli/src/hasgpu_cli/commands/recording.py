"""`hasgpu recording`: what the scaler saw and decided, as a file."""

from __future__ import annotations

from pathlib import Path

import click
from hasgpu_core.errors import InvalidError

from hasgpu_cli.client import Target
from hasgpu_cli.options import run, target_options


@click.group("recording")
def recording_command() -> None:
    """Take out what the scaler saw and decided."""


@recording_command.command("export")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--from", "from_text", metavar="TIME", help="From when on, as for `explain --at` [the oldest].")
@click.option("--to", "to_text", metavar="TIME", help="Until when [now].")
@target_options("scaler")
def export_command(target: Target, file: Path, from_text: str | None, to_text: str | None) -> None:
    """Write what the scaler recorded to FILE (gzipped lines of JSON), for `hasgpu simulate --recording FILE`.

    Whole segments of up to ten minutes are taken. The scaler keeps the newest 256 MiB (HASGPU_SCALER_RECORDING_MIB).
    """
    from hasgpu_cli.recordings import fetch, parse_time, summary

    times = [0 if text is None else parse_time(text) for text in (from_text, to_text)]
    data = run(fetch(target, *times))
    try:
        file.write_bytes(data)
    except OSError as error:
        raise InvalidError("FILE", expected="a file that can be written", got=f"{file}: {error.strerror}") from error
    click.echo(f"{file}: {len(data):,} bytes; {summary(file)}")


@recording_command.command("info")
@click.argument("file", type=click.Path(path_type=Path))
def info_command(file: Path) -> None:
    """Say what a recording holds."""
    from hasgpu_cli.recordings import summary

    click.echo(f"{file}: {summary(file)}")
