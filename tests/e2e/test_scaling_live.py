"""Shares and instances change under load without a lost request."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hasgpu_system import SteadyLoad, System, eventually

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]


def test_a_quota_changes_under_load_without_a_restart(system: System, scale: Callable[..., None]) -> None:
    system.hold("tricky", 1, for_s=30)
    before = system.serving("tricky")
    with SteadyLoad(system, "tricky", period_s=0.05) as load:
        for quota_pct in (60, 20, 80):
            scale("tricky", "--quota", str(quota_pct), "--hold", "30")

            def in_force(quota_permille: int = quota_pct * 10) -> bool:
                return [i["allocation"]["request_permille"] for i in system.serving("tricky")] == [quota_permille]

            eventually(in_force, within_s=10)
    after = system.serving("tricky")
    assert load.errors == []
    assert load.ok_count == load.sent_count > 20
    assert [(i["instance"], i["restarts_count"]) for i in after] == [
        (i["instance"], i["restarts_count"]) for i in before
    ]
    reasons = system.json("explain", "tricky")
    assert any(d["origin"] == "manual" for d in reasons)


def test_no_request_is_lost_when_an_instance_retires(system: System, scale: Callable[..., None]) -> None:
    def ready_count(wanted: int) -> bool:
        return [i["state"] for i in system.serving("tricky")] == ["ready"] * wanted

    def two_ready() -> bool:
        return ready_count(2)

    def one_ready() -> bool:
        return ready_count(1)

    system.hold("tricky", 1, for_s=60)
    with SteadyLoad(system, "tricky", period_s=0.03) as load:
        scale("tricky", "--quota", "30", "--instances", "2", "--hold", "60")
        eventually(two_ready, within_s=40)
        scale("tricky", "--instances", "1", "--hold", "10")
        eventually(one_ready, within_s=30)
    assert load.errors == []
    assert load.ok_count == load.sent_count > 50
