"""Latency prediction: features, the CatBoost model, capacity tables.

    points --fit_physical--> PhysicalModel --LatencyModel (residual)--> Surface --capacity_table--> CapacityTable

CatBoost is imported only when a model is fitted or read, so importing this package is quick.
"""

from hasgpu_predictor.capacity import SPREAD_FACTOR, capacity_table, surface_points, table_axes
from hasgpu_predictor.correction import Correction, Factors, ObservedBatch, ObservedError, SourceLevel, corrected
from hasgpu_predictor.features import FEATURES, FunctionView
from hasgpu_predictor.intervals import Intervals
from hasgpu_predictor.model import (
    ROWS_MIN,
    LatencyModel,
    ModelCard,
    TrainingSettings,
    profile_axes,
    static_surface,
)
from hasgpu_predictor.operators import V100, DataSheet, Operator, Workload, data_sheet
from hasgpu_predictor.physical import PhysicalModel, fit_physical, static_physical
from hasgpu_predictor.probe_plan import Probe, plan_probes, probe_candidates
from hasgpu_predictor.profile import Profile, ProfilePoint, load_profile, save_profile, workload_digest
from hasgpu_predictor.surface import Axes, Surface, batch_axis, canonical_axes
from hasgpu_predictor.transfer import Probes, Sample, TransferModel, TransferSettings, TransferView, train_transfer
from hasgpu_predictor.unprofiled import (
    PROBES_MAX,
    FunctionTransfer,
    Known,
    TransferCard,
    fit_transfer,
    parse_operator,
)

__all__ = [
    "FEATURES",
    "PROBES_MAX",
    "ROWS_MIN",
    "SPREAD_FACTOR",
    "V100",
    "Axes",
    "Correction",
    "DataSheet",
    "Factors",
    "FunctionTransfer",
    "FunctionView",
    "Intervals",
    "Known",
    "LatencyModel",
    "ModelCard",
    "ObservedBatch",
    "ObservedError",
    "Operator",
    "PhysicalModel",
    "Probe",
    "Probes",
    "Profile",
    "ProfilePoint",
    "Sample",
    "SourceLevel",
    "Surface",
    "TrainingSettings",
    "TransferCard",
    "TransferModel",
    "TransferSettings",
    "TransferView",
    "Workload",
    "batch_axis",
    "canonical_axes",
    "capacity_table",
    "corrected",
    "data_sheet",
    "fit_physical",
    "fit_transfer",
    "load_profile",
    "parse_operator",
    "plan_probes",
    "probe_candidates",
    "profile_axes",
    "save_profile",
    "static_physical",
    "static_surface",
    "surface_points",
    "table_axes",
    "train_transfer",
    "workload_digest",
]
