"""Runs a model's work as segments: pass the gate, run, be charged the device time measured.

The executor thread calls `run`; a model's layers call `boundary` in between (see `hasgpu_device.cutting`). A segment
that has used 5 ms of device time ends at the next boundary, so one instance never holds the device much longer.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from hasgpu_device.backends import DeviceBackend
from hasgpu_device.control import ControlBlock, Shares
from hasgpu_device.gate import GateMember, Grant
from hasgpu_device.ledger import SmLedger

SEGMENT_NS = 5_000_000
PUBLISH_NS = 5_000_000
"""While nothing changes, the counters are told after this much device time, not after every short segment."""
MAX_RECORDED_SEGMENTS = 256
"""Segments of one batch that are recorded singly; the sums count all."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class SegmentRecord:
    """One segment, for traces. It began waiting at the end of the one before."""

    start_unix_ns: int
    end_unix_ns: int
    wait_ns: int
    device_ns: int
    borrowed: bool


@dataclass(slots=True)
class Run:
    """What running one batch took."""

    start_unix_ns: int
    """When it began to wait for the device."""
    sm_pct: int = 100
    """In force at its first segment, as is the request."""
    request_permille: int = 0
    end_unix_ns: int = 0
    gate_wait_ns: int = 0
    execute_ns: int = 0
    """From the first pass of the gate to the end, less later waits at the gate."""
    device_ns: int = 0
    segments_count: int = 0
    longest_segment_ns: int = 0
    segments: list[SegmentRecord] = field(default_factory=list)


class SegmentRunner:
    """The executor thread's way to the device.

    Args:
        backend: The device.
        member: This instance's slot at its row's gate.
        control: The instance's control block: shares are read there, counters written.
        ledger: Of the device; None: partitions never overlap there.
        segment_ns: Device time after which a segment ends at the next boundary.

    Attributes:
        gate_wait_ns: Waited at the gate so far, by all segments.
        lingers: The last batch said that another would follow at once, and none has begun; `run` or `withdraw` is due.
    """

    def __init__(
        self,
        backend: DeviceBackend,
        member: GateMember,
        control: ControlBlock,
        *,
        ledger: SmLedger | None = None,
        segment_ns: int = SEGMENT_NS,
    ) -> None:
        self.backend = backend
        self._member = member
        self._control = control
        self._ledger = ledger
        self._in_ledger = False
        self._segment_ns = segment_ns
        self._thread_id = -1
        self._run: Run | None = None
        self._grant = Grant(0, False)
        self._segment_start_unix_ns = 0
        self._held_since_ns = 0
        self._held_before_ns = 0
        self._applied: Shares | None = None
        self._used_ns = self._borrowed_ns = self._segments_count = self._longest_ns = 0
        self.gate_wait_ns = 0
        self._batches_count = 0
        self._ended_ns = 0
        self._due: tuple[Run, Grant, int, int] | None = None
        self._published_ns = 0
        self._epoch = 0
        self.lingers = False
        member.refresh = control.read_shares
        member.on_change = self._acknowledge
        member.on_wait = self._on_wait

    def poll(self) -> None:
        """Puts changed shares into force while no batch runs; called by the executor thread every few milliseconds."""
        self._member.poll()
        if self._member.shares is not self._applied:
            self._apply()

    @property
    def used_ns(self) -> int:
        """Device time used so far, by all segments that have ended."""
        return self._used_ns

    def held_ns(self) -> int:
        """Returns for how long the running batch has held the device, 0 when none runs; for any thread."""
        since_ns = self._held_since_ns
        running_ns = time.monotonic_ns() - since_ns if since_ns else 0
        return self._held_before_ns + running_ns

    def run(
        self,
        work: Callable[[], T],
        *,
        deadline_ns: int | None = None,
        cancelled: Callable[[], bool] | None = None,
        background: bool = False,
        linger: Callable[[], bool] | None = None,
    ) -> tuple[T, Run]:
        """Runs a batch.

        Args:
            work: Runs the model; its layers call `boundary`.
            deadline_ns: Monotonic time by which the first segment must have begun.
            cancelled: Looked at while the batch waits for its first segment.
            background: As in `GateMember.acquire`.
            linger: Asked at the end: whether the next batch is at hand.

        Raises:
            GateTimeoutError: The deadline passed or the batch was cancelled before its first segment.
        """
        run = Run(time.time_ns())
        self._thread_id = threading.get_ident()
        self._held_before_ns = 0
        self.lingers = False
        grant = self._member.acquire(deadline_ns=deadline_ns, cancelled=cancelled, background=background)
        self._run = run
        self._begin(grant)
        run.sm_pct, run.request_permille = self._member.shares.sm_pct, self._member.shares.request_permille
        try:
            result = work()
        finally:
            self._end(run)
            self._run = None
            self.lingers = linger is not None and linger()
            self._member.release(self._ended_ns, linger=self.lingers)
            self._note_ended()
            self._held_before_ns = 0
            run.end_unix_ns = time.time_ns()
            # The host's clock may have been set back meanwhile.
            run.execute_ns = max(0, run.end_unix_ns - run.start_unix_ns - run.gate_wait_ns)
            if not background:
                self._batches_count += 1
            self._publish()
        return result, run

    def withdraw(self) -> None:
        """Takes back a `linger` that no batch followed."""
        self.lingers = False
        self._member.withdraw()

    def boundary(self) -> None:
        """A place where a batch may be interrupted: ends the segment when it has run its time.

        Nothing happens outside `run` and in threads other than the executor's.
        """
        run = self._run
        if run is None or threading.get_ident() != self._thread_id:
            return
        if self.backend.running_ns() < self._segment_ns:
            return
        self._end(run)
        self._begin(self._member.renew(self._ended_ns))
        # The next segment runs already: noting what the last one took is at this instance's own expense.
        self._note_ended()
        if self._used_ns - self._published_ns >= PUBLISH_NS:
            self._publish()

    def _begin(self, grant: Grant) -> None:
        """Starts the segment that was granted, at once; all else comes after."""
        if self._member.shares is not self._applied:
            self._apply()
        waited_ns = grant.wait_ns
        if self._ledger is not None and self._member.shares.exclusive:
            shares = self._member.shares
            self._in_ledger = True
            waited_ns += self._ledger.take(shares.first_pct, shares.sm_pct)
        self.backend.start_segment()
        run = self._run
        assert run is not None
        self._segment_start_unix_ns = time.time_ns()
        self._held_since_ns = time.monotonic_ns()
        self._grant = grant
        run.gate_wait_ns += waited_ns
        self.gate_wait_ns += waited_ns

    def _end(self, run: Run) -> None:
        """Ends the segment on the device. The others wait for it: what can be noted later is (`_note_ended`)."""
        self._ended_ns = self.backend.stop_segment()
        if self._in_ledger:
            assert self._ledger is not None
            self._ledger.give()
            self._in_ledger = False
        self._held_before_ns += time.monotonic_ns() - self._held_since_ns
        self._held_since_ns = 0
        self._due = (run, self._grant, self._segment_start_unix_ns, time.time_ns())

    def _note_ended(self) -> None:
        """Books the segment that ended last, once."""
        if self._due is None:
            return
        run, grant, start_unix_ns, end_unix_ns = self._due
        self._due = None
        device_ns = self._ended_ns
        run.device_ns += device_ns
        run.segments_count += 1
        run.longest_segment_ns = max(run.longest_segment_ns, device_ns)
        if len(run.segments) < MAX_RECORDED_SEGMENTS:
            run.segments.append(SegmentRecord(start_unix_ns, end_unix_ns, grant.wait_ns, device_ns, grant.borrowed))
        self._used_ns += device_ns
        self._borrowed_ns += device_ns if grant.borrowed else 0
        self._segments_count += 1
        self._longest_ns = max(self._longest_ns, device_ns)

    def _on_wait(self) -> None:
        self._note_ended()
        self._publish()

    def _apply(self) -> None:
        """Gives the next segment the SM share in force and acknowledges the epoch."""
        shares = self._member.shares
        before = self._applied
        if before is None or (shares.sm_pct, shares.first_pct) != (before.sm_pct, before.first_pct):
            self.backend.apply_sm(shares.sm_pct, shares.first_pct)
        self._applied = shares
        self._acknowledge()

    def _acknowledge(self) -> None:
        """Tells that the shares in force are; while it waits, no segment runs that might not be bound by them."""
        self._epoch = self._member.shares.epoch
        self._publish()

    def _publish(self) -> None:
        self._published_ns = self._used_ns
        self._control.write_usage(
            self._epoch,
            self._used_ns,
            self._borrowed_ns,
            self._member.debt_ns,
            self._batches_count,
            self._segments_count,
            self._longest_ns,
            self.gate_wait_ns,
        )
