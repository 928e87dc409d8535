"""The simulator against queueing theory, and its two physics."""

from __future__ import annotations

import math
from array import array
from random import Random

import pytest
from hasgpu_core.events import DesiredInstance
from hasgpu_core.function import MIB
from hasgpu_core.resources import Allocation, DeviceInfo
from hasgpu_sim import FunctionLoad, Scenario, Timing, simulate
from hasgpu_sim.arrivals import Process, RateStep
from hasgpu_sim.lending import effective_permille
from hasgpu_sim.physics import SEGMENT_S, WINDOW_S, Bucket, Gate, Physics
from hasgpu_sim.scenario import FunctionResult
from hasgpu_sim.surface import Surface
from hasgpu_sim.synthetic import synthetic_spec, synthetic_table

DEVICE = DeviceInfo("n0", "g0", "m", "emulated", 8192 * MIB, (25, 50, 100))
LATENCY_S = 0.01


def held(allocations: list[Allocation], steps: tuple[RateStep, ...], **fields: object) -> FunctionResult:
    """A function whose shares are fixed, on one device."""
    table = synthetic_table(
        "f", device_model="m", slo_ms=1000, fixed_s=0.0, item_s=LATENCY_S, speed={25: 1.0, 100: 1.0}, batches=(1,)
    )
    desired = tuple(DesiredInstance(f"f-{i}", allocation) for i, allocation in enumerate(allocations))
    spec = synthetic_spec("f", slo_ms=1000, max_batch=1)
    load = FunctionLoad(spec, (table,), steps, Process.POISSON, desired, held=True)
    duration_s = sum(step.duration_s for step in steps)
    slow = Timing(tick_s=duration_s, demand_period_s=duration_s, telemetry_period_s=duration_s)
    return simulate(Scenario((DEVICE,), (load,), duration_s, 11, slow, **fields)).functions["f"]  # type: ignore[arg-type]


def mean_wait_s(rate_rps: float, count: int) -> float:
    """M/D/c: the number in the system a service later is what exceeded c, and a Poisson number of arrivals."""
    mean = rate_rps * LATENCY_S
    most = 200
    arrivals = [math.exp(-mean + k * math.log(mean) - math.lgamma(k + 1)) for k in range(most)]
    state = [1.0] + [0.0] * (most - 1)
    for _ in range(400):
        after = [0.0] * most
        for n, part in enumerate(state):
            if part > 1e-15:
                left = max(0, n - count)
                for k in range(most - left):
                    after[left + k] += part * arrivals[k]
        state = after
    return sum(max(0, n - count) * part for n, part in enumerate(state)) / rate_rps


@pytest.mark.parametrize(("count", "utilisation"), [(1, 0.7), (2, 0.7), (3, 0.8)])
def test_waits_are_those_of_an_m_d_c_queue(count: int, utilisation: float) -> None:
    rate = utilisation * count / LATENCY_S
    allocation = Allocation(25, 1000, 1000, MIB)
    found = held([allocation] * count, (RateStep(40_000 / rate, rate),))
    assert sum(found.waits_s) / len(found.waits_s) == pytest.approx(mean_wait_s(rate, count), rel=0.10)


def test_cost_is_the_share_over_time() -> None:
    found = held([Allocation(25, 400, 400, MIB)], (RateStep(50.0, 1.0),))
    assert found.gpu_seconds == pytest.approx(0.25 * 0.4 * 50)


def test_lent_time_is_paid_for_and_makes_a_batch_as_fast_as_the_limit() -> None:
    steps = (RateStep(100.0, 5.0),)
    reserved = held([Allocation(25, 100, 1000, MIB)], steps)
    lent = held([Allocation(25, 100, 1000, MIB)], steps, lend=True)
    assert min(reserved.latencies_s) == pytest.approx(LATENCY_S / 0.1)
    assert min(lent.latencies_s) == pytest.approx(LATENCY_S)
    busy_s = lent.requests_count * LATENCY_S
    assert lent.gpu_seconds == pytest.approx(0.25 * (0.1 * 100 + 0.9 * busy_s), rel=1e-6)


@pytest.mark.parametrize(
    ("shares", "expected"),
    [
        ([(100, 1000)], [1000]),
        ([(100, 300)], [300]),
        ([(100, 1000), (100, 1000)], [500, 500]),
        ([(600, 1000), (100, 1000)], [750, 250]),
        ([(600, 600), (100, 1000)], [600, 400]),
        ([(500, 500), (500, 500)], [500, 500]),
    ],
)
def test_what_a_row_lends(shares: list[tuple[int, int]], expected: list[int]) -> None:
    assert effective_permille(shares) == expected


def test_two_batches_of_a_row_slow_each_other() -> None:
    """At a rate that keeps both busy often, the mean is between the whole row's latency and half of it."""
    found = held([Allocation(25, 100, 1000, MIB)] * 2, (RateStep(200.0, 90.0),), lend=True)
    mean_s = sum(found.latencies_s) / len(found.latencies_s)
    assert mean_s > 1.2 * LATENCY_S
    assert max(found.latencies_s) > 2 * LATENCY_S * 0.99


def test_a_gate_gives_a_window_at_once_and_then_the_request() -> None:
    gate = Gate(Bucket(), Bucket())
    run = lambda now_s, device_s, limit_permille: gate.run(  # noqa: E731  short for this test
        now_s, device_s, request_permille=500, limit_permille=limit_permille, alone=True
    )
    took_s, borrowed_s = run(1.0, 0.010, 500)
    assert took_s == pytest.approx(0.010)  # out of the 20 ms that had filled up
    assert borrowed_s == 0.0
    took_s, _ = run(1.010, 0.200, 500)
    # What had filled up lets it run at full speed at first; then it runs a segment and waits for as long.
    left_s = 0.5 * WINDOW_S - 0.010 * 0.5
    assert took_s == pytest.approx(left_s / 0.5 + (0.200 - left_s / 0.5) / 0.5, abs=2 * SEGMENT_S)
    took_s, borrowed_s = run(2.0, 0.100, 1000)
    assert took_s == pytest.approx(0.100)
    assert borrowed_s == pytest.approx(0.100 - 0.5 * WINDOW_S - 0.100 * 0.5, abs=3 * SEGMENT_S)


def test_a_segment_begun_with_tokens_is_not_borrowed_and_its_debt_is_carried() -> None:
    gate = Gate(Bucket(), Bucket())
    own_s = 0.025 * WINDOW_S
    took_s, borrowed_s = gate.run(1.0, 0.030, request_permille=25, limit_permille=1000, alone=True)
    assert (took_s, borrowed_s) == pytest.approx((0.030, 0.030 - SEGMENT_S))
    debt_s = SEGMENT_S - own_s - 0.030 * 0.025
    _, borrowed_s = gate.run(1.030, 0.030, request_permille=25, limit_permille=1000, alone=True)
    assert borrowed_s == pytest.approx(0.030)  # in debt: all of it
    again_s = 1.030 + (debt_s / 0.025) + 0.001
    _, borrowed_s = gate.run(again_s, 0.030, request_permille=25, limit_permille=1000, alone=True)
    assert borrowed_s == pytest.approx(0.030 - SEGMENT_S)


def test_a_gate_bounds_borrowing_by_the_limit() -> None:
    gate = Gate(Bucket(), Bucket())
    took_s, borrowed_s = gate.run(1.0, 0.500, request_permille=100, limit_permille=400, alone=False)
    assert took_s == pytest.approx(0.4 * WINDOW_S + (0.500 - 0.4 * WINDOW_S) / 0.4, abs=2 * SEGMENT_S / 0.4)
    assert borrowed_s == pytest.approx(0.500 - 0.1 * took_s, abs=2 * SEGMENT_S)


def test_device_time_physics_runs_at_the_request_in_the_long_run() -> None:
    surface = Surface("m", "m", {(1, sm, q): LATENCY_S * 10 for sm in (25, 100) for q in (500, 1000)})
    slo_ms = 2000
    rng = Random(3)
    times = array("d", sorted(rng.uniform(0, 100) for _ in range(200)))
    load = FunctionLoad(
        synthetic_spec("f", slo_ms=slo_ms, max_batch=1),
        (surface.table("f", slo_ms),),
        desired=(DesiredInstance("f-0", Allocation(25, 500, 500, MIB)),),
        held=True,
        arrivals_s=times,
        surfaces={"m": surface},
    )
    outcome = simulate(Scenario((DEVICE,), (load,), 130.0, physics=Physics.DEVICE_TIME)).functions["f"]
    assert len(outcome.latencies_s) == 200
    assert min(outcome.latencies_s) == pytest.approx(0.2 - 0.02 / 0.5, rel=0.3)
    assert min(outcome.latencies_s) < 0.2
