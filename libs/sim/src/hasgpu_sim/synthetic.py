"""Functions and predictions made up from a few numbers, for scenarios without a profile."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from hasgpu_core.capacity import CapacityPoint, CapacityTable, capacity_rps
from hasgpu_core.function import Artifact, FunctionSpec, ModelFormat, TensorSpec

QUOTAS_PERMILLE = tuple(range(100, 1001, 100))


def synthetic_spec(name: str, *, slo_ms: int, **fields: int) -> FunctionSpec:
    """Returns a spec with one small tensor in and out; `fields` are FunctionSpec's numbers."""
    tensor = TensorSpec("x", "FP32", (-1, 1))
    spec = FunctionSpec(
        name=name,
        format=ModelFormat.PYTHON,
        artifact=Artifact("0" * 64, 1),
        entry="model.py",
        inputs=(tensor,),
        outputs=(tensor,),
        slo_ms=slo_ms,
        **fields,  # type: ignore[arg-type]  # numbers only, checked by validate()
    )
    spec.validate()
    return spec


def synthetic_table(
    function: str,
    *,
    device_model: str,
    slo_ms: int,
    fixed_s: float,
    item_s: float,
    speed: Mapping[int, float],
    batches: Iterable[int] = (1, 2, 4, 8),
) -> CapacityTable:
    """Returns a table with latency = (fixed_s + item_s × batch) / speed[SM share] / quota.

    Numbers have the resolution of the wire (ns and 1/1000 rps), so that a table that was sent equals the one kept.
    """
    points = []
    for batch in batches:
        for sm_pct, factor in sorted(speed.items()):
            for quota_permille in QUOTAS_PERMILLE:
                latency_s = round((fixed_s + item_s * batch) / factor / (quota_permille / 1e3), 9)
                capacity = round(capacity_rps(batch=batch, latency_s=latency_s, slo_s=slo_ms / 1e3), 3)
                points.append(CapacityPoint(batch, sm_pct, quota_permille, latency_s, capacity))
    return CapacityTable(function, 1, device_model, 1, 0, slo_ms, tuple(points), basis="static")
