"""Options that many commands share."""

from __future__ import annotations

import asyncio
import functools
import json
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, TypeVar

import click

from hasgpu_cli.client import SERVICES, Target
from hasgpu_cli.home import find_home

if TYPE_CHECKING:
    from rich.console import Console

F = TypeVar("F", bound=Callable[..., Any])
T = TypeVar("T")
WIDTH_OF_NO_TERMINAL = 200


def target_options(*services: str) -> Callable[[F], F]:
    """Adds --home and an address option for each service; the command gets `target`, a Target."""
    unknown = set(services) - set(SERVICES)
    assert not unknown, unknown

    def decorate(function: F) -> F:
        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            context = click.get_current_context()
            root = context.find_root().obj or {}
            home = kwargs.pop("home") or root.get("home")
            overrides = {name: kwargs.pop(name) for name in services}
            given = {name: value for name, value in overrides.items() if value}
            target = Target(find_home(home), {**root.get("addresses", {}), **given})
            return function(*args, target=target, **kwargs)

        for name in reversed(services):
            text = f"Address of the {name} [HASGPU_{name.upper()}, else as `up` started it]."
            click.option(f"--{name}", metavar="HOST:PORT", help=text)(wrapper)
        click.option("--home", metavar="DIR", help="Folder of the system.")(wrapper)
        return wrapper  # type: ignore[return-value]  # the decorated function has another signature, as click's do

    return decorate


def json_option(function: F) -> F:
    """Adds --json; the command gets `as_json`."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON.")(function)


def print_json(value: Any) -> None:
    """Prints a value for scripts."""
    click.echo(json.dumps(value, indent=2))


def make_console() -> Console:
    """A console for standard output; wide where it is no terminal, so that lines stay whole in files and pipes."""
    from rich.console import Console

    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=WIDTH_OF_NO_TERMINAL)


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    """Runs a command's coroutine."""
    return asyncio.run(coroutine)
