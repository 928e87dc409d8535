"""How a CUDA device is shared, and whether it really is: what a worker checks before it loads anything.

A limit that is not in force is worse than none, because others are promised the rest of the device. A process that does
not find the MPS daemon's pipes runs outside MPS without a word, so in the MPS modes a worker asks the driver whether it
is a client, and refuses to start when it is not.
"""

from __future__ import annotations

from collections.abc import Mapping

from hasgpu_core.errors import InvalidError

from hasgpu_device.backends.cuda.driver import CudaDriver
from hasgpu_device.errors import DeviceFaultError

GREEN = "mps+green"
PERCENTAGE = "mps+pct"
STATIC = "mps+static"
TIMESHARE = "timeshare"
MODES = (GREEN, PERCENTAGE, STATIC, TIMESHARE)

PERCENTAGE_VARIABLE = "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"
PARTITION_VARIABLE = "CUDA_MPS_SM_PARTITION"
NOT_IN_USE = "MPS_NOT_IN_USE"
LIMIT_MISSING = "SM_LIMIT_MISSING"


def check_mode(mode: str) -> None:
    """Raises InvalidError unless it is one of MODES."""
    if mode not in MODES:
        raise InvalidError("mode of a cuda device", expected=" or ".join(MODES), got=repr(mode))


def check(mode: str, driver: CudaDriver, device: int, environ: Mapping[str, str]) -> None:
    """Makes sure that the mode is in force in this process.

    Raises:
        DeviceFaultError: It is not (MPS_NOT_IN_USE, SM_LIMIT_MISSING).
    """
    check_mode(mode)
    if mode == TIMESHARE:
        return
    if not driver.is_mps_client(device):
        pipes = environ.get("CUDA_MPS_PIPE_DIRECTORY")
        where = f"with CUDA_MPS_PIPE_DIRECTORY={pipes}" if pipes else "without CUDA_MPS_PIPE_DIRECTORY"
        raise DeviceFaultError(0, NOT_IN_USE, f"mode {mode} needs MPS, but this process runs outside it, {where}")
    if mode == GREEN and PERCENTAGE_VARIABLE in environ:
        text = f"{PERCENTAGE_VARIABLE} is set, under which a green context may use more SMs than it has"
        raise DeviceFaultError(0, LIMIT_MISSING, text)
    if mode == STATIC and not environ.get(PARTITION_VARIABLE):
        raise DeviceFaultError(0, LIMIT_MISSING, f"mode {mode} needs {PARTITION_VARIABLE}")
    if mode == PERCENTAGE:
        percentage(environ)


def percentage(environ: Mapping[str, str]) -> float:
    """Returns the MPS percentage of this process, 100 when there is none.

    Raises:
        DeviceFaultError: It is not a number in (0, 100]; the MPS server would take none.
    """
    given = environ.get(PERCENTAGE_VARIABLE, "100")
    try:
        value = float(given)
    except ValueError:
        value = 0.0
    if not 0 < value <= 100:
        text = f"{PERCENTAGE_VARIABLE}: expected a number above 0, up to 100, got {given!r}"
        raise DeviceFaultError(0, LIMIT_MISSING, text)
    return value
