"""A device whose time is moved by hand, for tests."""

from __future__ import annotations

from collections.abc import Callable

from hasgpu_device import models
from hasgpu_device.worker_config import WorkerConfig


class FakeBackend:
    """Work takes as long as the test says."""

    name = "fake"

    def __init__(self) -> None:
        self.now_ns = 0
        self.sm_pct = 100
        self.first_pct = 0
        self.segments_ns: list[int] = []
        self._start_ns: int | None = None

    def setup_loader(self) -> None:
        """Nothing to prepare."""

    def setup(self) -> None:
        """Nothing to prepare."""

    def load(self, config: WorkerConfig, boundary: Callable[[], None]) -> models.Model:
        """Loads the model as the CPU device does; raises LoadError."""
        return models.load(config, boundary)

    def apply_sm(self, sm_pct: int, first_pct: int = 0) -> None:
        """Remembers the share; refused within a segment."""
        assert self._start_ns is None, "the SM share changes only between segments"
        self.sm_pct, self.first_pct = sm_pct, first_pct

    def work(self, whole_device_ns: int) -> None:
        """Lets device time pass: as long as the work takes on the whole device, divided by the SM share."""
        self.now_ns += whole_device_ns * 100 // self.sm_pct

    def start_segment(self) -> None:
        """Starts timing."""
        assert self._start_ns is None, "a segment is running already"
        self._start_ns = self.now_ns

    def running_ns(self) -> int:
        """Returns the time passed since the segment began."""
        assert self._start_ns is not None, "no segment is running"
        return self.now_ns - self._start_ns

    def stop_segment(self) -> int:
        """Ends the segment."""
        used_ns = self.running_ns()
        self._start_ns = None
        self.segments_ns.append(used_ns)
        return used_ns
