"""Ports and environment of what `hasgpu up` starts."""

from __future__ import annotations

from pathlib import Path

from hasgpu_cli.home import Home
from hasgpu_cli.stack import Stack, assign_ports, metrics_targets, service_units


def test_every_service_serves_its_metrics_on_a_port_of_its_own(tmp_path: Path) -> None:
    stack = assign_ports(Stack(nodes_count=2), before={})
    assert len(set(stack.ports.values())) == len(stack.ports)
    units = service_units(Home(tmp_path), stack, nats_url="nats://n", redis_url="redis://r")
    assert [unit.metrics for unit in units] == [target["targets"][0] for target in metrics_targets(stack)]
    for unit in units:
        assert unit.metrics == f"127.0.0.1:{unit.env['HASGPU_METRICS_PORT']}"
        assert unit.metrics != unit.address
    assert [target["labels"]["job"] for target in metrics_targets(stack)][-2:] == ["hasgpu-node-agent"] * 2


def test_ports_stay_from_one_up_to_the_next() -> None:
    first = assign_ports(Stack(), before={}).ports
    second = assign_ports(Stack(), before=first).ports
    assert {name: port for name, port in second.items() if name != "gateway"} == {
        name: port for name, port in first.items() if name != "gateway"
    }, "the gateway takes its well-known port when that is free"
