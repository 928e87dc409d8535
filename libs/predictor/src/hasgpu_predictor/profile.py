"""Measurements of one function on one device model, and their files."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from hasgpu_core.errors import InvalidError
from hasgpu_core.function import workload_digest

__all__ = ["Profile", "ProfilePoint", "load_profile", "save_profile", "workload_digest", "write_atomically"]

FILE_FORMAT = "hasgpu-profile-1"


@dataclass(frozen=True, slots=True)
class ProfilePoint:
    """One measured configuration: means over its repetitions, batches run back to back."""

    batch: int
    sm_pct: int
    quota_permille: int
    latency_s: float
    """Gate wait and execution."""
    device_time_s: float = 0.0
    """For which a batch held the device; 0: not measured (data of systems that meter something else)."""
    longest_segment_s: float = 0.0
    """Longest stretch between two gate passes; 0: not measured."""
    repetitions_count: int = 1

    @property
    def configuration(self) -> tuple[int, int, int]:
        """(batch, sm_pct, quota_permille)."""
        return self.batch, self.sm_pct, self.quota_permille

    def validate(self) -> None:
        """Raises InvalidError, naming the field, the bound and what came."""
        for name, value, low, high in (
            ("batch", self.batch, 1, 4_096),
            ("sm_pct", self.sm_pct, 1, 100),
            ("quota_permille", self.quota_permille, 1, 1_000),
            ("repetitions_count", self.repetitions_count, 1, 1_000_000_000),
        ):
            if not low <= value <= high:
                raise InvalidError(f"point.{name}", expected=f"{low}..{high}", got=str(value))
        if not (math.isfinite(self.latency_s) and 0 < self.latency_s <= 3_600):
            raise InvalidError("point.latency", expected="above 0 and at most 3600 s", got=f"{self.latency_s} s")
        for name, value_s in (("device_time", self.device_time_s), ("longest_segment", self.longest_segment_s)):
            if not (math.isfinite(value_s) and 0 <= value_s <= 3_600):
                raise InvalidError(f"point.{name}", expected="0 to 3600 s", got=f"{value_s} s")


@dataclass(frozen=True, slots=True)
class Profile:
    """All that was measured of one workload on one device model; one point a configuration, sorted."""

    workload: str
    """`workload_digest` of the function."""
    device_model: str
    points: tuple[ProfilePoint, ...] = ()

    def merged(self, points: Iterable[ProfilePoint]) -> Profile:
        """Returns the profile with `points` added; a configuration measured again takes the new value.

        Points of one call that name the same configuration are averaged, weighted by their repetitions. Raises
        InvalidError for a point that can't be; the profile is then as before.
        """
        fresh: dict[tuple[int, int, int], ProfilePoint] = {}
        for point in points:
            point.validate()
            before = fresh.get(point.configuration)
            fresh[point.configuration] = point if before is None else _average(before, point)
        known = {point.configuration: point for point in self.points} | fresh
        return Profile(self.workload, self.device_model, tuple(known[key] for key in sorted(known)))


def _average(a: ProfilePoint, b: ProfilePoint) -> ProfilePoint:
    count = a.repetitions_count + b.repetitions_count
    share = a.repetitions_count / count
    return ProfilePoint(
        *a.configuration,
        latency_s=a.latency_s * share + b.latency_s * (1 - share),
        device_time_s=a.device_time_s * share + b.device_time_s * (1 - share),
        longest_segment_s=max(a.longest_segment_s, b.longest_segment_s),
        repetitions_count=count,
    )


def write_atomically(path: Path, data: bytes) -> None:
    """Writes a file that a crash leaves either as it was or whole; makes its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def save_profile(path: Path, profile: Profile) -> None:
    """Writes the profile as JSON, atomically."""
    content = {
        "format": FILE_FORMAT,
        "workload": profile.workload,
        "device_model": profile.device_model,
        "points": [asdict(point) for point in profile.points],
    }
    write_atomically(path, json.dumps(content, indent=1).encode())


def load_profile(path: Path) -> Profile:
    """Reads a profile. Raises InvalidError, naming the file, when it is corrupt or foreign; OSError when unreadable."""
    try:
        content = json.loads(path.read_bytes())
        if content["format"] != FILE_FORMAT:
            raise InvalidError(f"profile file {path}", expected=FILE_FORMAT, got=repr(content["format"]))
        points = [_point(entry) for entry in content["points"]]
        return Profile(str(content["workload"]), str(content["device_model"])).merged(points)
    except (ValueError, KeyError, TypeError) as error:
        raise InvalidError(
            f"profile file {path}", expected="a profile", got=f"{type(error).__name__}: {error}"
        ) from error


def _point(entry: Mapping[str, float]) -> ProfilePoint:
    known = {field.name for field in fields(ProfilePoint)}
    if unknown := set(entry) - known:
        raise ValueError(f"unknown fields {sorted(unknown)}")
    point = ProfilePoint(**entry)  # type: ignore[arg-type]  # validate() below judges the values
    point.validate()
    return point
