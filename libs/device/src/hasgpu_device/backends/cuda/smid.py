"""Which SMs a stream's kernels run on: a kernel that notes the number of its SM (`%smid`), as PTX text, so that no
compiler is needed; the driver translates it for the device at hand.

The kernel is loaded as a context-less library kernel (`cuLibraryLoadData`, CUDA 12.0), not as a module: such a kernel
runs in the context of the stream it is launched on, and a green context's stream has a context of its own, to which a
module's function would not belong (CUDA driver API, `cuLaunchKernel`).
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, byref, c_char_p, c_int, c_size_t, c_uint, c_uint64, c_void_p
from typing import Any

from hasgpu_core.errors import UnsupportedError

from hasgpu_device.backends.cuda import faults
from hasgpu_device.backends.cuda.driver import LIBRARY
from hasgpu_device.errors import DeviceFaultError

MAX_SMS = 4096
"""SM numbers that are noted; NVIDIA's largest device has fewer than 200."""
BLOCKS_COUNT = 8192
THREADS_PER_BLOCK = 32
"""One warp: up to 32 blocks fit on an SM at once, so the blocks spread over all SMs that the stream may use."""
SPIN_NS = 50_000
"""How long a block holds its place, so that an early one does not make room for all others."""

PTX = b"""
.version 6.4
.target sm_70
.address_size 64

.visible .entry hasgpu_smid(.param .u64 counts, .param .u64 spin_ns)
{
    .reg .pred %p<3>;
    .reg .b32 %r<5>;
    .reg .b64 %rd<8>;

    mov.u32 %r1, %tid.x;
    setp.ne.u32 %p1, %r1, 0;
    @%p1 bra DONE;
    ld.param.u64 %rd1, [counts];
    ld.param.u64 %rd2, [spin_ns];
    cvta.to.global.u64 %rd1, %rd1;
    mov.u32 %r2, %smid;
    min.u32 %r3, %r2, 4095;
    mul.wide.u32 %rd3, %r3, 4;
    add.u64 %rd4, %rd1, %rd3;
    mov.u32 %r4, 1;
    red.global.add.u32 [%rd4], %r4;
    mov.u64 %rd5, %globaltimer;
    add.u64 %rd5, %rd5, %rd2;
SPIN:
    mov.u64 %rd6, %globaltimer;
    setp.lt.u64 %p2, %rd6, %rd5;
    @%p2 bra SPIN;
DONE:
    ret;
}
\0"""
"""counts: 4096 unsigned 32-bit numbers on the device, blocks by SM; spin_ns: how long a block stays. From Volta on."""

_FUNCTIONS: dict[str, list[Any]] = {
    "cuLibraryLoadData": [
        POINTER(c_void_p),
        c_char_p,
        c_void_p,
        c_void_p,
        c_uint,
        c_void_p,
        c_void_p,
        c_uint,
    ],
    "cuLibraryGetKernel": [POINTER(c_void_p), c_void_p, c_char_p],
    "cuLibraryUnload": [c_void_p],
    "cuMemAlloc_v2": [POINTER(c_uint64), c_size_t],
    "cuMemFree_v2": [c_uint64],
    "cuMemsetD32_v2": [c_uint64, c_uint, c_size_t],
    "cuMemcpyDtoH_v2": [c_void_p, c_uint64, c_size_t],
    "cuLaunchKernel": [c_void_p, *[c_uint] * 7, c_void_p, POINTER(c_void_p), c_void_p],
    "cuStreamSynchronize": [c_void_p],
    "cuCtxSynchronize": [],
}


class SmRecorder:
    """Records the SMs of streams; the device's primary context is current in the calling thread.

    Args:
        library: The driver's.

    Raises:
        UnsupportedError: The driver lacks a function.
        DeviceFaultError: It refuses the kernel or the memory.
    """

    def __init__(self, library: str = LIBRARY) -> None:
        loaded = ctypes.CDLL(library)
        self._functions = {}
        for name, types in _FUNCTIONS.items():
            try:
                function = getattr(loaded, name)
            except AttributeError:
                raise UnsupportedError(f"the installed NVIDIA driver has no {name}: it is too old") from None
            function.argtypes, function.restype = types, c_int
            self._functions[name] = function
        self._library, self._kernel, self._counts = c_void_p(), c_void_p(), c_uint64()
        self._call("cuLibraryLoadData", byref(self._library), PTX, None, None, 0, None, None, 0)
        self._call("cuLibraryGetKernel", byref(self._kernel), self._library, b"hasgpu_smid")
        self._call("cuMemAlloc_v2", byref(self._counts), MAX_SMS * 4)

    def record(self, stream: int) -> frozenset[int]:
        """Runs the kernel on a stream and returns the numbers of the SMs on which blocks of it ran."""
        self._call("cuMemsetD32_v2", self._counts, 0, MAX_SMS)
        self._call("cuCtxSynchronize")
        spin = c_uint64(SPIN_NS)
        arguments = (c_void_p * 2)(
            ctypes.cast(byref(self._counts), c_void_p).value, ctypes.cast(byref(spin), c_void_p).value
        )
        self._call(
            "cuLaunchKernel", self._kernel, BLOCKS_COUNT, 1, 1, THREADS_PER_BLOCK, 1, 1, 0, stream, arguments, None
        )
        self._call("cuStreamSynchronize", stream)
        counts = (c_uint * MAX_SMS)()
        self._call("cuMemcpyDtoH_v2", counts, self._counts, ctypes.sizeof(counts))
        if sum(counts) != BLOCKS_COUNT:
            raise DeviceFaultError(0, "SMID_COUNT", f"{sum(counts)} blocks were noted, expected {BLOCKS_COUNT}")
        return frozenset(number for number, count in enumerate(counts) if count)

    def close(self) -> None:
        """Gives memory and kernel back."""
        self._call("cuMemFree_v2", self._counts)
        self._call("cuLibraryUnload", self._library)

    def _call(self, name: str, *arguments: object) -> None:
        code = self._functions[name](*arguments)
        if code:
            raise DeviceFaultError(code, faults.name_of(code), f"in {name}, while SM numbers were recorded")
