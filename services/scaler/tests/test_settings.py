"""The scaler's settings."""

from __future__ import annotations

import pytest
from hasgpu_core.errors import InvalidError
from hasgpu_core.policy.scaling import ScalingSettings
from hasgpu_scaler.settings import load


def test_defaults_and_values():
    assert load({}).period_s == 0.5
    assert load({"HASGPU_SCALER_PERIOD_S": "0.1"}).period_s == 0.1


def test_the_idle_time_is_the_policys_unless_told():
    assert load({}).idle_to_zero_s == ScalingSettings().idle_to_zero_s
    assert load({"HASGPU_SCALER_IDLE_TO_ZERO_S": "5"}).idle_to_zero_s == 5.0
    with pytest.raises(InvalidError, match=r"HASGPU_SCALER_IDLE_TO_ZERO_S.*1\.\.86400"):
        load({"HASGPU_SCALER_IDLE_TO_ZERO_S": "0"})


@pytest.mark.parametrize("value", ["soon", "0", "61", "nan"])
def test_refused_values_name_the_variable_and_the_bound(value):
    with pytest.raises(InvalidError, match=r"HASGPU_SCALER_PERIOD_S.*0\.05\.\.60.*" + value):
        load({"HASGPU_SCALER_PERIOD_S": value})
