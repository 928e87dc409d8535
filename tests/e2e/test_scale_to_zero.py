"""A function with `min: 0` costs nothing while nobody asks, and a request wakes it."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Iterator

import grpc
import pytest
from hasgpu.inference.v2 import inference_pb2 as oip
from hasgpu_system import System, eventually, text_request, unpack_bytes

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

NAME = "sleeper"
ASLEEP_WITHIN_S = 40


@pytest.fixture(scope="module")
def sleeper(system: System, copy_of_tricky: Callable[..., pathlib.Path]) -> Iterator[System]:
    path = copy_of_tricky(name=NAME, timeout_ms="60000", instances="{min: 0, max: 2}")
    system.cli("deploy", str(path), "--wait")
    yield system
    system.cli("delete", NAME)


def asleep(system: System) -> None:
    """Waits until it has no instance, whatever it had."""

    def gone() -> bool:
        function = system.json("describe", NAME)["function"]
        return function["instances"] == [] and function["condition"].startswith("scaled to zero")

    eventually(gone, within_s=ASLEEP_WITHIN_S)


def test_a_request_waits_for_the_cold_start_and_then_it_goes_to_zero_again(sleeper: System) -> None:
    asleep(sleeper)
    with sleeper.stub() as stub:
        assert stub.ModelReady(oip.ModelReadyRequest(name=NAME), timeout=10).ready
        call = stub.ModelInfer.future(text_request(NAME, "good morning"), timeout=50)
        answer = call.result()
    assert unpack_bytes(answer.raw_output_contents[0]) == [b"good morning"]
    woken = sleeper.instances(NAME)
    assert "ready" in [i["state"] for i in woken]  # beside it one may be starting to be parked
    asleep(sleeper)
    went = [d for d in sleeper.json("explain", NAME) if "scaled to zero" in d["reason"]]
    assert went
    assert [a["kind"] for a in went[0]["actions"]] == ["horizontal_down"]


def test_two_requests_at_once_start_one_instance(sleeper: System) -> None:
    asleep(sleeper)
    with sleeper.stub() as stub:
        calls = [stub.ModelInfer.future(text_request(NAME, f"n{i}"), timeout=50) for i in range(2)]
        assert [unpack_bytes(call.result().raw_output_contents[0]) for call in calls] == [[b"n0"], [b"n1"]]
    decisions = list(reversed(sleeper.json("explain", NAME)))
    last = max(at for at, decision in enumerate(decisions) if "scaled to zero" in decision["reason"])
    woke = next(decision for decision in decisions[last + 1 :] if decision["actions"])
    assert [action["kind"] for action in woke["actions"]] == ["horizontal_up"]


def test_a_deadline_shorter_than_the_cold_start_is_told_clearly(sleeper: System) -> None:
    asleep(sleeper)
    with sleeper.stub() as stub:
        with pytest.raises(grpc.RpcError) as by_caller:
            stub.ModelInfer(text_request(NAME, "too soon"), timeout=0.1)
        assert by_caller.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        request = text_request(NAME, "too soon")
        request.parameters["timeout"].int64_param = 100_000  # microseconds
        with pytest.raises(grpc.RpcError) as by_parameter:
            stub.ModelInfer(request, timeout=30)
    assert by_parameter.value.code() is grpc.StatusCode.UNAVAILABLE
    assert "Request timeout expired" in by_parameter.value.details()
