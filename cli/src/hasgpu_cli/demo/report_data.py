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
    limit_permille: int = 0
    """Up to which idle time is borrowed; 0: not known."""
    used_s: float = 0.0
    """Device time so far, all SMs of its share counted as one."""

    @property
    def gpu_share(self) -> float:
        """Part of a device that is promised, 0..1."""
        return self.sm_pct / 100 * self.request_permille / 1_000

    @property
    def allowed_share(self) -> float:
        """Part of a device that may be used while nobody else wants it, 0..1."""
        return self.sm_pct / 100 * max(self.request_permille, self.limit_permille) / 1_000


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

    def allowed_share(self, function: str) -> float:
        """Part of a device that the function's instances may use."""
        return sum(instance.allowed_share for instance in self.instances if instance.function == function)


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


CHARGED_OVER_S = 5.0
"""Agents tell of device time once a second; what was borrowed is told from what was promised over stretches of this."""


def device_seconds(samples: Sequence[Sample], function: str, duration_s: float) -> float:
    """Returns what a function's instances cost over the run: in each stretch the larger of promised and used.

    A sample holds until the next one.
    """
    total = 0.0
    promised: dict[str, float] = {}
    used: dict[str, float] = {}
    began_s, last = 0.0, {item.instance: item.used_s for sample in samples[:1] for item in sample.instances}
    for index, sample in enumerate(samples):
        until_s = samples[index + 1].at_s if index + 1 < len(samples) else duration_s
        start_s = 0.0 if index == 0 else sample.at_s
        length_s = max(0.0, until_s - max(0.0, start_s))
        for item in sample.instances:
            if item.function == function:
                name = item.instance
                promised[name] = promised.get(name, 0.0) + item.gpu_share * length_s
                since = max(0.0, item.used_s - last.get(name, 0.0))  # falls when a worker is replaced
                used[name] = used.get(name, 0.0) + item.sm_pct / 100 * since
                last[name] = item.used_s
        if until_s - began_s >= CHARGED_OVER_S or index + 1 == len(samples):
            total += sum(max(share, used[name]) for name, share in promised.items())
            promised, used, began_s = {}, {}, until_s
    return total


def count_actions(decisions: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Counts the policy's actions by kind (what was done by hand does not count)."""
    counts = Counter(
        action["kind"] for decision in decisions if decision["origin"] == "policy" for action in decision["actions"]
    )
    return {kind: counts[kind] for kind in ACTION_KINDS}


def report_json(run: DemoRun) -> dict[str, Any]:
    """The content of report.json.

    `device_seconds` is the integral of SM share times the larger of requested and used time over the run (in stretches
    of 5 s), `peak_share` the largest part of the device that it was allowed, `whole_device_seconds` what a function
    would be charged that had a whole device to itself for as long: duration times one device.
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
        "peak_share": round(max((sample.allowed_share(function.name) for sample in run.samples), default=0.0), 4),
        "largest_difference": function.largest_difference,
        "actions": count_actions(function.decisions),
        "prediction": asdict(function.prediction) if function.prediction is not None else None,
    }
