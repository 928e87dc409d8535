"""Builders of the values that the scheduler's tests work with."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from hasgpu_core.events import (
    DesiredInstance,
    HorizontalScaleEvent,
    InstanceEvent,
    NodeEvent,
    PlanEvent,
    PlannedInstance,
)
from hasgpu_core.function import MIB
from hasgpu_core.resources import Allocation, DeviceInfo, InstanceState


def allocation(request_permille: int = 300, sm_pct: int = 100, memory_mib: int = 100) -> Allocation:
    return Allocation(sm_pct, request_permille, max(request_permille, 500), memory_mib * MIB)


def device(node: str, gpu: str = "cpu0", memory_mib: int = 4096) -> DeviceInfo:
    return DeviceInfo(node, gpu, "cpu-2c", "cpu", memory_mib * MIB, (25, 50, 75, 100))


def node(name: str, *, beat: int = 1, gpus: tuple[str, ...] = ("cpu0",), draining: bool = False) -> NodeEvent:
    return NodeEvent(name, f"{name}:1", tuple(device(name, gpu) for gpu in gpus), beat, 0, draining)


def wanted(function: str, revision: int, *shares: tuple[int, Allocation], standby: tuple[int, ...] = ()):
    """`shares`: ordinal and allocation of each instance."""
    instances = tuple(DesiredInstance(f"{function}-{n}", a, n in standby) for n, a in shares)
    return HorizontalScaleEvent(function, revision, instances, "test", 0, 1)


def status(
    instance: str,
    node_name: str,
    share: Allocation,
    revision: int,
    *,
    row: int = 0,
    gpu: str = "cpu0",
    state: InstanceState = InstanceState.READY,
) -> InstanceEvent:
    return InstanceEvent(
        function=instance.rpartition("-")[0],
        instance=instance,
        node=node_name,
        gpu=gpu,
        row=row,
        state=state,
        reason="",
        address="127.0.0.1:1",
        allocation=share,
        allocation_revision=revision,
        function_revision=1,
        device_model="cpu-2c",
        plan_revision=1,
    )


def planned(instance: str, share: Allocation, *, row: int = 0) -> PlannedInstance:
    return PlannedInstance(instance.rpartition("-")[0], instance, "cpu0", row, share, 1)


def plan(node_name: str, revision: int, *entries: PlannedInstance) -> PlanEvent:
    return PlanEvent(node_name, revision, entries)


@pytest.fixture
def make() -> SimpleNamespace:
    return SimpleNamespace(
        allocation=allocation, device=device, node=node, wanted=wanted, status=status, planned=planned, plan=plan
    )
