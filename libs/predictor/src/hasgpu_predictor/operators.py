"""Operators of a model's graph, and what the predictor takes from them; the table that every extractor produces.

One row an operator in execution order, at batch 1, as in `model_ops.csv` of the published profiles. The rows of a
`torch.export` program come from `hasgpu_device.operators`, which has torch; here are numbers only, so that training,
serving and the simulator read the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]

FREE = frozenset({"view", "permute", "as_strided", "split_with_sizes"})
"""Operators that start no kernel."""
KINDS = (
    "pointwise",
    "spatial",
    "grouped",
    "depthwise",
    "linear",
    "norm",
    "layernorm",
    "element",
    "cat",
    "reduce",
    "pool",
)
_KIND_OF = {
    "_native_batch_norm_legit_no_training": "norm",
    "native_layer_norm": "layernorm",
    "cat": "cat",
    "mean": "reduce",
    "_adaptive_avg_pool2d": "reduce",
    "avg_pool2d": "pool",
    "max_pool2d_with_indices": "pool",
}
_FLOAT_BYTES = 4.0


@dataclass(frozen=True, slots=True)
class Operator:
    """One operator at batch 1."""

    op: str
    """Name of the aten operator without its overload: `convolution`, `addmm`, `relu`, ..."""
    flops: float
    """2 per multiply-add."""
    input_bytes: float
    """Of activations."""
    weight_bytes: float
    output_bytes: float
    groups: int
    """Of a convolution, else 1."""
    output_shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Kernel:
    """An operator as a matrix product, where it is one: out (rows, columns) = in (rows, depth) @ (depth, columns)."""

    kind: str
    flops: float
    bytes: float
    """Activations in and out, batch 1."""
    weight_bytes: float
    rows: float
    columns: float
    """Of one group."""
    depth: float
    groups: int


def kernel_of(operator: Operator) -> Kernel | None:
    """Returns what an operator runs on the device; None for one that starts nothing."""
    if operator.op in FREE:
        return None
    shape, groups = operator.output_shape, max(1, operator.groups)
    moved = operator.input_bytes + operator.output_bytes
    if operator.op == "convolution" and len(shape) >= 2:
        channels, pixels = shape[1], float(np.prod(shape[2:]) or 1)
        depth = operator.flops / max(1.0, 2.0 * channels * pixels)
        taps = depth * groups * pixels / max(1.0, operator.input_bytes / _FLOAT_BYTES)
        if groups > 1:
            kind = "depthwise" if groups == channels else "grouped"
        else:
            kind = "pointwise" if 0.2 < taps < 1.5 else "spatial"
        return Kernel(kind, operator.flops, moved, operator.weight_bytes, pixels, channels / groups, depth, groups)
    if operator.op in ("addmm", "mm", "bmm", "linear") and shape:
        columns, rows = float(shape[-1]), float(np.prod(shape[:-1]) or 1)
        depth = operator.flops / max(1.0, 2.0 * rows * columns)
        return Kernel("linear", operator.flops, moved, operator.weight_bytes, rows, columns, depth, 1)
    return Kernel(_KIND_OF.get(operator.op, "element"), operator.flops, moved, operator.weight_bytes, 1, 1, 1, 1)


SUMMARY: tuple[str, ...] = (
    "launches_log2",
    "matrix_launches_log2",
    "flops_log2",
    "bytes_log2",
    "intensity_log2",
    "pointwise_flops_share",
    "spatial_flops_share",
    "grouped_flops_share",
    "linear_flops_share",
    "depthwise_bytes_share",
    "cat_bytes_share",
    "layernorm_bytes_share",
    "grouped_bytes_share",
    "grouped_launch_share",
    "depthwise_launch_share",
    "group_width_log2",
    "groups_mean",
    "columns_log2",
    "critical_path_log2",
)
"""Of a whole model, batch 1: counts of kernels, FLOPs (2 a multiply-add), bytes (FP32, weights included),
`intensity`: FLOPs a byte; shares 0..1; `group_width`: channels a group of grouped convolutions, plus 1; `columns`:
output channels a convolution, weighted by FLOPs; `critical_path`: kernels one after another (a table of operators has
no edges and one stream runs them, so it is all of them)."""


@dataclass(frozen=True, slots=True)
class Workload:
    """A model as the predictor sees it."""

    kernels: tuple[Kernel, ...] = ()
    summary: Array = field(default_factory=lambda: np.zeros(len(SUMMARY)), repr=False)
    """Shape (len(SUMMARY),)."""

    @classmethod
    def of(cls, operators: Sequence[Operator]) -> Workload:
        """Summarises the operators of a model, in any order."""
        kernels = tuple(k for k in map(kernel_of, operators) if k is not None)
        return cls(kernels, _summary(kernels))

    def value(self, name: str) -> float:
        """Returns one number of the summary."""
        return float(self.summary[SUMMARY.index(name)])


def _summary(kernels: Sequence[Kernel]) -> Array:
    def total(what: str, *kinds: str) -> float:
        return float(sum(getattr(k, what) for k in kernels if not kinds or k.kind in kinds))

    def count(*kinds: str) -> int:
        return sum(k.kind in kinds for k in kernels)

    matrix = ("pointwise", "spatial", "grouped", "depthwise")
    launches = max(1, len(kernels))
    flops, moved = max(1.0, total("flops")), max(1.0, total("bytes"))
    weights = total("weight_bytes")
    products = max(1.0, total("flops", *matrix, "linear"))
    grouped = [k for k in kernels if k.kind == "grouped"]
    convolutions = [k for k in kernels if k.kind in matrix]
    heavy = sum(k.flops for k in convolutions) or 1.0
    columns = sum(np.log2(max(1.0, k.columns)) * k.flops for k in convolutions) / heavy
    return np.array(
        [
            np.log2(launches),
            np.log2(1 + count(*matrix)),
            np.log2(flops),
            np.log2(moved + weights),
            np.log2(flops / (moved + weights)),
            total("flops", "pointwise") / products,
            total("flops", "spatial") / products,
            total("flops", "grouped") / products,
            total("flops", "linear") / products,
            total("bytes", "depthwise") / moved,
            total("bytes", "cat") / moved,
            total("bytes", "layernorm") / moved,
            total("bytes", "grouped") / moved,
            count("grouped") / launches,
            count("depthwise") / launches,
            np.log2(1 + float(np.mean([k.columns for k in grouped]))) if grouped else 0.0,
            float(np.mean([k.groups for k in grouped])) if grouped else 0.0,
            columns,
            np.log2(launches),
        ]
    )


@dataclass(frozen=True, slots=True)
class DataSheet:
    """What a vendor says of a device."""

    peak_flops: float
    """FP32 FLOP a second, all SMs."""
    memory_bytes_per_s: float
    sm_count: int
    saturating_sm_pct: float = 40.0
    """Share of SMs that can use the whole memory bandwidth."""


V100 = DataSheet(15.7e12, 900e9, 80)
"""V100 PCIe/SXM2 16 GB, FP32 without tensor cores. Source: NVIDIA V100 data sheet."""
_SHEETS: tuple[tuple[str, DataSheet], ...] = (
    ("h200", DataSheet(66.9e12, 4.8e12, 132, 33.0)),
    ("h100", DataSheet(66.9e12, 3.35e12, 132, 33.0)),
    ("a100", DataSheet(19.5e12, 1.555e12, 108)),
    ("v100", V100),
    ("l40", DataSheet(91.6e12, 864e9, 142)),
    ("l4", DataSheet(30.3e12, 300e9, 58)),
    ("a10", DataSheet(31.2e12, 600e9, 72)),
    ("t4", DataSheet(8.1e12, 320e9, 40)),
)
"""By what a device model's name contains; the first that fits. Sources: NVIDIA data sheets (SXM variants)."""
CPU = DataSheet(100e9, 20e9, 100, 50.0)
"""An ordinary pair of cores, shares in per cent; only proportions matter, as the columns are fitted to measurements."""


def data_sheet(device_model: str, backend: str) -> DataSheet:
    """Returns a device model's sheet, found by its name; of a GPU that is not known the V100's, for its proportions."""
    if backend == "cpu":
        return CPU
    name = device_model.lower()
    return next((sheet for key, sheet in _SHEETS if key in name), V100)


_TILES = {"large": (128, 128), "medium": (128, 64), "small": (64, 32)}


def roofline_columns(workload: Workload, sheet: DataSheet, batch: ArrayLike, sm_pct: ArrayLike) -> dict[str, Array]:
    """Returns times in ms at the sheet's peak by kind of kernel, each of shape (n,), for n pairs of batch and SM share.

    `flops`: max(compute, memory) of each kernel, summed; `tiles`: the same with matrix products cut into tiles of a
    whole number of waves over the SMs; `memory`: bytes over the bandwidth that the share can use; `bound`: bytes over
    a bandwidth in proportion to the share. Grouped convolutions have a column a batch range, as the library picks
    other algorithms there. A device's real time is a non-negative combination of the columns (see `device_times`).
    """
    b, s = np.asarray(batch, float), np.asarray(sm_pct, float)
    out: dict[str, Array] = {}

    def add(name: str, value: Array) -> None:
        out[name] = out.get(name, np.zeros(b.shape)) + 1e3 * value.sum(0)

    bandwidth = sheet.memory_bytes_per_s * np.minimum(1.0, s / sheet.saturating_sm_pct)
    peak = sheet.peak_flops * s / 100.0
    sms = np.maximum(1.0, np.round(sheet.sm_count * s / 100.0))
    add("launches", np.full((1, *b.shape), 5e-6 * len(workload.kernels)))
    for kind in KINDS:
        kernels = [k for k in workload.kernels if k.kind == kind]
        if not kernels:
            continue
        flops, moved, weights, rows, cols, depth, groups = (
            np.array([getattr(k, what) for k in kernels], float)[:, None]
            for what in ("flops", "bytes", "weight_bytes", "rows", "columns", "depth", "groups")
        )
        moved = moved * b + weights
        memory = moved / bandwidth
        roof = np.maximum(flops * b / peak, memory)
        if kind in ("pointwise", "spatial", "linear"):
            for name, (tall, wide) in _TILES.items():
                waves = np.ceil(np.ceil(b * rows / tall) * np.ceil(cols / wide) * groups / sms)
                each = waves * 2 * tall * wide * depth / (sheet.peak_flops / sheet.sm_count)
                add(f"{kind}_tiles_{name}", np.maximum(each, memory))
            add(f"{kind}_flops", roof)
            add(f"{kind}_memory", memory)
        elif kind == "grouped":
            width = "narrow" if np.mean(cols) <= 8 else "middle" if np.mean(cols) <= 48 else "wide"
            for name, chosen in (("1", b < 2), ("2", (b >= 2) & (b < 4)), ("4", b >= 4)):
                add(f"grouped_{width}_{name}", roof * chosen)
            add("grouped_memory", memory)
        else:
            if kind == "depthwise":
                add("depthwise_flops", flops * b / peak)
            name = "element" if kind in ("element", "norm") else kind
            add(f"{name}_memory", memory)
            add(f"{name}_bound", moved / sheet.memory_bytes_per_s * 100.0 / s)
    return out


COLUMNS: tuple[str, ...] = (
    "launches",
    *(f"{k}_{c}" for k in ("pointwise", "spatial", "linear") for c in ("tiles_large", "tiles_medium", "tiles_small")),
    *(f"{k}_{c}" for k in ("pointwise", "spatial", "linear") for c in ("flops", "memory")),
    *(f"grouped_{w}_{n}" for w in ("narrow", "middle", "wide") for n in ("1", "2", "4")),
    "grouped_memory",
    "depthwise_flops",
    *(f"{k}_{c}" for k in ("depthwise", "layernorm", "element", "cat", "reduce", "pool") for c in ("memory", "bound")),
)
"""Order of the columns in `roofline_matrix`."""


def roofline_matrix(workload: Workload, sheet: DataSheet, batch: ArrayLike, sm_pct: ArrayLike) -> Array:
    """Returns `roofline_columns` as an array of shape (n, len(COLUMNS)), in ms; 0 where a model has no such kernel."""
    found = roofline_columns(workload, sheet, batch, sm_pct)
    zero = np.zeros(np.asarray(batch, float).shape)
    return np.stack([found.get(name, zero) for name in COLUMNS], axis=1)
