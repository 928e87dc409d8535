"""The control block: one small memory-mapped file per instance, shared by the node agent and the worker.

```
offset  0  header      magic, version; the bell at offset 16
       64  shares      written by the agent: epoch, request, limit, window, SM share, draining
      320  agent       written by the agent: its heartbeat
      576  life        written by the worker: its state, process and heartbeat
      832  usage       written by the worker's executor: applied epoch, device time used, debt, ...
```

Each group has one writer and is kept twice: a write goes to the older copy, with the next sequence number and a
checksum over number and payload. A reader takes the newest copy whose checksum holds, so it never sees a half-written
group, on no memory model, and a writer that is killed in the middle of a write leaves the value before it in force.

The bell is a futex word that changes with every write of the shares, so an idle worker sleeps until there is something
new. It only saves looking: two rings in one moment may count as one, so whoever waits for it looks now and then.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import struct
import threading
import time
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from hasgpu_core.errors import InvalidError
from hasgpu_core.resources import InstanceState

from hasgpu_device import futex
from hasgpu_device.errors import ControlBlockError

MAGIC = b"HASGPUCB"
VERSION = 2
SIZE_BYTES = 4096
DEFAULT_WINDOW_NS = 40_000_000
"""The period over which a quota is enforced."""

_HEADER = struct.Struct("<8sI")
_BELL_OFFSET = 16
_SEQUENCE = struct.Struct("<Q")
_COPY_BYTES = 128
_READ_ATTEMPTS = 1_000


@dataclass(frozen=True, slots=True)
class Shares:
    """What the agent lets an instance use; in force from the next segment on."""

    request_permille: int
    """Device time guaranteed in every window, 1..1000."""
    limit_permille: int
    """Device time that may be used while it is idle otherwise, request..1000."""
    sm_pct: int = 100
    """Share of the SMs (of the cores on a CPU device), 1..100."""
    window_ns: int = DEFAULT_WINDOW_NS
    """1 ms..10 s."""
    first_pct: int = 0
    """Where the instance's partition begins: it has the SMs from `first_pct` to `first_pct + sm_pct` per cent."""
    exclusive: bool = False
    """Partitions may overlap: no segment runs while another holds any SM of this partition (see `ledger`)."""
    draining: bool = False
    """The worker takes no new batch and finishes those it has."""
    epoch: int = 0
    """Set by `write_shares`, 1 and up; grows with every change."""

    def validate(self) -> None:
        """Raises InvalidError, naming the field, the bound and what came."""
        for name, value, low, high in (
            ("request_permille", self.request_permille, 1, 1_000),
            ("limit_permille", self.limit_permille, self.request_permille, 1_000),
            ("sm_pct", self.sm_pct, 1, 100),
            ("window_ns", self.window_ns, 1_000_000, 10_000_000_000),
            ("first_pct", self.first_pct, 0, 100 - self.sm_pct),
        ):
            if not low <= value <= high:
                raise InvalidError(name, expected=f"{low}..{high}", got=str(value))


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """When a process last showed that it lives."""

    unix_ns: int
    monotonic_ns: int
    """Of the host's monotonic clock, which all its processes share."""


@dataclass(frozen=True, slots=True)
class Counters:
    """What the worker tells the agent; times are cumulative since the worker began."""

    applied_epoch: int = 0
    """Epoch of the shares in force; reaching the agent's epoch means that the change has taken effect."""
    used_ns: int = 0
    """Device time."""
    borrowed_ns: int = 0
    """Part of it that was used beyond the request."""
    debt_ns: int = 0
    """Device time by which the request is overdrawn now."""
    batches_count: int = 0
    segments_count: int = 0
    longest_segment_ns: int = 0
    gate_wait_ns: int = 0
    state: InstanceState = InstanceState.PENDING
    pid: int = 0
    """0: no worker has attached yet."""
    heartbeat_unix_ns: int = 0
    heartbeat_monotonic_ns: int = 0


_STATES = tuple(InstanceState)


class _Group:
    """One group of fields, kept twice."""

    def __init__(self, memory: mmap.mmap, offset: int, layout: str) -> None:
        self._memory = memory
        self._offsets = (offset, offset + _COPY_BYTES)
        self._layout = struct.Struct("<" + layout)
        self._lock = threading.Lock()
        self._last_written: int | None = None
        # Number and value in one, because several threads read: the two must not part.
        self._cached: tuple[int, tuple[Any, ...]] | None = None

    def _copy(self, offset: int) -> tuple[int, bytes] | None:
        size = _SEQUENCE.size + self._layout.size
        raw = self._memory[offset : offset + size + 4]
        if zlib.crc32(raw[:size]) != int.from_bytes(raw[size:], "little"):
            return None
        return _SEQUENCE.unpack_from(raw)[0], raw[_SEQUENCE.size : size]

    def _newest(self) -> tuple[int, bytes] | None:
        copies = [copy for copy in map(self._copy, self._offsets) if copy is not None and copy[0] > 0]
        return max(copies) if copies else None

    def sequence(self) -> int:
        """The larger sequence number; unproven, good only to see that nothing has changed."""
        first, second = (int(_SEQUENCE.unpack_from(self._memory, offset)[0]) for offset in self._offsets)
        return max(first, second)

    def read(self) -> tuple[Any, ...] | None:
        """Returns the newest whole value, None when nothing was ever written."""
        cached = self._cached
        if cached is not None and self.sequence() == cached[0]:
            return cached[1]
        for _ in range(_READ_ATTEMPTS):
            found = self._newest()
            if found is not None:
                sequence, payload = found
                values = self._layout.unpack(payload)
                self._cached = (sequence, values)
                return values
            if self.sequence() == 0:
                return None
            time.sleep(0)
        return None

    def write(self, *values: Any) -> None:
        """Writes the next value over the older copy; the first write goes on from what an earlier writer left."""
        with self._lock:
            if self._last_written is None:
                found = self._newest()
                self._last_written = found[0] if found else 0
            sequence = self._last_written = self._last_written + 1
            body = _SEQUENCE.pack(sequence) + self._layout.pack(*values)
            offset = self._offsets[sequence % 2]
            self._memory[offset : offset + len(body) + 4] = body + zlib.crc32(body).to_bytes(4, "little")


class ControlBlock:
    """An instance's control block, mapped into this process.

    The agent calls `create`, `write_shares`, `beat_agent` and `read_counters`; the worker calls `open`, `read_shares`,
    `read_agent_heartbeat`, `write_usage`, `write_state` and `beat_worker`. Safe to use from several threads of the
    writer.
    """

    def __init__(self, path: Path, memory: mmap.mmap) -> None:
        self.path = path
        self._memory = memory
        self._bell: ctypes.c_uint32 | None = ctypes.c_uint32.from_buffer(memory, _BELL_OFFSET)
        self._shares = _Group(memory, 64, "QIIIQIII")
        self._agent = _Group(memory, 320, "qq")
        self._life = _Group(memory, 576, "IIqq")
        self._usage = _Group(memory, 832, "QQQQQQQQ")
        self._life_lock = threading.Lock()
        self._own_life = (_STATES.index(InstanceState.PENDING), 0, 0, 0)
        self._known_shares: tuple[tuple[Any, ...], Shares] | None = None

    @classmethod
    def create(cls, path: Path | str, shares: Shares | None = None) -> ControlBlock:
        """Makes a control block, or takes over the one that is there with its shares and counters.

        Args:
            path: Where; its folder must exist.
            shares: First shares of a new block (default: request and limit 1000 ‰). Those of a block that is there
                already stay as they are.

        Raises:
            ControlBlockError: The file is there and is something else.
        """
        path = Path(path)
        if not path.exists():
            # Made beside and renamed, so that nobody ever opens a block without its header.
            draft = path.with_name(f".{path.name}.{os.getpid()}")
            draft.write_bytes(_HEADER.pack(MAGIC, VERSION).ljust(SIZE_BYTES, b"\0"))
            block = cls.open(draft)
            block.write_shares(shares or Shares(1_000, 1_000))
            block.beat_agent()
            block.close()
            draft.replace(path)
        return cls.open(path)

    @classmethod
    def open(cls, path: Path | str) -> ControlBlock:
        """Maps a control block.

        Raises:
            ControlBlockError: The file is missing, is something else, or of another version.
        """
        path = Path(path)
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise ControlBlockError(str(path), error.strerror or str(error)) from error
        try:
            if os.fstat(descriptor).st_size != SIZE_BYTES:
                raise ControlBlockError(str(path), f"not a control block: {os.fstat(descriptor).st_size} bytes")
            memory = mmap.mmap(descriptor, SIZE_BYTES)
        finally:
            os.close(descriptor)
        magic, version = _HEADER.unpack_from(memory)
        if magic != MAGIC:
            memory.close()
            raise ControlBlockError(str(path), f"not a control block: begins with {magic!r}")
        if version != VERSION:
            memory.close()
            raise ControlBlockError(str(path), f"version {version}, this program knows {VERSION}")
        return cls(path, memory)

    def close(self) -> None:
        """Unmaps it; the file stays."""
        self._bell = None
        # Somebody may still wait for the bell, or a traceback hold it; the mapping then goes with it.
        with contextlib.suppress(BufferError):
            self._memory.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def read_shares(self) -> Shares:
        """Returns the newest shares.

        Raises:
            ControlBlockError: None of the copies is whole: the file was damaged.
        """
        values = self._shares.read()
        if values is None:
            raise ControlBlockError(str(self.path), "its shares are damaged")
        known = self._known_shares
        if known is not None and known[0] is values:
            return known[1]  # asked for before every segment
        epoch, request, limit, sm_pct, window_ns, first_pct, exclusive, draining = values
        shares = Shares(request, limit, sm_pct, window_ns, first_pct, bool(exclusive), bool(draining), epoch)
        self._known_shares = (values, shares)
        return shares

    def write_shares(self, shares: Shares) -> int:
        """Puts shares into force and returns their epoch; `shares.epoch` is not looked at.

        Raises:
            InvalidError: A share is out of its range; nothing is written.
        """
        shares.validate()
        values = self._shares.read()
        epoch = 1 + (values[0] if values else 0)
        self._shares.write(
            epoch,
            shares.request_permille,
            shares.limit_permille,
            shares.sm_pct,
            shares.window_ns,
            shares.first_pct,
            shares.exclusive,
            shares.draining,
        )
        self.ring()
        return epoch

    def ring(self) -> None:
        """Wakes whoever waits for the bell."""
        bell = self._bell
        if bell is not None:
            bell.value = (bell.value + 1) & 0xFFFFFFFF
            futex.wake(bell)

    def bell(self) -> int:
        """Returns what `wait_for_bell` is told; to be asked before looking at what the bell is rung for."""
        return self._bell.value if self._bell is not None else 0

    def wait_for_bell(self, seen: int, timeout_s: float) -> None:
        """Sleeps until the bell is rung, unless it was since `bell` returned `seen`; may return early for no reason."""
        bell = self._bell
        if bell is not None:
            futex.wait(bell, seen, round(timeout_s * 1e9))

    def beat_agent(self) -> None:
        """The agent's heartbeat, now. A worker that sees none for its orphan time ends itself."""
        self._agent.write(time.time_ns(), time.monotonic_ns())

    def read_agent_heartbeat(self) -> Heartbeat | None:
        """Returns the agent's last heartbeat, None when there was none."""
        values = self._agent.read()
        return None if values is None else Heartbeat(*values)

    def read_counters(self) -> Counters:
        """Returns the newest counters; all zero and PENDING when no worker has written any."""
        state, pid, unix_ns, monotonic_ns = self._life.read() or (0, 0, 0, 0)
        epoch, used, borrowed, debt, batches, segments, longest, wait = self._usage.read() or (0,) * 8
        return Counters(
            epoch, used, borrowed, debt, batches, segments, longest, wait, _STATES[state], pid, unix_ns, monotonic_ns
        )

    def write_usage(
        self,
        applied_epoch: int,
        used_ns: int = 0,
        borrowed_ns: int = 0,
        debt_ns: int = 0,
        batches_count: int = 0,
        segments_count: int = 0,
        longest_segment_ns: int = 0,
        gate_wait_ns: int = 0,
    ) -> None:
        """Writes what the instance has used, as in `Counters`; the worker's executor does, between two segments."""
        self._usage.write(
            applied_epoch,
            used_ns,
            borrowed_ns,
            debt_ns,
            batches_count,
            segments_count,
            longest_segment_ns,
            gate_wait_ns,
        )

    def write_state(self, state: InstanceState, pid: int) -> None:
        """Writes what the worker is doing (the worker alone does)."""
        with self._life_lock:
            self._own_life = (_STATES.index(state), pid, *self._own_life[2:])
            self._life.write(*self._own_life)

    def beat_worker(self) -> None:
        """The worker's heartbeat, now."""
        with self._life_lock:
            self._own_life = (*self._own_life[:2], time.time_ns(), time.monotonic_ns())
            self._life.write(*self._own_life)


def remove(path: Path | str) -> None:
    """Deletes a control block's file; nothing happens when there is none."""
    with contextlib.suppress(FileNotFoundError):
        Path(path).unlink()
