"""What the probe found out about a GPU, which mode follows from it, and what may be claimed of it.

The table (first that holds):

| mode | when |
|---|---|
| `mps+static` | asked for, and a client was seen inside a static SM partition |
| `mps+green` | MPS is in use inside a process, green contexts slow a matrix product, SMs of two processes disjoint |
| `mps+pct` | MPS is in use, and its active thread percentage slows a matrix product |
| `timeshare` | nothing of that: one instance holds the whole device at a time |

A mode `single`, one worker process that holds the models of all functions of a GPU with green contexts but without MPS,
is not offered. All that makes an instance an instance here is its process: its gate, control block, memory limit, its
end when it is unbound; one function's crash, leak or blocking handler would be everybody's, and code that one user
deployed would read another's memory. Where MPS does not work, `timeshare` keeps those borders and loses only the
rows that run side by side.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hasgpu_core.errors import InvalidError

from hasgpu_device.backends.cuda.sharing import MODES
from hasgpu_device.worker_config import write_json

NO_MODE = "none"
"""The GPU can't be used at all."""
BITE_LEAST = 0.3
"""A rung whose slowdown is less than this part of the predicted one does not hold its share."""
WIDTHS_PCT = (25, 50, 75, 100)
PROBE_VERSION = 1
"""Of the steps and their meaning; findings of another are not used."""

STEPS: Mapping[str, str] = {
    "nvml": "what NVML tells",
    "driver": "the CUDA driver",
    "mps_start": "starting MPS in a private folder",
    "mps_in_use": "MPS in use inside a process",
    "green_api": "green contexts in the driver",
    "groups": "splitting the SMs",
    "bite_green": "slowdown by green contexts",
    "disjoint": "SMs of two processes",
    "bite_pct": "slowdown by an MPS percentage",
    "static": "a static SM partition",
}
"""In their order; the words in which they are told."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One step of the probe."""

    step: str
    is_proven: bool
    detail: str
    """What was proven, or why it was not, in words."""
    data: Mapping[str, Any] = field(default_factory=dict)
    is_final: bool = True
    """False: a time-out or crash, which another try may not meet; such findings are not kept."""


@dataclass(frozen=True, slots=True)
class Findings:
    """All that the probe found out about one GPU."""

    gpu_uuid: str
    driver_version: str
    """NVML's, else the CUDA version that the driver offers."""
    torch_version: str
    widths_pct: tuple[int, ...]
    steps: Mapping[str, Finding]
    """By step; a step that was not tried is missing."""

    def proven(self, *steps: str) -> bool:
        """Whether all of these steps proved what they were for."""
        return all(step in self.steps and self.steps[step].is_proven for step in steps)

    def why_not(self, *steps: str) -> str:
        """Returns why the first of these steps that proved nothing did not."""
        for step in steps:
            if not self.proven(step):
                found = self.steps.get(step)
                return f"{STEPS[step]}: {found.detail if found else 'not tried'}"
        return ""

    def to_json(self) -> dict[str, Any]:
        """Returns what `from_json` reads."""
        return {
            "probe_version": PROBE_VERSION,
            "gpu_uuid": self.gpu_uuid,
            "driver_version": self.driver_version,
            "torch_version": self.torch_version,
            "widths_pct": list(self.widths_pct),
            "steps": {name: asdict(found) for name, found in self.steps.items()},
        }

    @classmethod
    def from_json(cls, document: Any) -> Findings:
        """Reads findings.

        Raises:
            ValueError, KeyError, TypeError: The document is not such, or of another version of the probe.
        """
        if document["probe_version"] != PROBE_VERSION:
            raise ValueError(f"expected probe version {PROBE_VERSION}, got {document['probe_version']}")
        return cls(
            str(document["gpu_uuid"]),
            str(document["driver_version"]),
            str(document["torch_version"]),
            tuple(int(width) for width in document["widths_pct"]),
            {
                str(name): Finding(
                    str(found["step"]),
                    found["is_proven"] is True,
                    str(found["detail"]),
                    dict(found["data"]),
                    found["is_final"] is True,
                )
                for name, found in document["steps"].items()
            },
        )


@dataclass(frozen=True, slots=True)
class ModeChoice:
    """How a GPU is shared, and why so."""

    mode: str
    """One of MODES, or NO_MODE."""
    reasons: tuple[str, ...]
    """In words: what was found on the way to the mode."""
    sm_rungs_pct: tuple[int, ...]
    """Widths of partitions that the mode gives, ascending; none in NO_MODE."""


def choose_mode(findings: Findings, wanted: str = "") -> ModeChoice:
    """Returns the best mode that the findings prove; see the table above.

    Args:
        findings: Of the GPU.
        wanted: A mode asked for: taken if it is proven, else the best one below it. "mps+static" is taken only if it is
            asked for.

    Raises:
        InvalidError: No such mode.
    """
    if wanted and wanted not in MODES:
        raise InvalidError("mode of a GPU", expected=", ".join(MODES), got=repr(wanted))
    nvml = findings.steps.get("nvml")
    if nvml is not None and nvml.data.get("refused"):
        return ModeChoice(NO_MODE, (nvml.detail,), ())
    if not findings.proven("driver"):
        return ModeChoice(NO_MODE, (findings.why_not("driver"),), ())
    if wanted == "timeshare":
        return ModeChoice("timeshare", ("asked for",), (100,))
    if not findings.proven("mps_start", "mps_in_use"):
        why = findings.why_not("mps_start", "mps_in_use")
        return ModeChoice("timeshare", (f"no MPS ({why})",), (100,))
    reasons = ["MPS is in use inside a process"]
    if wanted == "mps+static":
        if findings.proven("static"):
            rungs = tuple(findings.steps["static"].data["sm_rungs_pct"])
            return ModeChoice("mps+static", (*reasons, findings.steps["static"].detail), rungs)
        reasons.append(f"no static partitions ({findings.why_not('static')})")
    green = ("green_api", "groups", "bite_green", "disjoint")
    if wanted == "mps+pct":
        reasons.append("green contexts were not asked for")
    elif findings.proven(*green):
        told = tuple(findings.steps[step].detail for step in green[1:])
        return ModeChoice("mps+green", (*reasons, *told), _rungs(findings.steps["bite_green"]))
    else:
        reasons.append(f"no green contexts ({findings.why_not(*green)})")
    if findings.proven("bite_pct"):
        return ModeChoice("mps+pct", (*reasons, findings.steps["bite_pct"].detail), _rungs(findings.steps["bite_pct"]))
    reasons.append(f"no MPS percentage ({findings.why_not('bite_pct')})")
    return ModeChoice("timeshare", tuple(reasons), (100,))


def capabilities(findings: Findings, choice: ModeChoice) -> tuple[str, ...]:
    """Returns what the device can enforce in a mode, and what it can't, in words: only what was proven is claimed."""
    told = [f"mode {choice.mode}"]
    widths = ", ".join(str(width) for width in choice.sm_rungs_pct)
    if choice.mode == NO_MODE:
        return (*told, *choice.reasons)
    if choice.mode == "mps+green":
        told.append(f"SM partitions of {widths} % change at the next segment (proven: {_slowdowns(findings, 'green')})")
        told.append(f"partitions do not overlap ({findings.steps['disjoint'].detail})")
    elif choice.mode == "mps+pct":
        told.append(f"SM limits of {widths} % fixed at a worker's start (proven: {_slowdowns(findings, 'pct')})")
        told.append("not proven: that the SMs of two workers are different ones; an MPS percentage reserves none")
    elif choice.mode == "mps+static":
        told.append(f"SM partitions of {widths} % fixed at a worker's start ({findings.steps['static'].detail})")
        told.append("a client's fault is contained from driver release 610 on (documented, not proven)")
    else:
        told.append("no SM limits: one instance holds the whole device at a time")
    if choice.mode.startswith("mps"):
        told.append("memory limit of a client by MPS (documented, not proven)")
    told.append("time quotas in measured device time")
    rejected = {
        "mps+green": ("bite_green", "SM partition"),
        "mps+pct": ("bite_pct", "SM limit"),
    }.get(choice.mode)
    if rejected is not None:
        told += [
            f"not proven: {rejected[1]} of {rung['sm_pct']} %: {rung['why']}"
            for rung in findings.steps[rejected[0]].data.get("rungs", ())
            if not rung["is_accepted"]
        ]
    told += [
        f"not proven: {STEPS[step]}: {found.detail}"
        for step, found in findings.steps.items()
        if not found.is_proven and step != "nvml"
    ]
    return tuple(told)


def judge_rungs(step: str, times_us: Mapping[int, list[tuple[int, float]]]) -> Finding:
    """Compares how long a matrix product took in each partition with what its SMs predict.

    Args:
        step: "bite_green" or "bite_pct".
        times_us: For each width in per cent, SMs and time of each of its partitions; the whole device under 100.

    Returns:
        Proven when a width below 100 % holds its share: at each place the slowdown is at least BITE_LEAST of
        what was predicted, (time / whole time - 1) / (whole SMs / SMs - 1).
    """
    if 100 not in times_us or not times_us[100] or min(time_us for _, time_us in times_us[100]) <= 0:
        return Finding(step, False, "the whole device was not timed")
    whole_sms, whole_us = times_us[100][0]
    rungs = []
    for width in sorted(times_us):
        if width == 100:
            continue
        bites = [
            (time_us / whole_us - 1) / (whole_sms / sms - 1) if 0 < sms < whole_sms else 0.0
            for sms, time_us in times_us[width]
        ]
        bite = min(bites, default=0.0)
        accepted = bite >= BITE_LEAST
        rungs.append(
            {
                "sm_pct": width,
                "sms": [sms for sms, _ in times_us[width]],
                "time_us": [round(time_us, 2) for _, time_us in times_us[width]],
                "bite": round(bite, 3),
                "is_accepted": accepted,
                "why": "" if accepted else f"only {bite:.2f} of the predicted slowdown was seen",
            }
        )
    data = {"rungs": rungs, "whole_sms": whole_sms, "whole_us": round(whole_us, 2)}
    good = [rung for rung in rungs if rung["is_accepted"]]
    words = ", ".join(f"{rung['sm_pct']} %: {rung['bite']:.2f}" for rung in rungs)
    return Finding(step, bool(good), f"part of the predicted slowdown that was seen: {words or 'none timed'}", data)


def compare_sms(one: Mapping[str, list[int]], two: Mapping[str, list[int]]) -> Finding:
    """Compares the SMs that two processes recorded for the same ranges: equal ranges equal SMs, others disjoint."""
    if len(one) < 2 or set(one) != set(two) or not all([*one.values(), *two.values()]):
        return Finding("disjoint", False, "the processes did not record the same ranges")
    for name in one:
        if set(one[name]) != set(two[name]):
            odd = sorted(set(one[name]) ^ set(two[name]))
            return Finding("disjoint", False, f"range {name} has other SMs in another process ({odd[:8]} differ)")
        for other in two:
            shared = sorted(set(one[name]) & set(two[other]))
            if other != name and shared:
                return Finding("disjoint", False, f"ranges {name} and {other} share SMs {shared[:8]}")
    return Finding(
        "disjoint",
        True,
        f"{len(one)} ranges recorded in two processes: equal ranges on equal SMs, different ones disjoint",
        {"sms": {name: len(numbers) for name, numbers in one.items()}},
    )


class ProbeCache:
    """Findings in a JSON file, by GPU, driver version, torch version and widths.

    A file that can't be read counts as empty. One process writes it.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def load(
        self, gpu_uuid: str, driver_version: str, torch_version: str, widths_pct: tuple[int, ...]
    ) -> Findings | None:
        """Returns what is kept; None: nothing, or of another driver, torch or probe."""
        try:
            found = Findings.from_json(self._entries()[gpu_uuid])
        except (KeyError, ValueError, TypeError, AttributeError):
            return None
        key = (found.gpu_uuid, found.driver_version, found.torch_version, found.widths_pct)
        return found if key == (gpu_uuid, driver_version, torch_version, widths_pct) else None

    def save(self, findings: Findings) -> bool:
        """Keeps findings, unless a step timed out or crashed: that may go better next time. Raises OSError."""
        if not all(found.is_final for found in findings.steps.values()):
            return False
        write_json(self._path, {**self._entries(), findings.gpu_uuid: findings.to_json()})
        return True

    def _entries(self) -> dict[str, Any]:
        try:
            document = json.loads(self._path.read_bytes())
        except (OSError, ValueError):
            return {}
        return document if isinstance(document, dict) else {}


def _rungs(found: Finding) -> tuple[int, ...]:
    accepted = (int(rung["sm_pct"]) for rung in found.data.get("rungs", ()) if rung["is_accepted"])
    return tuple(sorted({*accepted, 100}))


def _slowdowns(findings: Findings, kind: str) -> str:
    found = findings.steps[f"bite_{kind}"]
    return found.detail
