"""The load generator, on its own and against a server of the protocol in this process."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import pytest
from hasgpu.inference.v2 import inference_pb2 as oip
from hasgpu.inference.v2 import inference_pb2_grpc
from hasgpu_cli.load import OK, UNSENT, Answer, Outcome, Replay, percentile, run_open_loop
from hasgpu_cli.sender import FunctionSender, Sample
from hasgpu_cli.tensors import Tensor
from hasgpu_core.errors import QueueFullError
from hasgpu_runtime.rpc import Server, create_server, open_channel


async def test_every_request_is_settled_once_and_never_before_it_is_due() -> None:
    replay = Replay([0.0, 0.01, 0.01, 0.02])
    seen: list[int] = []

    async def send(index: int) -> Answer:
        await asyncio.sleep(0.005 * (4 - index))
        return Answer(OK) if index != 2 else Answer("UNAVAILABLE", "full")

    await run_open_loop(replay, send, on_outcome=lambda outcome: seen.append(outcome.index))
    assert sorted(seen) == [0, 1, 2, 3]
    assert all(outcome.sent_s >= outcome.due_s for outcome in replay.outcomes)
    summary = replay.summary(slo_ms=60_000)
    assert (summary.requests, summary.ok, summary.failures) == (4, 3, {"UNAVAILABLE": 1})
    assert summary.slo_attainment == 0.75
    assert summary.first_failure == "UNAVAILABLE: full"


async def test_the_loop_is_open_and_what_can_not_be_sent_is_counted() -> None:
    """No answer comes until all are due: an open loop sends on, up to its bound, and counts the rest."""
    replay = Replay([0.0, 0.001, 0.002, 0.003, 0.004])
    release = asyncio.Event()

    async def send(index: int) -> Answer:
        await release.wait()
        return Answer(OK)

    def let_go_after_two(_: Outcome) -> None:
        if len(replay.outcomes) == 2:
            release.set()

    await run_open_loop(replay, send, most_in_flight=3, on_outcome=let_go_after_two)
    assert replay.sent_count == 3
    assert [o.index for o in replay.outcomes if o.answer.status == UNSENT] == [3, 4]
    summary = replay.summary(slo_ms=60_000)
    assert (summary.requests, summary.ok, summary.unsent) == (5, 3, 2)
    assert summary.slo_attainment == 0.6


def test_latency_counts_from_the_due_time() -> None:
    replay = Replay([1.0])
    replay.outcomes.append(Outcome(0, due_s=1.0, sent_s=1.4, done_s=1.5, answer=Answer(OK)))
    summary = replay.summary(slo_ms=400)
    assert summary.p50_ms == pytest.approx(500)
    assert summary.late_sends_p99_ms == pytest.approx(400)
    assert summary.slo_attainment == 0


def test_nothing_answered_gives_none_not_zero() -> None:
    summary = Replay([]).summary(slo_ms=1)
    assert (summary.p50_ms, summary.slo_attainment, summary.late_sends_p99_ms) == (None, None, None)


def test_percentile_is_the_nearest_rank() -> None:
    values = [float(value) for value in range(1, 101)]
    assert [percentile(values, pct) for pct in (0, 50, 95, 99, 100)] == [1, 50, 95, 99, 100]
    assert percentile([7.0], 99) == 7.0
    assert percentile([], 50) is None


class Doubler(inference_pb2_grpc.GRPCInferenceServiceServicer):
    """Answers y = 2 x, wrongly for x[0] == 3, and refuses x[0] == 4."""

    async def ModelInfer(self, request: oip.ModelInferRequest, context: Any) -> oip.ModelInferResponse:
        x = np.frombuffer(request.raw_input_contents[0], dtype="<f4")
        if x[0] == 4:
            raise QueueFullError("full", retry_after_s=1.0)
        y = (2 * x + (x[0] == 3)).astype("<f4")
        output = oip.ModelInferResponse.InferOutputTensor(name="y", datatype="FP32", shape=[1, len(y)])
        return oip.ModelInferResponse(outputs=[output], raw_output_contents=[y.tobytes()])


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    server = create_server(address="127.0.0.1:0")
    inference_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(Doubler(), server)
    await server.start()
    yield server
    await server.stop(0)


async def test_answers_are_checked_and_errors_become_statuses(server: Server) -> None:
    def sample(first: float, expected: bool = True) -> Sample:
        x = np.array([first, 1], dtype="<f4")
        return Sample([Tensor("x", "FP32", (1, 2), x.tobytes())], 2 * x if expected else None)

    async with open_channel(server.address) as channel:
        samples = [sample(1), sample(3), sample(4), sample(3, expected=False)]
        sender = FunctionSender(channel, "double", samples, timeout_s=5)
        replay = Replay([0.0] * 8)
        await run_open_loop(replay, sender.send)
    summary = replay.summary(slo_ms=60_000)
    assert (summary.requests, summary.ok, summary.wrong_outputs) == (8, 6, 2)
    assert summary.failures == {"UNAVAILABLE": 2}
    assert "full" in summary.first_failure
