"""Shared values to and from `hasgpu.common.v1`; enums go through explicit tables."""

from __future__ import annotations

from collections.abc import Mapping

from hasgpu.common.v1 import common_pb2
from hasgpu_core.errors import InvalidError
from hasgpu_core.function import Artifact, FunctionSpec, ModelFormat, TensorSpec, slo_class_of
from hasgpu_core.resources import Allocation, DeviceHealth, DeviceInfo, InstanceState, Row

_FORMAT_TO_PROTO: Mapping[ModelFormat, common_pb2.ModelFormat.ValueType] = {
    ModelFormat.PYTHON: common_pb2.MODEL_FORMAT_PYTHON,
    ModelFormat.TORCHSCRIPT: common_pb2.MODEL_FORMAT_TORCHSCRIPT,
    ModelFormat.TORCH_EXPORT: common_pb2.MODEL_FORMAT_TORCH_EXPORT,
}
_FORMAT_FROM_PROTO = {wire: value for value, wire in _FORMAT_TO_PROTO.items()}

_STATE_TO_PROTO: Mapping[InstanceState, common_pb2.InstanceState.ValueType] = {
    InstanceState.PENDING: common_pb2.INSTANCE_STATE_PENDING,
    InstanceState.LOADING: common_pb2.INSTANCE_STATE_LOADING,
    InstanceState.READY: common_pb2.INSTANCE_STATE_READY,
    InstanceState.DRAINING: common_pb2.INSTANCE_STATE_DRAINING,
    InstanceState.STOPPED: common_pb2.INSTANCE_STATE_STOPPED,
    InstanceState.FAILED: common_pb2.INSTANCE_STATE_FAILED,
}
_STATE_FROM_PROTO = {wire: value for value, wire in _STATE_TO_PROTO.items()}

_HEALTH_TO_PROTO: Mapping[DeviceHealth, common_pb2.DeviceHealth.ValueType] = {
    DeviceHealth.OK: common_pb2.DEVICE_HEALTH_OK,
    DeviceHealth.DEGRADED: common_pb2.DEVICE_HEALTH_DEGRADED,
    DeviceHealth.LOST: common_pb2.DEVICE_HEALTH_LOST,
}
_HEALTH_FROM_PROTO = {
    common_pb2.DEVICE_HEALTH_UNSPECIFIED: DeviceHealth.OK,  # by an agent that does not tell
    **{wire: value for value, wire in _HEALTH_TO_PROTO.items()},
}


def require(value: str, field: str) -> str:
    """Returns a name that must be there; raises InvalidError naming the wire field when it is empty."""
    if not value:
        raise InvalidError(field, expected="a name", got="nothing")
    return value


def require_field(present: bool, field: str) -> None:
    """Raises InvalidError when a sub-message that must be there is absent."""
    if not present:
        raise InvalidError(field, expected="a value", got="nothing")


def format_to_proto(value: ModelFormat) -> common_pb2.ModelFormat.ValueType:
    """Converts a model format."""
    return _FORMAT_TO_PROTO[value]


def format_from_proto(wire: common_pb2.ModelFormat.ValueType) -> ModelFormat:
    """Converts a model format; raises InvalidError for one that is unset or unknown here."""
    value = _FORMAT_FROM_PROTO.get(wire)
    if value is None:
        raise InvalidError("format", expected=" or ".join(f.value for f in ModelFormat), got=f"number {int(wire)}")
    return value


def instance_state_to_proto(value: InstanceState) -> common_pb2.InstanceState.ValueType:
    """Converts an instance's state."""
    return _STATE_TO_PROTO[value]


def instance_state_from_proto(wire: common_pb2.InstanceState.ValueType) -> InstanceState:
    """Converts an instance's state; raises InvalidError for one that is unset or unknown here."""
    value = _STATE_FROM_PROTO.get(wire)
    if value is None:
        raise InvalidError("state", expected=" or ".join(s.value for s in InstanceState), got=f"number {int(wire)}")
    return value


def device_health_to_proto(value: DeviceHealth) -> common_pb2.DeviceHealth.ValueType:
    """Converts a device's health."""
    return _HEALTH_TO_PROTO[value]


def device_health_from_proto(wire: common_pb2.DeviceHealth.ValueType) -> DeviceHealth:
    """Converts a device's health, unset is OK; raises InvalidError for one that is unknown here."""
    value = _HEALTH_FROM_PROTO.get(wire)
    if value is None:
        raise InvalidError("health", expected=" or ".join(h.value for h in DeviceHealth), got=f"number {int(wire)}")
    return value


def allocation_to_proto(value: Allocation) -> common_pb2.Allocation:
    """Converts an allocation; raises ValueError when a number does not fit its field."""
    return common_pb2.Allocation(
        sm_pct=value.sm_pct,
        request_permille=value.request_permille,
        limit_permille=value.limit_permille,
        memory_bytes=value.memory_bytes,
    )


def allocation_from_proto(wire: common_pb2.Allocation) -> Allocation:
    """Converts an allocation; its bounds are for `Allocation.validate`."""
    return Allocation(
        sm_pct=wire.sm_pct,
        request_permille=wire.request_permille,
        limit_permille=wire.limit_permille,
        memory_bytes=wire.memory_bytes,
    )


def tensor_spec_to_proto(value: TensorSpec) -> common_pb2.TensorSpec:
    """Converts a tensor's declaration."""
    return common_pb2.TensorSpec(name=value.name, datatype=value.datatype, shape=value.shape)


def tensor_spec_from_proto(wire: common_pb2.TensorSpec) -> TensorSpec:
    """Converts a tensor's declaration."""
    return TensorSpec(name=wire.name, datatype=wire.datatype, shape=tuple(wire.shape))


def spec_to_proto(value: FunctionSpec) -> common_pb2.FunctionSpec:
    """Converts a function's spec; raises ValueError when a number does not fit its field."""
    return common_pb2.FunctionSpec(
        name=value.name,
        format=format_to_proto(value.format),
        artifact=common_pb2.Artifact(sha256=value.artifact.sha256, size_bytes=value.artifact.size_bytes),
        entry=value.entry,
        inputs=[tensor_spec_to_proto(tensor) for tensor in value.inputs],
        outputs=[tensor_spec_to_proto(tensor) for tensor in value.outputs],
        slo_ms=value.slo_ms,
        slo_permille=value.slo_permille,
        timeout_ms=value.timeout_ms,
        max_batch=value.max_batch,
        min_instances=value.min_instances,
        max_instances=value.max_instances,
        standby=value.standby,
        memory_bytes=value.memory_bytes,
        max_queue=value.max_queue,
        parameters=dict(value.parameters),
        execution_timeout_ms=value.execution_timeout_ms,
        advisory=value.advisory,
        slo_class=value.slo_class.value,
        weight=value.weight,
    )


def spec_from_proto(wire: common_pb2.FunctionSpec) -> FunctionSpec:
    """Converts a function's spec as it came: bounds and defaults are for `FunctionSpec.validate` and the caller.

    Raises InvalidError for a missing name or an unknown format.
    """
    return FunctionSpec(
        name=require(wire.name, "name"),
        format=format_from_proto(wire.format),
        artifact=Artifact(sha256=wire.artifact.sha256, size_bytes=wire.artifact.size_bytes),
        entry=wire.entry,
        inputs=tuple(tensor_spec_from_proto(tensor) for tensor in wire.inputs),
        outputs=tuple(tensor_spec_from_proto(tensor) for tensor in wire.outputs),
        slo_ms=wire.slo_ms,
        slo_permille=wire.slo_permille,
        timeout_ms=wire.timeout_ms,
        max_batch=wire.max_batch,
        min_instances=wire.min_instances,
        max_instances=wire.max_instances,
        standby=wire.standby,
        memory_bytes=wire.memory_bytes,
        max_queue=wire.max_queue,
        parameters=dict(wire.parameters),
        execution_timeout_ms=wire.execution_timeout_ms,
        advisory=wire.advisory,
        slo_class=slo_class_of(wire.slo_class),
        weight=wire.weight or 100,
    )


def device_info_to_proto(value: DeviceInfo) -> common_pb2.Device:
    """Converts a device's description."""
    return common_pb2.Device(
        node=value.node,
        gpu=value.gpu,
        model=value.model,
        backend=value.backend,
        memory_bytes=value.memory_bytes,
        sm_rungs_pct=value.sm_rungs_pct,
        capabilities=value.capabilities,
        mode=value.mode,
        uuid=value.uuid,
        sm_count=value.sm_count,
        sm_granule_pct=value.sm_granule_pct,
        health=device_health_to_proto(value.health),
        health_reason=value.health_reason,
    )


def device_info_from_proto(wire: common_pb2.Device) -> DeviceInfo:
    """Converts a device's description; raises InvalidError for a missing node or name or an unknown health."""
    return DeviceInfo(
        node=require(wire.node, "device.node"),
        gpu=require(wire.gpu, "device.gpu"),
        model=wire.model,
        backend=wire.backend,
        memory_bytes=wire.memory_bytes,
        sm_rungs_pct=tuple(wire.sm_rungs_pct),
        capabilities=tuple(wire.capabilities),
        mode=wire.mode,
        uuid=wire.uuid,
        sm_count=wire.sm_count,
        sm_granule_pct=wire.sm_granule_pct or 1,
        health=device_health_from_proto(wire.health),
        health_reason=wire.health_reason,
    )


def row_to_proto(value: Row) -> common_pb2.Row:
    """Converts a row."""
    return common_pb2.Row(index=value.index, sm_pct=value.sm_pct, used_permille=value.used_permille)


def row_from_proto(wire: common_pb2.Row) -> Row:
    """Converts a row."""
    return Row(index=wire.index, sm_pct=wire.sm_pct, used_permille=wire.used_permille)
