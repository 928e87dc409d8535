from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
from hasgpu.common.v1 import common_pb2
from hasgpu.events.v1 import events_pb2
from hasgpu_core import events
from hasgpu_core.capacity import CapacityPoint, CapacityTable
from hasgpu_core.errors import InvalidError
from hasgpu_core.function import Artifact, FunctionSpec, ModelFormat, TensorSpec
from hasgpu_core.resources import Allocation, DeviceHealth, DeviceInfo, InstanceState, Row
from hasgpu_runtime import wire
from hypothesis import given, settings
from hypothesis import strategies as st

U32 = st.integers(0, 2**32 - 1)
U64 = st.integers(0, 2**64 - 1)
I64 = st.integers(-(2**63), 2**63 - 1)
TEXT = st.text(max_size=20)
NAME = st.text(min_size=1, max_size=20)

ALLOCATION = st.builds(Allocation, U32, U32, U32, U64)
TENSOR = st.builds(TensorSpec, TEXT, TEXT, st.lists(I64, max_size=4).map(tuple))
SPEC = st.builds(
    FunctionSpec,
    name=NAME,
    format=st.sampled_from(ModelFormat),
    artifact=st.builds(Artifact, TEXT, U64),
    entry=TEXT,
    inputs=st.lists(TENSOR, max_size=2).map(tuple),
    outputs=st.lists(TENSOR, max_size=2).map(tuple),
    slo_ms=U32,
    slo_permille=U32,
    timeout_ms=U32,
    max_batch=U32,
    min_instances=U32,
    max_instances=U32,
    standby=U32,
    memory_bytes=U64,
    max_queue=U32,
    parameters=st.dictionaries(TEXT, TEXT, max_size=2),
    execution_timeout_ms=U32,
)
DEVICE = st.builds(
    DeviceInfo,
    *(NAME, NAME, TEXT, TEXT, U64, st.lists(U32, max_size=4).map(tuple), st.lists(TEXT, max_size=2).map(tuple)),
    mode=TEXT,
    uuid=TEXT,
    sm_count=U32,
    sm_granule_pct=st.integers(1, 100),
    health=st.sampled_from(DeviceHealth),
    health_reason=TEXT,
)
ROW = st.builds(Row, U32, U32, U32)
DESIRED = st.builds(events.DesiredInstance, NAME, ALLOCATION, st.booleans())
PLANNED = st.builds(events.PlannedInstance, NAME, NAME, NAME, U32, ALLOCATION, U64, st.booleans())
OBSERVATION = st.builds(events.BatchObservation, U32, U32, U32, U64, U64, st.none() | U64)
POINT = st.builds(
    CapacityPoint,
    batch=U32,
    sm_pct=U32,
    quota_permille=U32,
    latency_s=U32.map(lambda us: us / 1_000_000),
    capacity_rps=st.integers(0, 2**50).map(lambda milli: milli / 1_000),
)


def demand(
    percentiles: tuple[int, int, int] | None, counts: list[int], names: list[str], at: int
) -> events.DemandEvent:
    p50, p95, p99 = percentiles or (None, None, None)
    return events.DemandEvent(
        names[0],
        names[1],
        names[2],
        at,
        *counts[:8],
        arrived_items_count=counts[8],
        queued_items_count=counts[9],
        window_count=7 if percentiles else 0,
        p50_ms=p50,
        p95_ms=p95,
        p99_ms=p99,
    )


EVENTS: dict[str, tuple[st.SearchStrategy[Any], Callable[[bytes], Any]]] = {
    "function": (st.builds(events.FunctionEvent, SPEC, U64, I64), wire.decode_function),
    "demand": (
        st.builds(
            demand,
            st.none() | st.tuples(U32, U32, U32),
            st.lists(U32, min_size=10, max_size=10),
            st.lists(NAME, min_size=3, max_size=3),
            I64,
        ),
        wire.decode_demand,
    ),
    "instance": (
        st.builds(
            events.InstanceEvent,
            *(NAME, NAME, NAME, TEXT, U32, st.sampled_from(InstanceState), TEXT, TEXT, ALLOCATION),
            *(U64, U64, TEXT, U64, U64, I64, U64, U32, I64, st.lists(OBSERVATION, max_size=2).map(tuple)),
        ),
        wire.decode_instance,
    ),
    "node": (
        st.builds(events.NodeEvent, NAME, TEXT, st.lists(DEVICE, max_size=2).map(tuple), I64, U64, st.booleans()),
        wire.decode_node,
    ),
    "device": (
        st.builds(
            events.DeviceEvent,
            *(DEVICE, st.lists(ROW, max_size=2).map(tuple), U64, U32, I64, U64),
            measured_memory_bytes=st.none() | U64,
            power_mw=st.none() | U64,
            utilisation_pct=st.none() | U32,
            temperature_c=st.none() | st.integers(-(2**31), 2**31 - 1),
            sm_clock_mhz=st.none() | U32,
        ),
        wire.decode_device,
    ),
    "capacity": (
        st.builds(CapacityTable, NAME, U64, NAME, U64, I64, U32, st.lists(POINT, max_size=3).map(tuple), TEXT, TEXT),
        wire.decode_capacity,
    ),
    "vertical": (
        st.builds(events.VerticalScaleEvent, NAME, NAME, NAME, ALLOCATION, U64, TEXT, I64),
        wire.decode_vertical,
    ),
    "horizontal": (
        st.builds(events.HorizontalScaleEvent, NAME, U64, st.lists(DESIRED, max_size=3).map(tuple), TEXT, I64, U64),
        wire.decode_horizontal,
    ),
    "plan": (
        st.builds(events.PlanEvent, NAME, U64, st.lists(PLANNED, max_size=3).map(tuple), U64, TEXT),
        wire.decode_plan,
    ),
}


@pytest.mark.parametrize("kind", EVENTS)
@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_every_event_survives_the_wire(kind, data):
    strategy, decode = EVENTS[kind]
    event = data.draw(strategy)
    assert decode(wire.encode(event)) == event


@pytest.mark.parametrize("kind", EVENTS)
@pytest.mark.parametrize("payload", [b"", b"\xff\xff\xff", b"\x0a\x05abc"])
def test_a_malformed_payload_is_invalid(kind, payload):
    with pytest.raises(InvalidError):
        EVENTS[kind][1](payload)


def test_an_unset_or_unknown_enum_is_invalid():
    wired = wire.spec_to_proto(spec())
    for number in (0, 99):
        wired.format = number
        with pytest.raises(InvalidError, match="format"):
            wire.spec_from_proto(wired)
    with pytest.raises(InvalidError, match="state"):
        wire.instance_state_from_proto(common_pb2.INSTANCE_STATE_UNSPECIFIED)


def test_an_agent_that_does_not_tell_a_devices_health_means_ok_and_an_unknown_one_is_invalid():
    quiet = common_pb2.Device(node="n", gpu="gpu0")
    found = wire.device_info_from_proto(quiet)
    assert (found.health, found.sm_granule_pct) == (DeviceHealth.OK, 1)
    quiet.ParseFromString(quiet.SerializeToString() + b"\x60\x63")  # field 12, number 99
    with pytest.raises(InvalidError, match="health: expected ok or degraded or lost, got number 99"):
        wire.device_info_from_proto(quiet)


def test_what_the_driver_does_not_tell_is_not_zero():
    device = DeviceInfo("n", "gpu0", "m", "cuda", 1, (100,))
    unknown = events.DeviceEvent(device, (), 0, 0, 0, 0)
    zero = dataclasses.replace(unknown, measured_memory_bytes=0, power_mw=0, utilisation_pct=0, temperature_c=0)
    assert wire.decode_device(wire.encode(unknown)) == unknown
    assert wire.decode_device(wire.encode(zero)) == zero


def test_every_enum_value_has_a_number_of_its_own():
    formats = [wire.format_to_proto(value) for value in ModelFormat]
    assert sorted([0, *formats]) == sorted(common_pb2.ModelFormat.values())
    states = [wire.instance_state_to_proto(value) for value in InstanceState]
    assert sorted([0, *states]) == sorted(common_pb2.InstanceState.values())
    healths = [wire.device_health_to_proto(value) for value in DeviceHealth]
    assert sorted([0, *healths]) == sorted(common_pb2.DeviceHealth.values())


def test_a_missing_allocation_is_invalid():
    with pytest.raises(InvalidError, match="allocation"):
        wire.desired_instance_from_proto(events_pb2.DesiredInstance(instance="f-1"))


def test_a_number_that_does_not_fit_is_invalid_when_encoded():
    event = events.NodeEvent("n", "", (), observed_unix_ns=0, plan_revision=-1)
    with pytest.raises(InvalidError, match="NodeEvent"):
        wire.encode(event)


def test_seconds_and_rates_are_rounded_to_the_wires_units():
    point = CapacityPoint(batch=4, sm_pct=50, quota_permille=300, latency_s=0.0123456789, capacity_rps=123.45678)
    wired = wire.capacity_point_to_proto(point)
    assert (wired.latency_us, wired.capacity_millirps) == (12_346, 123_457)
    back = wire.capacity_point_from_proto(wired)
    assert dataclasses.astuple(back) == (4, 50, 300, 0.012346, 123.457)


def spec() -> FunctionSpec:
    return FunctionSpec("f", ModelFormat.PYTHON, Artifact("0" * 64, 1), "handler.py", (), (), slo_ms=100)
