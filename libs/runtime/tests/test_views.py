from __future__ import annotations

import asyncio

import pytest
from hasgpu_core.events import NodeEvent, node_subject
from hasgpu_runtime import wire
from hasgpu_runtime.views import StateView


def node(name: str, revision: int) -> NodeEvent:
    return NodeEvent(name, "127.0.0.1:1", (), observed_unix_ns=1, plan_revision=revision)


async def test_a_view_follows_and_tells(memory_bus, background_errors):
    told = asyncio.Queue[tuple[str, NodeEvent | None]]()
    times = []
    view = StateView(
        memory_bus,
        "node.>",
        decode=wire.decode_node,
        on_change=lambda subject, value: told.put_nowait((subject, value)),
        on_caught_up=lambda: times.append(1),
    )
    await memory_bus.put(node_subject("a"), wire.encode(node("a", 1)))
    assert not view.is_caught_up
    task = asyncio.create_task(view.run())
    async with asyncio.timeout(20):
        await view.caught_up()
        assert view.values == {"node.a": node("a", 1)}
        await told.get()
        await memory_bus.put("node.a", b"\xff")
        await memory_bus.put("node.b", wire.encode(node("b", 2)))
        assert await told.get() == ("node.b", node("b", 2))
        assert view.values == {"node.a": node("a", 1), "node.b": node("b", 2)}
        await memory_bus.delete("node.a")
        assert await told.get() == ("node.a", None)
        memory_bus.go_away()
        memory_bus.come_back()
        assert await told.get() == ("node.b", node("b", 2))
    assert view.values == {"node.b": node("b", 2)}
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert times == [1, 1]
