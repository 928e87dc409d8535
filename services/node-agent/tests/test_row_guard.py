"""No sequence of reservations over-fills a device."""

from __future__ import annotations

import pytest
from hasgpu_core.errors import CapacityError, InvalidError, NotFoundError
from hasgpu_core.function import MIB
from hasgpu_core.resources import Allocation, DeviceInfo
from hasgpu_node_agent.row_guard import RowGuard, WorkerKey
from hypothesis import given
from hypothesis import strategies as st

DEVICE = DeviceInfo("n", "cpu0", "cpu-2c", "cpu", 4_096 * MIB, (25, 50, 75, 100))
allocations = st.builds(
    lambda sm, request, memory: Allocation(sm, request, 1_000, memory * MIB),
    st.sampled_from((25, 50, 75, 100)),
    st.integers(1, 1_000),
    st.integers(0, 2_048),
)
actions = st.lists(
    st.tuples(st.sampled_from(("reserve", "resize", "release")), st.integers(0, 5), st.integers(0, 3), allocations),
    max_size=60,
)


@given(actions)
def test_nothing_is_ever_over_filled(steps: list[tuple[str, int, int, Allocation]]) -> None:
    guard = RowGuard([DEVICE])
    held: dict[WorkerKey, tuple[int, Allocation]] = {}
    for what, number, some_row, allocation in steps:
        key = WorkerKey(f"f-{number}", 1)
        if what == "release":
            guard.release(key)
            held.pop(key, None)
            continue
        row = held[key][0] if what == "resize" and key in held else some_row
        wanted = {**held, key: (row, allocation)}
        fits = _fits(wanted)
        try:
            if what == "resize":
                guard.resize(key, allocation)
            else:
                guard.reserve(key, "cpu0", row, allocation)
        except NotFoundError:
            assert what == "resize"
            assert key not in held
        except CapacityError:
            assert not fits, "refused what fits"
        else:
            assert fits, "took what does not fit"
            held = wanted
        assert sum(r.sm_pct for r in guard.rows("cpu0")) <= 100
        assert all(r.used_permille <= 1_000 for r in guard.rows("cpu0"))
        assert guard.state("cpu0").memory_used_bytes == sum(a.memory_bytes for _, a in held.values())


def _fits(held: dict[WorkerKey, tuple[int, Allocation]]) -> bool:
    rows = {row for row, _ in held.values()}
    requests = [sum(a.request_permille for r, a in held.values() if r == row) for row in rows]
    widths = [max(a.sm_pct for r, a in held.values() if r == row) for row in rows]
    memory = sum(a.memory_bytes for _, a in held.values())
    return max(requests) <= 1_000 and sum(widths) <= 100 and memory <= DEVICE.memory_bytes


def _share(sm: int, request: int, memory_mib: int = 1) -> Allocation:
    return Allocation(sm, request, request, memory_mib * MIB)


def test_a_refusal_says_what_is_free() -> None:
    guard = RowGuard([DEVICE])
    guard.reserve(WorkerKey("a-0", 1), "cpu0", 0, _share(50, 700, 3_000))
    with pytest.raises(CapacityError, match="row 0 of cpu0 has 300 ‰ free, 400 ‰ were asked for"):
        guard.reserve(WorkerKey("b-0", 1), "cpu0", 0, _share(50, 400))
    with pytest.raises(CapacityError, match="cpu0 has 50 % of its SMs free for row 1, 75 % were asked for"):
        guard.reserve(WorkerKey("b-0", 1), "cpu0", 1, _share(75, 100))
    with pytest.raises(CapacityError, match="cpu0 has 1096 MiB of memory free, 2000 MiB were asked for"):
        guard.reserve(WorkerKey("b-0", 1), "cpu0", 1, _share(50, 100, 2_000))


def test_a_refused_resize_keeps_the_former_share() -> None:
    guard = RowGuard([DEVICE])
    key = WorkerKey("a-0", 1)
    guard.reserve(key, "cpu0", 0, _share(50, 700))
    guard.reserve(WorkerKey("b-0", 1), "cpu0", 0, _share(50, 300))
    with pytest.raises(CapacityError):
        guard.resize(key, _share(50, 701))
    present = guard.get(key)
    assert present is not None
    assert present.allocation.request_permille == 700


def test_unknown_devices_and_impossible_shares_are_refused() -> None:
    guard = RowGuard([DEVICE])
    with pytest.raises(NotFoundError, match="this node has cpu0"):
        guard.reserve(WorkerKey("a-0", 1), "gpu7", 0, _share(50, 100))
    with pytest.raises(InvalidError, match="request_permille"):
        guard.reserve(WorkerKey("a-0", 1), "cpu0", 0, Allocation(50, 0, 100, 0))


def test_the_share_of_the_device_is_space_times_time() -> None:
    guard = RowGuard([DEVICE])
    guard.reserve(WorkerKey("a-0", 1), "cpu0", 0, _share(50, 500))
    guard.reserve(WorkerKey("b-0", 1), "cpu0", 1, _share(25, 1_000))
    assert guard.gpu_share("cpu0") == pytest.approx(0.5)
