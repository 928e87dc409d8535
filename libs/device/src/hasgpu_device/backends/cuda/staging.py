"""Weights onto the device through pinned memory.

A copy from ordinary memory makes the driver copy twice and waits for each piece. Here weights go through two pinned
buffers in turn: while one is on its way to the device, the host fills the other. Pinning memory is slow (the kernel
locks every page), so the buffers stay with the process: a model that is loaded again in it, and every one after the
first, finds them ready. They are bounded (`BUFFER_BYTES` each), whatever the model's size, and count as host memory.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

BUFFER_BYTES = 32 << 20
BUFFERS = 2
ALIGNMENT_BYTES = 16


class Staging:
    """Copies tensors to one device; one thread at a time.

    Args:
        device: "cuda:0"; with "cpu" the same code copies without pinned memory, for tests.
        buffer_bytes: Size of a buffer.
    """

    def __init__(self, device: str, *, buffer_bytes: int = BUFFER_BYTES) -> None:
        self.device = device
        self.copied_bytes = 0
        self._is_cuda = device.startswith("cuda")
        self._buffer_bytes = max(ALIGNMENT_BYTES, buffer_bytes)
        self._buffers: list[Any] = []
        self._busy: list[Any] = []
        self._turn = 0
        self._lock = threading.Lock()

    def move_module(self, module: Any) -> None:
        """Moves a module's parameters and buffers in place; parameters shared by modules stay shared."""
        import torch

        if isinstance(module, torch.jit.ScriptModule):
            module.to(self.device)
            return
        moved: dict[tuple[Any, ...], Any] = {}
        with self._lock, torch.no_grad():
            # What `Module.to` does, with another way of copying.
            module._apply(lambda tensor: self._move(tensor, moved))
            self.finish()

    def move(self, tensor: Any) -> Any:
        """Returns a copy of a tensor on the device; itself when it is there already."""
        import torch

        if tensor.device == torch.device(self.device):
            return tensor
        with self._lock, torch.no_grad():
            target = self._move(tensor, {})
            self.finish()
        return target

    def finish(self) -> None:
        """Waits for the copies on their way."""
        for event in self._busy:
            if event is not None:
                event.synchronize()

    def _move(self, source: Any, moved: dict[tuple[Any, ...], Any]) -> Any:
        import torch

        if source.device == torch.device(self.device):
            return source
        if source.layout != torch.strided or source.device.type != "cpu" or not source.numel():
            return source.detach().to(self.device)
        # Two tensors of the same memory (tied weights under two names) become one on the device as well.
        key = (source.data_ptr(), source.dtype, tuple(source.shape), source.stride())
        if key not in moved:
            target = torch.empty_like(source, device=self.device)
            if self._is_cuda and source.is_contiguous() and target.is_contiguous():
                self._copy(source.detach().reshape(-1).view(torch.uint8), target.reshape(-1).view(torch.uint8))
            else:
                target.copy_(source)
            moved[key] = target
            self.copied_bytes += source.numel() * source.element_size()
        return moved[key]

    def _copy(self, source: Any, target: Any) -> None:
        """Copies bytes, a buffer at a time."""
        import torch

        for start, end in pieces(source.numel(), self._buffer_bytes):
            index = self._next_buffer()
            buffer = self._buffers[index][: end - start]
            buffer.copy_(source[start:end])
            target[start:end].copy_(buffer, non_blocking=True)
            event = self._busy[index] or torch.cuda.Event(blocking=True)
            event.record()
            self._busy[index] = event

    def _next_buffer(self) -> int:
        import torch

        index, self._turn = self._turn, (self._turn + 1) % BUFFERS
        while len(self._buffers) <= index:
            self._buffers.append(torch.empty(self._buffer_bytes, dtype=torch.uint8, pin_memory=True))
            self._busy.append(None)
        if self._busy[index] is not None:
            self._busy[index].synchronize()
        return index


def pieces(size: int, most: int) -> Iterator[tuple[int, int]]:
    """Cuts 0..size into ranges of at most `most`, in order."""
    for start in range(0, size, most):
        yield start, min(size, start + most)


_stagings: dict[str, Staging] = {}
_stagings_lock = threading.Lock()


def staging_for(device: str) -> Staging:
    """Returns the process's staging for a device; its pinned buffers live as long as the process."""
    with _stagings_lock:
        return _stagings.setdefault(device, Staging(device))
