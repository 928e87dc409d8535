from __future__ import annotations

import pytest
from hasgpu_core.errors import InvalidError
from hasgpu_runtime import settings
from hasgpu_runtime.settings import CommonSettings, load_common


def test_defaults_are_those_of_the_design():
    assert load_common({}) == CommonSettings(
        nats_url="nats://127.0.0.1:4222",
        redis_url="redis://127.0.0.1:6379/0",
        listen="127.0.0.1:0",
        advertise="",
        log_level="info",
        log_format="text",
    )
    assert load_common({}, listen="127.0.0.1:8001").listen == "127.0.0.1:8001"
    assert load_common({"HASGPU_LISTEN": "[::]:9", "HASGPU_LOG_LEVEL": "DEBUG"}).listen == "[::]:9"


@pytest.mark.parametrize(
    ("name", "value", "bound"),
    [
        ("HASGPU_NATS_URL", "http://x", "nats://"),
        ("HASGPU_REDIS_URL", "redis://", "redis://"),
        ("HASGPU_LISTEN", "8001", "host:port"),
        ("HASGPU_LISTEN", "localhost:99999", "host:port"),
        ("HASGPU_ADVERTISE", "me", "host:port"),
        ("HASGPU_LOG_LEVEL", "loud", "debug or info"),
        ("HASGPU_LOG_FORMAT", "xml", "text or json"),
    ],
)
def test_a_refused_value_names_variable_bound_and_what_came(name, value, bound):
    with pytest.raises(InvalidError) as caught:
        load_common({name: value})
    assert name in str(caught.value)
    assert bound in str(caught.value)
    assert value in str(caught.value)


def test_numbers_have_bounds():
    assert settings.number({"X": "0.5"}, "X", 1.0, 0.0, 1.0) == 0.5
    assert settings.number({"X": " "}, "X", 1.0, 0.0, 1.0) == 1.0
    assert settings.integer({"X": "7"}, "X", 1, 0, 10) == 7
    for value in ("2", "nan", "inf", "x"):
        with pytest.raises(InvalidError, match=r"X: expected a number in 0\.\.1"):
            settings.number({"X": value}, "X", 1.0, 0.0, 1.0)
    for value in ("11", "1.5", "-1"):
        with pytest.raises(InvalidError, match=r"X: expected a whole number in 0\.\.10"):
            settings.integer({"X": value}, "X", 1, 0, 10)
