"""Events to and from `hasgpu.events.v1`; seconds become µs and requests per second become thousandths here."""

from __future__ import annotations

from hasgpu.events.v1 import events_pb2
from hasgpu_core.capacity import CapacityPoint, CapacityTable
from hasgpu_core.events import (
    BatchObservation,
    DemandEvent,
    DesiredInstance,
    DeviceEvent,
    FunctionEvent,
    HorizontalScaleEvent,
    InstanceEvent,
    NodeEvent,
    PlanEvent,
    PlannedInstance,
    VerticalScaleEvent,
)

from hasgpu_runtime.wire.values import (
    allocation_from_proto,
    allocation_to_proto,
    device_info_from_proto,
    device_info_to_proto,
    instance_state_from_proto,
    instance_state_to_proto,
    require,
    require_field,
    row_from_proto,
    row_to_proto,
    spec_from_proto,
    spec_to_proto,
)

_US_PER_S = 1_000_000
_MILLI = 1_000


def function_event_to_proto(value: FunctionEvent) -> events_pb2.FunctionEvent:
    """Converts a function's declaration."""
    return events_pb2.FunctionEvent(
        spec=spec_to_proto(value.spec), revision=value.revision, updated_unix_ns=value.updated_unix_ns
    )


def function_event_from_proto(wire: events_pb2.FunctionEvent) -> FunctionEvent:
    """Converts a function's declaration; raises InvalidError as `spec_from_proto` does."""
    return FunctionEvent(spec=spec_from_proto(wire.spec), revision=wire.revision, updated_unix_ns=wire.updated_unix_ns)


def demand_event_to_proto(value: DemandEvent) -> events_pb2.DemandEvent:
    """Converts a gateway's counters; percentiles that are None are left out."""
    return events_pb2.DemandEvent(
        function=value.function,
        gateway=value.gateway,
        epoch=value.epoch,
        observed_unix_ns=value.observed_unix_ns,
        arrived_count=value.arrived_count,
        ok_count=value.ok_count,
        failed_count=value.failed_count,
        refused_count=value.refused_count,
        late_count=value.late_count,
        queued_count=value.queued_count,
        in_flight_count=value.in_flight_count,
        oldest_wait_ms=value.oldest_wait_ms,
        window_count=value.window_count,
        p50_ms=value.p50_ms or 0,
        p95_ms=value.p95_ms or 0,
        p99_ms=value.p99_ms or 0,
        arrived_items_count=value.arrived_items_count,
        queued_items_count=value.queued_items_count,
    )


def demand_event_from_proto(wire: events_pb2.DemandEvent) -> DemandEvent:
    """Converts a gateway's counters; with no request in the window the percentiles are None."""
    known = wire.window_count > 0
    return DemandEvent(
        function=require(wire.function, "function"),
        gateway=require(wire.gateway, "gateway"),
        epoch=wire.epoch,
        observed_unix_ns=wire.observed_unix_ns,
        arrived_count=wire.arrived_count,
        ok_count=wire.ok_count,
        failed_count=wire.failed_count,
        refused_count=wire.refused_count,
        late_count=wire.late_count,
        queued_count=wire.queued_count,
        in_flight_count=wire.in_flight_count,
        oldest_wait_ms=wire.oldest_wait_ms,
        window_count=wire.window_count,
        p50_ms=wire.p50_ms if known else None,
        p95_ms=wire.p95_ms if known else None,
        p99_ms=wire.p99_ms if known else None,
        arrived_items_count=wire.arrived_items_count,
        queued_items_count=wire.queued_items_count,
    )


def batch_observation_to_proto(value: BatchObservation) -> events_pb2.BatchObservation:
    """Converts a measured batch."""
    return events_pb2.BatchObservation(
        batch=value.batch,
        sm_pct=value.sm_pct,
        request_permille=value.request_permille,
        latency_ns=value.latency_ns,
        device_time_ns=value.device_time_ns,
        gate_wait_ns=value.gate_wait_ns,
    )


def batch_observation_from_proto(wire: events_pb2.BatchObservation) -> BatchObservation:
    """Converts a measured batch."""
    return BatchObservation(
        batch=wire.batch,
        sm_pct=wire.sm_pct,
        request_permille=wire.request_permille,
        latency_ns=wire.latency_ns,
        device_time_ns=wire.device_time_ns,
        gate_wait_ns=wire.gate_wait_ns if wire.HasField("gate_wait_ns") else None,
    )


def instance_event_to_proto(value: InstanceEvent) -> events_pb2.InstanceEvent:
    """Converts an instance's status."""
    return events_pb2.InstanceEvent(
        function=value.function,
        instance=value.instance,
        node=value.node,
        gpu=value.gpu,
        row=value.row,
        state=instance_state_to_proto(value.state),
        reason=value.reason,
        address=value.address,
        allocation=allocation_to_proto(value.allocation),
        allocation_revision=value.allocation_revision,
        function_revision=value.function_revision,
        device_model=value.device_model,
        plan_revision=value.plan_revision,
        device_time_ns=value.device_time_ns,
        debt_ns=value.debt_ns,
        batches_count=value.batches_count,
        restarts_count=value.restarts_count,
        observed_unix_ns=value.observed_unix_ns,
        observations=[batch_observation_to_proto(item) for item in value.observations],
        pid=value.pid,
    )


def instance_event_from_proto(wire: events_pb2.InstanceEvent) -> InstanceEvent:
    """Converts an instance's status; raises InvalidError for missing names, allocation or state."""
    require_field(wire.HasField("allocation"), "allocation")
    return InstanceEvent(
        function=require(wire.function, "function"),
        instance=require(wire.instance, "instance"),
        node=require(wire.node, "node"),
        gpu=wire.gpu,
        row=wire.row,
        state=instance_state_from_proto(wire.state),
        reason=wire.reason,
        address=wire.address,
        allocation=allocation_from_proto(wire.allocation),
        allocation_revision=wire.allocation_revision,
        function_revision=wire.function_revision,
        device_model=wire.device_model,
        plan_revision=wire.plan_revision,
        device_time_ns=wire.device_time_ns,
        debt_ns=wire.debt_ns,
        batches_count=wire.batches_count,
        restarts_count=wire.restarts_count,
        observed_unix_ns=wire.observed_unix_ns,
        observations=tuple(batch_observation_from_proto(item) for item in wire.observations),
        pid=wire.pid,
    )


def node_event_to_proto(value: NodeEvent) -> events_pb2.NodeEvent:
    """Converts a heartbeat."""
    return events_pb2.NodeEvent(
        node=value.node,
        address=value.address,
        devices=[device_info_to_proto(device) for device in value.devices],
        observed_unix_ns=value.observed_unix_ns,
        plan_revision=value.plan_revision,
        draining=value.draining,
    )


def node_event_from_proto(wire: events_pb2.NodeEvent) -> NodeEvent:
    """Converts a heartbeat; raises InvalidError when the node's name is missing."""
    return NodeEvent(
        node=require(wire.node, "node"),
        address=wire.address,
        devices=tuple(device_info_from_proto(device) for device in wire.devices),
        observed_unix_ns=wire.observed_unix_ns,
        plan_revision=wire.plan_revision,
        draining=wire.draining,
    )


def device_event_to_proto(value: DeviceEvent) -> events_pb2.DeviceEvent:
    """Converts device telemetry."""
    return events_pb2.DeviceEvent(
        device=device_info_to_proto(value.device),
        rows=[row_to_proto(row) for row in value.rows],
        memory_used_bytes=value.memory_used_bytes,
        busy_permille=value.busy_permille,
        observed_unix_ns=value.observed_unix_ns,
        allocated_gpu_ns=value.allocated_gpu_ns,
        measured_memory_bytes=value.measured_memory_bytes,
        power_mw=value.power_mw,
        utilisation_pct=value.utilisation_pct,
        temperature_c=value.temperature_c,
        sm_clock_mhz=value.sm_clock_mhz,
    )


def device_event_from_proto(wire: events_pb2.DeviceEvent) -> DeviceEvent:
    """Converts device telemetry; raises InvalidError when the device is missing or has no name."""
    return DeviceEvent(
        device=device_info_from_proto(wire.device),
        rows=tuple(row_from_proto(row) for row in wire.rows),
        memory_used_bytes=wire.memory_used_bytes,
        busy_permille=wire.busy_permille,
        observed_unix_ns=wire.observed_unix_ns,
        allocated_gpu_ns=wire.allocated_gpu_ns,
        measured_memory_bytes=wire.measured_memory_bytes if wire.HasField("measured_memory_bytes") else None,
        power_mw=wire.power_mw if wire.HasField("power_mw") else None,
        utilisation_pct=wire.utilisation_pct if wire.HasField("utilisation_pct") else None,
        temperature_c=wire.temperature_c if wire.HasField("temperature_c") else None,
        sm_clock_mhz=wire.sm_clock_mhz if wire.HasField("sm_clock_mhz") else None,
    )


def capacity_point_to_proto(value: CapacityPoint) -> events_pb2.CapacityPoint:
    """Converts a prediction; latency is rounded to µs, capacity to thousandths of a request per second."""
    return events_pb2.CapacityPoint(
        batch=value.batch,
        sm_pct=value.sm_pct,
        quota_permille=value.quota_permille,
        latency_us=round(value.latency_s * _US_PER_S),
        capacity_millirps=round(value.capacity_rps * _MILLI),
    )


def capacity_point_from_proto(wire: events_pb2.CapacityPoint) -> CapacityPoint:
    """Converts a prediction."""
    return CapacityPoint(
        batch=wire.batch,
        sm_pct=wire.sm_pct,
        quota_permille=wire.quota_permille,
        latency_s=wire.latency_us / _US_PER_S,
        capacity_rps=wire.capacity_millirps / _MILLI,
    )


def capacity_table_to_proto(value: CapacityTable) -> events_pb2.CapacityEvent:
    """Converts a capacity table."""
    return events_pb2.CapacityEvent(
        function=value.function,
        function_revision=value.function_revision,
        device_model=value.device_model,
        version=value.version,
        computed_unix_ns=value.computed_unix_ns,
        slo_ms=value.slo_ms,
        points=[capacity_point_to_proto(point) for point in value.points],
        basis=value.basis,
        infeasible_reason=value.infeasible_reason,
        correction_permille=value.correction_permille,
        run_correction_permille=value.run_correction_permille,
        drift=value.drift,
        profiled_max_batch=value.profiled_max_batch,
        spread_permille=value.spread_permille,
    )


def capacity_table_from_proto(wire: events_pb2.CapacityEvent) -> CapacityTable:
    """Converts a capacity table; raises InvalidError when the function or the device model is missing."""
    return CapacityTable(
        function=require(wire.function, "function"),
        function_revision=wire.function_revision,
        device_model=require(wire.device_model, "device_model"),
        version=wire.version,
        computed_unix_ns=wire.computed_unix_ns,
        slo_ms=wire.slo_ms,
        points=tuple(capacity_point_from_proto(point) for point in wire.points),
        basis=wire.basis,
        infeasible_reason=wire.infeasible_reason,
        correction_permille=wire.correction_permille or 1_000,
        run_correction_permille=wire.run_correction_permille or 1_000,
        drift=wire.drift,
        profiled_max_batch=wire.profiled_max_batch,
        spread_permille=wire.spread_permille or 1_000,
    )


def vertical_to_proto(value: VerticalScaleEvent) -> events_pb2.VerticalScaleEvent:
    """Converts a vertical change."""
    return events_pb2.VerticalScaleEvent(
        function=value.function,
        instance=value.instance,
        node=value.node,
        allocation=allocation_to_proto(value.allocation),
        revision=value.revision,
        reason=value.reason,
        decided_unix_ns=value.decided_unix_ns,
    )


def vertical_from_proto(wire: events_pb2.VerticalScaleEvent) -> VerticalScaleEvent:
    """Converts a vertical change; raises InvalidError for missing names or allocation."""
    require_field(wire.HasField("allocation"), "allocation")
    return VerticalScaleEvent(
        function=require(wire.function, "function"),
        instance=require(wire.instance, "instance"),
        node=require(wire.node, "node"),
        allocation=allocation_from_proto(wire.allocation),
        revision=wire.revision,
        reason=wire.reason,
        decided_unix_ns=wire.decided_unix_ns,
    )


def desired_instance_to_proto(value: DesiredInstance) -> events_pb2.DesiredInstance:
    """Converts a wanted instance."""
    return events_pb2.DesiredInstance(
        instance=value.instance, allocation=allocation_to_proto(value.allocation), standby=value.standby
    )


def desired_instance_from_proto(wire: events_pb2.DesiredInstance) -> DesiredInstance:
    """Converts a wanted instance; raises InvalidError for a missing id or allocation."""
    require_field(wire.HasField("allocation"), "allocation")
    return DesiredInstance(
        instance=require(wire.instance, "instance"),
        allocation=allocation_from_proto(wire.allocation),
        standby=wire.standby,
    )


def horizontal_to_proto(value: HorizontalScaleEvent) -> events_pb2.HorizontalScaleEvent:
    """Converts a wanted set of instances."""
    return events_pb2.HorizontalScaleEvent(
        function=value.function,
        revision=value.revision,
        instances=[desired_instance_to_proto(item) for item in value.instances],
        reason=value.reason,
        decided_unix_ns=value.decided_unix_ns,
        fencing_token=value.fencing_token,
    )


def horizontal_from_proto(wire: events_pb2.HorizontalScaleEvent) -> HorizontalScaleEvent:
    """Converts a wanted set of instances; raises InvalidError for missing names."""
    return HorizontalScaleEvent(
        function=require(wire.function, "function"),
        revision=wire.revision,
        instances=tuple(desired_instance_from_proto(item) for item in wire.instances),
        reason=wire.reason,
        decided_unix_ns=wire.decided_unix_ns,
        fencing_token=wire.fencing_token,
    )


def planned_instance_to_proto(value: PlannedInstance) -> events_pb2.PlannedInstance:
    """Converts a bound instance."""
    return events_pb2.PlannedInstance(
        function=value.function,
        instance=value.instance,
        gpu=value.gpu,
        row=value.row,
        allocation=allocation_to_proto(value.allocation),
        allocation_revision=value.allocation_revision,
        standby=value.standby,
        moving_from=value.moving_from,
        moving_to=value.moving_to,
    )


def planned_instance_from_proto(wire: events_pb2.PlannedInstance) -> PlannedInstance:
    """Converts a bound instance; raises InvalidError for missing names or allocation."""
    require_field(wire.HasField("allocation"), "allocation")
    return PlannedInstance(
        function=require(wire.function, "function"),
        instance=require(wire.instance, "instance"),
        gpu=require(wire.gpu, "gpu"),
        row=wire.row,
        allocation=allocation_from_proto(wire.allocation),
        allocation_revision=wire.allocation_revision,
        standby=wire.standby,
        moving_from=wire.moving_from,
        moving_to=wire.moving_to,
    )


def plan_to_proto(value: PlanEvent) -> events_pb2.PlanEvent:
    """Converts a node's plan."""
    return events_pb2.PlanEvent(
        node=value.node,
        revision=value.revision,
        instances=[planned_instance_to_proto(item) for item in value.instances],
        fencing_token=value.fencing_token,
        reason=value.reason,
    )


def plan_from_proto(wire: events_pb2.PlanEvent) -> PlanEvent:
    """Converts a node's plan; raises InvalidError for missing names."""
    return PlanEvent(
        node=require(wire.node, "node"),
        revision=wire.revision,
        instances=tuple(planned_instance_from_proto(item) for item in wire.instances),
        fencing_token=wire.fencing_token,
        reason=wire.reason,
    )
