"""Keeps processes running: starts them in order, restarts those that died with back-off, stops them in order.

waiting → running → (exit) → backing off → running → ... → stopped
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from hasgpu_core.errors import HasgpuError

from hasgpu_cli.home import Home, RunRecord, UnitRecord, write_run_record
from hasgpu_cli.processes import ProcessId, find_leftovers, stop_processes

logger = logging.getLogger(__name__)

FIRST_BACKOFF_S = 0.2
LONGEST_BACKOFF_S = 5.0
STEADY_S = 10.0
"""A process that ran this long starts again with the first back-off."""
POLL_S = 0.05
LARGEST_LOG_BYTES = 64 << 20
"""A log larger than this is moved to `.1` when its service starts."""


class Unit(Protocol):
    """Something that runs as a process."""

    name: str
    kind: str
    address: str
    log: Path
    metrics: str
    """host:port of its metrics; empty: it has none."""
    rank: int
    """Units start by ascending rank (each rank once the one before has started) and stop by descending rank."""

    def start(self) -> int:
        """Starts it and returns its pid; may block until it listens. Raises HasgpuError or OSError."""
        ...

    def ended(self) -> str | None:
        """Says why it does not run; None while it does."""
        ...

    def stop(self) -> None:
        """Ends it, by force after the grace; returns when it is gone. Does nothing when it is not running."""
        ...


@dataclass(slots=True)
class CommandUnit:
    """A process by its command line; output goes to its log."""

    name: str
    kind: str
    address: str
    log: Path
    argv: Sequence[str]
    env: Mapping[str, str] = field(default_factory=dict)
    metrics: str = ""
    rank: int = 1
    grace_s: float = 25.0
    _process: subprocess.Popen[bytes] | None = None

    def start(self) -> int:
        """Starts the command in a session of its own, so that a terminal's interrupt does not reach it."""
        if self.log.exists() and self.log.stat().st_size > LARGEST_LOG_BYTES:
            self.log.replace(self.log.with_suffix(".log.1"))
        with self.log.open("ab") as output:
            self._process = subprocess.Popen(
                list(self.argv),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **self.env},
                start_new_session=True,
            )
        return self._process.pid

    def ended(self) -> str | None:
        """Says why it does not run; None while it does."""
        status = self._process.poll() if self._process else 0
        if status is None:
            return None
        return f"was ended by signal {-status}" if status < 0 else f"ended with status {status}"

    def stop(self) -> None:
        """Asks it to end, kills it after the grace."""
        if self._process is None or self._process.poll() is not None:
            return
        self._process.terminate()
        self._process.send_signal(signal.SIGCONT)  # a stopped process hears nothing else but SIGKILL
        try:
            self._process.wait(self.grace_s)
        except subprocess.TimeoutExpired:
            logger.warning("%s did not end within %.0f s and is killed", self.name, self.grace_s)
            self._process.kill()
            self._process.wait()


class Supervisor:
    """Runs units until told to stop."""

    def __init__(self, home: Home, units: Sequence[Unit], *, nats_url: str, redis_url: str) -> None:
        me = ProcessId.of(os.getpid())
        assert me is not None
        self._home = home
        self._units = sorted(units, key=lambda unit: unit.rank)
        self._stop = asyncio.Event()
        records = {
            unit.name: UnitRecord(unit.name, unit.kind, unit.address, str(unit.log), metrics=unit.metrics)
            for unit in self._units
        }
        self._record = RunRecord(me, nats_url, redis_url, records)

    def stop(self) -> None:
        """Ends `run` soon; may be called from a signal handler of the loop."""
        self._stop.set()

    async def run(self) -> None:
        """Keeps the units running until `stop` is called, then ends them all and removes the run file."""
        write_run_record(self._home, self._record)
        started = {unit.rank: [asyncio.Event() for u in self._units if u.rank == unit.rank] for unit in self._units}
        slots = {rank: iter(events) for rank, events in started.items()}
        try:
            async with asyncio.TaskGroup() as group:
                for unit in self._units:
                    before = [event for rank, events in started.items() if rank < unit.rank for event in events]
                    group.create_task(self._keep(unit, before, next(slots[unit.rank])), name=f"keep {unit.name}")
        finally:
            await asyncio.to_thread(self._stop_all)

    async def _keep(self, unit: Unit, before: Sequence[asyncio.Event], started: asyncio.Event) -> None:
        for event in before:
            if not await self._wait_unless_stopped(event):
                return
        backoff_s = FIRST_BACKOFF_S
        while not self._stop.is_set():
            began_s = time.monotonic()
            try:
                pid = await asyncio.to_thread(unit.start)
            except (HasgpuError, OSError) as error:
                reason = f"could not be started: {error}"
            else:
                logger.info("%s runs as pid %d at %s", unit.name, pid, unit.address)
                self._note(unit, state="running", process=ProcessId.of(pid))
                started.set()
                reason = await self._wait_for_exit(unit)
            if self._stop.is_set():
                return
            if time.monotonic() - began_s > STEADY_S:
                backoff_s = FIRST_BACKOFF_S
            logger.warning("%s %s; starting it again in %.1f s", unit.name, reason, backoff_s)
            count = self._record.units[unit.name].restarts_count + 1
            self._note(unit, state="backing off", process=None, reason=reason, restarts_count=count)
            await self._pause(backoff_s)
            backoff_s = min(LONGEST_BACKOFF_S, 2 * backoff_s)

    async def _wait_for_exit(self, unit: Unit) -> str:
        while (reason := unit.ended()) is None and not self._stop.is_set():
            await self._pause(POLL_S)
        return reason or ""

    async def _wait_unless_stopped(self, event: asyncio.Event) -> bool:
        while not event.is_set() and not self._stop.is_set():
            await self._pause(POLL_S)
        return not self._stop.is_set()

    async def _pause(self, delay_s: float) -> None:
        try:
            async with asyncio.timeout(delay_s):
                await self._stop.wait()
        except TimeoutError:
            return

    def _note(self, unit: Unit, **changes: object) -> None:
        self._record = self._record.with_unit(replace(self._record.units[unit.name], **changes))  # type: ignore[arg-type]  # names and types are UnitRecord's
        write_run_record(self._home, self._record)

    def _stop_all(self) -> None:
        self._record = replace(self._record, stopping=True)
        write_run_record(self._home, self._record)
        for rank in sorted({unit.rank for unit in self._units}, reverse=True):
            group = [unit for unit in self._units if unit.rank == rank]
            logger.info("stopping %s", ", ".join(unit.name for unit in group))
            for unit in group:
                self._note(unit, state="stopped")
            _stop_together(group)
        if leftovers := find_leftovers(self._home.path):
            logger.info("stopping %d processes left over", len(leftovers))
            stop_processes(leftovers, grace_s=5.0)
        self._home.run_file.unlink(missing_ok=True)


def _stop_together(units: Sequence[Unit]) -> None:
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(max_workers=max(1, len(units))) as pool:
        for _ in pool.map(lambda unit: unit.stop(), units):
            pass
