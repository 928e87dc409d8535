"""What `hasgpu status` and `hasgpu top` show of devices."""

from __future__ import annotations

from typing import Any

from hasgpu.common.v1 import common_pb2
from hasgpu.events.v1 import events_pb2
from hasgpu_cli.commands.top import _table
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


def shown(renderable: Any, width: int = 200) -> str:
    console = Console(width=width, record=True, file=None, highlight=False)
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
    other = events_pb2.DeviceEvent(device=card(), sm_clock_mhz=1_400)
    text = shown(device_table([to_plain(event), to_plain(other)]))
    line = next(line for line in text.splitlines() if "n1/gpu0" in line)
    assert "degraded the MPS daemon does not run" in line
    for word in ("25 % × 30 %", "4.0 GiB", "3.0 GiB", "250 W", "0 %"):
        assert word in line, word
    assert line.split()[-1] == "-", "no clock is not zero"
    assert "°C" not in text, "no card tells its temperature"
    assert "clock" not in shown(device_table([to_plain(event)]))


def test_top_fits_a_terminal_of_80_columns() -> None:
    reason = "rate 2.0 rps (random), planned for 3.0; sustains 9.0: quota of fn-1 2 % -> 3 %; and more of the same"
    instance = {
        "instance": "minilm-1",
        "state": "ready",
        "reason": "",
        "node": "node0",
        "gpu": "cpu0",
        "row": 1,
        "allocation": {"sm_pct": 25, "request_permille": 500, "limit_permille": 1000},
        "batches_count": 7,
    }
    spec = {"name": "minilm", "slo_ms": 400}
    function = {"spec": spec, "condition": "ready", "queued_count": 3, "instances": [instance]}
    decision = {"observed_rps": 2.0, "capacity_rps": 9.0, "p95_ms": 75, "reason": reason}
    rows = [{"name": "minilm", "function": function, "decision": decision}]
    for width in (80, 160):
        text = shown(_table(rows, {"minilm-1": 0.5}, [], width), width)
        for word in ("75 / 400", "12 %", "node0/cpu0 row 1", "rate 2.0 rps (random), planned"):
            assert word in text, (width, word)
