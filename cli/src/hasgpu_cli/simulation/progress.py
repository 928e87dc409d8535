"""How far a simulation is, on standard error."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType

import click

from hasgpu_cli.simulation.runs import Outcome

EVERY_S = 10.0
"""Between two lines where standard error is no terminal; a run that takes less says nothing until its end."""


class Progress:
    """A line for each run: on a terminal it is written over, elsewhere long runs tell every few seconds."""

    def __init__(self, total_count: int, *, quiet: bool) -> None:
        self._total = total_count
        self._quiet = quiet
        self._live = sys.stderr.isatty() and not quiet
        self._done = 0

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._live:
            click.echo("\r\x1b[K", nl=False, err=True)

    def begin(self, title: str, duration_s: float) -> Callable[[float], None]:
        """Begins a run; returns what to call with the virtual time it has reached."""
        every_s = 0.2 if self._live else EVERY_S
        began_s = time.monotonic()
        next_s = [began_s + every_s]
        head = f"[{self._done + 1}/{self._total}] {title}"

        def tell(at_s: float) -> None:
            now_s = time.monotonic()
            if self._quiet or now_s < next_s[0]:
                return
            next_s[0] = now_s + every_s
            done = min(1.0, max(0.0, at_s / duration_s))
            left = f", about {(now_s - began_s) * (1 - done) / done:.0f} s left" if done > 0.02 else ""
            text = f"{head}: {done:4.0%}{left}"
            click.echo(f"\r\x1b[K{text}" if self._live else text, nl=not self._live, err=True)

        return tell

    def end(self, outcome: Outcome) -> None:
        """Ends a run."""
        self._done += 1
        if self._quiet:
            return
        result = outcome.results[0]
        cost = result["cost_per_good"]
        text = (
            f"[{self._done}/{self._total}] {outcome.case.title}, {outcome.policy}: "
            f"{result['gpu_seconds']:.2f} GPU-s, {'-' if cost is None else f'{cost * 1e3:.3f}'} GPU-ms a request in "
            f"time, {result['violation_rate']:.3%} late or dropped ({outcome.took_s:.1f} s)"
        )
        click.echo(f"\r\x1b[K{text}" if self._live else text, err=True)
