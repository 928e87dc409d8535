"""The table of features in docs/rapp.md, of the extractors' own names: `python -m hasgpu_predictor.feature_table`.

A feature that an extractor has and no description here is an error, and so is the reverse.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence

from hasgpu_predictor.features import FEATURES
from hasgpu_predictor.operators import COLUMNS, SUMMARY
from hasgpu_predictor.transfer import TRANSFER_FEATURES

_BEGIN, _END = "<!-- features: python -m hasgpu_predictor.feature_table -->", "<!-- end of features -->"

SUMMARY_MEANINGS: tuple[tuple[str, str, str], ...] = (
    ("launches_log2", "log2 of a count", "operators that start a kernel"),
    ("matrix_launches_log2", "log2 of a count, plus 1", "convolutions among them"),
    ("flops_log2", "log2 FLOP", "arithmetic, 2 a multiply-add"),
    ("bytes_log2", "log2 byte", "activations in and out, and weights, each once"),
    ("intensity_log2", "log2 FLOP/byte", "arithmetic intensity"),
    (r"(pointwise|spatial|grouped|linear)_flops_share", "0..1", "of the arithmetic of convolutions and products"),
    (r"(depthwise|cat|layernorm|grouped)_bytes_share", "0..1", "of the bytes of activations"),
    (r"(grouped|depthwise)_launch_share", "0..1", "of the launches"),
    ("group_width_log2", "log2 of a count, plus 1", "channels a group of grouped convolutions; 0: none"),
    ("groups_mean", "count", "groups of grouped convolutions; 0: none"),
    ("columns_log2", "log2 of a count", "output channels a convolution, weighted by FLOPs"),
    ("critical_path_log2", "log2 of a count", "kernels one after another: all of them, as one stream runs them"),
)
COLUMN_MEANINGS: tuple[tuple[str, str, str], ...] = (
    ("launches", "ms", "5 us a kernel"),
    (
        r"(pointwise|spatial|linear)_tiles_(large|medium|small)",
        "ms",
        "roofline with products cut into tiles (128x128, 128x64, 64x32), whole waves over the share's SMs",
    ),
    (r"(pointwise|spatial|linear)_flops", "ms", "roofline: max(FLOPs / peak, bytes / bandwidth) of each kernel"),
    (r"(pointwise|spatial|linear)_memory", "ms", "bytes over the bandwidth that the share can draw"),
    (r"grouped_(narrow|middle|wide)_[124]", "ms", "roofline of grouped convolutions by width, from that batch on"),
    ("grouped_memory", "ms", "bytes over bandwidth"),
    ("depthwise_flops", "ms", "FLOPs / peak"),
    (r"(depthwise|layernorm|element|cat|reduce|pool)_memory", "ms", "bytes over the bandwidth that the share can draw"),
    (r"(depthwise|layernorm|element|cat|reduce|pool)_bound", "ms", "bytes over a bandwidth in proportion to the share"),
)
TRANSFER_MEANINGS: tuple[tuple[str, str, str], ...] = (
    ("quota_log", "ln %", "quota"),
    ("batch_log2", "octave", "batch"),
    ("sm_from_probe_octaves", "octave", "SM share over that of the probes"),
    ("device_over_curve_log", "ln", "predicted device time over the launch curve: device-bound above 0"),
    (r"device_over_(fast|slow)_curve_log", "ln", "the same at the largest quota, and at 20 %"),
    ("device_spread_log", "ln", "standard deviation of the predicted device time"),
    ("curve_over_interpolation_log", "ln", "launch curve over a straight line between the probes: windows of the gate"),
    ("curve_range_log", "ln", "launch curve at 20 % over that at the largest quota"),
    ("host_over_probe_log", "ln", "graph time at large SM shares over the fastest probe; NaN: not probed"),
    ("graph_5_over_host_log", "ln", "graph time on 5 % of the SMs over that; NaN: not probed"),
    ("probe_per_launch_log", "ln ms", "fastest probe for each launch"),
    ("device_over_probe_at_probe_log", "ln", "predicted device time at the probes' place over the fastest probe"),
    (
        "octaves_of_batch_from_probe_if_grouped",
        "octave",
        "batch over that of the probes; 0 without grouped convolutions",
    ),
    (
        r"depthwise_launch_share|group_width_log2|groups_mean|intensity_log2",
        "as above",
        "of the model, from its operators",
    ),
    ("probes_count", "count", "probes on the launch curve"),
)
FEATURE_MEANINGS: tuple[tuple[str, str, str], ...] = (
    ("batch_log2", "octave", "batch"),
    ("sm_pct_log2", "log2 %", "SM share"),
    ("quota_permille_log2", "log2 per mille", "quota"),
    ("batch_per_sm_log2", "octave", "batch over SM share"),
    ("physical_latency_s_log2", "log2 s", "physical estimate"),
    ("device_time_s_log2", "log2 s", "its device time"),
    ("quota_bound_s_log2", "log2 s", "its latency as the quota bounds it"),
    ("quota_bound_per_device_time_log2", "octave", "regime: bound by the quota above 0, by the device below"),
    ("windows_per_batch_log2", "octave", "device time over a window's worth of quota: the gate's quantised waiting"),
    ("segment_per_token_log2", "octave", "longest segment over a window's worth of quota"),
    ("function_device_time_s_log2", "log2 s", "device time of batch 1 on the whole device"),
    (r"function_(floor|fixed|overhead)_share", "share of that", "launching; fixed for a batch; host work"),
    ("function_exponent", "0..1.25", "how device time falls with SMs"),
    ("function_points_log2", "log2 of a count, plus 1", "points of its own"),
    (r"neighbours_\w+_log_residual", "ln", "measured over estimated, mean of its own points near by, for each kernel"),
    (r"neighbours_\w+_weight_log2", "log2", "how much lies near by, for each kernel"),
)
SECTIONS = (
    ("Of a model, from its operators at batch 1", "`operators.Workload.summary`", SUMMARY, SUMMARY_MEANINGS),
    (
        "Of a model at a batch and SM share, from its operators and the device's data sheet",
        "`operators.roofline_matrix`, shape (n, {count})",
        COLUMNS,
        COLUMN_MEANINGS,
    ),
    (
        "Of a configuration of a model without a profile, with its probes",
        "`transfer.TransferView.features`, shape (n, {count})",
        TRANSFER_FEATURES,
        TRANSFER_MEANINGS,
    ),
    (
        "Of a configuration of a function with a profile",
        "`features.FunctionView.features`, shape (n, {count})",
        FEATURES,
        FEATURE_MEANINGS,
    ),
)


def feature_table() -> str:
    """Returns the tables in Markdown; raises ValueError for a feature without description, or the reverse."""
    return "\n".join([_BEGIN, *_lines(), _END]) + "\n"


def _lines() -> Iterator[str]:
    for title, where, names, meanings in SECTIONS:
        yield ""
        yield f"**{title}** ({where.format(count=len(names))}), float64:"
        yield ""
        yield "| feature | unit | meaning |"
        yield "|---|---|---|"
        for pattern, unit, meaning in meanings:
            found = [name for name in names if re.fullmatch(pattern, name)]
            yield f"| {', '.join(f'`{name}`' for name in _short(found))} | {unit} | {meaning} |"
        _check(title, names, [pattern for pattern, *_ in meanings])
    yield ""


def _check(title: str, names: Sequence[str], patterns: Sequence[str]) -> None:
    for name in names:
        if sum(re.fullmatch(pattern, name) is not None for pattern in patterns) != 1:
            raise ValueError(f"feature {name!r} ({title}): expected one description, got none or several")
    for pattern in patterns:
        if not any(re.fullmatch(pattern, name) for name in names):
            raise ValueError(f"a description of {pattern!r} ({title}): expected a feature of that name, got none")


def _short(names: Sequence[str]) -> Sequence[str]:
    """Of many features alike, the first and the last."""
    return names if len(names) <= 4 else (names[0], "...", names[-1])


if __name__ == "__main__":
    sys.stdout.write(feature_table())
