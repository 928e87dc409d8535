"""The fault table: each rule, and what holds for any observation."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hasgpu_device.backends.cuda import faults
from hasgpu_device.backends.cuda.fault_policy import (
    FAULTS,
    ActionKind,
    Decision,
    FaultClass,
    FaultLimits,
    Observation,
    ObservedWorker,
    class_of,
    decide,
)
from hasgpu_device.backends.cuda.mps import MpsState
from hasgpu_device.status import EXIT_DEVICE_FAULT, EXIT_LOAD_FAILED
from hypothesis import given
from hypothesis import strategies as st

LIMITS = FaultLimits()
A = ObservedWorker("a", is_running=True)
B = ObservedWorker("b", is_running=True)


def seen(mps: MpsState | None, *workers: ObservedWorker, age_s: float = 0.0, **more: object) -> Observation:
    values: dict[str, object] = {"now_s": 1000.0, "mps": mps, "mps_since_s": 1000.0 - age_s, "workers": workers}
    return Observation(**(values | more))  # type: ignore[arg-type]


def steps(decision: Decision) -> list[str]:
    return [f"{action.kind} {action.instance}".strip() for action in decision.actions]


def ended(instance: str, fault: str = "", exit_code: int | None = EXIT_DEVICE_FAULT) -> ObservedWorker:
    return ObservedWorker(instance, is_running=False, exit_code=exit_code, fault=fault)


STOP_BOTH = ["drain a", "drain b", "terminate_client a", "terminate_client b", "kill a", "kill b"]


def test_nothing_is_done_when_nothing_is_wrong() -> None:
    for mps in (MpsState.ACTIVE, MpsState.IDLE, None):
        assert decide(seen(mps, A, B), LIMITS) == Decision((), "")


def test_a_server_in_fault_gets_rid_of_its_clients_then_time_then_a_new_daemon() -> None:
    first = decide(seen(MpsState.FAULT, A, B), LIMITS)
    assert steps(first) == STOP_BOTH
    assert first.is_recovery
    assert first.look_again_s == LIMITS.look_again_s

    waiting = decide(seen(MpsState.FAULT, ended("a"), ended("b"), age_s=LIMITS.recovery_s - 1), LIMITS)
    assert steps(waiting) == []
    assert waiting.look_again_s is not None

    last = decide(seen(MpsState.FAULT, ended("a"), ended("b"), age_s=LIMITS.recovery_s), LIMITS)
    assert steps(last) == ["quit_daemon", "start_daemon", "start_worker a", "start_worker b"]
    assert last.is_recovery


def test_a_server_that_came_back_by_itself_gets_its_workers_back_in_order() -> None:
    decision = decide(seen(MpsState.ACTIVE, ended("a", exit_code=None), ended("b", exit_code=None)), LIMITS)
    assert steps(decision) == ["start_worker a", "start_worker b"]


def test_a_daemon_that_is_gone_is_started_after_its_workers_have_ended() -> None:
    decision = decide(seen(MpsState.GONE, A, ended("b")), LIMITS)
    assert steps(decision) == ["drain a", "kill a", "start_daemon", "start_worker a", "start_worker b"]
    assert decision.is_recovery


@pytest.mark.parametrize(
    ("state", "patience_s"),
    [(MpsState.UNRESPONSIVE, LIMITS.unresponsive_s), (MpsState.INITIALIZING, LIMITS.initialize_s)],
)
def test_silence_and_slow_starts_get_patience(state: MpsState, patience_s: float) -> None:
    early = decide(seen(state, A, age_s=patience_s - 0.1), LIMITS)
    assert (steps(early), early.look_again_s) == ([], LIMITS.look_again_s)
    late = decide(seen(state, A, age_s=patience_s), LIMITS)
    assert steps(late) == [
        "drain a",
        "terminate_client a",
        "kill a",
        "quit_daemon",
        "start_daemon",
        "start_worker a",
    ]


def test_a_fault_that_mps_spreads_takes_all_workers_of_the_gpu_down() -> None:
    decision = decide(seen(MpsState.ACTIVE, A, ended("b", "CUDA_ERROR_ILLEGAL_ADDRESS")), LIMITS)
    assert steps(decision) == ["drain a", "terminate_client a", "kill a", "start_worker a", "start_worker b"]
    assert decision.is_recovery
    assert "b met CUDA_ERROR_ILLEGAL_ADDRESS" in decision.reason


@pytest.mark.parametrize("more", [{"mps": None}, {"mps": MpsState.ACTIVE, "is_static": True}])
def test_without_mps_or_with_static_partitions_a_fault_stays_with_its_worker(more: dict[str, object]) -> None:
    observation = replace(seen(None, A, ended("b", "CUDA_ERROR_ILLEGAL_ADDRESS")), **more)  # type: ignore[arg-type]
    assert steps(decide(observation, LIMITS)) == ["start_worker b"]


def test_a_model_that_can_not_be_loaded_is_left_to_the_plan() -> None:
    failed = ended("b", exit_code=EXIT_LOAD_FAILED)
    assert steps(decide(seen(MpsState.ACTIVE, A, failed), LIMITS)) == []
    assert "start_worker b" not in steps(decide(seen(MpsState.GONE, A, failed), LIMITS))


def test_running_out_of_memory_is_the_workers_own_affair() -> None:
    decision = decide(seen(MpsState.ACTIVE, A, ended("b", "CUDA_ERROR_OUT_OF_MEMORY")), LIMITS)
    assert steps(decision) == ["start_worker b"]
    assert not decision.is_recovery


def test_a_silent_worker_is_terminated_before_it_is_killed() -> None:
    decision = decide(seen(MpsState.ACTIVE, A, replace(B, is_silent=True)), LIMITS)
    assert steps(decision) == ["terminate_client b", "kill b", "start_worker b"]
    alone = decide(seen(None, replace(B, is_silent=True)), LIMITS)
    assert steps(alone) == ["kill b", "start_worker b"]


def test_a_full_server_is_tried_again_only_when_a_worker_has_gone() -> None:
    turned_away = replace(ended("b", "CUDA_ERROR_MPS_MAX_CLIENTS_REACHED"), knew_full=True)
    assert steps(decide(seen(MpsState.ACTIVE, A, turned_away), LIMITS)) == []
    assert "finds no room" in decide(seen(MpsState.ACTIVE, A, turned_away), LIMITS).reason
    assert steps(decide(seen(MpsState.ACTIVE, A, replace(turned_away, knew_full=False)), LIMITS)) == ["start_worker b"]


def test_a_worker_outside_mps_is_not_started_again() -> None:
    decision = decide(seen(MpsState.ACTIVE, ended("b", "MPS_NOT_IN_USE")), LIMITS)
    assert steps(decision) == []
    assert "without its limits" in decision.reason
    gone = decide(seen(MpsState.GONE, ended("a"), ended("b", "MPS_NOT_IN_USE")), LIMITS)
    assert steps(gone) == ["start_daemon", "start_worker a"]


def test_a_lost_gpu_is_unhealthy_and_nothing_is_started() -> None:
    decision = decide(seen(MpsState.ACTIVE, A, ended("b"), lost_reason="fell off the bus"), LIMITS)
    assert steps(decision) == ["kill a", "mark_unhealthy"]
    assert decision.is_unhealthy
    assert "fell off the bus" in decision.reason


def test_a_fault_of_the_hardware_is_not_tried_again() -> None:
    decision = decide(seen(MpsState.ACTIVE, A, ended("b", "CUDA_ERROR_ECC_UNCORRECTABLE")), LIMITS)
    assert steps(decision) == ["drain a", "terminate_client a", "kill a", "mark_unhealthy"]
    assert decision.is_unhealthy


def test_a_gpu_that_keeps_failing_is_unhealthy_until_the_recoveries_are_old() -> None:
    tired = seen(MpsState.GONE, A, recoveries_s=(500.0, 800.0, 900.0))
    decision = decide(tired, LIMITS)
    assert steps(decision) == ["drain a", "kill a", "mark_unhealthy"]
    assert decision.is_unhealthy
    assert not decision.is_recovery
    assert decision.look_again_s == pytest.approx(100.0)
    assert "3 recoveries within 600 s" in decision.reason
    rested = decide(replace(tired, now_s=1100.5), LIMITS)
    assert "start_daemon" in steps(rested)


def test_the_steps_of_one_incident_count_once() -> None:
    first = seen(MpsState.FAULT, A, recoveries_s=(700.0,))
    assert decide(first, LIMITS).is_recovery
    later = seen(MpsState.FAULT, ended("a"), age_s=20.0, recoveries_s=(700.0, 980.0))
    assert "start_daemon" in steps(decide(later, LIMITS))
    assert not decide(later, LIMITS).is_recovery
    # Also the third one is brought to its end.
    third = replace(later, recoveries_s=(600.0, 700.0, 980.0))
    assert "start_worker a" in steps(decide(third, LIMITS))


def test_an_unhealthy_gpu_gets_no_worker_back_though_its_server_did() -> None:
    tired = seen(MpsState.ACTIVE, ended("a", exit_code=None), recoveries_s=(500.0, 600.0, 700.0), is_unhealthy=True)
    decision = decide(tired, LIMITS)
    assert steps(decision) == ["mark_unhealthy"]
    assert decision.is_unhealthy
    rested = decide(replace(tired, now_s=1100.5), LIMITS)
    assert (steps(rested), rested.is_unhealthy) == (["start_worker a"], False)


def test_a_gpu_that_was_mended_often_but_works_is_let_be() -> None:
    mended = seen(MpsState.ACTIVE, A, ended("b", "CUDA_ERROR_OUT_OF_MEMORY"), recoveries_s=(500.0, 600.0, 700.0))
    assert steps(decide(mended, LIMITS)) == ["start_worker b"]


def test_every_fault_that_ends_a_worker_has_a_place_in_the_table() -> None:
    named = {faults.name_of(code) for code in faults.FATAL}
    assert named - set(FAULTS) == set()
    assert class_of("CUDA_ERROR_SOMETHING_NEW") is FaultClass.WORKER


workers = st.builds(
    ObservedWorker,
    instance=st.just(""),
    is_running=st.booleans(),
    exit_code=st.sampled_from([None, 0, 65, 70, 71]),
    fault=st.sampled_from(["", *FAULTS]),
    is_silent=st.booleans(),
    knew_full=st.booleans(),
)
observations = st.builds(
    Observation,
    now_s=st.just(1000.0),
    mps=st.sampled_from([None, *MpsState]),
    mps_since_s=st.floats(0, 1000),
    workers=st.lists(workers, max_size=5).map(
        lambda found: tuple(replace(worker, instance=f"w{index}") for index, worker in enumerate(found))
    ),
    is_static=st.booleans(),
    lost_reason=st.sampled_from(["", "lost"]),
    recoveries_s=st.lists(st.floats(0, 1000), max_size=5).map(tuple),
    is_unhealthy=st.booleans(),
)


@given(observations)
def test_whatever_is_observed(observation: Observation) -> None:
    decision = decide(observation, LIMITS)
    kinds = [action.kind for action in decision.actions]
    running = {worker.instance for worker in observation.workers if worker.is_running}
    at = {(action.kind, action.instance): index for index, action in enumerate(decision.actions)}
    answers = observation.mps not in (None, MpsState.GONE) and not observation.lost_reason

    assert len(at) == len(decision.actions), "no step twice"
    for kind, instance in at:
        if kind is ActionKind.KILL:
            assert instance in running
            if answers:
                assert at[ActionKind.TERMINATE_CLIENT, instance] < at[kind, instance]
        if kind is ActionKind.DRAIN:
            assert at[kind, instance] < at[ActionKind.KILL, instance]
        if kind is ActionKind.START_WORKER:
            assert instance not in running or at[ActionKind.KILL, instance] < at[kind, instance]
    started = [action.instance for action in decision.actions if action.kind is ActionKind.START_WORKER]
    assert started == sorted(started), "in the order of the plan"
    if ActionKind.START_DAEMON in kinds:
        assert running <= {action.instance for action in decision.actions if action.kind is ActionKind.KILL}
        if ActionKind.QUIT_DAEMON in kinds:
            assert kinds.index(ActionKind.QUIT_DAEMON) < kinds.index(ActionKind.START_DAEMON)
        assert observation.mps is not None
    if decision.is_unhealthy:
        assert ActionKind.MARK_UNHEALTHY in kinds
        assert not started
    if observation.mps is MpsState.FAULT:
        assert not started or ActionKind.START_DAEMON in kinds
    assert decision.reason or not decision.actions
