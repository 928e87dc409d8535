"""Due times."""

from __future__ import annotations

import gzip
import random
from pathlib import Path

import pytest
from hasgpu_cli import rates
from hasgpu_core.errors import InvalidError


def test_the_published_load_has_its_2690_requests() -> None:
    assert len(rates.HASGPU_RATES_RPS) == 50
    assert len(rates.spread(rates.HASGPU_RATES_RPS, 5.0)) == 2_690


def test_spread_is_even_and_carries_fractions_over() -> None:
    assert rates.spread([2, 0, 4], 1.0) == pytest.approx([0.25, 0.75, 2.125, 2.375, 2.625, 2.875])
    due_s = rates.spread([0.5] * 5, 1.0)
    assert due_s == pytest.approx([1.0, 3.0])


def test_poisson_has_the_asked_rate_and_repeats_with_its_seed() -> None:
    one = rates.poisson([10, 0, 20], 50.0, random.Random(1))
    assert one == rates.poisson([10, 0, 20], 50.0, random.Random(1))
    assert not [at_s for at_s in one if 50 <= at_s < 100]
    assert 400 < sum(at_s < 50 for at_s in one) < 600
    assert one == sorted(one)


@pytest.mark.parametrize("text", ["", "0 0", "5 x", "-1", "nan", "inf"])
def test_rates_that_are_none(text: str) -> None:
    with pytest.raises(InvalidError, match="--rates"):
        rates.parse_rates(text)


def test_parse_rates() -> None:
    assert rates.parse_rates("8 5, 0.5") == (8, 5, 0.5)


def test_traces(tmp_path: Path) -> None:
    plain, packed = tmp_path / "a.csv", tmp_path / "b.csv.gz"
    plain.write_text("t_s,other\n12.5,a\n10.0,b\n")
    packed.write_bytes(gzip.compress(b"counts\n2\n0\n1\n"))
    assert rates.read_trace(plain, bin_s=5) == [0.0, 2.5]
    assert rates.read_trace(packed, bin_s=5) == pytest.approx([1.25, 3.75, 12.5])


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("time\n1\n", "a column t_s or counts, got time"),
        ("", "got nothing"),
        ("t_s\n", "at least one row"),
        ("t_s\n1\nx\n", ":3: t_s: expected a number of 0 or more, got 'x'"),
    ],
)
def test_bad_traces(tmp_path: Path, content: str, says: str) -> None:
    path = tmp_path / "t.csv"
    path.write_text(content)
    with pytest.raises(InvalidError) as raised:
        rates.read_trace(path, bin_s=1)
    assert says in str(raised.value)


def test_rescale() -> None:
    due_s = [0.0, 1.0, 2.0, 3.0]
    assert rates.rescale(due_s, speed=2, scale=1) == [0.0, 0.5, 1.0, 1.5]
    assert len(rates.rescale(due_s, speed=1, scale=2.5)) == 10
    assert len(rates.rescale(due_s, speed=1, scale=0.5)) == 2
    doubled = rates.rescale(due_s, speed=1, scale=2)
    assert doubled == sorted(doubled)
    with pytest.raises(InvalidError):
        rates.rescale(due_s, speed=0, scale=1)


def test_rate_curve() -> None:
    assert rates.rate_curve([0.1, 0.2, 2.5], 1.0) == [(0.0, 2.0), (1.0, 0.0), (2.0, 1.0)]
    assert rates.rate_curve([], 1.0) == []
