"""Where a command looks for the services."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner
from hasgpu_cli.__main__ import cli


@pytest.mark.parametrize(
    ("arguments", "asked"),
    [
        (["--gateway", "127.0.0.1:9", "functions"], "127.0.0.1:9"),
        (["functions", "--gateway", "127.0.0.1:9"], "127.0.0.1:9"),
        (["--gateway", "127.0.0.1:7", "functions", "--gateway", "127.0.0.1:9"], "127.0.0.1:9"),
        (["functions"], "127.0.0.1:11"),
    ],
)
def test_an_address_may_be_given_before_or_behind_the_command_or_by_the_environment(
    arguments: list[str], asked: str, tmp_path: Path
) -> None:
    environ = {"HASGPU_HOME": str(tmp_path), "HASGPU_GATEWAY": "127.0.0.1:11"}
    done = CliRunner().invoke(cli, arguments, env=environ)
    assert done.exit_code == 1
    assert f"the gateway at {asked} can't be reached" in done.output


def test_an_address_without_a_port_is_refused(tmp_path: Path) -> None:
    done = CliRunner().invoke(cli, ["--gateway", "localhost", "functions"], env={"HASGPU_HOME": str(tmp_path)})
    assert done.exit_code == 1
    assert "the address of the gateway: expected host:port, got 'localhost'" in done.output
