"""What `hasgpu status` and `hasgpu top` show of devices."""

from __future__ import annotations

from typing import Any

from hasgpu.common.v1 import common_pb2
from hasgpu.events.v1 import events_pb2
from hasgpu_cli.devices import device_table, sharing, trouble
from hasgpu_cli.proto_json import to_plain
from hasgpu_cli.status import _add_device
from rich.console import Console
from rich.tree import Tree


def card(**changes: Any) -> common_pb2.Device:
    fields: dict[str, Any] = {
        "node": "n1",
        "gpu": "gpu0",
        "model": "Card",
        "backend": "cuda",
        "memory_bytes": 80 << 30,
        "sm_rungs_pct": [25, 50, 100],
        "mode": "mps+green",
        "uuid": "GPU-7",
        "sm_count": 132,
        "sm_granule_pct": 25,
        "health": common_pb2.DEVICE_HEALTH_OK,
    }
    return common_pb2.Device(**{**fields, **changes})


def shown(renderable: Any) -> str:
    console = Console(width=200, record=True, file=None, highlight=False)
    with console.capture() as captured:
        console.print(renderable)
    return captured.get()


def test_status_tells_how_a_gpu_is_shared_and_what_is_wrong_with_it() -> None:
    lost = card(health=common_pb2.DEVICE_HEALTH_LOST, health_reason="the GPU is lost: Card (GPU-7): [fell off]")
    tree = Tree("nodes")
    _add_device(tree, {"device": to_plain(lost), "rows": [], "instances": []})
    text = shown(tree)
    assert "shared by mps+green, 132 SMs, SM shares are rounded up to its rungs, 25 % the least, GPU-7" in text
    assert "PROBLEM LOST the GPU is lost: Card (GPU-7): [fell off]" in text


def test_a_cpu_and_a_device_of_an_older_agent_have_nothing_to_add() -> None:
    plain = to_plain(common_pb2.Device(node="n", gpu="cpu0", model="cpu-2c", backend="cpu"))
    assert (sharing(plain), trouble(plain)) == ("", "")


def test_top_shows_what_was_measured_and_a_dash_for_what_was_not() -> None:
    event = events_pb2.DeviceEvent(
        device=card(health=common_pb2.DEVICE_HEALTH_DEGRADED, health_reason="the MPS daemon does not run"),
        memory_used_bytes=4 << 30,
        measured_memory_bytes=3 << 30,
        power_mw=250_000,
        utilisation_pct=0,
    )
    event.rows.add(index=0, sm_pct=25, used_permille=300)
    text = shown(device_table([to_plain(event)]))
    line = next(line for line in text.splitlines() if "n1/gpu0" in line)
    assert "degraded the MPS daemon does not run" in line
    for word in ("25 % × 30 %", "4.0 GiB", "3.0 GiB", "250 W", "0 %"):
        assert word in line, word
    assert line.split()[-2:] == ["-", "-"], "no clock and no temperature is not zero"
