"""Latency prediction: features, the CatBoost model, capacity tables.

    points --fit_physical--> PhysicalModel --LatencyModel (residual)--> Surface --capacity_table--> CapacityTable

CatBoost is imported only when a model is fitted or read, so importing this package is quick.
"""

from hasgpu_predictor.capacity import SPREAD_FACTOR, capacity_table, surface_points, table_axes
from hasgpu_predictor.correction import Correction, ObservedBatch
from hasgpu_predictor.features import FEATURES, FunctionView
from hasgpu_predictor.model import (
    ROWS_MIN,
    LatencyModel,
    ModelCard,
    TrainingSettings,
    profile_axes,
    static_surface,
)
from hasgpu_predictor.physical import PhysicalModel, fit_physical, static_physical
from hasgpu_predictor.profile import Profile, ProfilePoint, load_profile, save_profile, workload_digest
from hasgpu_predictor.surface import Axes, Surface, batch_axis, canonical_axes

__all__ = [
    "FEATURES",
    "ROWS_MIN",
    "SPREAD_FACTOR",
    "Axes",
    "Correction",
    "FunctionView",
    "LatencyModel",
    "ModelCard",
    "ObservedBatch",
    "PhysicalModel",
    "Profile",
    "ProfilePoint",
    "Surface",
    "TrainingSettings",
    "batch_axis",
    "canonical_axes",
    "capacity_table",
    "fit_physical",
    "load_profile",
    "profile_axes",
    "save_profile",
    "static_physical",
    "static_surface",
    "surface_points",
    "table_axes",
    "workload_digest",
]
