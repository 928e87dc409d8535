"""From values to the messages of RappService."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from hasgpu.rapp.v1 import rapp_pb2
from hasgpu_core.capacity import CapacityPoint
from hasgpu_predictor import Correction, ModelCard, ObservedError, Probe, Profile, SourceLevel

from hasgpu_rapp.predictions import Recipe, Transfer, data_sha256
from hasgpu_rapp.profiling import Cell
from hasgpu_rapp.queries import FunctionErrors


def correction_to_proto(recipe: Recipe, correction: Correction | None) -> rapp_pb2.Correction:
    """Converts what corrects a prediction."""
    return rapp_pb2.Correction(
        factor=recipe.factors.device,
        run_factor=recipe.factors.run,
        batches_count=correction.observed_count if correction is not None else 0,
        drift=recipe.drift,
    )


def source_to_proto(level: SourceLevel) -> rapp_pb2.SourceFactor:
    """Converts what is known of an instance or device."""
    return rapp_pb2.SourceFactor(name=level.name, factor=level.factor, batches_count=level.batches_count)


def observed_to_proto(error: ObservedError) -> rapp_pb2.ObservedError:
    """Converts the error on observed batches."""
    return rapp_pb2.ObservedError(
        batches_count=error.batches_count,
        predicted_run_ns=round(error.predicted_run_s * 1e9),
        corrected_run_ns=round(error.corrected_run_s * 1e9),
        observed_run_ns=round(error.observed_run_s * 1e9),
        run_mape_pct=error.run_mape_pct,
        corrected_run_mape_pct=error.corrected_run_mape_pct,
        device_mape_pct=error.device_mape_pct,
        corrected_device_mape_pct=error.corrected_device_mape_pct,
        median_run_error_pct=error.median_run_error_pct,
        corrected_median_run_error_pct=error.corrected_median_run_error_pct,
    )


def cell_to_proto(cell: Cell) -> rapp_pb2.Configuration:
    """Converts (batch, sm_pct, quota_permille)."""
    return rapp_pb2.Configuration(batch=cell[0], sm_pct=cell[1], quota_permille=cell[2])


def probe_to_proto(probe: Probe) -> rapp_pb2.PlannedProbe:
    """Converts a planned measurement."""
    return rapp_pb2.PlannedProbe(
        configuration=cell_to_proto(probe.cell),
        cost_ns=round(probe.cost_s * 1e9),
        expected_error_pct=probe.expected_error_pct,
    )


def card_to_proto(card: ModelCard, functions: Sequence[str], profiles: Mapping[str, Profile]) -> rapp_pb2.ModelCard:
    """Converts the card of the model that serves."""
    return rapp_pb2.ModelCard(
        device_model=card.device_model,
        version=card.version,
        sha256=card.sha256,
        rows_count=card.rows_count,
        functions=functions,
        features=card.features,
        mape_pct=card.mape_pct,
        train_s=card.train_s,
        trained_unix_ns=card.trained_unix_ns,
        physical_mape_pct=card.physical_mape_pct,
        data_sha256=data_sha256(profiles),
        seed=card.seed,
        served=True,
    )


def transfer_to_proto(device_model: str, transfer: Transfer) -> rapp_pb2.TransferCard:
    """Converts what predicts functions without a profile, or why there is nothing."""
    if transfer.model is None:
        return rapp_pb2.TransferCard(device_model=device_model, reason=transfer.reason)
    card = transfer.model.card
    return rapp_pb2.TransferCard(
        device_model=device_model,
        reason=transfer.reason,
        models=card.models,
        rows_count=card.rows_count,
        static_mape_pct=card.static_mape_pct,
        probed_mape_pct=card.probed_mape_pct,
        sha256=card.sha256,
        data_sha256=card.data_sha256,
        features=card.features,
        train_s=card.train_s,
        seed=card.seed,
    )


def version_to_proto(
    fields: Mapping[str, Any], functions: Sequence[str], served: Collection[tuple[str, int]]
) -> rapp_pb2.ModelCard:
    """Converts a card as it is kept."""
    return rapp_pb2.ModelCard(
        device_model=fields["device_model"],
        version=fields["version"],
        sha256=fields["sha256"],
        rows_count=fields["rows_count"],
        functions=functions,
        features=fields["features"],
        mape_pct=fields["mape_pct"],
        train_s=fields["train_s"],
        trained_unix_ns=fields["trained_unix_ns"],
        physical_mape_pct=fields["physical_mape_pct"],
        data_sha256=fields["data_sha256"],
        seed=fields["seed"],
        served=(fields["device_model"], fields["version"]) in served,
    )


def function_error_to_proto(error: FunctionErrors) -> rapp_pb2.FunctionError:
    """Converts a function's errors, points included."""
    ape_pct, predicted = error.ape_pct, error.predicted
    return rapp_pb2.FunctionError(
        function=error.function,
        points_count=len(ape_pct),
        mape_pct=float(ape_pct.mean()),
        median_ape_pct=float(np.median(ape_pct)),
        p95_ape_pct=float(np.quantile(ape_pct, 0.95)),
        coverage_90=error.coverage,
        observed=observed_to_proto(error.observed) if error.observed is not None else None,
        points=[
            rapp_pb2.PointError(
                configuration=cell_to_proto(cell),
                measured_ns=round(measured_s * 1e9),
                predicted_ns=round(latency_s * 1e9),
                low_ns=round(low_s * 1e9),
                high_ns=round(high_s * 1e9),
            )
            for cell, measured_s, latency_s, low_s, high_s in zip(
                error.cells, error.measured_s, predicted.latency_s, predicted.low_s, predicted.high_s, strict=True
            )
        ],
    )


def infeasible_reason(points: Sequence[CapacityPoint], slo_ms: int) -> str:
    """Returns why none of the configurations meets the objective; empty when one does."""
    if any(point.capacity_rps > 0 for point in points):
        return ""
    fastest = min(points, key=lambda point: point.latency_s)
    return (
        f"the fastest configuration asked for, batch {fastest.batch} at {fastest.sm_pct} % SM and "
        f"{fastest.quota_permille / 10:g} % quota, takes {fastest.latency_s * 1e3:.3g} ms; the objective is {slo_ms} ms"
    )
