"""What a demo measured, as values that go to report.json and into the pictures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from hasgpu_cli.load import Outcome, Summary

ACTION_KINDS = ("vertical_up", "vertical_down", "horizontal_up", "horizontal_down")


@dataclass(frozen=True, slots=True)
class InstanceSample:
    """An instance as seen at one moment."""

    function: str
    instance: str
    state: str
    sm_pct: int
    request_permille: int

    @property
    def gpu_share(self) -> float:
        """Part of a device, 0..1."""
        return self.sm_pct / 100 * self.request_permille / 1_000


@dataclass(frozen=True, slots=True)
class LoadView:
    """What the scaler last saw of a function, requests a second."""

    capacity_rps: float
    """Of the ready instances, inside the objective."""
    predicted_rps: float


@dataclass(frozen=True, slots=True)
class Sample:
    """All instances at one moment."""

    at_s: float
    """Since the replay began."""
    instances: tuple[InstanceSample, ...]
    loads: Mapping[str, LoadView] = field(default_factory=dict)
    """By function; those of which the scaler has decided something."""

    def share(self, function: str) -> float:
        """Part of a device that the function's instances are promised."""
        return sum(instance.gpu_share for instance in self.instances if instance.function == function)


@dataclass(frozen=True, slots=True)
class Prediction:
    """What was predicted of a function, against what its newest batches took; without the wait at the gate."""

    basis: str
    batches_count: int
    observed_ms: float
    """Median run of a batch, as are the next two."""
    predicted_ms: float
    corrected_ms: float
    """As predicted, with the correction in force."""
    error_pct: float
    """Median of the batches' errors before the correction, ..."""
    corrected_error_pct: float
    """... and after it."""
    factor: float
    run_factor: float
    drift: str = ""

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> Prediction | None:
        """Returns that of a function's state as rapp describes it; None: nothing was observed."""
        seen, correction = state["observed"], state["correction"]
        if not seen:
            return None
        return cls(
            basis=state["basis"],
            batches_count=seen["batches_count"],
            observed_ms=seen["observed_run_ns"] / 1e6,
            predicted_ms=seen["predicted_run_ns"] / 1e6,
            corrected_ms=seen["corrected_run_ns"] / 1e6,
            error_pct=seen["median_run_error_pct"],
            corrected_error_pct=seen["corrected_median_run_error_pct"],
            factor=correction["factor"],
            run_factor=correction["run_factor"],
            drift=correction["drift"],
        )


@dataclass(frozen=True, slots=True)
class FunctionRun:
    """One function's part of a demo."""

    name: str
    due_s: Sequence[float]
    outcomes: Sequence[Outcome]
    summary: Summary
    decisions: Sequence[Mapping[str, Any]]
    """As the scaler explains them, oldest first; those of the run."""
    rate_factor: float
    """HAS-GPU's rates times this were sent."""
    largest_difference: float
    """Of any output element from the model called directly, over the answers checked before the replay."""
    notes: Sequence[str] = ()
    prediction: Prediction | None = None
    """None: no batch was observed, or rapp did not answer."""


@dataclass(frozen=True, slots=True)
class DemoRun:
    """A whole demo."""

    device: str
    began_unix_ns: int
    """When the replay began; the samples' and decisions' zero."""
    duration_s: float
    """From the first request until the last sample."""
    replay_s: float
    """Until the last request was due."""
    functions: Sequence[FunctionRun]
    samples: Sequence[Sample]
    ranking: Mapping[str, float] = field(default_factory=dict)
    """Cosine similarities that the served embedding gives: "paraphrase", "unrelated"."""


def device_seconds(samples: Sequence[Sample], function: str, duration_s: float) -> float:
    """Integrates a function's share of the device over the run; a sample holds until the next one."""
    total = 0.0
    for index, sample in enumerate(samples):
        until_s = samples[index + 1].at_s if index + 1 < len(samples) else duration_s
        start_s = 0.0 if index == 0 else sample.at_s
        total += sample.share(function) * max(0.0, until_s - max(0.0, start_s))
    return total


def count_actions(decisions: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Counts the policy's actions by kind (what was done by hand does not count)."""
    counts = Counter(
        action["kind"] for decision in decisions if decision["origin"] == "policy" for action in decision["actions"]
    )
    return {kind: counts[kind] for kind in ACTION_KINDS}


def report_json(run: DemoRun) -> dict[str, Any]:
    """The content of report.json.

    `device_seconds` is the integral of SM share times requested time over the run, `whole_device_seconds` what a
    function would be charged that had a whole device to itself for as long: duration times one device.
    """
    return {
        "device": run.device,
        "duration_s": round(run.duration_s, 3),
        "replay_s": round(run.replay_s, 3),
        "functions": {function.name: _function_json(run, function) for function in run.functions},
    }


def _function_json(run: DemoRun, function: FunctionRun) -> dict[str, Any]:
    summary = asdict(function.summary)
    del summary["duration_s"]
    return {
        **{key: round(value, 4) if isinstance(value, float) else value for key, value in summary.items()},
        "rate_factor": round(function.rate_factor, 4),
        "device_seconds": round(device_seconds(run.samples, function.name, run.duration_s), 3),
        "whole_device_seconds": round(run.duration_s, 3),
        "peak_share": round(max((sample.share(function.name) for sample in run.samples), default=0.0), 4),
        "largest_difference": function.largest_difference,
        "actions": count_actions(function.decisions),
        "prediction": asdict(function.prediction) if function.prediction is not None else None,
    }
