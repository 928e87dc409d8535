"""The scaler's settings."""

from __future__ import annotations

import pytest
from hasgpu_core.errors import InvalidError
from hasgpu_scaler.settings import load


def test_defaults_and_values():
    assert load({}).period_s == 0.5
    assert load({"HASGPU_SCALER_PERIOD_S": "0.1"}).period_s == 0.1


def test_the_idle_time_is_the_policys_unless_told():
    assert load({}).idle_to_zero_s is None
    assert load({"HASGPU_SCALER_IDLE_TO_ZERO_S": "5"}).idle_to_zero_s == 5.0
    with pytest.raises(InvalidError, match=r"HASGPU_SCALER_IDLE_TO_ZERO_S.*1\.\.86400"):
        load({"HASGPU_SCALER_IDLE_TO_ZERO_S": "0"})


def test_the_policy_and_the_room_for_recordings():
    assert load({}).policy == "hybrid"
    assert load({"HASGPU_SCALER_POLICY": "kserve"}).policy == "kserve"
    with pytest.raises(InvalidError, match=r"HASGPU_SCALER_POLICY.*hybrid.*'nobody'"):
        load({"HASGPU_SCALER_POLICY": "nobody"})
    assert load({}).retire_s is None
    assert load({"HASGPU_SCALER_RETIRE_S": "30"}).retire_s == 30.0
    kept = load({"HASGPU_STATE_DIR": "/x", "HASGPU_SCALER_RECORDING_MIB": "64"})
    assert (str(kept.recording_dir), kept.recording_bytes) == ("/x/scaler/recording", 64 << 20)
    assert load({"HASGPU_SCALER_RECORDING_MIB": "0"}).recording_dir is None
    with pytest.raises(InvalidError, match="0 or 32"):
        load({"HASGPU_SCALER_RECORDING_MIB": "8"})


@pytest.mark.parametrize("value", ["soon", "0", "61", "nan"])
def test_refused_values_name_the_variable_and_the_bound(value):
    with pytest.raises(InvalidError, match=r"HASGPU_SCALER_PERIOD_S.*0\.05\.\.60.*" + value):
        load({"HASGPU_SCALER_PERIOD_S": value})
