"""Settings from the environment."""

from __future__ import annotations

from pathlib import Path

import pytest
from hasgpu_core.errors import InvalidError
from hasgpu_node_agent.devices import probe_devices
from hasgpu_node_agent.settings import DeviceSetting, default_node, load, parse_devices


def test_devices() -> None:
    assert parse_devices("cpu") == (DeviceSetting("cpu"),)
    assert parse_devices("cpu:cores=2; cpu:cores=1") == (DeviceSetting("cpu", 2), DeviceSetting("cpu", 1))


@pytest.mark.parametrize("text", ["tpu", "cpu:cores=0", "cpu:cores=x", "cpu:threads=2", ";", "cpu:cores"])
def test_devices_that_cannot_be_are_refused_with_what_came(text: str) -> None:
    with pytest.raises(InvalidError, match="HASGPU_DEVICES"):
        parse_devices(text)


def test_a_host_name_becomes_one_token_of_a_subject() -> None:
    assert default_node("box.example.org") == "box-example-org"
    assert default_node("...") == "node"


def test_the_rest() -> None:
    settings = load({"HASGPU_NODE": "n1", "HASGPU_STOP_WORKERS_ON_EXIT": "0", "HASGPU_STATE_DIR": "/s"})
    assert (settings.node, settings.stop_workers_on_exit, settings.state_dir) == ("n1", False, Path("/s"))
    for environ in ({"HASGPU_NODE": "a.b"}, {"HASGPU_STOP_WORKERS_ON_EXIT": "yes"}):
        with pytest.raises(InvalidError, match=next(iter(environ))):
            load(environ)
    assert load({"XDG_STATE_HOME": "/x"}).state_dir == Path("/x/hasgpu")


def test_devices_share_the_memory_of_the_host() -> None:
    (one,) = probe_devices("n", [DeviceSetting("cpu", 2)])
    two = probe_devices("n", [DeviceSetting("cpu", 2), DeviceSetting("cpu", 1)])
    assert [d.info.gpu for d in two] == ["cpu0", "cpu1"]
    assert [d.info.model for d in two] == ["cpu-2c", "cpu-1c"]
    assert sum(d.info.memory_bytes for d in two) <= one.info.memory_bytes
