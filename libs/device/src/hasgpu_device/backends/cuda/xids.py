"""Xid events: the errors that NVIDIA's kernel driver logs, heard through NVML.

Source: NVIDIA's "XID Errors" catalogue.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from types import ModuleType

log = logging.getLogger(__name__)

HARDWARE: Mapping[int, str] = {
    48: "double-bit memory error",
    62: "halt of the internal micro-controller",
    64: "memory row or page could not be retired",
    74: "NVLink error",
    79: "the GPU has fallen off the bus",
    92: "many single-bit memory errors",
    95: "uncontained memory error",
    119: "no answer from the GPU system processor",
    120: "error of the GPU system processor",
    140: "memory error that was not recovered",
}
"""Of the device itself; others (13, 31, 43, 45, 94, ...) come from what runs on it, or were contained."""
LOST = 79
MAX_EVENTS = 64
"""Taken at one look; more wait for the next."""


class XidWatch:
    """Collects the Xid events of GPUs; where NVML offers none, it hears nothing and says so.

    Args:
        nvml: pynvml, initialised.
    """

    def __init__(self, nvml: ModuleType) -> None:
        self._nvml = nvml
        self._heard: dict[str, list[int]] = {}
        self._refused: set[str] = set()
        try:
            self._events: object | None = nvml.nvmlEventSetCreate()
        except nvml.NVMLError as error:
            log.info("NVML offers no events: %s", error)
            self._events = None

    def newest(self, gpu_uuid: str, device: object) -> int | None:
        """Returns a GPU's newest Xid of HARDWARE, else its newest; 0: none since it is watched; None: not offered.

        The first call for a GPU begins to watch it.
        """
        if self._events is None or not self._watch(gpu_uuid, device):
            return None
        self._drain(self._events)
        heard = self._heard[gpu_uuid]
        return next((xid for xid in reversed(heard) if xid in HARDWARE), heard[-1] if heard else 0)

    def close(self) -> None:
        """Ends watching."""
        events, self._events = self._events, None
        if events is None:
            return
        try:
            self._nvml.nvmlEventSetFree(events)
        except self._nvml.NVMLError as error:
            log.info("NVML's event set was not freed: %s", error)

    def _watch(self, gpu_uuid: str, device: object) -> bool:
        if gpu_uuid in self._heard:
            return True
        if gpu_uuid in self._refused:
            return False
        try:
            self._nvml.nvmlDeviceRegisterEvents(device, self._nvml.nvmlEventTypeXidCriticalError, self._events)
        except self._nvml.NVMLError as error:
            log.info("NVML offers no Xid events of %s: %s", gpu_uuid, error)
            self._refused.add(gpu_uuid)
            return False
        self._heard[gpu_uuid] = []
        return True

    def _drain(self, events: object) -> None:
        for _ in range(MAX_EVENTS):
            try:
                event = self._nvml.nvmlEventSetWait_v2(events, 0)
                gpu_uuid = self._nvml.nvmlDeviceGetUUID(event.device)
            except self._nvml.NVMLError as error:
                if error.value != self._nvml.NVML_ERROR_TIMEOUT:
                    log.debug("NVML's events: %s", error)
                return
            heard = self._heard.setdefault(gpu_uuid, [])
            heard.append(int(event.eventData))
            del heard[:-MAX_EVENTS]
            log.warning("Xid %d of %s", event.eventData, gpu_uuid)
