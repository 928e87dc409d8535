"""`hasgpu rapp`: what it asks the service, and what it shows."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import Future
from typing import Any

import pytest
from click.testing import CliRunner, Result
from hasgpu.rapp.v1 import rapp_pb2, rapp_pb2_grpc
from hasgpu_cli.__main__ import cli
from hasgpu_cli.commands.rapp_service import parse_at
from hasgpu_core.errors import InvalidError, NotFoundError
from hasgpu_runtime.rpc import create_server


class Rapp(rapp_pb2_grpc.RappServiceServicer):
    """Answers with what a test sets."""

    def __init__(self) -> None:
        self.basis = "profiled"
        self.basis_reason = ""
        self.devices = ["Card"]
        self.correction = rapp_pb2.Correction(factor=1.0, run_factor=1.0)
        self.asked: list[Any] = []

    async def Predict(self, request: Any, context: Any) -> rapp_pb2.PredictResponse:
        self.asked.append(request)
        count = len(request.configurations)
        return rapp_pb2.PredictResponse(
            latencies_ns=[10_000_000 * c.batch for c in request.configurations],
            low_ns=[9_000_000] * count,
            high_ns=[12_000_000] * count,
            extrapolated=[c.batch > 4 for c in request.configurations],
            version=3,
            basis=self.basis,
            basis_reason=self.basis_reason,
            correction=self.correction,
        )

    async def Capacity(self, request: Any, context: Any) -> rapp_pb2.CapacityResponse:
        self.asked.append(request)
        answer = rapp_pb2.CapacityResponse(version=3, basis=self.basis, slo_ms=request.slo_ms or 100)
        for c in request.configurations or [rapp_pb2.Configuration(batch=1, sm_pct=100, quota_permille=1_000)]:
            answer.points.add(batch=c.batch, sm_pct=c.sm_pct, quota_permille=c.quota_permille, capacity_millirps=42_500)
        return answer

    async def Describe(self, request: Any, context: Any) -> rapp_pb2.DescribeResponse:
        card = rapp_pb2.ModelCard(
            device_model="Card", version=3, sha256="ab" * 32, rows_count=48, functions=["f"], features=["x", "y"]
        )
        card.mape_pct, card.physical_mape_pct, card.data_sha256, card.served = 3.25, 7.5, "cd" * 32, True
        answer = rapp_pb2.DescribeResponse(cards=[card], profiling={"g on Card": "loading"}, notes=["a file was odd"])
        before = answer.versions.add()
        before.CopyFrom(card)
        before.version, before.served = 2, False
        answer.transfers.add(device_model="Other", reason="2 of the 4 functions that are needed were profiled on Other")
        answer.transfers.add(
            device_model="Card",
            models=["f", "g", "h", "i"],
            rows_count=99,
            static_mape_pct=24.5,
            probed_mape_pct=8.25,
            sha256="ef" * 32,
            data_sha256="cd" * 32,
        )
        for name in self.devices:
            state = answer.functions.add(
                function="f", device_model=name, basis="profiled", version=3, points_count=48, profiled_max_batch=8
            )
            state.operators_count, state.basis_reason = 91, self.basis_reason
            state.correction.CopyFrom(self.correction)
            state.sources.add(name="instance f-0", factor=1.52, batches_count=100)
            state.observed.CopyFrom(
                rapp_pb2.ObservedError(
                    batches_count=200,
                    predicted_run_ns=10_000_000,
                    corrected_run_ns=15_000_000,
                    observed_run_ns=15_200_000,
                    median_run_error_pct=34.2,
                    corrected_median_run_error_pct=1.3,
                )
            )
        return answer

    async def Train(self, request: Any, context: Any) -> AsyncIterator[rapp_pb2.TrainResponse]:
        if request.device_model != "Card":
            raise NotFoundError("profile on device model", request.device_model, "nothing was measured on it yet")
        yield rapp_pb2.TrainResponse(progress="fitting 48 rows")
        yield rapp_pb2.TrainResponse(card=rapp_pb2.ModelCard(device_model="Card", version=4, rows_count=48))

    async def Evaluate(self, request: Any, context: Any) -> rapp_pb2.EvaluateResponse:
        self.asked.append(request)
        answer = rapp_pb2.EvaluateResponse(version=3)
        answer.functions.add(
            function="f", points_count=48, mape_pct=3.0, median_ape_pct=2.0, p95_ape_pct=9.0, coverage_90=0.9
        )
        return answer


@pytest.fixture
def rapp(monkeypatch: pytest.MonkeyPatch) -> Iterator[Rapp]:
    """In a thread with a loop of its own, since a command runs one itself."""
    service, ready = Rapp(), Future[tuple[asyncio.AbstractEventLoop, str]]()
    stop: list[asyncio.Event] = []

    async def serve() -> None:
        server = create_server(address="127.0.0.1:0")
        rapp_pb2_grpc.add_RappServiceServicer_to_server(service, server)
        await server.start()
        stop.append(asyncio.Event())
        ready.set_result((asyncio.get_running_loop(), server.address))
        await stop[0].wait()
        await server.stop(0)

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    loop, address = ready.result(20)
    monkeypatch.setenv("HASGPU_RAPP", address)
    yield service
    loop.call_soon_threadsafe(stop[0].set)
    thread.join(20)


def call(*arguments: str) -> Result:
    return CliRunner().invoke(cli, ["rapp", *arguments])


def test_a_prediction_shows_interval_rate_and_what_is_extrapolated(rapp: Rapp) -> None:
    result = call("predict", "f", "--at", "1,100,100", "--at", "8,50,12.5", "--slo-ms", "50", "--instance", "f-0")
    assert result.exit_code == 0, result.output
    capacity, predict = rapp.asked
    assert (capacity.device_model, capacity.slo_ms, predict.instance) == ("Card", 50, "f-0")
    assert [(c.batch, c.sm_pct, c.quota_permille) for c in predict.configurations] == [(1, 100, 1000), (8, 50, 125)]
    assert "f on Card, version 3, profiled\n" in result.output
    _, _, small, large = result.output.splitlines()
    assert "9.0..12.0 ms" in small
    assert "42.5/s" in small
    assert "extrapolated" not in small
    assert "12.5 %" in large
    assert "extrapolated" in large
    found = json.loads(call("predict", "f", "--json").output)
    assert found["points"][0]["latency_ms"] == 10.0
    assert found["slo_ms"] == 100


def test_a_guess_is_called_one(rapp: Rapp) -> None:
    rapp.basis = "static"
    assert "static: a guess, nothing of it was measured" in call("predict", "f").output


def test_what_a_prediction_rests_on_is_told(rapp: Rapp) -> None:
    rapp.basis, rapp.basis_reason = "transferred", "from its 91 operators, 3 points of its own and 4 functions"
    assert "transferred: from its 91 operators, 3 points of its own" in call("predict", "f").output
    shown = call("describe").output
    assert "Card functions without a profile: from their operators and 4 others, 24.5 % error" in shown
    assert "Other functions without a profile: guessed from their size, 2 of the 4" in shown
    assert "91 operators" in shown
    assert "from its 91 operators, 3 points of its own" in shown


def test_the_device_has_to_be_named_when_there_are_several(rapp: Rapp) -> None:
    rapp.devices = ["Card", "Other"]
    assert "--device: expected one of Card, Other" in call("predict", "f").output
    assert call("predict", "f", "--device", "Other").exit_code == 0
    assert "rapp knows none of that name" in call("predict", "h").output


def test_describe_tells_versions_corrections_and_drift(rapp: Rapp) -> None:
    rapp.correction = rapp_pb2.Correction(factor=1.5, run_factor=1.4, batches_count=200, drift="it takes 1.5 times")
    result = call("describe")
    assert result.exit_code == 0, result.output
    for text in (
        "Card version 3: 48 rows of f, 3.2 % error, model abababababab, data cdcdcdcdcdcd",
        "the physical estimate alone 7.5 %",
        "before: version 2",
        "corrected by 1.50 where the quota decides, else by 1.40, after 200 batches; DRIFT: it takes 1.5 times",
        "instance f-0: 1.52 over 100 batches",
        "a run of 15.2 ms was predicted as 10.0, with the correction 15.0 ms; median error 34.2 % before, 1.3 %",
        "profiling g on Card: loading",
        "note: a file was odd",
    ):
        assert text in result.output
    assert json.loads(call("describe", "--json").output)["functions"][0]["correction"]["drift"]


def test_train_shows_progress_and_the_card(rapp: Rapp) -> None:
    result = call("train", "Card")
    assert result.exit_code == 0, result.output
    assert "fitting 48 rows" in result.output
    assert "Card version 4: 48 rows" in result.output
    failed = call("train", "abacus")
    assert failed.exit_code == 1
    assert "nothing was measured on it yet" in failed.output


def test_errors_are_told(rapp: Rapp) -> None:
    result = call("errors", "Card", "--function", "f")
    assert rapp.asked[0].function == "f"
    assert (
        "f: mean 3.0, median 2.0, 95th percentile 9.0 over 48 points; 90 % of them in the 90 % interval"
        in result.output
    )


@pytest.mark.parametrize("text", ["", "1,2", "0,100,100", "1,101,100", "1,100,0", "1,100,101", "a,b,c", "1,100,nan"])
def test_a_configuration_that_cannot_be_is_named(text: str) -> None:
    with pytest.raises(InvalidError, match="--at: expected batch,sm_pct,quota_pct"):
        parse_at(text)


def test_a_configuration() -> None:
    assert parse_at("4, 50, 12.5") == (4, 50, 125)
