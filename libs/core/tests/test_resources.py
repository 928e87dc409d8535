from __future__ import annotations

import pytest
from hasgpu_core.resources import DeviceInfo

CARD = DeviceInfo("n", "gpu0", "card", "cuda", 1 << 30, (25, 50, 75, 100), sm_granule_pct=25)


@pytest.mark.parametrize(("asked_pct", "given_pct"), [(1, 25), (25, 25), (26, 50), (76, 100), (100, 100)])
def test_a_device_with_a_granule_gives_the_next_rung_up(asked_pct, given_pct):
    assert CARD.given_sm_pct(asked_pct) == given_pct


def test_a_device_without_a_granule_gives_what_is_asked_for():
    assert DeviceInfo("n", "cpu0", "cpu-2c", "cpu", 1, (25, 100)).given_sm_pct(7) == 7


def test_above_the_highest_rung_what_was_asked_for_is_kept_for_the_guard_to_refuse():
    card = DeviceInfo("n", "gpu0", "card", "cuda", 1, (24, 48, 96), sm_granule_pct=24)
    assert card.given_sm_pct(97) == 97
