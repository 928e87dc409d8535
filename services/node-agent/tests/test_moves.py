"""Who tells of an instance that moves between two nodes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from hasgpu_core.events import PlannedInstance
from hasgpu_core.resources import Allocation, InstanceState
from hasgpu_node_agent.agent import NodeAgent

LOADING, READY = InstanceState.LOADING, InstanceState.READY


def planned(**marks: str) -> PlannedInstance:
    return PlannedInstance("f", "f-0", "g0", 0, Allocation(50, 100, 100, 1), 1, **marks)


@pytest.mark.parametrize(
    ("entry", "state", "speaks"),
    [
        (None, READY, False),
        (planned(), None, True),
        (planned(), LOADING, True),
        (planned(moving_from="a"), None, False),
        (planned(moving_from="a"), LOADING, False),
        (planned(moving_from="a"), READY, True),
        (planned(moving_to="b"), READY, False),
    ],
)
def test_the_old_node_has_the_say_until_the_new_worker_is_ready(
    entry: PlannedInstance | None, state: InstanceState | None, speaks: bool
) -> None:
    worker = SimpleNamespace(state=state) if state is not None else None
    held: Any = SimpleNamespace(
        _reconciler=SimpleNamespace(instances={"f-0": SimpleNamespace(planned=entry, current=worker)})
    )
    assert NodeAgent._speaks(held, "f-0") is speaks
    assert NodeAgent._speaks(held, "g-0") is False
