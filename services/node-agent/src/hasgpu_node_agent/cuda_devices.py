"""The host's NVIDIA GPUs as devices: NVML's inventory, and what the probe proves of each."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from hasgpu_core.errors import InvalidError, UnavailableError
from hasgpu_core.resources import DeviceInfo
from hasgpu_device.backends.cuda.mps import MpsDaemon
from hasgpu_device.backends.cuda.nvml import GpuFacts, Inventory, Nvml
from hasgpu_device.backends.cuda.probe import Probe
from hasgpu_device.backends.cuda.probe_findings import (
    NO_MODE,
    Findings,
    ModeChoice,
    ProbeCache,
    capabilities,
    choose_mode,
)

from hasgpu_node_agent.settings import DeviceSetting

log = logging.getLogger(__name__)

SETTING = "HASGPU_DEVICES"


class CudaHost:
    """Finds the GPUs that the settings name. Its methods block, for a minute a GPU that was never probed.

    Args:
        environment: What the probe's processes inherit, PATH included.
        mps_folder: Returns the folder of a device's MPS daemon.
        cache: File in which the probe's findings are kept.
        open_nvml: Opens NVML.
        probe: Probes a GPU (UUID, mode asked for, pipe directory of a daemon that runs there).
    """

    def __init__(
        self,
        *,
        environment: Mapping[str, str],
        mps_folder: Callable[[str], Path],
        cache: Path,
        open_nvml: Callable[[], Nvml] = Nvml.open,
        probe: Callable[[str, str, Path | None], Findings] | None = None,
    ) -> None:
        self._environment = environment
        self._mps_folder = mps_folder
        self._cache = cache
        self._open_nvml = open_nvml
        self._probe = probe or self._run_probe

    def devices(self, node: str, settings: Sequence[DeviceSetting]) -> tuple[DeviceInfo, ...]:
        """Returns the devices, named gpu<NVML's index>, in the order of the settings.

        Raises:
            UnavailableError: There is no GPU, with what NVML said, or one can't be used at all.
            InvalidError: A GPU that the settings name is not there, is refused (MIG), or is named twice.
        """
        if not settings:
            return ()
        nvml = self._open_nvml()
        try:
            inventory = nvml.inventory()
        finally:
            nvml.close()
        chosen: dict[str, GpuFacts] = {}
        devices = []
        for setting in settings:
            for facts in _chosen(inventory, setting):
                if facts.uuid in chosen:
                    raise InvalidError(SETTING, expected="each GPU once", got=f"GPU {facts.index} ({facts.uuid}) twice")
                chosen[facts.uuid] = facts
                device = self._device(node, facts, setting)
                if device is not None:
                    devices.append(device)
        if not devices:
            raise UnavailableError(f"{SETTING}=cuda: none of the GPUs can be used; the log says why")
        return tuple(devices)

    def _device(self, node: str, facts: GpuFacts, setting: DeviceSetting) -> DeviceInfo | None:
        name = f"gpu{facts.index}"
        log.info("%s: probing %s (%s)", name, facts.name, facts.uuid)
        findings = self._probe(facts.uuid, setting.mode, self._pipe_dir(name, facts.uuid))
        choice = choose_mode(findings, setting.mode)
        if choice.mode == NO_MODE:
            reason = f"{SETTING}: {facts.name} ({facts.uuid}) can't be used: {'; '.join(choice.reasons)}"
            if setting.gpu:
                raise UnavailableError(reason)
            log.error("%s", reason)
            return None
        if setting.mode and choice.mode != setting.mode:
            log.warning("%s: mode %s, not %s: %s", name, choice.mode, setting.mode, "; ".join(choice.reasons))
        return _info(node, name, facts, findings, choice)

    def _pipe_dir(self, name: str, uuid: str) -> Path | None:
        """The pipes of a daemon that an earlier agent left, as whose client the probe has to run."""
        daemon = MpsDaemon(uuid, self._mps_folder(name), environment=self._environment)
        found = daemon.pipe_dir if daemon.adopt() and not daemon.is_static else None
        daemon.let_go()
        return found

    def _run_probe(self, uuid: str, mode: str, pipe_dir: Path | None) -> Findings:
        probe = Probe(uuid, environment=self._environment, wanted=mode, pipe_dir=pipe_dir)
        try:
            return probe.run(ProbeCache(self._cache))
        except OSError as error:
            raise UnavailableError(f"{uuid} can't be probed: {error}") from error


def _chosen(inventory: Inventory, setting: DeviceSetting) -> Iterator[GpuFacts]:
    if not setting.gpu:
        if not inventory.gpus:
            raise UnavailableError(f"{SETTING}=cuda: {inventory.reason}")
        for refused in inventory.refused:
            log.warning("GPU %d %s (%s) is left out: %s", refused.index, refused.name, refused.uuid, refused.reason)
        yield from inventory.gpus
        return
    facts = inventory.find(setting.gpu)
    if facts is not None:
        yield facts
        return
    for refused in inventory.refused:
        if setting.gpu in (refused.uuid, str(refused.index)):
            got = f"GPU {refused.index} {refused.name} ({refused.uuid}): {refused.reason}"
            raise InvalidError(f"{SETTING}: gpu", expected="a GPU that can be shared", got=got)
    there = ", ".join(f"{gpu.index} ({gpu.uuid})" for gpu in inventory.gpus)
    if not there:
        raise UnavailableError(f"{SETTING}: gpu={setting.gpu}: {inventory.reason}")
    raise InvalidError(f"{SETTING}: gpu", expected=f"one of {there}", got=setting.gpu)


def _info(node: str, name: str, facts: GpuFacts, findings: Findings, choice: ModeChoice) -> DeviceInfo:
    rungs = choice.sm_rungs_pct or (100,)
    return DeviceInfo(
        node=node,
        gpu=name,
        model=facts.model,
        backend="cuda",
        memory_bytes=facts.memory_bytes,
        sm_rungs_pct=rungs,
        # `hasgpu profile` takes the driver's version from there.
        capabilities=(*capabilities(findings, choice), f"driver: {findings.driver_version}", *facts.notes),
        mode=choice.mode,
        uuid=facts.uuid,
        sm_count=facts.sm_count or 0,
        # Nothing below the smallest width was proven to hold.
        sm_granule_pct=min(rungs),
    )
