"""Sleeping on a word of shared memory until another process changes it (futex(2)); elsewhere a bounded poll."""

from __future__ import annotations

import ctypes
import platform
import sys
import time

_SYSCALL_NUMBER = {"x86_64": 202, "aarch64": 98}.get(platform.machine()) if sys.platform == "linux" else None
_WAIT = 0
_WAKE = 1
_POLL_NS = 1_000_000

AVAILABLE = _SYSCALL_NUMBER is not None
"""Whether the kernel's futex is used."""


class _TimeSpec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_int64), ("nanoseconds", ctypes.c_int64))


_libc = ctypes.CDLL(None, use_errno=True)


def wait(word: ctypes.c_uint32, expected: int, timeout_ns: int) -> None:
    """Sleeps while the word holds `expected`, at most `timeout_ns`; may return early for no reason."""
    if timeout_ns <= 0:
        return
    if _SYSCALL_NUMBER is None:
        end_ns = time.monotonic_ns() + timeout_ns
        while word.value == expected and (left_ns := end_ns - time.monotonic_ns()) > 0:
            time.sleep(min(left_ns, _POLL_NS) / 1e9)
        return
    timeout = _TimeSpec(*divmod(timeout_ns, 1_000_000_000))
    # Not FUTEX_PRIVATE: the word is shared by processes. Whatever the outcome, the caller looks at its state again.
    _libc.syscall(
        ctypes.c_long(_SYSCALL_NUMBER),
        ctypes.byref(word),
        ctypes.c_int(_WAIT),
        ctypes.c_uint32(expected),
        ctypes.byref(timeout),
        None,
        ctypes.c_int(0),
    )


def wake(word: ctypes.c_uint32) -> None:
    """Wakes all that sleep on the word; the caller has changed it before."""
    if _SYSCALL_NUMBER is None:
        return
    _libc.syscall(
        ctypes.c_long(_SYSCALL_NUMBER),
        ctypes.byref(word),
        ctypes.c_int(_WAKE),
        ctypes.c_int(1 << 30),
        None,
        None,
        ctypes.c_int(0),
    )
