"""RappService: predictions and what they are made of."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from hasgpu.rapp.v1 import rapp_pb2, rapp_pb2_grpc
from hasgpu_core.errors import InvalidError
from hasgpu_predictor import ModelCard
from hasgpu_runtime import wire

from hasgpu_rapp.adapters.agents import point_from_proto
from hasgpu_rapp.app import RappApp
from hasgpu_rapp.predictions import Recipe


class RappServicer(rapp_pb2_grpc.RappServiceServicer):
    """Answers from the app's state; errors are the domain's, mapped by the server."""

    def __init__(self, app: RappApp) -> None:
        self._app = app

    async def Predict(self, request: rapp_pb2.PredictRequest, context: Any) -> rapp_pb2.PredictResponse:
        """Returns latencies in the order asked."""
        configurations = [(c.batch, c.sm_pct, c.quota_permille) for c in request.configurations]
        latencies_s, recipe = await self._app.predict(request.function, request.device_model, configurations)
        return rapp_pb2.PredictResponse(
            latencies_ns=[round(latency_s * 1e9) for latency_s in latencies_s],
            version=recipe.version,
            basis=_basis(recipe),
        )

    async def PredictSurface(
        self, request: rapp_pb2.PredictSurfaceRequest, context: Any
    ) -> rapp_pb2.PredictSurfaceResponse:
        """Returns a whole grid."""
        points, recipe = await self._app.predict_surface(
            request.function,
            request.device_model,
            batches=request.batches,
            sm_pcts=request.sm_pcts,
            quotas_permille=request.quotas_permille,
        )
        return rapp_pb2.PredictSurfaceResponse(
            points=[wire.capacity_point_to_proto(point) for point in points],
            version=recipe.version,
            basis=_basis(recipe),
            slo_ms=recipe.slo_ms,
        )

    async def Ingest(self, request: rapp_pb2.IngestRequest, context: Any) -> rapp_pb2.IngestResponse:
        """Adds measurements; all or none."""
        points = [point_from_proto(point) for point in request.points]
        count = await self._app.ingest(request.function, request.device_model, points)
        return rapp_pb2.IngestResponse(accepted_count=count)

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
        """Returns the models' cards and what is being profiled."""
        return rapp_pb2.DescribeResponse(
            cards=[self._card(card) for card in self._app.cards(request.device_model)],
            profiling=self._app.profiling_texts(request.device_model),
        )

    def _card(self, card: ModelCard) -> rapp_pb2.ModelCard:
        return rapp_pb2.ModelCard(
            device_model=card.device_model,
            version=card.version,
            sha256=card.sha256,
            rows_count=card.rows_count,
            functions=self._app.function_names(card.workloads),
            features=card.features,
            mape_pct=card.mape_pct,
            train_s=card.train_s,
            trained_unix_ns=card.trained_unix_ns,
        )


def _basis(recipe: Recipe) -> str:
    return "static" if recipe.profile is None else "profiled"
