"""Telling the C allocator to keep what large messages needed."""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_KEEP_BYTES = 256 * 1024 * 1024
_MMAP_BYTES = 32 * 1024 * 1024
"""glibc accepts no more."""


def keep_freed_memory() -> bool:
    """Makes glibc reuse freed blocks of up to 32 MiB instead of giving each back to the kernel at once.

    A request of 600 kB is copied several times on its way; by default each copy is mapped, filled page fault by page
    fault, and unmapped. Keeping up to 256 MiB spares that. Returns False, having done nothing, on another C library.

    Source: mallopt(3), M_MMAP_THRESHOLD and M_TRIM_THRESHOLD.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _MMAP_BYTES) and mallopt(_M_TRIM_THRESHOLD, _KEEP_BYTES))
