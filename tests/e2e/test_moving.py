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
from hasgpu_system import System, emulated_function, eventually, running_system

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def places(system: System) -> set[str]:
    (function,) = system.json("functions")
    return {item["node"] for item in function["instances"] if item["state"] == "ready"}


def test_a_node_is_emptied_while_it_serves(tmp_path: pathlib.Path) -> None:
    (tmp_path / "f").mkdir()
    path = emulated_function(tmp_path / "f", "resnet50", slo_ms=5_000)
    with running_system(tmp_path / "home", "--device", "emulated", "--nodes", "2") as system:
        system.cli("deploy", path, "--wait")
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


def node(system: System, name: str) -> Any:
    return next(item for item in system.json("status")["cluster"]["nodes"] if item["name"] == name)
