"""What NVML tells of the host's NVIDIA GPUs: inventory, health, telemetry.

NVML is asked through `pynvml` (the package nvidia-ml-py), which is imported when `Nvml.open` is called. A host without
the package, without a driver or without a GPU gets an inventory with no GPU and a reason in words. Under MPS, NVML
books all clients' work on the server: device time per worker comes from the worker.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import ModuleType
from typing import TypeVar

from hasgpu_device.backends.cuda import xids

log = logging.getLogger(__name__)

T = TypeVar("T")

CORES_PER_SM: Mapping[tuple[int, int], int] = {
    (7, 0): 64,
    (7, 2): 64,
    (7, 5): 64,
    (8, 0): 64,
    (8, 6): 128,
    (8, 7): 128,
    (8, 9): 128,
    (9, 0): 128,
    (10, 0): 128,
    (10, 3): 128,
    (11, 0): 128,
    (12, 0): 128,
    (12, 1): 128,
}
"""FP32 cores of an SM by compute capability (CUDA programming guide, "Compute Capabilities")."""
COMPUTE_MODES = ("DEFAULT", "EXCLUSIVE_THREAD", "PROHIBITED", "EXCLUSIVE_PROCESS")
"""By their number in nvml.h."""
NO_GPU = "no NVIDIA GPU"


class Health(StrEnum):
    """How a GPU is."""

    OK = "ok"
    DEGRADED = "degraded"
    """It works, and should be looked at: memory errors, pages or rows to be retired at the next reset."""
    LOST = "lost"
    """It fell off the bus or vanished from NVML; nothing on it works until a reset."""
    UNKNOWN = "unknown"
    """NVML gave no answer."""


@dataclass(frozen=True, slots=True)
class GpuFacts:
    """A GPU's unchanging facts."""

    index: int
    """NVML's; not stable over reboots, unlike the UUID."""
    uuid: str
    name: str
    """As NVML writes it: "NVIDIA H100 80GB HBM3"."""
    memory_bytes: int
    compute_capability: tuple[int, int] | None
    sm_count: int | None
    """From the number of cores; None: not told, or a capability that this version does not know."""
    compute_mode: str
    """DEFAULT, EXCLUSIVE_PROCESS, ... ; "" when not told. Reported, never changed."""
    notes: tuple[str, ...] = ()
    """What is odd about it, in words."""

    @property
    def model(self) -> str:
        """What predictions are keyed by: the name with dashes for spaces."""
        return "-".join(self.name.split())


@dataclass(frozen=True, slots=True)
class RefusedGpu:
    """A GPU that can't be served from."""

    index: int
    uuid: str
    """Empty when NVML did not tell it."""
    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class Inventory:
    """The GPUs of a host."""

    gpus: tuple[GpuFacts, ...] = ()
    refused: tuple[RefusedGpu, ...] = ()
    driver_version: str = ""
    """Such as "580.65.06"."""
    cuda_version: tuple[int, int] | None = None
    """Newest CUDA that the driver supports."""
    reason: str = ""
    """Why there is no GPU, beginning "no NVIDIA GPU:"; empty when there is one."""

    def find(self, which: str) -> GpuFacts | None:
        """Returns the GPU with an index ("0") or a UUID; None: none such, or it was refused."""
        return next((gpu for gpu in self.gpus if which in (gpu.uuid, str(gpu.index))), None)


@dataclass(frozen=True, slots=True)
class Telemetry:
    """One look at a GPU. None: NVML offers no such figure here; never zero in its stead."""

    uuid: str
    health: Health
    reason: str
    """Why the health is not OK, in words that name the GPU; empty when it is."""
    memory_used_bytes: int | None = None
    memory_total_bytes: int | None = None
    busy_pct: int | None = None
    """Share of the last sample period in which a kernel ran, whatever it filled."""
    power_mw: int | None = None
    power_limit_mw: int | None = None
    temperature_c: int | None = None
    sm_clock_mhz: int | None = None
    memory_clock_mhz: int | None = None
    throttle_reasons: int | None = None
    """Bits of nvmlClocksEventReasons."""
    ecc_uncorrected_count: int | None = None
    """Since the last reboot."""
    xid: int | None = None
    """Newest Xid of the hardware, else the newest, since this process watches; 0: none."""


class Nvml:
    """NVML, opened. Methods never raise an error of NVML's: what is wrong is in the answer.

    Not to be called by two threads at once.
    """

    def __init__(self, module: ModuleType | None, reason: str) -> None:
        self._nvml = module
        self._reason = reason
        self._names: dict[str, str] = {}
        self._xids = xids.XidWatch(module) if module is not None else None

    @classmethod
    def open(cls) -> Nvml:
        """Loads and initialises NVML; where that fails, the inventory says why."""
        try:
            import pynvml
        except ImportError as error:
            return cls(None, f"{NO_GPU}: the Python package nvidia-ml-py is not installed ({error})")
        try:
            pynvml.nvmlInit()
        except pynvml.NVMLError as error:
            return cls(None, f"{NO_GPU}: {_init_in_words(error.value, str(error))}")
        return cls(pynvml, "")

    def close(self) -> None:
        """Shuts NVML down; may be repeated."""
        if self._nvml is None:
            return
        if self._xids is not None:
            self._xids.close()
        module, self._nvml, self._reason = self._nvml, None, f"{NO_GPU}: NVML was closed"
        try:
            module.nvmlShutdown()
        except module.NVMLError as error:
            log.info("NVML did not shut down: %s", error)

    def inventory(self) -> Inventory:
        """Returns the host's GPUs, those that can't be used with a reason."""
        nvml = self._nvml
        if nvml is None:
            return Inventory(reason=self._reason)
        driver = self._ask(nvml.nvmlSystemGetDriverVersion) or ""
        number = self._ask(nvml.nvmlSystemGetCudaDriverVersion_v2)
        cuda = (number // 1000, number % 1000 // 10) if number else None
        try:
            count = nvml.nvmlDeviceGetCount()
        except nvml.NVMLError as error:
            return Inventory(driver_version=driver, cuda_version=cuda, reason=f"{NO_GPU}: {error}")
        gpus: list[GpuFacts] = []
        refused: list[RefusedGpu] = []
        for index in range(count):
            found = self._describe(index)
            if isinstance(found, GpuFacts):
                gpus.append(found)
                self._names[found.uuid] = found.name
            else:
                refused.append(found)
        reason = ""
        if not gpus:
            told = "; ".join(f"GPU {gpu.index} {gpu.name or gpu.uuid}: {gpu.reason}" for gpu in refused)
            reason = f"{NO_GPU}: {told or 'the driver lists none'}"
        return Inventory(tuple(gpus), tuple(refused), driver, cuda, reason)

    def telemetry(self, gpu_uuid: str) -> Telemetry:
        """Looks at a GPU; one that is gone is told as lost, under its name."""
        nvml = self._nvml
        label = f"{self._names[gpu_uuid]} ({gpu_uuid})" if gpu_uuid in self._names else gpu_uuid
        if nvml is None:
            return Telemetry(gpu_uuid, Health.UNKNOWN, f"{label}: {self._reason}")
        try:
            device = nvml.nvmlDeviceGetHandleByUUID(gpu_uuid)
            memory = nvml.nvmlDeviceGetMemoryInfo(device)
        except nvml.NVMLError as error:
            lost = error.value in (nvml.NVML_ERROR_GPU_IS_LOST, nvml.NVML_ERROR_NOT_FOUND)
            health = Health.LOST if lost else Health.UNKNOWN
            words = (
                "has vanished: NVML does not know it any more" if error.value == nvml.NVML_ERROR_NOT_FOUND else error
            )
            return Telemetry(gpu_uuid, health, f"{label}: {words}")
        return self._look(nvml, device, gpu_uuid, label, memory)

    def _look(self, nvml: ModuleType, device: object, gpu_uuid: str, label: str, memory: object) -> Telemetry:
        busy = self._ask(nvml.nvmlDeviceGetUtilizationRates, device)
        ecc = self._ask(
            nvml.nvmlDeviceGetTotalEccErrors, device, nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_VOLATILE_ECC
        )
        xid = self._xids.newest(gpu_uuid, device) if self._xids is not None else None
        troubles = self._troubles(nvml, device, ecc)
        if xid is not None and xid in xids.HARDWARE:
            troubles.insert(0, f"Xid {xid}: {xids.HARDWARE[xid]}")
        return Telemetry(
            uuid=gpu_uuid,
            health=Health.LOST if xid == xids.LOST else Health.DEGRADED if troubles else Health.OK,
            reason=f"{label}: {'; '.join(troubles)}" if troubles else "",
            memory_used_bytes=int(memory.used),  # type: ignore[attr-defined]  # a ctypes structure of pynvml
            memory_total_bytes=int(memory.total),  # type: ignore[attr-defined]  # likewise
            busy_pct=int(busy.gpu) if busy is not None else None,
            power_mw=self._ask(nvml.nvmlDeviceGetPowerUsage, device),
            power_limit_mw=self._ask(nvml.nvmlDeviceGetEnforcedPowerLimit, device),
            temperature_c=self._temperature(nvml, device),
            sm_clock_mhz=self._ask(nvml.nvmlDeviceGetClockInfo, device, nvml.NVML_CLOCK_SM),
            memory_clock_mhz=self._ask(nvml.nvmlDeviceGetClockInfo, device, nvml.NVML_CLOCK_MEM),
            throttle_reasons=self._throttle_reasons(nvml, device),
            ecc_uncorrected_count=ecc,
            xid=xid,
        )

    def _describe(self, index: int) -> GpuFacts | RefusedGpu:
        assert self._nvml is not None
        nvml = self._nvml
        uuid = name = ""
        try:
            device = nvml.nvmlDeviceGetHandleByIndex(index)
            uuid = nvml.nvmlDeviceGetUUID(device)
            name = nvml.nvmlDeviceGetName(device)
            memory_bytes = int(nvml.nvmlDeviceGetMemoryInfo(device).total)
        except nvml.NVMLError as error:
            return RefusedGpu(index, uuid, name, _device_in_words(nvml, error.value, str(error)))
        mig = self._ask(nvml.nvmlDeviceGetMigMode, device)
        if mig is not None and nvml.NVML_DEVICE_MIG_ENABLE in mig:
            when = "is enabled" if mig[0] == nvml.NVML_DEVICE_MIG_ENABLE else "will be enabled at the next reset"
            return RefusedGpu(index, uuid, name, f"MIG mode {when}; hasgpu shares whole GPUs: nvidia-smi -mig 0")
        mode_number = self._ask(nvml.nvmlDeviceGetComputeMode, device)
        mode = "" if mode_number is None else _at(COMPUTE_MODES, mode_number)
        if mode == "PROHIBITED":
            return RefusedGpu(index, uuid, name, "compute mode PROHIBITED allows no CUDA process: nvidia-smi -c 0")
        notes = []
        if mode.startswith("EXCLUSIVE"):
            notes.append(f"compute mode {mode}: without MPS only one process can use it")
        capability = self._ask(nvml.nvmlDeviceGetCudaComputeCapability, device)
        cores = self._ask(nvml.nvmlDeviceGetNumGpuCores, device)
        per_sm = CORES_PER_SM.get(tuple(capability)) if capability is not None else None
        return GpuFacts(
            index=index,
            uuid=uuid,
            name=name,
            memory_bytes=memory_bytes,
            compute_capability=(capability[0], capability[1]) if capability is not None else None,
            sm_count=cores // per_sm if cores and per_sm and cores % per_sm == 0 else None,
            compute_mode=mode,
            notes=tuple(notes),
        )

    def _troubles(self, nvml: ModuleType, device: object, ecc_uncorrected_count: int | None) -> list[str]:
        """Returns what is wrong with a GPU that works, in words; figures that it does not offer are no trouble."""
        troubles = []
        if ecc_uncorrected_count:
            troubles.append(f"{ecc_uncorrected_count} uncorrected memory errors since the last reboot")
        if self._ask(nvml.nvmlDeviceGetRetiredPagesPendingStatus, device):
            troubles.append("memory pages are to be retired at the next reset")
        cause = nvml.NVML_PAGE_RETIREMENT_CAUSE_DOUBLE_BIT_ECC_ERROR
        if pages := self._ask(nvml.nvmlDeviceGetRetiredPages, device, cause):
            troubles.append(f"{len(pages)} memory pages retired after double-bit errors")
        rows = self._ask(nvml.nvmlDeviceGetRemappedRows, device)
        if rows is not None and rows[2]:
            troubles.append("memory rows are to be remapped at the next reset")
        if rows is not None and rows[3]:
            troubles.append("remapping memory rows failed: the board is to be replaced")
        return troubles

    def _temperature(self, nvml: ModuleType, device: object) -> int | None:
        newer = getattr(nvml, "nvmlDeviceGetTemperatureV", None)
        value = self._ask(newer, device, nvml.NVML_TEMPERATURE_GPU) if newer is not None else None
        if value is None:
            # Drivers before 570 know only the older function.
            value = self._ask(nvml.nvmlDeviceGetTemperature, device, nvml.NVML_TEMPERATURE_GPU)
        return value

    def _throttle_reasons(self, nvml: ModuleType, device: object) -> int | None:
        newer = getattr(nvml, "nvmlDeviceGetCurrentClocksEventReasons", None)
        return self._ask(newer or nvml.nvmlDeviceGetCurrentClocksThrottleReasons, device)

    def _ask(self, function: Callable[..., T], *arguments: object) -> T | None:
        """Calls a function of NVML; None when this GPU, driver or user is not offered it."""
        assert self._nvml is not None
        try:
            return function(*arguments)
        except self._nvml.NVMLError as error:
            log.debug("%s: %s", getattr(function, "__name__", function), error)
            return None


def _at(names: tuple[str, ...], number: int) -> str:
    return names[number] if 0 <= number < len(names) else f"number {number}"


def _init_in_words(code: int, text: str) -> str:
    """Returns why NVML does not initialise (codes of nvml.h)."""
    return {
        12: "libnvidia-ml.so.1 is not installed (it comes with the NVIDIA driver)",
        9: "the NVIDIA kernel driver is not loaded",
        4: "this user may not ask the NVIDIA driver (no permission on /dev/nvidiactl)",
        18: "the driver's library and its kernel module are of different versions; reboot or reload the module",
        15: "the GPU has fallen off the bus",
    }.get(code, f"NVML does not initialise: {text}")


def _device_in_words(nvml: ModuleType, code: int, text: str) -> str:
    if code == nvml.NVML_ERROR_GPU_IS_LOST:
        return "lost: it has fallen off the bus and needs a reset"
    if code == nvml.NVML_ERROR_NO_PERMISSION:
        return "this user may not use it (no permission on its /dev/nvidia file)"
    if code == nvml.NVML_ERROR_INSUFFICIENT_POWER:
        return "its external power cables are not attached"
    return text
