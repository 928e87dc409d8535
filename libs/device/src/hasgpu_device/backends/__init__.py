"""Device backends: what kind of device an instance runs on. Same worker, same gate, same control block for all."""

from __future__ import annotations

from typing import Protocol

from hasgpu_core.errors import UnsupportedError


class DeviceBackend(Protocol):
    """The device as the executor thread sees it; every method but `setup_loader` is called in that thread.

    A backend times segments on the device: CUDA events around a rung's stream, thread CPU time on a CPU device, a
    profile table where the device is emulated.
    """

    name: str
    """"cpu", "cuda", "emulated" or, in tests, "fake"."""

    def setup_loader(self) -> None:
        """Prepares the thread that loads the model, once, before it does."""
        ...

    def setup(self) -> None:
        """Prepares the calling thread, once, after the model was loaded and before anything runs."""
        ...

    def apply_sm(self, sm_pct: int) -> None:
        """Gives the segments that follow this share of the SMs; only between segments."""
        ...

    def start_segment(self) -> None:
        """Starts timing."""
        ...

    def running_ns(self) -> int:
        """Returns about how much device time the running segment has used; cheap, called between a model's layers."""
        ...

    def stop_segment(self) -> int:
        """Waits until the segment is done on the device and returns its device time in nanoseconds."""
        ...


def create(backend: str, *, device_cores: float) -> DeviceBackend:
    """Makes the backend of that name.

    Args:
        backend: As in `DeviceInfo.backend`.
        device_cores: Cores of the whole device, for a CPU device.

    Raises:
        UnsupportedError: No such backend here.
    """
    if backend == "cpu":
        from hasgpu_device.backends.cpu import CpuBackend

        return CpuBackend(device_cores)
    raise UnsupportedError(f"device backend {backend!r} is not offered here; there is: cpu")
