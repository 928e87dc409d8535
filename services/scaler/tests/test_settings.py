"""The scaler's settings."""

from __future__ import annotations

import pytest
from hasgpu_core.errors import InvalidError
from hasgpu_scaler.settings import load


def test_defaults_and_values():
    assert load({}).period_s == 0.5
    assert load({"HASGPU_SCALER_PERIOD_S": "0.1"}).period_s == 0.1


@pytest.mark.parametrize("value", ["soon", "0", "61", "nan"])
def test_refused_values_name_the_variable_and_the_bound(value):
    with pytest.raises(InvalidError, match=r"HASGPU_SCALER_PERIOD_S.*0\.05\.\.60.*" + value):
        load({"HASGPU_SCALER_PERIOD_S": value})
