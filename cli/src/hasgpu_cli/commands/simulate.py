"""`hasgpu simulate`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from hasgpu_core.errors import InvalidError

from hasgpu_cli.options import make_console

if TYPE_CHECKING:
    from hasgpu_cli.simulation.plan import SimulateOptions

DEFAULT_POLICIES = "hybrid,hasgpu,fastgshare,kserve,clairvoyant"
_EPILOG = """
\b
Profiles: hasgpu's profile files (`hasgpu profile` writes them), or HAS-GPU's (a folder with latency.csv.gz, or
that file). A profile may lack cells: a missing one is interpolated between its nearest measured neighbours,
log(latency) over log(quota), log(SM share) and log(batch), the mean of the axes that have one on both sides;
beyond the last neighbour its value is taken. The output says how many cells were filled so.

\b
Traces, told apart by their columns: t_s; set, rps (HAS-GPU's replays); count; fn, c0, c1, ...; and the public
Azure Functions file (HashFunction, 1, 2, ...). FILE:PART takes one set, or one function, of a file.

\b
Policies: hybrid, hasgpu, hasgpu-released, fastgshare, kserve, static-peak, and clairvoyant, a lower bound on
cost. `docs/simulate.md` says more, also of SPEC.yaml.
"""


@click.command("simulate", epilog=_EPILOG)
@click.option("--profile", "profiles", default="", metavar="F[,F]", help="Profiles; a model is taken from the first.")
@click.option("--trace", "traces", default="", metavar="F[,F]", help="Arrival traces, each a run of its own.")
@click.option("--functions", "spec", type=click.Path(path_type=Path), help="SPEC.yaml: functions that run together.")
@click.option("--models", default="", metavar="M[,M]", help="Models of the profile, each a run of its own.")
@click.option("--slo-multiples", default="2,3,5", show_default=True, help="SLOs, over the latency of a whole GPU.")
@click.option("--policies", default=DEFAULT_POLICIES, show_default=True, help="See below.")
@click.option("--gpus", default=8, show_default=True, type=int, help="How many there are.")
@click.option("--cold-start-s", type=float, help="From the plan to READY [6, or as recorded].")
@click.option("--physics", type=click.Choice(["table", "device-time"]), default="table", show_default=True)
@click.option("--arrivals", type=click.Choice(["even", "poisson"]), default="even", show_default=True)
@click.option("--rate-scale", default=1.0, show_default=True, help="Rates and counts times this; t_s runs faster.")
@click.option("--seconds", type=float, help="Only the first so many of each trace.")
@click.option("--seed", default=0, show_default=True, help="Of what is drawn.")
@click.option("--lend/--no-lend", default=True, show_default=True, help="Idle time of a row is lent and paid for.")
@click.option("--moves/--no-moves", default=False, show_default=True, help="The scheduler moves instances.")
@click.option("--recording", type=click.Path(path_type=Path), help="Replay a recording (`hasgpu recording export`).")
@click.option("--gpu-memory-mib", type=int, help="Of each GPU [the profile's, else 16384].")
@click.option("--memory-mib", default=512, show_default=True, type=int, help="Of each instance.")
@click.option("--min-instances", default=1, show_default=True, type=int, help="0 lets functions scale to zero.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), metavar="OUT", help="Write all figures.")
@click.option("--html", "html_path", type=click.Path(path_type=Path), metavar="PAGE", help="Write a page.")
@click.option("--quiet", is_flag=True, help="No progress.")
def simulate_command(json_path: Path | None, html_path: Path | None, quiet: bool, **options: Any) -> None:
    """Run scaling policies in the simulator, on measured profiles and real traces, and compare them.

    The policies are those of the live scaler, called as it calls them. An SLO is a multiple of the latency at batch 1
    with the whole GPU. Cost is GPU-seconds: SM share times the larger of requested and used time (--lend), or times
    requested time (--no-lend).
    """
    from hasgpu_cli.simulation import report
    from hasgpu_cli.simulation.plan import SimulateOptions, make_plan
    from hasgpu_cli.simulation.progress import Progress
    from hasgpu_cli.simulation.runs import Outcome, run_case

    chosen = SimulateOptions(**options)
    plan = make_plan(chosen)
    for note in plan.notes:
        click.echo(note, err=True)
    outcomes: list[Outcome] = list(plan.recorded)
    total = len(plan.cases) * len(plan.policies)
    with Progress(total, quiet=quiet) as progress:
        for case in plan.cases:
            for policy in plan.policies:
                tell = progress.begin(f"{case.title}, {policy}", case.duration_s)
                outcome, _ = run_case(case, policy, plan.settings, tell, keep=html_path is not None)
                progress.end(outcome)
                outcomes.append(outcome)
                if json_path is not None:  # what is done is kept, should the rest be interrupted
                    report.write_json(
                        json_path, report.document(outcomes, _settings(chosen, plan.settings), plan.notes)
                    )
    _print(outcomes)
    if html_path is not None:
        report.write_page(html_path, outcomes, [*_words(chosen), *plan.notes])
    for path in (json_path, html_path):
        if path is not None:
            click.echo(f"wrote {path}")


def _print(outcomes: Any) -> None:
    from rich.table import Table

    from hasgpu_cli.simulation import report

    table = Table(*report.HEADS)
    for outcome in outcomes:
        for result in outcome.results:
            table.add_row(*report.row(outcome, result))
    console = make_console()
    console.print(table)
    if ratios := report.cost_ratios(outcomes):
        compared = Table(*ratios[0])
        for cells in ratios[1:]:
            compared.add_row(*cells)
        console.print(compared)


def _settings(chosen: SimulateOptions, settings: Any) -> dict[str, Any]:
    """What the figures hold for."""
    return {
        "gpus": settings.gpus,
        "gpu_memory_mib": settings.gpu_memory_mib,
        "cold_start_s": settings.cold_start_s,
        "physics": settings.physics.value,
        "lend": settings.lend,
        "moves": settings.moves,
        "arrivals": chosen.arrivals,
        "rate_scale": chosen.rate_scale,
        "seed": chosen.seed,
        "tick_s": settings.tick_s,
        "resize_s": settings.resize_s,
    }


def _words(chosen: SimulateOptions) -> list[str]:
    lent = "idle time of a row is lent and paid for" if chosen.lend else "nothing is lent"
    return [
        f"Physics {chosen.physics}, {lent}. Arrivals inside a trace's bins: {chosen.arrivals}. Seed {chosen.seed}. "
        "Cost is GPU-seconds; clairvoyant is a lower bound of it that knows the future.",
    ]


def check_positive(option: str, value: float | None) -> None:
    """Raises InvalidError unless a number is above 0 (or not given)."""
    if value is not None and not value > 0:
        raise InvalidError(option, expected="a number above 0", got=f"{value:g}")
