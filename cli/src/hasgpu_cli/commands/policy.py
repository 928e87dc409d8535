"""`hasgpu policy`: which policy decides, and advisory mode."""

from __future__ import annotations

from typing import Any

import click

from hasgpu_cli import functions
from hasgpu_cli.client import CALL_TIMEOUT_S, Target
from hasgpu_cli.options import json_option, print_json, run, target_options
from hasgpu_cli.proto_json import to_plain


@click.group("policy")
def policy_command() -> None:
    """Show or set the policy that decides; advisory mode."""


@policy_command.command("show")
@json_option
@target_options("scaler")
def show_command(target: Target, as_json: bool) -> None:
    """Show which policy decides now, and those there are."""
    found = run(get_policy(target))
    if as_json:
        print_json(found)
        return
    click.echo(f"{found['policy']} decides (configured: {found['configured']})")
    click.echo(f"there are: {', '.join(found['available'])}")


@policy_command.command("set")
@click.argument("name")
@target_options("scaler")
def set_command(target: Target, name: str) -> None:
    """Let NAME decide from the next pass on; nothing restarts. `default`: the configured one. Kept over restarts."""
    policy = run(set_policy(target, "" if name == "default" else name))
    click.echo(f"{policy} decides from now on")


@policy_command.command("advise")
@click.argument("function")
@click.option("--on/--off", default=True, show_default=True, help="Whether FUNCTION is in advisory mode.")
@target_options("gateway")
def advise_command(target: Target, function: str, on: bool) -> None:
    """Put FUNCTION into advisory mode: the policy decides and shows (`hasgpu explain`), and does nothing.

    Its instances and shares stay as they are; `hasgpu scale` changes them. Only the instances that its `min` asks for
    are started where they are missing. The same as `advisory: true` in its YAML.
    """
    run(functions.update_function(target, function, advisory=on))
    state = "is decided for and left as it is" if on else "follows the policy again"
    click.echo(f"{function} {state}")


async def get_policy(target: Target) -> dict[str, Any]:
    """Returns which policy decides, those there are, and the configured one."""
    from hasgpu.scaler.v1 import scaler_pb2, scaler_pb2_grpc

    async with target.channel("scaler") as channel:
        stub = scaler_pb2_grpc.ScalerServiceStub(channel)
        return to_plain(await stub.GetPolicy(scaler_pb2.GetPolicyRequest(), timeout=CALL_TIMEOUT_S))


async def set_policy(target: Target, name: str) -> str:
    """Sets the policy (empty: the configured one); returns the name of the one in force."""
    from hasgpu.scaler.v1 import scaler_pb2, scaler_pb2_grpc

    async with target.channel("scaler") as channel:
        stub = scaler_pb2_grpc.ScalerServiceStub(channel)
        answer = await stub.SetPolicy(scaler_pb2.SetPolicyRequest(policy=name), timeout=CALL_TIMEOUT_S)
    return str(answer.policy)
