"""`hasgpu replay`."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from hasgpu_core.function import TensorSpec

from hasgpu_cli import rates
from hasgpu_cli.client import CALL_TIMEOUT_S, Target
from hasgpu_cli.load import MOST_IN_FLIGHT, Outcome, Replay, Summary, run_open_loop
from hasgpu_cli.options import json_option, make_console, print_json, run, target_options

if TYPE_CHECKING:
    from collections.abc import Callable


@click.command("replay")
@click.argument("name")
@click.option("--rates", "rate_list", help='Requests a second of each stage, as "8 5 5" [the 50 of HAS-GPU].')
@click.option(
    "--stage-seconds", "stage_s", default=5.0, show_default=True, help="Length of a stage, or of a trace's bin."
)
@click.option("--trace", type=click.Path(path_type=Path), help="CSV (or .gz) with a column t_s or counts.")
@click.option("--speed", default=1.0, show_default=True, help="Run time faster by this factor.")
@click.option("--scale", default=1.0, show_default=True, help="Send this many times the requests.")
@click.option("--arrivals", type=click.Choice(["even", "poisson"]), default="even", show_default=True)
@click.option("--seed", default=0, show_default=True, help="Of Poisson arrivals and random inputs.")
@click.option("--text", "texts", multiple=True, help="As for `infer`; without any input, random ones are sent.")
@click.option("--input", "inputs", multiple=True, metavar="TENSOR=JSON", help="As for `infer`.")
@click.option("--file", "files", multiple=True, metavar="TENSOR=PATH", help="As for `infer`.")
@click.option("--max-in-flight", "most", default=MOST_IN_FLIGHT, show_default=True, type=click.IntRange(min=1))
@json_option
@target_options("gateway")
def replay_command(target: Target, name: str, as_json: bool, most: int, **options: Any) -> None:
    """Send requests to NAME at given rates, open loop: a request leaves when it is due, whatever became of the others.

    Latency counts from the due time. Exit status 1 when no request was answered.
    """
    due_s = _due_times(
        **{key: options[key] for key in ("rate_list", "stage_s", "trace", "speed", "scale")},
        arrivals=options["arrivals"],
        seed=options["seed"],
    )
    given = (options["texts"], options["inputs"], options["files"])
    replay = Replay(due_s)
    summary = run(_replay(target, name, replay, given, most=most, seed=options["seed"], quiet=as_json))
    if as_json:
        print_json(asdict(summary))
    else:
        print_summaries({name: summary})
    if not summary.ok:
        raise click.ClickException(f"no request was answered; the first: {summary.first_failure}")


def _due_times(
    *, rate_list: str | None, stage_s: float, trace: Path | None, speed: float, scale: float, arrivals: str, seed: int
) -> list[float]:
    if trace is not None and rate_list is not None:
        raise click.UsageError("give --rates or --trace, not both")
    if stage_s <= 0:
        raise click.UsageError("--stage-seconds must be above 0")
    if trace is not None:
        return rates.rescale(rates.read_trace(trace, bin_s=stage_s), speed=speed, scale=scale)
    stages = rates.parse_rates(rate_list) if rate_list is not None else rates.HASGPU_RATES_RPS
    scaled = [rate * scale for rate in stages]
    if arrivals == "poisson":
        due_s = rates.poisson(scaled, stage_s, random.Random(seed))  # noqa: S311  a load, no secret
    else:
        due_s = rates.spread(scaled, stage_s)
    return rates.rescale(due_s, speed=speed, scale=1.0)


async def _replay(
    target: Target, name: str, replay: Replay, given: tuple[Any, Any, Any], *, most: int, seed: int, quiet: bool
) -> Summary:
    from hasgpu.gateway.v1 import gateway_pb2, gateway_pb2_grpc

    from hasgpu_cli.commands.infer import build_inputs
    from hasgpu_cli.sender import FunctionSender, Sample, random_samples

    async with target.channel("gateway") as channel:
        registry = gateway_pb2_grpc.FunctionServiceStub(channel)
        answer = await registry.GetFunction(gateway_pb2.GetFunctionRequest(name=name), timeout=CALL_TIMEOUT_S)
        spec = answer.function.spec
        tensors = [TensorSpec(t.name, t.datatype, tuple(t.shape)) for t in spec.inputs]
        rng = random.Random(seed)  # noqa: S311  a load, no secret
        samples = [Sample(build_inputs(tensors, *given))] if any(given) else random_samples(tensors, rng)
        sender = FunctionSender(channel, name, samples, timeout_s=spec.timeout_ms / 1e3)
        with progress_display({name: replay}, {name: spec.slo_ms}, quiet=quiet) as on_outcome:
            await run_open_loop(replay, sender.send, most_in_flight=most, on_outcome=on_outcome[name])
        return replay.summary(spec.slo_ms)


@contextlib.contextmanager
def progress_display(
    replays: dict[str, Replay], slos_ms: dict[str, int], *, quiet: bool
) -> Iterator[dict[str, Callable[[Outcome], None]]]:
    """Shows a bar for each load; gives what to call with every outcome."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description:<10}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TextColumn("{task.fields[state]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True, quiet=quiet), refresh_per_second=4) as progress:
        tasks = {
            name: progress.add_task(name, total=len(replay.due_s), state="starting") for name, replay in replays.items()
        }

        def watcher(name: str) -> Callable[[Outcome], None]:
            met = failed = 0

            def settled(outcome: Outcome) -> None:
                nonlocal met, failed
                failed += not outcome.ok
                met += outcome.ok and outcome.latency_s * 1e3 <= slos_ms[name]
                count = len(replays[name].outcomes)
                state = (
                    f"{100 * met / count:5.1f} % in time, {replays[name].in_flight_count} in flight, {failed} failed"
                )
                progress.update(tasks[name], completed=count, state=state)

            return settled

        yield {name: watcher(name) for name in replays}


def print_summaries(summaries: dict[str, Summary]) -> None:
    """Prints a table, one row a function."""
    from rich.table import Table

    table = Table("function", "requests", "answered", "p50 ms", "p95 ms", "p99 ms", "SLO ms", "in time", "failures")
    for name, summary in summaries.items():
        attained = "-" if summary.slo_attainment is None else f"{100 * summary.slo_attainment:.1f} %"
        failures = ", ".join(f"{status} {count}" for status, count in summary.failures.items()) or "none"
        table.add_row(
            name,
            str(summary.requests),
            str(summary.ok),
            *(_ms(value) for value in (summary.p50_ms, summary.p95_ms, summary.p99_ms)),
            str(summary.slo_ms),
            attained,
            failures,
        )
    make_console().print(table)


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"
