"""The scheduler's settings."""

from __future__ import annotations

import pytest
from hasgpu_core.errors import InvalidError
from hasgpu_scheduler.moving import MovingSettings
from hasgpu_scheduler.settings import load


def test_defaults_and_values():
    assert (load({}).period_s, load({}).node_timeout_s) == (1.0, 6.0)
    assert load({"HASGPU_NODE_TIMEOUT_S": "30"}).node_timeout_s == 30.0
    assert load({}).moving == MovingSettings()
    assert load({"HASGPU_MOVES_AT_ONCE": "0"}).moving.at_once == 0


@pytest.mark.parametrize(
    ("environ", "says"),
    [
        ({"HASGPU_NODE_TIMEOUT_S": "soon"}, "HASGPU_NODE_TIMEOUT_S.*soon"),
        ({"HASGPU_NODE_TIMEOUT_S": "0.5"}, r"1\.\.3600.*0\.5"),
        ({"HASGPU_MOVES_AT_ONCE": "1.5"}, r"HASGPU_MOVES_AT_ONCE.*1\.5"),
        ({"HASGPU_MOVE_HEADROOM_PERMILLE": "-1"}, "HASGPU_MOVE_HEADROOM_PERMILLE.*0.*-1"),
        ({"HASGPU_SCHEDULER_PERIOD_S": "2.5"}, "at most 2 .*got 2.5"),
    ],
)
def test_refused_values_name_the_variable_and_the_bound(environ, says):
    with pytest.raises(InvalidError, match=says):
        load(environ)
