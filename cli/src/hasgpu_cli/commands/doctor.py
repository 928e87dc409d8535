"""`hasgpu doctor`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

import click

from hasgpu_cli.client import Target
from hasgpu_cli.diagnosis import FAULT, OK, WARNING, Finding, diagnose
from hasgpu_cli.options import json_option, make_console, print_json, run, target_options

MARKS = {OK: "[green]✓[/]", WARNING: "[yellow]![/]", FAULT: "[red]✗[/]"}


@click.command("doctor")
@click.option("--wait-ms", type=click.IntRange(100, 10_000), default=1_000, show_default=True, help="For the answers.")
@target_options("gateway")
@json_option
def doctor_command(*, wait_ms: int, target: Target, as_json: bool) -> None:
    """Check the installation: what is reachable, versions, clocks, brokers, streams, devices, functions.

    Everything is asked through the gateway. Each fault comes with what to do about it. The exit status is 0 when there
    is no fault (warnings are none), 1 when there is one.
    """
    findings = run(diagnose(target, wait_ms=wait_ms))
    if as_json:
        print_json([asdict(finding) for finding in findings])
    else:
        show(findings)
    raise SystemExit(1 if any(finding.level == FAULT for finding in findings) else 0)


def show(findings: Sequence[Finding]) -> None:
    """Prints one line a finding, and below it what to do."""
    from rich.markup import escape

    console = make_console()
    width = max(len(finding.subject) for finding in findings)
    for finding in findings:
        console.print(f"{MARKS[finding.level]} {escape(finding.subject.ljust(width))}  {escape(finding.found)}")
        if finding.advice:
            console.print(f"  {'':{width}}  [bold]→ {escape(finding.advice)}[/]")
    faults = sum(finding.level == FAULT for finding in findings)
    warnings = sum(finding.level == WARNING for finding in findings)
    if faults or warnings:
        console.print(f"\n{faults} fault{'s' * (faults != 1)}, {warnings} warning{'s' * (warnings != 1)}")
    else:
        console.print("\nall is well")
