"""Names of CUDA's errors, and which of them end a process.

The runtime's codes (`cudaError_t`, which torch reports) are the driver's (`CUresult`) wherever both have the error.
Source: cuda.h and driver_types.h of CUDA 13.0.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from hasgpu_device.errors import DeviceFaultError

NAMES: Mapping[int, str] = {
    1: "CUDA_ERROR_INVALID_VALUE",
    2: "CUDA_ERROR_OUT_OF_MEMORY",
    3: "CUDA_ERROR_NOT_INITIALIZED",
    4: "CUDA_ERROR_DEINITIALIZED",
    34: "CUDA_ERROR_STUB_LIBRARY",
    46: "CUDA_ERROR_DEVICE_UNAVAILABLE",
    100: "CUDA_ERROR_NO_DEVICE",
    101: "CUDA_ERROR_INVALID_DEVICE",
    201: "CUDA_ERROR_INVALID_CONTEXT",
    214: "CUDA_ERROR_ECC_UNCORRECTABLE",
    220: "CUDA_ERROR_NVLINK_UNCORRECTABLE",
    226: "CUDA_ERROR_CONTAINED",
    400: "CUDA_ERROR_INVALID_HANDLE",
    600: "CUDA_ERROR_NOT_READY",
    700: "CUDA_ERROR_ILLEGAL_ADDRESS",
    701: "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES",
    702: "CUDA_ERROR_LAUNCH_TIMEOUT",
    709: "CUDA_ERROR_CONTEXT_IS_DESTROYED",
    710: "CUDA_ERROR_ASSERT",
    714: "CUDA_ERROR_HARDWARE_STACK_ERROR",
    715: "CUDA_ERROR_ILLEGAL_INSTRUCTION",
    716: "CUDA_ERROR_MISALIGNED_ADDRESS",
    717: "CUDA_ERROR_INVALID_ADDRESS_SPACE",
    718: "CUDA_ERROR_INVALID_PC",
    719: "CUDA_ERROR_LAUNCH_FAILED",
    721: "CUDA_ERROR_TENSOR_MEMORY_LEAK",
    801: "CUDA_ERROR_NOT_SUPPORTED",
    802: "CUDA_ERROR_SYSTEM_NOT_READY",
    803: "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH",
    805: "CUDA_ERROR_MPS_CONNECTION_FAILED",
    806: "CUDA_ERROR_MPS_RPC_FAILURE",
    807: "CUDA_ERROR_MPS_SERVER_NOT_READY",
    808: "CUDA_ERROR_MPS_MAX_CLIENTS_REACHED",
    809: "CUDA_ERROR_MPS_MAX_CONNECTIONS_REACHED",
    810: "CUDA_ERROR_MPS_CLIENT_TERMINATED",
    900: "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED",
    901: "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED",
    914: "CUDA_ERROR_INVALID_RESOURCE_TYPE",
    915: "CUDA_ERROR_INVALID_RESOURCE_CONFIGURATION",
    999: "CUDA_ERROR_UNKNOWN",
}
"""Of the errors that this project meets; a driver's own `cuGetErrorName` knows them all."""

OUT_OF_MEMORY = 2
NOT_SUPPORTED = 801
INVALID_RESOURCE_CONFIGURATION = 915

FATAL = frozenset(
    (4, 46, 214, 220, 226, 700, 702, 709, 710, 714, 715, 716, 717, 718, 719, 721, 805, 806, 807, 808, 809, 810, 999)
)
"""Sticky errors, after which every call of the process fails, and those of a lost or refusing MPS server."""

_TEXTS = {
    "an illegal memory access was encountered": 700,
    "the launch timed out and was terminated": 702,
    "device-side assert triggered": 710,
    "an illegal instruction was encountered": 715,
    "misaligned address": 716,
    "unspecified launch failure": 719,
    "uncorrectable ECC error encountered": 214,
    "MPS client failed to connect to the MPS control daemon or the MPS server": 805,
    "MPS control daemon failed to communicate with the MPS server": 806,
    "MPS server is not ready to accept new MPS client requests": 807,
    "the hardware resources required to create MPS client have been exhausted": 808,
    "the hardware resources required to support device connections have been exhausted": 809,
    "MPS client terminated": 810,
    "out of memory": OUT_OF_MEMORY,
}
"""What `cudaGetErrorString` says, for errors that carry no code."""

_TORCH_CUDA_TEXT = re.compile(r"CUDA (?:driver )?error:? *(?P<text>[^\n]*)")


def name_of(code: int) -> str:
    """Returns an error's name; "CUDA_ERROR_<code>" for one that is not in the table."""
    return NAMES.get(code, f"CUDA_ERROR_{code}")


def code_of(error: BaseException) -> int:
    """Returns the CUDA error that an exception of torch tells of, 0 when it tells of none.

    `torch.AcceleratorError` has it as `error_code`; older or other errors ("CUDA error: ...") are known by their text.
    """
    code = getattr(error, "error_code", None)
    if isinstance(code, int) and code > 0:
        return code
    if isinstance(error, DeviceFaultError):
        return error.code
    if not isinstance(error, RuntimeError):
        return 0
    found = _TORCH_CUDA_TEXT.search(str(error))
    if found is None:
        return 0
    return next((code for text, code in _TEXTS.items() if text in found["text"]), 0)


def fault_in(error: BaseException, doing: str) -> DeviceFaultError | None:
    """Finds the fault in an exception or in what caused it; None when a process survives it.

    Args:
        error: What was raised.
        doing: What was being done, for the message.
    """
    for link in _chain(error):
        if isinstance(link, DeviceFaultError):
            return link
        code = code_of(link)
        if code in FATAL:
            first_line = str(link).split("\n", 1)[0].strip()
            return DeviceFaultError(code, name_of(code), f"{first_line or 'no text'}, while {doing}")
    return None


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        yield link
        link = link.__cause__ or link.__context__
