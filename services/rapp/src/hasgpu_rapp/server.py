"""RappService: predictions and what they are made of."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Sequence
from typing import Any

import numpy as np
from hasgpu.rapp.v1 import rapp_pb2, rapp_pb2_grpc
from hasgpu_core.errors import InvalidError
from hasgpu_predictor import ModelCard
from hasgpu_runtime import wire

from hasgpu_rapp import answers
from hasgpu_rapp.adapters.agents import operators_from_proto, point_from_proto
from hasgpu_rapp.app import RappApp
from hasgpu_rapp.profiling import Cell
from hasgpu_rapp.queries import Queries


class RappServicer(rapp_pb2_grpc.RappServiceServicer):
    """Answers from the app's state; errors are the domain's, mapped by the server."""

    def __init__(self, app: RappApp) -> None:
        self._app = app
        self._queries = Queries(app)

    async def Predict(self, request: rapp_pb2.PredictRequest, context: Any) -> rapp_pb2.PredictResponse:
        """Returns latencies in the order asked."""
        found = await self._queries.predict(
            request.function, request.device_model, _cells(request.configurations), instance=request.instance
        )
        correction = self._app.predictions.corrections.get((request.function, request.device_model))
        return rapp_pb2.PredictResponse(
            latencies_ns=np.rint(found.latency_s * 1e9).astype(np.int64).tolist(),
            version=found.recipe.version,
            basis=found.recipe.basis,
            low_ns=np.rint(found.low_s * 1e9).astype(np.int64).tolist(),
            high_ns=np.rint(found.high_s * 1e9).astype(np.int64).tolist(),
            extrapolated=found.extrapolated.tolist(),
            correction=answers.correction_to_proto(found.recipe, correction),
            basis_reason=found.recipe.reason,
        )

    async def PredictSurface(
        self, request: rapp_pb2.PredictSurfaceRequest, context: Any
    ) -> rapp_pb2.PredictSurfaceResponse:
        """Returns a whole grid."""
        found = await self._queries.surface(
            request.function,
            request.device_model,
            batches=request.batches,
            sm_pcts=request.sm_pcts,
            quotas_permille=request.quotas_permille,
            instance=request.instance,
        )
        correction = self._app.predictions.corrections.get((request.function, request.device_model))
        return rapp_pb2.PredictSurfaceResponse(
            points=[wire.capacity_point_to_proto(point) for point in found.points],
            version=found.recipe.version,
            basis=found.recipe.basis,
            slo_ms=found.recipe.slo_ms,
            low_us=np.rint(found.low_s * 1e6).astype(np.int64).tolist(),
            high_us=np.rint(found.high_s * 1e6).astype(np.int64).tolist(),
            extrapolated_batches=found.extrapolated_batches,
            correction=answers.correction_to_proto(found.recipe, correction),
            basis_reason=found.recipe.reason,
        )

    async def Capacity(self, request: rapp_pb2.CapacityRequest, context: Any) -> rapp_pb2.CapacityResponse:
        """Returns what rate each configuration sustains inside an objective."""
        points, recipe, slo_ms = await self._queries.capacity(
            request.function, request.device_model, slo_ms=request.slo_ms, cells=_cells(request.configurations)
        )
        pair = (request.function, request.device_model)
        return rapp_pb2.CapacityResponse(
            points=[wire.capacity_point_to_proto(point) for point in points],
            version=recipe.version,
            basis=recipe.basis,
            slo_ms=slo_ms,
            table_computed_unix_ns=self._app.table_computed_unix_ns.get(pair, 0),
            infeasible_reason=answers.infeasible_reason(points, slo_ms),
            extrapolated=[0 < recipe.profiled_max_batch < point.batch for point in points],
            basis_reason=recipe.reason,
        )

    async def Ingest(self, request: rapp_pb2.IngestRequest, context: Any) -> rapp_pb2.IngestResponse:
        """Adds measurements; all or none."""
        points = [point_from_proto(point) for point in request.points]
        operators = operators_from_proto(request.operators) if request.HasField("operators") else None
        count = await self._app.ingest(request.function, request.device_model, points, operators)
        return rapp_pb2.IngestResponse(
            accepted_count=count, operators_count=len(operators.rows) if operators is not None else 0
        )

    async def Train(self, request: rapp_pb2.TrainRequest, context: Any) -> AsyncIterator[rapp_pb2.TrainResponse]:
        """Fits the device model's predictor; progress, then the card. A caller that leaves does not stop the fit."""
        if not request.device_model:
            raise InvalidError("device_model", expected="a device model", got="nothing")
        texts: asyncio.Queue[str | None] = asyncio.Queue()

        async def train() -> ModelCard:
            try:
                return await self._app.trainer.train(request.device_model, texts.put_nowait)
            finally:
                texts.put_nowait(None)

        waiting = asyncio.ensure_future(train())
        try:
            while (text := await texts.get()) is not None:
                yield rapp_pb2.TrainResponse(progress=text)
            yield rapp_pb2.TrainResponse(card=self._card(await waiting))
        finally:
            waiting.cancel()

    async def Describe(self, request: rapp_pb2.DescribeRequest, context: Any) -> rapp_pb2.DescribeResponse:
        """Returns models, versions, the state of each function, and what is being profiled."""
        cards = self._queries.cards(request.device_model)
        served = {(card.device_model, card.version) for card in cards}
        return rapp_pb2.DescribeResponse(
            cards=[self._card(card) for card in cards],
            profiling=self._queries.profiling_texts(request.device_model),
            versions=[
                answers.version_to_proto(fields, self._queries.function_names(fields.get("workloads", ())), served)
                for fields in self._queries.versions(request.device_model)
            ],
            functions=[
                await self._state(event.spec.name, name)
                for _, event in sorted(self._app.world.functions.items())
                for name in self._app.world.device_models()
                if request.device_model in ("", name)
            ],
            notes=self._app.notes,
            transfers=[
                answers.transfer_to_proto(name, transfer)
                for name, transfer in sorted(self._app.predictions.transfers.items())
                if request.device_model in ("", name)
            ],
        )

    async def Evaluate(self, request: rapp_pb2.EvaluateRequest, context: Any) -> rapp_pb2.EvaluateResponse:
        """Returns errors on points held out and on observed batches."""
        if not request.device_model:
            raise InvalidError("device_model", expected="a device model", got="nothing")
        errors, version = await self._queries.evaluate(request.device_model, request.function)
        return rapp_pb2.EvaluateResponse(
            functions=[answers.function_error_to_proto(error) for error in errors], version=version
        )

    async def PlanProbes(self, request: rapp_pb2.PlanProbesRequest, context: Any) -> rapp_pb2.PlanProbesResponse:
        """Returns what to measure next."""
        plan = await self._queries.plan(
            request.function,
            request.device_model,
            budget_s=request.budget_ms / 1e3,
            candidates=_cells(request.candidates),
        )
        return rapp_pb2.PlanProbesResponse(probes=[answers.probe_to_proto(probe) for probe in plan])

    async def _state(self, function: str, device_model: str) -> rapp_pb2.FunctionState:
        event, device = self._app.pair(function, device_model)
        recipe = self._app.predictions.recipe(event, device)
        correction = self._app.predictions.corrections.get((function, device_model))
        error = await self._queries.observed_error((function, device_model))
        return rapp_pb2.FunctionState(
            function=function,
            device_model=device_model,
            basis=recipe.basis,
            version=recipe.version,
            points_count=len(recipe.profile.points) if recipe.profile is not None else 0,
            profiled_max_batch=recipe.profiled_max_batch,
            table_computed_unix_ns=self._app.table_computed_unix_ns.get((function, device_model), 0),
            correction=answers.correction_to_proto(recipe, correction),
            sources=[answers.source_to_proto(level) for level in correction.sources()] if correction else (),
            observed=answers.observed_to_proto(error) if error is not None else None,
            operators_count=self._queries.operators_count(event),
            basis_reason=recipe.reason,
        )

    def _card(self, card: ModelCard) -> rapp_pb2.ModelCard:
        served = self._app.predictions.served.get(card.device_model)
        profiles = served.profiles if served is not None else {}
        return answers.card_to_proto(card, self._queries.function_names(card.workloads), profiles)


def _cells(configurations: Iterable[rapp_pb2.Configuration]) -> Sequence[Cell]:
    return [(c.batch, c.sm_pct, c.quota_permille) for c in configurations]
