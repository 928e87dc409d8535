"""The gate's critical section in C: building it, and finding it.

    python -m hasgpu_device.native

compiles `gate.c` into this package's folder, with the compiler that `CC` names or the first of cc, gcc and clang. Where
there is none, or the platform has no futex, everything works without it, with slower hand-overs; `hasgpu status` says
which ("gate: native" or "gate: python").
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from hasgpu_core.errors import HasgpuError

SOURCE = Path(__file__).with_name("gate.c")
FLAGS = ("-O2", "-shared", "-fPIC", "-std=gnu11", "-Wall", "-Wextra", "-Werror")


class BuildError(HasgpuError):
    """The C core can't be built; says why."""


@dataclass(frozen=True, slots=True)
class Library:
    """The two functions of the C core."""

    step: Any
    sleep: Any


def path() -> Path:
    """Returns where the built core lies: one for each source and machine, so that a stale one is never loaded."""
    digest = hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:12]
    return SOURCE.with_name(f"gate-{platform.machine()}-{digest}.so")


def build() -> Path:
    """Compiles the core, if that was not done before.

    Returns:
        The library's path.

    Raises:
        BuildError: There is no compiler, no futex, the folder can't be written, or the compiler refuses.
    """
    target = path()
    if target.exists():
        return target
    if sys.platform != "linux":
        raise BuildError(f"the native gate needs Linux (its futex and its locks), this is {sys.platform}")
    named = os.environ.get("CC", "")
    compiler = shutil.which(named) if named else next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if compiler is None:
        raise BuildError(f"no C compiler: looked for {named or 'cc, gcc and clang'} on PATH")
    draft = target.with_name(f".{target.name}.{os.getpid()}")
    command = [compiler, *FLAGS, "-o", str(draft), str(SOURCE)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        if done.returncode != 0:
            raise BuildError(f"{compiler} ended with code {done.returncode}: {done.stderr.strip()[-2_000:]}")
        draft.replace(target)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{compiler} can't be run: {error}") from error
    for stale in SOURCE.parent.glob("gate-*.so"):
        if stale != target:
            stale.unlink(missing_ok=True)
    return target


@cache
def load() -> Library | None:
    """Returns the built core, None where there is none (or HASGPU_NATIVE_GATE is 0)."""
    if os.environ.get("HASGPU_NATIVE_GATE") == "0" or not path().exists():
        return None
    try:
        library = ctypes.CDLL(str(path()))
    except OSError:
        return None  # built for another system
    step, sleep = library.hasgpu_gate_step, library.hasgpu_gate_sleep
    step.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)
    sleep.argtypes = (
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_int,
        ctypes.c_uint32,
        ctypes.c_int64,
        ctypes.c_void_p,
    )
    return Library(step, sleep)
