"""A node is drained under load, and the scheduler killed meanwhile: all requests are answered, each in time."""

from __future__ import annotations

import os
import pathlib
import signal
import threading
from typing import Any

import grpc
import pytest
from hasgpu.node_agent.v1 import node_agent_pb2, node_agent_pb2_grpc
from hasgpu_system import System, eventually

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

FUNCTION = """
name: vision
format: python
path: .
entry: handler.py
inputs:
  - {name: x, datatype: FP32, shape: [-1, 4]}
outputs:
  - {name: y, datatype: FP32, shape: [-1, 3]}
slo_ms: 5000
max_batch: 4
memory_mib: 1024
instances: {min: 2, max: 2}
parameters: {hasgpu.emulate: resnet50}
"""


def places(system: System) -> set[str]:
    (function,) = system.json("functions")
    return {item["node"] for item in function["instances"] if item["state"] == "ready"}


def test_a_node_is_emptied_while_it_serves(tmp_path: pathlib.Path) -> None:
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "function.yaml").write_text(FUNCTION)
    (tmp_path / "f" / "handler.py").write_text(
        "raise RuntimeError('the handler of an emulated function does not run')\n"
    )
    system = System(tmp_path / "home")
    try:
        system.up("--device", "emulated", "--nodes", "2")
        system.cli("deploy", str(tmp_path / "f" / "function.yaml"), "--wait")
        system.cli("scale", "vision", "--quota", "30", "--instances", "2", "--hold", "200")
        (before,) = places(system)
        cluster = system.json("status")["cluster"]
        (address,) = [node["address"] for node in cluster["nodes"] if node["name"] == before]
        answers: list[Any] = []
        rates = ("--rates", "10 10 10", "--stage-seconds", "4")
        load = threading.Thread(target=lambda: answers.append(system.json("replay", "vision", *rates)))
        load.start()
        with grpc.insecure_channel(address) as channel:
            stub = node_agent_pb2_grpc.NodeAgentServiceStub(channel)
            stub.Drain(node_agent_pb2.DrainRequest(draining=True), timeout=60)
        eventually(lambda: system.json("events")["moves"] or before not in places(system), within_s=60)
        os.kill(system.pid("scheduler"), signal.SIGKILL)
        eventually(lambda: places(system) and before not in places(system), within_s=60)
        load.join()
        (answer,) = answers
        assert (answer["ok"], answer["first_failure"]) == (answer["requests"], "")
        eventually(lambda: not node(system, before)["devices"][0]["instances"], within_s=60)
        lines = system.cli("whatif", "--lose-node", before).stdout.splitlines()
        assert lines[0] == "nothing would move"
    finally:
        system.down()


def node(system: System, name: str) -> Any:
    return next(item for item in system.json("status")["cluster"]["nodes"] if item["name"] == name)
