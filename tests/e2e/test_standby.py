"""A standby is ready and parked, gets nothing, and starts to serve without a new process."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hasgpu_core.resources import PARKED_QUOTA_PERMILLE
from hasgpu_system import SteadyLoad, System, eventually

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

NAME = "spare"


@pytest.fixture
def spare(system: System, copy_of_tricky: Callable[..., pathlib.Path]) -> Iterator[System]:
    path = copy_of_tricky(name=NAME, instances="{min: 1, max: 3, standby: 1}")
    system.cli("deploy", str(path), "--wait")
    yield system
    system.cli("delete", NAME)


def parked_and_active(system: System) -> tuple[dict[str, Any], dict[str, Any]]:
    """The instance of each kind, once there is one of each; they are held: no policy changes which is which."""

    def one_of_each() -> bool:
        return len(system.instances(NAME)) == 2 and len(system.serving(NAME)) == 1

    eventually(one_of_each, within_s=60)
    system.hold(NAME, 1, for_s=120)
    (active,) = system.serving(NAME)
    (parked,) = [i for i in system.instances(NAME) if i["instance"] != active["instance"]]
    assert parked["allocation"]["request_permille"] == PARKED_QUOTA_PERMILLE
    return parked, active


def instance(system: System, name: str) -> dict[str, Any]:
    return next(i for i in system.instances(NAME) if i["instance"] == name)


def test_a_standby_gets_nothing_until_it_is_asked_for(spare: System) -> None:
    parked, active = parked_and_active(spare)
    with SteadyLoad(spare, NAME, period_s=0.1) as load:
        eventually(lambda: load.ok_count >= 20, within_s=30)
    assert load.errors == []
    assert instance(spare, parked["instance"])["batches_count"] == parked["batches_count"]
    assert instance(spare, active["instance"])["batches_count"] > active["batches_count"]

    spare.cli("scale", NAME, "--instances", "2", "--hold", "30")

    def activated() -> bool:
        now = instance(spare, parked["instance"])
        return now["allocation"]["request_permille"] > PARKED_QUOTA_PERMILLE and now["state"] == "ready"

    eventually(activated, within_s=5)
    seen = spare.instances(NAME)
    assert {i["instance"] for i in seen} == {parked["instance"], active["instance"]}
    # More than the active one is free for: what comes while it is busy goes to the other.
    with SteadyLoad(spare, NAME, period_s=0.005, text="burn:2") as load:
        eventually(lambda: instance(spare, parked["instance"])["batches_count"] > parked["batches_count"], within_s=30)
    assert load.errors == []
    now = instance(spare, parked["instance"])
    assert (now["pid"], now["restarts_count"]) == (parked["pid"], parked["restarts_count"])
    assert now["pid"] > 0
    decision = next(d for d in spare.json("explain", NAME) if d["origin"] == "manual")
    assert [(a["kind"], a["instance"]) for a in decision["actions"]] == [("vertical_up", parked["instance"])]
