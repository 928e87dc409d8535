"""`hasgpu whatif` and `events`: what is asked, what is refused, what is shown."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

import pytest
from click.testing import CliRunner, Result
from hasgpu.scheduler.v1 import scheduler_pb2, scheduler_pb2_grpc
from hasgpu_cli.__main__ import cli
from hasgpu_cli.commands.placement import Add, parse_add
from hasgpu_core.errors import InvalidError, NotFoundError
from hasgpu_runtime.rpc import create_server


class Scheduler(scheduler_pb2_grpc.SchedulerServiceServicer):
    """Answers and remembers what was asked."""

    def __init__(self) -> None:
        self.asked: list[Any] = []

    async def WhatIfMany(self, request: Any, context: Any) -> scheduler_pb2.WhatIfManyResponse:
        self.asked.append(request)
        if "nowhere" in request.lose_nodes:
            raise NotFoundError("node", "nowhere", "there are: n0, n1")
        answer = scheduler_pb2.WhatIfManyResponse(
            gpus_total=4, gpus_used_before=2, gpus_used_after=3, gpus_needed_at_least=1, interrupted_functions=["f"]
        )
        answer.placed.add(
            function="f", instance="f-0", node="n1", gpu="g0", row=2, reason="new row", **{"from": "n0/g0"}
        )
        answer.unplaced.add(function="g", instance={"instance": "g-0"}, reason="no room for SM 100 %")
        return answer

    async def GetSchedulingEvents(self, request: Any, context: Any) -> scheduler_pb2.GetSchedulingEventsResponse:
        self.asked.append(request)
        answer = scheduler_pb2.GetSchedulingEventsResponse(leader=True)
        answer.events.add(unix_ns=3_600_000_000_000, kind="moved", instance="f-0", reason="f-0 has moved")
        answer.moves.add(function="f", instance="f-1", to="n1/g0", reason="node n0 drains", **{"from": "n0/g0"})
        return answer


@pytest.fixture
def scheduler(monkeypatch: pytest.MonkeyPatch) -> Iterator[Scheduler]:
    """In a thread with a loop of its own, since a command runs one itself."""
    servicer, address, stop = Scheduler(), Future[str](), Future[asyncio.Event]()
    loops: list[asyncio.AbstractEventLoop] = []

    async def serve() -> None:
        server = create_server(address="127.0.0.1:0")
        scheduler_pb2_grpc.add_SchedulerServiceServicer_to_server(servicer, server)
        await server.start()
        event = asyncio.Event()
        loops.append(asyncio.get_running_loop())
        stop.set_result(event)
        address.set_result(server.address)
        await event.wait()
        await server.stop(0)

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    monkeypatch.setenv("HASGPU_SCHEDULER", address.result(60))
    yield servicer
    loops[0].call_soon_threadsafe(stop.result().set)
    thread.join()


def call(*words: str) -> Result:
    return CliRunner().invoke(cli, ["--home", "/nonexistent/home", *words])


def test_what_would_be_is_told_in_lines(scheduler: Scheduler) -> None:
    result = call("whatif", "--add", "g,sm=100,quota=30,count=2,memory=100", "--lose-node", "n0")
    assert result.exit_code == 0, result.output
    assert "f-0 would go from n0/g0 to n1/g0 row 2: new row" in result.output
    assert "g-0 would NOT fit: no room for SM 100 %" in result.output
    assert "interrupted, all their instances being lost at once: f" in result.output
    assert "GPUs used: 2 now, 3 then, of 4; no placement could do with fewer than 1" in result.output
    (asked,) = scheduler.asked
    (add,) = asked.add
    assert (add.function, add.count, add.allocation.request_permille, add.allocation.memory_bytes) == (
        "g",
        2,
        300,
        100 << 20,
    )
    assert list(asked.lose_nodes) == ["n0"]


def test_json_and_an_unknown_node(scheduler: Scheduler) -> None:
    result = call("whatif", "--drop", "f", "--lose-gpu", "n0/g0", "--json")
    assert json.loads(result.output)["placed"][0]["from"] == "n0/g0"
    result = call("whatif", "--lose-node", "nowhere")
    assert (result.exit_code, result.output) == (1, "Error: node 'nowhere' is not found; there are: n0, n1\n")


def test_events_and_moves(scheduler: Scheduler) -> None:
    result = call("events", "--limit", "7")
    assert "01:00:00 moved         f-0 has moved" in result.output
    assert "under way: f-1 from n0/g0 to n1/g0 (node n0 drains)" in result.output
    assert scheduler.asked[0].limit == 7
    assert json.loads(call("events", "--json").output)["leader"] is True


def test_nothing_supposed_is_wrong_usage() -> None:
    result = call("whatif")
    assert result.exit_code == 2
    assert "give --add, --lose-node, --lose-gpu or --drop" in result.output


def test_what_is_to_be_added_is_read() -> None:
    assert parse_add("f,sm=25,quota=30") == Add("f", 25, 300, 300)
    assert parse_add("f, sm=25, quota=0.5, limit=100, memory=2048, count=4, standby") == Add(
        "f", 25, 5, 1000, 2048, 4, True
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("f", "no sm"),
        (",sm=1,quota=1", "no name"),
        ("f,sm=25", "no quota"),
        ("f,sm=25,quota=30,colour=red", "'colour=red'"),
        ("f,sm=25,quota=30,standby=yes", "'standby=yes'"),
        ("f,sm=0,quota=30", "1..100, got '0'"),
        ("f,sm=2.5,quota=30", "whole number"),
        ("f,sm=25,quota=nan", "0.1..100, got 'nan'"),
        ("f,sm=25,quota=30,count=0", "1..20000, got '0'"),
        ("f,sm=25,quota=x", "got 'x'"),
    ],
)
def test_what_can_not_be_added_is_refused(text: str, words: str) -> None:
    with pytest.raises(InvalidError) as caught:
        parse_add(text)
    assert words in str(caught.value)
