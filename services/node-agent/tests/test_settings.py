"""Settings from the environment."""

from __future__ import annotations

from pathlib import Path

import pytest
from hasgpu_core.errors import HasgpuError, InvalidError
from hasgpu_device import profiles
from hasgpu_node_agent.devices import probe_devices
from hasgpu_node_agent.settings import DeviceSetting, default_node, load, parse_devices


def test_devices() -> None:
    assert parse_devices("cpu") == (DeviceSetting("cpu"),)
    assert parse_devices("cpu:cores=2; cpu:cores=1") == (DeviceSetting("cpu", 2), DeviceSetting("cpu", 1))
    assert parse_devices("emulated") == (DeviceSetting("emulated"),)
    assert parse_devices("emulated:gpus=8,profile=/p/x.csv") == (DeviceSetting("emulated", gpus=8, profile="/p/x.csv"),)


@pytest.mark.parametrize(
    "text",
    [
        "tpu",
        "cpu:cores=0",
        "cpu:cores=x",
        "cpu:threads=2",
        ";",
        "cpu:cores",
        "emulated:gpus=0",
        "emulated:gpus=65",
        "emulated:gpus=many",
        "emulated:profile=",
        "emulated:cores=2",
    ],
)
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


def test_emulated_devices_are_what_the_profile_says() -> None:
    settings = parse_devices("cpu:cores=1;emulated:gpus=2;emulated:gpus=1")
    cpu, *gpus = probe_devices("n", settings)
    assert cpu.info.gpu == "cpu0"
    assert [device.info.gpu for device in gpus] == ["gpu0", "gpu1", "gpu2"]
    header = profiles.shipped().header
    for device in gpus:
        info = device.info
        assert (info.backend, info.model) == ("emulated", f"emulated-{header.device_model}")
        assert (info.memory_bytes, info.sm_rungs_pct) == (header.memory_bytes, header.sm_rungs_pct)
        assert info.capabilities[0].startswith("emulated: ")
        assert Path(device.profile_path).is_file()


def test_a_profile_that_can_not_be_used_is_told_with_its_file(tmp_path: Path) -> None:
    with pytest.raises(HasgpuError, match=r"/nowhere/p\.csv can't be read"):
        probe_devices("n", parse_devices("emulated:profile=/nowhere/p.csv"))
    path = tmp_path / "bad.csv"
    path.write_text("model,batch\n")
    with pytest.raises(HasgpuError, match=r"bad\.csv can't be used: profile file, line 1, header"):
        probe_devices("n", parse_devices(f"emulated:profile={path}"))
