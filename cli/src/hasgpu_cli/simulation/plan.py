"""From the command line to the loads that are run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hasgpu_core.errors import InvalidError, NotFoundError
from hasgpu_sim.arrivals import Process
from hasgpu_sim.evaluate import POLICIES, Settings, function_load
from hasgpu_sim.physics import Physics
from hasgpu_sim.scenario import FunctionLoad
from hasgpu_sim.surface import Surface
from hasgpu_sim.traces import Trace

from hasgpu_cli.simulation import inputs
from hasgpu_cli.simulation.inputs import FunctionEntry, LoadOptions
from hasgpu_cli.simulation.runs import SPARSE_ABOVE, Case, Outcome, check_memory

DEFAULT_COLD_START_S = 6.0
DEFAULT_GPU_MEMORY_MIB = 16_384
SPARSE_TICK_S = 1.0


@dataclass(frozen=True, slots=True)
class SimulateOptions:
    """What the command line says; the names are those of the options."""

    profiles: str
    traces: str
    spec: Path | None
    models: str
    slo_multiples: str
    policies: str
    gpus: int
    cold_start_s: float | None
    physics: str
    arrivals: str
    rate_scale: float
    seconds: float | None
    seed: int
    lend: bool
    recording: Path | None
    gpu_memory_mib: int | None
    memory_mib: int
    min_instances: int
    moves: bool = False


@dataclass(frozen=True, slots=True)
class Plan:
    """What is run."""

    cases: tuple[Case, ...]
    policies: tuple[str, ...]
    settings: Settings
    notes: tuple[str, ...]
    recorded: tuple[Outcome, ...] = ()
    """What the live system did, where a recording is replayed."""


def make_plan(options: SimulateOptions) -> Plan:
    """Reads all that the options name.

    Raises:
        InvalidError: An option, a file, an objective or the memory can't be; names it, what was expected and what came.
        NotFoundError: There is no such model, policy or part of a trace; names the nearest.
    """
    sources = [bool(options.models), options.spec is not None, options.recording is not None]
    if sum(sources) != 1:
        raise InvalidError(
            "hasgpu simulate", expected="one of --models, --functions and --recording", got=_given(options)
        )
    if not math.isfinite(options.rate_scale) or options.rate_scale <= 0:
        raise InvalidError("--rate-scale", expected="a number above 0", got=f"{options.rate_scale:g}")
    if options.seconds is not None and not options.seconds > 0:
        raise InvalidError("--seconds", expected="a number above 0", got=f"{options.seconds:g}")
    if options.cold_start_s is not None and not 0 <= options.cold_start_s < math.inf:
        raise InvalidError("--cold-start-s", expected="a number of 0 or more", got=f"{options.cold_start_s:g}")
    policies = _policies(options.policies)
    if options.recording is not None:
        from hasgpu_cli.simulation.replayed import plan_recording

        return plan_recording(options, options.recording, policies)
    paths = [Path(part) for part in inputs.split("--profile", options.profiles)]
    settings = _settings(options, paths)
    loading = LoadOptions(Process(options.arrivals), options.rate_scale, options.seed, options.seconds)
    if options.spec is not None:
        return _plan_spec(options, options.spec, paths, settings, loading, policies)
    return _plan_models(options, paths, settings, loading, policies)


def _given(options: SimulateOptions) -> str:
    given = [
        name
        for name, value in (
            ("--models", options.models), ("--functions", options.spec), ("--recording", options.recording),
        )
        if value
    ]  # fmt: skip
    return " and ".join(given) or "none"


def _policies(text: str) -> tuple[str, ...]:
    names = inputs.split("--policies", text)
    for name in names:
        if name not in POLICIES:
            raise NotFoundError("policy", name, f"there are {', '.join(POLICIES)}")
    return tuple(dict.fromkeys(names))


def _settings(options: SimulateOptions, paths: Sequence[Path]) -> Settings:
    for option, value in (("--gpu-memory-mib", options.gpu_memory_mib), ("--memory-mib", options.memory_mib)):
        if value is not None and value < 1:
            raise InvalidError(option, expected="at least 1", got=str(value))
    if options.min_instances < 0:
        raise InvalidError("--min-instances", expected="0 or more", got=str(options.min_instances))
    return Settings(
        gpus=options.gpus,
        gpu_memory_mib=options.gpu_memory_mib or inputs.profile_memory_mib(paths) or DEFAULT_GPU_MEMORY_MIB,
        instance_memory_mib=options.memory_mib,
        cold_start_s=DEFAULT_COLD_START_S if options.cold_start_s is None else options.cold_start_s,
        physics=Physics(options.physics),
        lend=options.lend,
        moves=options.moves,
        min_instances=options.min_instances,
        seed=options.seed,
    )


def _plan_models(
    options: SimulateOptions, paths: Sequence[Path], settings: Settings, loading: LoadOptions, policies: tuple[str, ...]
) -> Plan:
    """Every model at every multiple under every trace."""
    if not options.traces:
        raise InvalidError("--trace", expected="at least one trace", got="none")
    multiples = inputs.parse_multiples(options.slo_multiples)
    surfaces = inputs.load_models(paths, inputs.split("--models", options.models))
    traces = [inputs.read_trace(text, loading) for text in inputs.split("--trace", options.traces)]
    many = any(len(trace.arrivals_s) > SPARSE_ABOVE for trace in traces)
    if many:
        settings = replace(settings, tick_s=SPARSE_TICK_S)
    cases = []
    for trace in traces:
        for surface in surfaces.values():
            for multiple in multiples:
                cases.append(_case(trace, surface, multiple, loading, settings))
                check_memory(cases[-1], settings)
    notes = [*_filled(surfaces), *dict.fromkeys(f"{t.name}: {note}" for t in traces for note in t.notes)]
    return Plan(tuple(cases), policies, settings, tuple(notes))


def _case(trace: Trace, surface: Surface, multiple: float, loading: LoadOptions, settings: Settings) -> Case:
    names = {"f": next(iter(trace.arrivals_s))} if len(trace.arrivals_s) == 1 else _names(trace.arrivals_s)
    loads = tuple(
        function_load(name, surface, multiple, trace.arrivals_s[key], settings) for name, key in names.items()
    )
    arrivals = "times" if trace.timed else loading.process.value
    count = f"{len(loads)} functions of " if len(loads) > 1 else ""
    return Case(
        f"{trace.name}: {count}{surface.model}, SLO {multiple:g}x",
        loads,
        dict.fromkeys(names, surface.model),
        dict.fromkeys(names, multiple),
        surface,
        trace.duration_s,
        trace.name,
        arrivals,
        per_function=False,
    )


def _names(keys: Mapping[str, Any]) -> dict[str, str]:
    """Names that functions may have, for those of a trace."""
    return {f"f-{index:05d}": key for index, key in enumerate(keys)}


def _plan_spec(
    options: SimulateOptions,
    path: Path,
    paths: Sequence[Path],
    settings: Settings,
    loading: LoadOptions,
    policies: tuple[str, ...],
) -> Plan:
    """All functions of a SPEC.yaml together, on the same GPUs."""
    traces = inputs.split("--trace", options.traces) if options.traces else []
    spec = inputs.read_spec(path, traces, loading)
    if spec.gpus is not None:
        settings = replace(settings, gpus=spec.gpus)
    if spec.gpu_memory_mib is not None:
        settings = replace(settings, gpu_memory_mib=spec.gpu_memory_mib)
    if len(spec.functions) > SPARSE_ABOVE:
        settings = replace(settings, tick_s=SPARSE_TICK_S)
    surfaces = inputs.load_models(paths, [entry.model for entry in spec.functions])
    kinds = {surface.device_model for surface in surfaces.values()}
    if len(kinds) > 1:
        raise InvalidError(
            str(path), expected="models of one device, as they share its GPUs", got=" and ".join(sorted(kinds))
        )
    multiples = {entry.name: _multiple(entry, surfaces[entry.model]) for entry in spec.functions}
    loads = tuple(
        _spec_load(path, entry, surfaces[entry.model], multiples[entry.name], settings) for entry in spec.functions
    )
    case = Case(
        path.name,
        loads,
        {entry.name: entry.model for entry in spec.functions},
        multiples,
        next(iter(surfaces.values())),
        max(entry.duration_s for entry in spec.functions),
        "+".join(dict.fromkeys(entry.trace for entry in spec.functions)),
        loading.process.value,
        per_function=True,
    )
    check_memory(case, settings)
    return Plan((case,), policies, settings, (*_filled(surfaces), *spec.notes))


def _multiple(entry: FunctionEntry, surface: Surface) -> float:
    if entry.slo_multiple is not None:
        return entry.slo_multiple
    assert entry.slo_ms is not None
    return entry.slo_ms / (surface.reference_s * 1e3)


def _spec_load(path: Path, entry: FunctionEntry, surface: Surface, multiple: float, settings: Settings) -> FunctionLoad:
    memory_mib = entry.memory_mib or settings.instance_memory_mib
    load = function_load(
        entry.name, surface, multiple, entry.arrivals_s, replace(settings, instance_memory_mib=memory_mib)
    )
    spec = replace(load.spec, **entry.fields)
    try:
        spec.validate()
    except InvalidError as error:
        raise InvalidError(f"{path}: {entry.name}: {error.what}", expected=error.expected, got=error.got) from error
    return replace(load, spec=spec)


def _filled(surfaces: Mapping[str, Surface]) -> list[str]:
    """Says how much of the profiles was interpolated."""
    cells = sum(len(surface.cells_s) for surface in surfaces.values())
    filled = sum(len(surface.filled) for surface in surfaces.values())
    if not filled:
        return []
    return [
        f"profile: {filled} of {cells} cells ({filled / cells:.1%}) are not measured: interpolated in "
        "log(latency) over log of quota, SM share and batch between the nearest measured ones (hasgpu's own files: "
        "device time over quota)"
    ]
