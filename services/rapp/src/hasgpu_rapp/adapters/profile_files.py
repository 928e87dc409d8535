"""Profile files that predictions of functions without a profile are learnt from, beside what was measured here.

NAME.csv             a profile file (docs/profiles.md), with the operators of its models in NAME.ops.csv(.gz) beside
DEVICE MODEL=FOLDER  latency.csv(.gz) and model_ops.csv(.gz) in the columns of `hasgpu_predictor.dataset`
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from hasgpu_core import profile as core_profile
from hasgpu_core.errors import HasgpuError, InvalidError
from hasgpu_predictor import Known, Operator, Profile, ProfilePoint
from hasgpu_predictor.dataset import read_latencies, read_operators


def read_shipped(sources: Sequence[str], note: Callable[[str], None]) -> dict[str, dict[str, Known]]:
    """Returns the models of the files by device model and a key of their own; what can't be read is told and left out.

    A model without operators is left out: there is nothing to tell it from another by.
    """
    found: dict[str, dict[str, Known]] = {}
    for source in sources:
        try:
            models = list(_read(source))
        except (HasgpuError, OSError, UnicodeDecodeError) as error:
            note(f"the profile file {source} is left out: {error}")
            continue
        for known in models:
            found.setdefault(known.profile.device_model, {})[known.profile.workload] = known
        if not models:
            note(f"the profile file {source} is left out: the operators of none of its models are known")
    return found


def _read(source: str) -> Iterator[Known]:
    device_model, equals, folder = source.partition("=")
    if equals:
        yield from _of_folder(device_model, Path(folder))
        return
    path = Path(source)
    content = core_profile.Profile.parse(path.read_text())
    operators = read_operators(_beside(path.with_suffix(".ops.csv")))
    for model in content.header.models:
        points = [
            ProfilePoint(*row.cell[1:], row.latency_us / 1e6, row.device_time_us / 1e6, row.longest_segment_us / 1e6)
            for row in content.rows
            if row.model == model
        ]
        yield from _known(source, model, content.header.device_model, points, operators.get(model, []))


def _of_folder(device_model: str, folder: Path) -> Iterator[Known]:
    latencies = read_latencies(_beside(folder / "latency.csv"))
    operators = read_operators(_beside(folder / "model_ops.csv"))
    for model, measured in latencies.items():
        points = [
            ProfilePoint(round(batch), max(1, round(sm_pct)), max(1, round(10 * quota_pct)), latency_ms / 1e3)
            for (batch, sm_pct, quota_pct), latency_ms in zip(
                measured.configurations.tolist(), measured.latency_ms.tolist(), strict=True
            )
        ]
        yield from _known(str(folder), model, device_model, points, operators.get(model, []))


def _known(
    source: str, model: str, device_model: str, points: Sequence[ProfilePoint], operators: Sequence[Operator]
) -> Iterator[Known]:
    if points and operators:
        profile = Profile(f"{source}:{model}", device_model).merged(points)
        yield Known(model, tuple(operators), profile)


def _beside(path: Path) -> Path:
    packed = path.with_name(path.name + ".gz")
    for candidate in (path, packed):
        if candidate.exists():
            return candidate
    raise InvalidError("file", expected=f"{path} or {packed.name}", got="neither")
