"""What the CUDA backend asks of torch: events, graphs, memory. Nothing here runs without a GPU."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

from hasgpu_core.errors import UnsupportedError

from hasgpu_device.backends.cuda.driver import CudaDriver

ALLOCATOR_SETTINGS = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
"""Torch 2.9 renamed it; older ones read the second."""
_CUBLAS_WORKSPACE = ":4096:2:16:8"
"""8 MiB for each stream, as before Hopper, where the default is 32 MiB: a worker has a stream for each rung."""


def prepare_environment(environ: MutableMapping[str, str] = os.environ) -> None:
    """Sets what torch and cuBLAS read when they start; a value given for cuBLAS is kept.

    Expandable segments are off: memory of that kind can't be shared by plain IPC handles, and its growth is hard to
    foresee under an MPS limit.
    """
    for name in ALLOCATOR_SETTINGS:
        settings = [part for part in environ.get(name, "").split(",") if part and "expandable_segments" not in part]
        environ[name] = ",".join([*settings, "expandable_segments:False"])
    environ.setdefault("CUBLAS_WORKSPACE_CONFIG", _CUBLAS_WORKSPACE)


def require_torch() -> Any:
    """Returns torch, able to use CUDA.

    Raises:
        UnsupportedError: It is built without CUDA, or does not find a device.
    """
    import torch

    if torch.version.cuda is None:
        raise UnsupportedError(f"no CUDA device: torch {torch.__version__} is built without CUDA")
    return torch


class TorchEvents:
    """Timing events on the current stream; a ring of them, as marks are waited for in the order they were made.

    Waiting sleeps rather than spins: a node has more workers than cores to spare.
    """

    def __init__(self, ring_size: int) -> None:
        import torch

        self._ring = [torch.cuda.Event(enable_timing=True, blocking=True) for _ in range(ring_size)]
        self._next = 0

    def record(self) -> Any:
        """Marks this place in the work given so far; good until the ring has come round."""
        event = self._ring[self._next]
        self._next = (self._next + 1) % len(self._ring)
        event.record()
        return event

    def wait(self, mark: Any) -> None:
        """Waits until the device has come to a mark."""
        mark.synchronize()

    def between_ns(self, first: Any, last: Any) -> int:
        """Returns the device time between two marks."""
        elapsed_ms: float = first.elapsed_time(last)
        return max(0, round(elapsed_ms * 1e6))


class TorchRecorder:
    """Captures work into CUDA graphs that share one memory pool.

    Args:
        streams: The stream of each rung.
        driver: Puts graphs onto the device ahead of their first launch, which is the warm-up of a rung that may not be
            used yet: nothing runs on its SMs.
    """

    def __init__(self, streams: Mapping[tuple[int, int], Any], driver: CudaDriver) -> None:
        import torch

        self._streams = streams
        self._driver = driver
        self._pool = torch.cuda.graph_pool_handle()

    def record(self, rung: tuple[int, int], work: Callable[[], None]) -> Callable[[], None]:
        """Captures the work on a rung's stream; raises RuntimeError when it can't be captured."""
        import torch

        graph = torch.cuda.CUDAGraph()
        stream = self._streams[rung]
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            # The other threads of a worker may go on calling CUDA meanwhile.
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                work()
            except BaseException:
                self._abandon(graph)
                raise
            graph.capture_end()
        if hasattr(graph, "raw_cuda_graph_exec"):  # torch 2.10 or so
            # A graph that does not give its handle away is uploaded by its first launch.
            with contextlib.suppress(RuntimeError, TypeError):
                self._driver.upload_graph(int(graph.raw_cuda_graph_exec()), int(stream.cuda_stream))
        replay: Callable[[], None] = graph.replay
        return replay

    @staticmethod
    def _abandon(graph: Any) -> None:
        """Ends a capture that failed, so that the stream can be used again."""
        try:
            graph.capture_end()
        except RuntimeError:
            # It says that the capture was invalid, which is known.
            return


def limit_memory(memory_bytes: int, device: int) -> str:
    """Bounds torch's allocator to what the instance was promised; returns a note, empty when there is none.

    The MPS limit in the environment bounds everything, the context included; this one gives torch's own error first.
    """
    import torch

    if not memory_bytes:
        return "memory is not limited: the allocation names no amount"
    total_bytes = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, memory_bytes / total_bytes), device)
    return ""
