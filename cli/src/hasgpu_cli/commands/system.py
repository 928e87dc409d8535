"""`hasgpu up`, `down` and `status`."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from hasgpu_cli import up
from hasgpu_cli.client import Target
from hasgpu_cli.home import Home, RunRecord
from hasgpu_cli.options import json_option, make_console, print_json, run, target_options
from hasgpu_cli.stack import DEFAULT_GATEWAY_PORT, DEVICES


@click.command("up")
@click.option("--nodes", default=1, show_default=True, help="Node agents to start.")
@click.option(
    "--device",
    default="",
    type=click.Choice(["", *DEVICES]),
    metavar="|".join(DEVICES),
    help="What each node's GPUs are: the host's cores, NVIDIA GPUs, or GPUs emulated from a profile [cpu].",
)
@click.option("--gpus", type=int, metavar="N", help="GPUs of each node [emulated: 1; cuda: all that there are].")
@click.option(
    "--profile",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="What GPUs are emulated from, as `hasgpu profile` writes it [the shipped profile].",
)
@click.option("--devices", default="", metavar="SETTING", help="In place of the three: as `cpu:cores=2;cpu:cores=1`.")
@click.option("--port", default=0, help="Port of the gateway [8001, or a free one when that is taken].")
@click.option("--nats-url", default="", metavar="URL", help="Use this NATS (JetStream on) instead of starting one.")
@click.option("--redis-url", default="", metavar="URL", help="Use this Redis instead of starting one.")
@click.option("--log-level", default="info", show_default=True, type=click.Choice(["debug", "info", "warning"]))
@click.option(
    "--timeout",
    "within_s",
    default=up.READY_WITHIN_S,
    show_default=True,
    type=click.FloatRange(min=1),
    help="Seconds to get ready in.",
)
@click.option("--foreground", is_flag=True, help="Stay, and stop everything on Ctrl-C.")
@json_option
@target_options()
def up_command(target: Target, within_s: float, foreground: bool, as_json: bool, **options: Any) -> None:
    """Start the system: brokers, services and node agents, supervised.

    What dies is started again on the same port. `hasgpu down` stops it all.
    """
    home = target.home
    if (record := up.running(home)) is not None:
        _print_endpoints(home, record, as_json, already=True)
        if given := _given(options):
            click.echo(f"it runs as it was started; {', '.join(given)} would count after `hasgpu down`", err=True)
        return
    supervisor = up.start(home, up.stack_from_options(**options), foreground=foreground)
    try:
        record = _wait(home, supervisor, within_s, quiet=as_json)
    except (up.StartError, KeyboardInterrupt):
        supervisor.terminate()  # it may not have said yet that it runs, and nobody else would find it then
        up.stop(home)
        supervisor.wait()
        raise
    _print_endpoints(home, record, as_json)
    if not options["port"] and not record.address("gateway").endswith(f":{DEFAULT_GATEWAY_PORT}"):
        click.echo(f"port {DEFAULT_GATEWAY_PORT} is taken, so the gateway has another; --port chooses one", err=True)
    if foreground:
        _stay(supervisor)


def _given(options: Mapping[str, Any]) -> list[str]:
    """Which of the options were typed."""
    source = click.get_current_context().get_parameter_source
    return [f"--{name.replace('_', '-')}" for name in options if source(name) is ParameterSource.COMMANDLINE]


def _wait(home: Home, supervisor: subprocess.Popen[bytes], within_s: float, *, quiet: bool) -> RunRecord:
    from rich.console import Console

    console = Console(stderr=True, quiet=quiet)
    began_s = time.monotonic()
    with console.status("starting") as spinner:

        def progress(missing: dict[str, str]) -> None:
            waiting = ", ".join(f"{name} ({why})" for name, why in missing.items())
            spinner.update(f"starting, {time.monotonic() - began_s:.0f} s: waiting for {waiting or 'nothing'}")

        return run(up.wait_until_ready(home, supervisor, within_s=within_s, on_progress=progress))


def _print_endpoints(home: Home, record: RunRecord, as_json: bool, *, already: bool = False) -> None:
    points = up.endpoints(record)
    if as_json:
        print_json({"home": str(home.path), "already": already, "endpoints": points})
        return
    click.echo(f"hasgpu is {'already ' if already else ''}up in {home.path}")
    for name, address in points.items():
        click.echo(f"  {name:<8} {address}")
    click.echo("next: `hasgpu deploy examples/minilm/function.yaml`, `hasgpu status`, `hasgpu down`")


def _stay(supervisor: subprocess.Popen[bytes]) -> None:
    def pass_on(number: int, frame: object) -> None:
        supervisor.send_signal(signal.SIGTERM)

    signal.signal(signal.SIGTERM, pass_on)
    while supervisor.poll() is None:
        try:
            supervisor.wait()
        except KeyboardInterrupt:
            click.echo("stopping", err=True)
            supervisor.send_signal(signal.SIGTERM)


@click.command("down")
@json_option
@target_options()
def down_command(target: Target, as_json: bool) -> None:
    """Stop everything that `up` started, workers included. Functions stay known for the next `up`."""
    was_up = target.home.run_file.exists()
    ended = up.stop(target.home)
    if as_json:
        print_json({"home": str(target.home.path), "was_up": was_up, "ended_by_force_or_late": ended})
    elif was_up or ended:
        click.echo(f"stopped; the logs stay in {target.home.logs}")
    else:
        click.echo(f"nothing ran in {target.home.path}")


@click.command("status")
@json_option
@target_options("gateway", "scaler", "scheduler")
def status_command(target: Target, as_json: bool) -> None:
    """Show brokers, services, nodes, devices and functions. Exit status 1 when the system is not up."""
    from hasgpu_cli.status import gather_status, render_status

    status = run(gather_status(target))
    if as_json:
        print_json(status)
    else:
        make_console().print(render_status(status))
    if not status["up"] and not target.overrides and "error" in status["cluster"]:
        raise SystemExit(1)
