"""The command `hasgpu`. Commands are imported when they are called, so that help comes at once."""

from __future__ import annotations

import importlib
from typing import Any, NoReturn

import click
from hasgpu_core.errors import HasgpuError

COMMANDS = {
    "up": ("system", "Start the system: brokers, services and node agents, supervised."),
    "down": ("system", "Stop everything that `up` started."),
    "status": ("system", "Show brokers, services, nodes, devices and functions."),
    "doctor": ("doctor", "Check the installation; say what is wrong and what to do."),
    "logs": ("logs", "Show the log of a service or an instance."),
    "deploy": ("functions", "Deploy a function from its YAML."),
    "functions": ("functions", "List the functions."),
    "describe": ("functions", "Show one function with its instances."),
    "delete": ("functions", "Delete a function."),
    "infer": ("infer", "Send one request to a function."),
    "scale": ("scaling", "Set shares or the number of instances by hand, for a while."),
    "explain": ("scaling", "Show the last scaling decisions and their reasons."),
    "policy": ("policy", "Show or set the policy that decides; advisory mode."),
    "recording": ("recording", "Take out what the scaler saw and decided."),
    "simulate": ("simulate", "Compare scaling policies on profiles and traces, or on a recording."),
    "whatif": ("placement", "Ask where instances would go, and what a lost node would mean. Changes nothing."),
    "events": ("placement", "Show what the scheduler placed, moved and could not place."),
    "profile": ("profile", "Measure a function over batch, SM share and quota; write a profile file."),
    "top": ("top", "Watch functions, shares and load."),
    "replay": ("replay", "Send requests at given rates or from a trace, open loop."),
    "rapp": ("rapp", "The latency predictor: how right it is."),
    "demo": ("demo", "Run the whole system once with real models and write a report."),
}


class LazyGroup(click.Group):
    """Knows its commands by name and help; imports one when it runs. Domain errors become one line and status 1."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """In the order of the table."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Imports the module of a command."""
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"hasgpu_cli.commands.{COMMANDS[cmd_name][0]}")
        command: click.Command = getattr(module, f"{cmd_name}_command")
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Lists names and one line each without importing anything."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])

    def invoke(self, ctx: click.Context) -> Any:
        """Runs the command."""
        try:
            return super().invoke(ctx)
        except HasgpuError as error:
            raise click.ClickException(str(error)) from error
        except BaseExceptionGroup as group:
            if (first := first_hasgpu_error(group)) is not None:
                raise click.ClickException(str(first)) from group
            raise


def first_hasgpu_error(group: BaseExceptionGroup[BaseException]) -> HasgpuError | None:
    """The first domain error of a task group that holds nothing else; None when it holds a bug."""
    known, other = group.split(HasgpuError)
    if known is None or other is not None:
        return None
    error: BaseException = known
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error if isinstance(error, HasgpuError) else None


@click.command(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="hasgpu-cli", prog_name="hasgpu")
@click.option("--home", metavar="DIR", help="Folder of the system [HASGPU_HOME, else ~/.local/state/hasgpu].")
@click.option("--gateway", metavar="HOST:PORT", help="Address of a gateway elsewhere [HASGPU_GATEWAY].")
@click.option("--scaler", metavar="HOST:PORT", help="The same for the scaler [HASGPU_SCALER].")
@click.option("--scheduler", metavar="HOST:PORT", help="The same for the scheduler [HASGPU_SCHEDULER].")
@click.option("--rapp", metavar="HOST:PORT", help="The same for rapp [HASGPU_RAPP].")
@click.pass_context
def cli(context: click.Context, /, home: str | None, **addresses: str | None) -> None:
    """Serverless deep-learning inference on shared GPUs.

    Every function gets a share of a device in space and time; shares grow and shrink so that its latency objective is
    met at the least cost.
    """
    context.obj = {"home": home, "addresses": {name: address for name, address in addresses.items() if address}}


def main() -> NoReturn:
    """Entry point: status 0, 1 for an error, 2 for wrong usage."""
    cli(prog_name="hasgpu")
    raise SystemExit(0)


if __name__ == "__main__":
    main()
