"""libcuda through ctypes: what hasgpu needs of the driver that torch does not offer.

Everything works on the device's primary context, which torch uses too. Functions that a driver lacks are found missing
when the library is opened (`CudaDriver.has_green_contexts`), not when they are called. Layouts and constants: cuda.h of
CUDA 13.0. Calls may be made in any thread.
"""

from __future__ import annotations

import ctypes
import uuid
from collections.abc import Sequence
from ctypes import POINTER, byref, c_char, c_char_p, c_int, c_size_t, c_ubyte, c_uint, c_void_p
from typing import Any

from hasgpu_core.errors import UnsupportedError

from hasgpu_device.backends.cuda import faults
from hasgpu_device.errors import DeviceFaultError

LIBRARY = "libcuda.so.1"

ATTRIBUTE_MULTIPROCESSORS = 16
ATTRIBUTE_CAPABILITY_MAJOR = 75
ATTRIBUTE_CAPABILITY_MINOR = 76
ATTRIBUTE_MPS_ENABLED = 133

_RESOURCE_TYPE_SM = 1
_GREEN_CTX_DEFAULT_STREAM = 1
_STREAM_NON_BLOCKING = 1


class SmResource(ctypes.Structure):
    """`CUdevSmResource`: a set of SMs."""

    _fields_ = (
        ("sm_count", c_uint),
        ("min_partition_size", c_uint),
        ("coscheduled_alignment", c_uint),
    )
    sm_count: int
    min_partition_size: int
    coscheduled_alignment: int


class _ResourceUnion(ctypes.Union):
    _fields_ = (("sm", SmResource), ("padding", c_ubyte * 48))


class DevResource(ctypes.Structure):
    """`CUdevResource`, 144 bytes, `sm` at 96; made and filled by the driver alone."""

    _fields_ = (("type", c_uint), ("internal", c_ubyte * 92), ("resource", _ResourceUnion))
    type: int
    resource: Any

    @property
    def sm_count(self) -> int:
        """How many SMs it holds."""
        return int(self.resource.sm.sm_count)

    @property
    def min_partition_size(self) -> int:
        """The fewest SMs that a partition of it may have; 0 where the driver does not say."""
        return int(self.resource.sm.min_partition_size)

    @property
    def coscheduled_alignment(self) -> int:
        """Partitions have a multiple of so many SMs; 0 where the driver does not say."""
        return int(self.resource.sm.coscheduled_alignment)


class SmSplit:
    """The SMs of a device as groups of one split, in the split's order.

    Attributes:
        count: How many equal groups there are.
        group_sms: SMs of one group.
        rest_sms: SMs left over; behind the last group, of weaker guarantees.
    """

    def __init__(self, resources: ctypes.Array[DevResource], count: int) -> None:
        # The groups and, behind them, what is left: one array, as a descriptor of several takes contiguous entries.
        self.resources = resources
        self.count = count
        self.group_sms = resources[0].sm_count
        self.rest_sms = resources[count].sm_count


_BASE: dict[str, list[Any]] = {
    "cuInit": [c_uint],
    "cuDriverGetVersion": [POINTER(c_int)],
    "cuDeviceGetCount": [POINTER(c_int)],
    "cuDeviceGet": [POINTER(c_int), c_int],
    "cuDeviceGetName": [POINTER(c_char), c_int, c_int],
    "cuDeviceGetUuid_v2": [POINTER(c_ubyte), c_int],
    "cuDeviceGetAttribute": [POINTER(c_int), c_int, c_int],
    "cuDeviceTotalMem_v2": [POINTER(c_size_t), c_int],
    "cuDevicePrimaryCtxRetain": [POINTER(c_void_p), c_int],
    "cuDevicePrimaryCtxRelease_v2": [c_int],
    "cuCtxSetCurrent": [c_void_p],
    "cuCtxSynchronize": [],
    "cuStreamDestroy_v2": [c_void_p],
    "cuStreamSynchronize": [c_void_p],
    "cuStreamQuery": [c_void_p],
}
_GREEN: dict[str, list[Any]] = {
    "cuDeviceGetDevResource": [c_int, POINTER(DevResource), c_int],
    "cuDevSmResourceSplitByCount": [
        POINTER(DevResource),
        POINTER(c_uint),
        POINTER(DevResource),
        POINTER(DevResource),
        c_uint,
        c_uint,
    ],
    "cuDevResourceGenerateDesc": [POINTER(c_void_p), POINTER(DevResource), c_uint],
    "cuGreenCtxCreate": [POINTER(c_void_p), c_void_p, c_int, c_uint],
    "cuGreenCtxDestroy": [c_void_p],
    "cuGreenCtxStreamCreate": [POINTER(c_void_p), c_void_p, c_uint, c_int],
}
_OPTIONAL: dict[str, list[Any]] = {"cuGraphUpload": [c_void_p, c_void_p]}


class CudaDriver:
    """The driver's library, initialised.

    Args:
        library: What to load; tests have a library of their own.

    Attributes:
        missing: Green-context functions that this driver lacks; empty from CUDA 12.4 (streams: 12.5) on.

    Raises:
        UnsupportedError: There is no such library, or it is not a CUDA driver.
        DeviceFaultError: It does not initialise: no device, no MPS server, a driver that does not fit the kernel's.
    """

    def __init__(self, library: str = LIBRARY) -> None:
        try:
            self._library = ctypes.CDLL(library)
        except OSError as error:
            raise UnsupportedError(f"no CUDA device: the driver's library can't be loaded: {error}") from error
        self._describe = {
            name: self._bind(name, [c_int, POINTER(c_char_p)]) for name in ("cuGetErrorName", "cuGetErrorString")
        }
        self._functions: dict[str, Any] = {}
        for name, types in (_BASE | _GREEN | _OPTIONAL).items():
            function = self._bind(name, types)
            if function is not None:
                self._functions[name] = function
        if lacking := [name for name in _BASE if name not in self._functions]:
            raise UnsupportedError(f"{library} is not a CUDA driver that hasgpu can use: it has no {lacking[0]}")
        self.missing = tuple(name for name in _GREEN if name not in self._functions)
        self._call("cuInit", 0)

    def _bind(self, name: str, types: list[Any]) -> Any:
        try:
            function = getattr(self._library, name)
        except AttributeError:
            return None
        function.argtypes = types
        function.restype = c_int
        return function

    @property
    def has_green_contexts(self) -> bool:
        """Whether this driver knows green contexts and their streams."""
        return not self.missing

    def error_name(self, code: int) -> str:
        """Returns the name of a CUresult."""
        return self._text("cuGetErrorName", code) or faults.name_of(code)

    def error_text(self, code: int) -> str:
        """Returns what a CUresult means, in the driver's words."""
        return self._text("cuGetErrorString", code) or "the driver gives no text"

    def _text(self, function: str, code: int) -> str:
        if self._describe[function] is None:
            return ""
        text = c_char_p()
        self._describe[function](code, byref(text))
        return (text.value or b"").decode(errors="replace")

    def _call(self, name: str, *arguments: object) -> None:
        function = self._functions.get(name)
        if function is None:
            raise UnsupportedError(f"the installed NVIDIA driver has no {name}: it is too old for green contexts")
        code = function(*arguments)
        if code:
            raise DeviceFaultError(code, self.error_name(code), f"{self.error_text(code)}, in {name}")

    def version(self) -> tuple[int, int]:
        """Returns the CUDA version that the driver supports, as (13, 0)."""
        number = c_int()
        self._call("cuDriverGetVersion", byref(number))
        return number.value // 1000, number.value % 1000 // 10

    def device_count(self) -> int:
        """Returns how many devices this process may see."""
        count = c_int()
        self._call("cuDeviceGetCount", byref(count))
        return count.value

    def device(self, ordinal: int = 0) -> int:
        """Returns a device's handle.

        Raises:
            DeviceFaultError: No such device.
        """
        handle = c_int()
        self._call("cuDeviceGet", byref(handle), ordinal)
        return handle.value

    def name(self, device: int) -> str:
        """Returns a device's name, such as "NVIDIA H100 80GB HBM3"."""
        buffer = ctypes.create_string_buffer(256)
        self._call("cuDeviceGetName", buffer, len(buffer), device)
        return buffer.value.decode(errors="replace")

    def uuid(self, device: int) -> str:
        """Returns a device's identity as NVML writes it, "GPU-..."."""
        raw = (c_ubyte * 16)()
        self._call("cuDeviceGetUuid_v2", raw, device)
        return f"GPU-{uuid.UUID(bytes=bytes(raw))}"

    def attribute(self, attribute: int, device: int) -> int:
        """Returns an attribute of a device (`ATTRIBUTE_...`)."""
        value = c_int()
        self._call("cuDeviceGetAttribute", byref(value), attribute, device)
        return value.value

    def multiprocessors(self, device: int) -> int:
        """Returns how many SMs this process may use; fewer than the device has under an MPS percentage."""
        return self.attribute(ATTRIBUTE_MULTIPROCESSORS, device)

    def is_mps_client(self, device: int) -> bool:
        """Tells whether this process really runs under MPS; a driver that can't tell counts as no."""
        try:
            return self.attribute(ATTRIBUTE_MPS_ENABLED, device) == 1
        except DeviceFaultError as error:
            if error.code == 1:  # CUDA_ERROR_INVALID_VALUE: an attribute that it does not know
                return False
            raise

    def total_memory_bytes(self, device: int) -> int:
        """Returns the device's memory."""
        size = c_size_t()
        self._call("cuDeviceTotalMem_v2", byref(size), device)
        return size.value

    def use_primary_context(self, device: int) -> int:
        """Makes the device's primary context, torch's too, that of the calling thread; returns its handle.

        It is retained once a call and, as a worker keeps it for life, not given back.
        """
        context = c_void_p()
        self._call("cuDevicePrimaryCtxRetain", byref(context), device)
        self._call("cuCtxSetCurrent", context)
        return context.value or 0

    def release_primary_context(self, device: int) -> None:
        """Gives back one `use_primary_context`, for a probe that leaves nothing behind."""
        self._call("cuDevicePrimaryCtxRelease_v2", device)

    def synchronize_context(self) -> None:
        """Waits for all work of the calling thread's context; this is where a sticky error shows."""
        self._call("cuCtxSynchronize")

    def sm_resource(self, device: int) -> DevResource:
        """Returns the SMs that this process may use.

        Raises:
            UnsupportedError: The driver knows no green contexts.
            DeviceFaultError: The device has no such resource.
        """
        resource = DevResource()
        self._call("cuDeviceGetDevResource", device, byref(resource), _RESOURCE_TYPE_SM)
        return resource

    def split(self, device: int, group_sms: int = 0) -> SmSplit:
        """Splits the device's SMs into as many equal groups as there can be.

        The same call gives the same groups, in the same order, in every process on the device; whether equal groups are
        the same physical SMs in two processes is for the probe to find out.

        Args:
            device: Handle.
            group_sms: The fewest SMs of a group; 0: the smallest that the driver allows.
        """
        whole = self.sm_resource(device)
        # Where the driver does not tell, one SM is asked for, and it rounds up.
        least = group_sms or whole.min_partition_size or 1
        count = c_uint(0)
        self._call("cuDevSmResourceSplitByCount", None, byref(count), byref(whole), None, 0, least)
        if not count.value:
            raise UnsupportedError(f"{whole.sm_count} SMs can't be split into groups of {least}")
        resources = (DevResource * (count.value + 1))()
        rest = DevResource()
        self._call("cuDevSmResourceSplitByCount", resources, byref(count), byref(whole), byref(rest), 0, least)
        resources[count.value] = rest
        return SmSplit(resources, count.value)

    def descriptor(self, resources: ctypes.Array[DevResource], first: int, count: int) -> int:
        """Joins neighbouring resources of one split to what a green context is made of.

        Raises:
            DeviceFaultError: CUDA_ERROR_INVALID_RESOURCE_CONFIGURATION when they are not of one split.
        """
        if first < 0 or count < 1 or first + count > len(resources):
            raise ValueError(f"resources {first}..{first + count - 1} of {len(resources)}")
        handle = c_void_p()
        start = ctypes.cast(byref(resources, first * ctypes.sizeof(DevResource)), POINTER(DevResource))
        self._call("cuDevResourceGenerateDesc", byref(handle), start, count)
        return handle.value or 0

    def create_green_context(self, device: int, descriptor: int) -> int:
        """Makes a green context on the primary context; it may overlap with others."""
        handle = c_void_p()
        self._call("cuGreenCtxCreate", byref(handle), descriptor, device, _GREEN_CTX_DEFAULT_STREAM)
        return handle.value or 0

    def destroy_green_context(self, context: int) -> None:
        """Ends a green context, after its streams."""
        self._call("cuGreenCtxDestroy", context)

    def create_green_stream(self, context: int, priority: int = 0) -> int:
        """Makes a stream whose work runs on the green context's SMs; usable in any thread."""
        handle = c_void_p()
        self._call("cuGreenCtxStreamCreate", byref(handle), context, _STREAM_NON_BLOCKING, priority)
        return handle.value or 0

    def destroy_stream(self, stream: int) -> None:
        """Ends a stream."""
        self._call("cuStreamDestroy_v2", stream)

    def synchronize_stream(self, stream: int) -> None:
        """Waits for a stream's work."""
        self._call("cuStreamSynchronize", stream)

    def is_stream_idle(self, stream: int) -> bool:
        """Tells whether a stream's work is done, without waiting."""
        code = self._functions["cuStreamQuery"](stream)
        if code not in (0, 600):  # 600: CUDA_ERROR_NOT_READY
            raise DeviceFaultError(code, self.error_name(code), f"{self.error_text(code)}, in cuStreamQuery")
        return bool(code == 0)

    def upload_graph(self, executable: int, stream: int) -> bool:
        """Puts an executable graph onto the device without running it; False when the driver has no such function."""
        if "cuGraphUpload" not in self._functions:
            return False
        self._call("cuGraphUpload", executable, stream)
        return True


def find_device(driver: CudaDriver, gpu_uuid: str, *, is_alone: bool = False) -> tuple[int, int]:
    """Finds a device among those that this process sees.

    Args:
        driver: The driver.
        gpu_uuid: "GPU-..."; empty: the first.
        is_alone: The process is a client of an MPS daemon that has this GPU and no other: one that is seen alone is it,
            under whatever UUID (that a client is told the GPU's own is not documented).

    Returns:
        Ordinal and handle.

    Raises:
        DeviceFaultError: It is not there.
    """
    uuids: Sequence[str] = [driver.uuid(driver.device(index)) for index in range(driver.device_count())]
    if not uuids:
        raise DeviceFaultError(100, faults.name_of(100), "no CUDA device: the driver sees none")
    if not gpu_uuid:
        return 0, driver.device(0)
    if gpu_uuid not in uuids and not (is_alone and len(uuids) == 1):
        text = f"no CUDA device {gpu_uuid}: expected it among those visible, there is {', '.join(uuids)}"
        raise DeviceFaultError(101, faults.name_of(101), text)
    ordinal = uuids.index(gpu_uuid) if gpu_uuid in uuids else 0
    return ordinal, driver.device(ordinal)
