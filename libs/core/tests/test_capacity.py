from __future__ import annotations

import math

from hasgpu_core.capacity import CapacityTable, capacity_rps
from hypothesis import assume, given
from hypothesis import strategies as st


@given(st.integers(1, 64), st.floats(0.001, 10), st.floats(0.001, 10), st.floats(1.0, 5.0))
def test_capacity_grows_with_the_objective_and_falls_with_latency(
    batch: int, latency_s: float, slo_s: float, factor: float
) -> None:
    base = capacity_rps(batch=batch, latency_s=latency_s, slo_s=slo_s)
    assert base <= capacity_rps(batch=batch, latency_s=latency_s, slo_s=slo_s * factor) + 1e-9
    assert base >= capacity_rps(batch=batch, latency_s=latency_s * factor, slo_s=slo_s) - 1e-9
    assert 0 <= base < batch / latency_s
    assert (base == 0) == (latency_s >= slo_s)


@given(st.integers(100, 10_000), st.floats(0.001, 0.5))
def test_a_tables_capacity_never_falls_with_a_larger_share(slo_ms: int, item_s: float) -> None:
    table = make_table(slo_ms, item_s)
    for sm_pct in range(25, 101, 5):
        for quota in range(100, 1000, 50):
            assert table.capacity_rps(sm_pct, quota) <= table.capacity_rps(sm_pct, quota + 50) + 1e-9
            assert table.capacity_rps(sm_pct, quota) <= table.capacity_rps(min(100, sm_pct + 5), quota) + 1e-9


@given(st.integers(1, 20), st.integers(1, 20), st.integers(25, 100), st.integers(10, 1000))
def test_latency_never_falls_with_the_batch(a: int, b: int, sm_pct: int, quota: int) -> None:
    assume(a <= b)
    table = make_table(1000, 0.01)
    low, high = table.latency_s(a, sm_pct, quota), table.latency_s(b, sm_pct, quota)
    assert low is not None
    assert high is not None
    assert low <= high + 1e-12


def test_below_the_grid_there_is_no_capacity_and_an_empty_table_knows_nothing() -> None:
    table = make_table(1000, 0.01)
    assert table.capacity_rps(50, 10) == 0.0
    latency_s = table.latency_s(1, 50, 10)
    assert latency_s is not None
    assert latency_s > table.latency_s(1, 50, 100)  # type: ignore[operator]
    empty = CapacityTable("f", 1, "m", 1, 0, 100, ())
    assert empty.latency_s(1, 50, 100) is None
    assert empty.capacity_rps(50, 100) == 0.0
    assert not math.isnan(table.capacity_rps(100, 1000))


def make_table(slo_ms: int, item_s: float) -> CapacityTable:
    from hasgpu_core.capacity import CapacityPoint

    points = tuple(
        CapacityPoint(b, sm, q, lat, capacity_rps(batch=b, latency_s=lat, slo_s=slo_ms / 1e3))
        for b in (1, 2, 4, 8)
        for sm in (25, 50, 100)
        for q in range(100, 1001, 100)
        for lat in (item_s * (1 + b) / 2 / (sm / 100) / (q / 1000),)
    )
    return CapacityTable("f", 1, "m", 1, 0, slo_ms, points)
