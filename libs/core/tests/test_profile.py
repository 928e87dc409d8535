"""Profile files: what is read back, what is refused and how it is told, what lies between measured cells."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from hasgpu_core.device_times import DeviceTimes
from hasgpu_core.errors import InvalidError, NotFoundError
from hasgpu_core.profile import Basis, Profile, ProfileFileError, ProfileHeader, ProfileModel, ProfileRow
from hypothesis import given
from hypothesis import strategies as st

HEADER = ProfileHeader(
    device_model="NVIDIA-H100-80GB-HBM3",
    backend="cuda",
    basis=Basis.MEASURED,
    memory_bytes=85_520_809_984,
    sm_rungs_pct=(25, 50, 75, 100),
    driver="570.00",
    versions={"torch": "2.8.0"},
    created_unix_s=1_790_000_000,
    source="hasgpu profile, 50 repetitions",
    models={"small": ProfileModel("ab" * 32, 1 << 30, 32, "seeded weights"), "big/one": ProfileModel("", 0)},
)


def row(
    model: str = "small", batch: int = 1, sm_pct: int = 25, quota: int = 1000, time_us: float = 100.5
) -> ProfileRow:
    return ProfileRow(model, batch, sm_pct, quota, time_us + 1, time_us, time_us, 50)


ROWS = (
    row(),
    row(batch=8, time_us=450.0),
    row(sm_pct=100, time_us=30.125),
    row(batch=8, sm_pct=100, time_us=140.0),
    row(quota=300, time_us=101.0),
    row("big/one", time_us=9e3),
)
PROFILE = Profile(HEADER, ROWS)


def test_a_profile_is_read_back_exactly() -> None:
    text = PROFILE.format()
    assert Profile.parse(text) == PROFILE
    assert Profile.parse(text).format() == text
    assert text.splitlines()[0].startswith('# {"format": "hasgpu-profile", "version": 1,')


@given(st.lists(st.floats(1e-3, 1e9, allow_nan=False), min_size=1, max_size=20))
def test_any_times_round_trip(times_us: list[float]) -> None:
    header = replace(HEADER, models={"m": ProfileModel("d", 5)})
    profile = Profile(header, tuple(row("m", batch=1 + i, time_us=us) for i, us in enumerate(times_us)))
    assert Profile.parse(profile.format()) == profile


def changed(find: str, put: str) -> str:
    text = PROFILE.format()
    assert find in text
    return text.replace(find, put, 1)


@pytest.mark.parametrize(
    ("text", "line", "column", "told"),
    [
        ("", 1, "header", "'# ' and a JSON object"),
        ("# [1]", 1, "header", "got list"),
        ("# {", 1, "header", "JSON"),
        (changed('"hasgpu-profile"', '"other"'), 1, "format", "got 'other'"),
        (changed('"version": 1', '"version": 2'), 1, "version", "expected 1, got 2"),
        (changed('"basis": "measured"', '"basis": "guessed"'), 1, "basis", "'measured' or 'modelled', got 'guessed'"),
        (changed('"basis": "measured", ', ""), 1, "basis", "got nothing"),
        (changed('"memory_bytes": 85520809984', '"memory_bytes": "80G"'), 1, "memory_bytes", "got '80G'"),
        (changed("[25, 50, 75, 100]", "[25, 0]"), 1, "sm_rungs_pct", "1..100, ascending"),
        (changed("[25, 50, 75, 100]", "[50, 25]"), 1, "sm_rungs_pct", "1..100, ascending"),
        (changed('"complete": true', '"complete": 1'), 1, "complete", "true or false"),
        (changed('"driver"', '"extra": 1, "driver"'), 1, "extra", "no other keys"),
        (changed('{"torch": "2.8.0"}', '{"torch": 2}'), 1, "versions.torch", "a text, got 2"),
        (changed('"max_batch": 32', '"max_batch": 0'), 1, "models.small.max_batch", "1 or more"),
        (changed(",longest_segment_us", ""), 2, "longest_segment_us", "no column longest_segment_us"),
        (changed("big/one,1,25,1000,9001", "big/one,1,25,1000,nan"), 3, "latency_us", "got 'nan'"),
        (changed("big/one,1,25,1000,9001", "big/one,1,25,1000,inf"), 3, "latency_us", "got 'inf'"),
        (changed("big/one,1,25,1000,9001", "big/one,1,25,1000,-3"), 3, "latency_us", "above 0"),
        (changed("big/one,1,25,1000,9001,9000", "big/one,1,25,1000,9001,0"), 3, "device_time_us", "got '0'"),
        (changed("big/one,1,25,1000,9001", "big/one,1,25,1000,"), 3, "latency_us", "got ''"),
        (changed("big/one,1,25", "big/one,1,101"), 3, "sm_pct", "1..100, got '101'"),
        (changed("big/one,1,25,1000", "big/one,1,25,1001"), 3, "quota_permille", "1..1000, got '1001'"),
        (changed("big/one,1,25", "big/one,0,25"), 3, "batch", "got '0'"),
        (changed("big/one,1,25", "big/one,1.5,25"), 3, "batch", "got '1.5'"),
        (changed("big/one,1,25,1000,9001", "other,1,25,1000,9001"), 3, "model", "got 'other'"),
        (changed("big/one,1,25,1000,9001,9000,9000,50", "big/one,1,25"), 3, "quota_permille", "got 3"),
        (PROFILE.format() + "small,1,25,1000,9,9,9,50\n", 9, "device_time_us", "that disagrees"),
    ],
)
def test_what_can_not_be_is_refused_by_line_and_column(text: str, line: int, column: str, told: str) -> None:
    with pytest.raises(ProfileFileError) as caught:
        Profile.parse(text)
    assert (caught.value.line, caught.value.column) == (line, column)
    assert f"line {line}, {column}" in str(caught.value)
    assert told in str(caught.value)
    assert isinstance(caught.value, InvalidError)


def test_a_row_given_twice_in_agreement_counts_once() -> None:
    assert Profile.parse(PROFILE.format() + PROFILE.format().splitlines()[-1] + "\n") == PROFILE


def test_a_model_without_a_whole_quota_row_is_refused_with_the_cells_named() -> None:
    rows = tuple(one for one in ROWS if one.model != "big/one")
    with pytest.raises(ProfileFileError, match=r"models.big/one.*missing cells: \(batch 1, sm 25 %\).*sm 100 %"):
        Profile(HEADER, rows).format()
    parked = (*rows, row("big/one", batch=4, sm_pct=50, quota=100))
    with pytest.raises(ProfileFileError, match=r"missing cells: \(batch 4, sm 50 %\)"):
        Profile(replace(HEADER, complete=False), parked).format()


def test_a_hole_is_refused_only_where_the_header_says_complete() -> None:
    holed = tuple(one for one in ROWS if one.cell != ("small", 8, 25, 1000))
    with pytest.raises(ProfileFileError, match=r"missing cells: \(batch 8, sm 25 %\)"):
        Profile(HEADER, holed).format()
    partial = Profile(replace(HEADER, complete=False), holed)
    assert Profile.parse(partial.format()) == partial
    assert partial.device_times("small").device_time_us(8, 25) == pytest.approx(100.5 * 140 / 30.125)
    assert not partial.device_times("small").covers(8, 25)


def test_device_times_are_exact_where_measured_and_linear_between() -> None:
    times = PROFILE.device_times("small")
    assert times.device_time_us(8, 100) == 140.0
    assert times.device_time_us(1, 25) == 100.5
    assert times.device_time_us(4, 25) == pytest.approx(100.5 + (450.0 - 100.5) * 3 / 7)
    # Linear in 1 / share: 1/50 lies a third of the way from 1/100 to 1/25.
    assert times.device_time_us(8, 50) == pytest.approx(140.0 + (450.0 - 140.0) / 3)
    assert times.covers(4, 50)
    assert not times.covers(16, 50)
    assert not times.covers(4, 10)


def test_outside_the_measured_cells_it_goes_on() -> None:
    times = PROFILE.device_times("small")
    assert times.device_time_us(15, 25) == pytest.approx(450.0 + 450.0 - 100.5)
    assert times.device_time_us(1, 10) > times.device_time_us(1, 25)
    alone = PROFILE.device_times("big/one")
    assert alone.device_time_us(2, 25) == 18e3
    assert alone.device_time_us(1, 100) == 9e3
    assert alone.device_time_us(1, 5) == pytest.approx(45e3)


def test_an_unknown_model_is_told_with_those_there_are() -> None:
    with pytest.raises(NotFoundError, match=r"'none' is not found; the profile has big/one, small"):
        PROFILE.device_times("none")


@given(
    st.lists(st.integers(1, 64), min_size=1, max_size=4, unique=True),
    st.lists(st.integers(1, 100), min_size=1, max_size=4, unique=True),
    st.sets(st.integers(0, 15)),
    st.tuples(st.floats(0, 1e3), st.floats(1, 1e3), st.floats(0, 1e3), st.floats(1, 1e3)),
)
def test_monotone_cells_give_monotone_times_everywhere(
    batches: list[int], sms_pct: list[int], holes: set[int], factors: tuple[float, float, float, float]
) -> None:
    a, b, c, d = factors
    grid = list(itertools.product(sorted(batches), sorted(sms_pct)))
    measured = {
        (batch, sm): a + b * batch + c / sm + d * batch / sm
        for index, (batch, sm) in enumerate(grid)
        if index == 0 or index not in holes
    }
    times = DeviceTimes(measured)
    for (batch, sm), time_us in measured.items():
        assert times.device_time_us(batch, sm) == pytest.approx(time_us)
    for sm in (1, 20, 33, 50, 100):
        along = [times.device_time_us(batch, sm) for batch in range(1, 80, 3)]
        assert all(x > 0 for x in along)
        assert all(x <= y * (1 + 1e-9) for x, y in itertools.pairwise(along))
    for batch in (1, 7, 32, 100):
        along = [times.device_time_us(batch, sm) for sm in range(1, 101, 3)]
        assert all(x >= y * (1 - 1e-9) for x, y in itertools.pairwise(along))
