"""Device backends: what kind of device an instance runs on. Same worker, same gate, same control block for all."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from hasgpu_core.errors import UnsupportedError

if TYPE_CHECKING:
    from hasgpu_device.models import Model
    from hasgpu_device.worker_config import WorkerConfig

NAMES = ("cpu", "cuda", "emulated")


class DeviceBackend(Protocol):
    """The device as the executor thread sees it.

    `setup_loader` and `load` are called in the thread that loads the model, every other method in the executor thread.
    A backend times segments on the device: CUDA events around a rung's stream, thread CPU time on a CPU device, a
    profile table where the device is emulated.
    """

    name: str
    """"cpu", "cuda", "emulated" or, in tests, "fake"."""

    def setup_loader(self) -> None:
        """Prepares the thread that loads the model, once, before it does."""
        ...

    def load(self, config: WorkerConfig, boundary: Callable[[], None]) -> Model:
        """Loads the model onto the device.

        Args:
            config: Which.
            boundary: To be called where a batch may be interrupted.

        Raises:
            LoadError: It can't be loaded; the message says why, fit for the user who deployed it.
        """
        ...

    def setup(self) -> None:
        """Prepares the calling thread, once, after the model was loaded and before anything runs."""
        ...

    def apply_sm(self, sm_pct: int, first_pct: int = 0) -> None:
        """Gives the segments that follow this share of the SMs; only between segments.

        Args:
            sm_pct: Width of the share, 1..100.
            first_pct: Where it begins, 0..99; of use only to a device whose partitions have a place.
        """
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


@runtime_checkable
class WarmsUp(Protocol):
    """A backend with a warm-up of its own, in place of the executor's two random batches."""

    def warm_up(self, model: Model, run: Callable[[Callable[[], object]], object], poll: Callable[[], None]) -> str:
        """Gets everything ready that a request should not wait for; in the executor thread.

        Args:
            model: As `load` gave it.
            run: Runs work within the gate, as a background batch, and returns its result.
            poll: Puts changed shares into force; to be called every few milliseconds or whenever it can be.

        Returns:
            What went otherwise than wished, in words; empty when nothing did.
        """
        ...


@runtime_checkable
class Quiesces(Protocol):
    """A backend whose device should have no work left when the process ends."""

    def quiesce(self, timeout_s: float) -> bool:
        """Gives the device no more work and waits until it has none; returns whether it is idle. For any thread."""
        ...


def create(config: WorkerConfig) -> DeviceBackend:
    """Makes the backend that a worker's configuration names.

    Raises:
        UnsupportedError: No such backend here.
    """
    if config.backend == "cpu":
        from hasgpu_device.backends.cpu import CpuBackend

        return CpuBackend(config.device_cores)
    if config.backend == "emulated":
        from hasgpu_device.backends.emulated import EmulatedBackend

        return EmulatedBackend(config.profile_path)
    if config.backend == "cuda":
        from hasgpu_device.backends.cuda.backend import CudaBackend

        return CudaBackend(config)
    raise UnsupportedError(f"device backend {config.backend!r} is not offered here; there is: {', '.join(NAMES)}")
