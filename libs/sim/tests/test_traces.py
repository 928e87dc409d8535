from __future__ import annotations

import gzip
from pathlib import Path
from random import Random

import pytest
from hasgpu_core.errors import InvalidError, NotFoundError
from hasgpu_sim.arrivals import Process
from hasgpu_sim.surface import filled_surface, load_v100
from hasgpu_sim.traces import load_trace, times_of_counts

DATA = Path(__file__).parents[4] / "shared" / "data"


def written(folder: Path, text: str) -> Path:
    path = folder / "trace.csv"
    path.write_text(text)
    return path


def test_every_shape_is_told_by_its_columns(tmp_path: Path) -> None:
    times = load_trace(written(tmp_path, "t_s,tokens\n5.0,1\n6.5,2\n"), rate_scale=2.0)
    assert list(times.arrivals_s["f"]) == [0.0, 0.75]
    stages = load_trace(written(tmp_path, "set,source_index,rps\na,1,2\nb,1,4\n"), part="b")
    assert (stages.requests_count, stages.duration_s) == (20, 5.0)
    counts = load_trace(written(tmp_path, "count\n1\n0\n2\n"))
    assert list(counts.arrivals_s["f"]) == [0.0, 2.0, 2.5]
    azure = load_trace(written(tmp_path, "app,fn,trigger,c480,c481\nx,g,http,1,2\n"))
    assert list(azure.arrivals_s["g"]) == [0.0, 60.0, 90.0]
    public = load_trace(written(tmp_path, "HashOwner,HashApp,HashFunction,Trigger,1,2\no,a,g,timer,0,1\n"))
    assert (list(public.arrivals_s["g"]), public.duration_s) == ([60.0], 120.0)


def test_batches_are_spread_until_the_next(tmp_path: Path) -> None:
    path = written(tmp_path, "t_s,input_tokens\n0,1\n0,1\n0,1\n3.0,1\n3.0,1\n10.0,5\n")
    even = load_trace(path)
    assert list(even.arrivals_s["f"]) == [0.0, 1.0, 2.0, 3.0, 4.5, 10.0]
    assert "spread (even)" in even.notes[0]
    drawn = load_trace(path, process=Process.POISSON, seed=3)
    times = list(drawn.arrivals_s["f"])
    assert times == sorted(times)
    assert len(times) == 6
    assert not drawn.timed
    assert load_trace(written(tmp_path, "t_s,context_tokens\n0,1\n0,1\n")).timed


def test_sums_of_fourteen_days_are_divided(tmp_path: Path) -> None:
    head = "fn," + ",".join(f"c{i}" for i in range(1_440))
    trace = load_trace(written(tmp_path, f"{head}\na," + ",".join(["28"] * 1_440) + "\n"))
    assert trace.requests_count == 2 * 1_440
    assert "divided by 14" in trace.notes[0]
    raw = head.replace("fn,", "app,fn,trigger,")
    kept = load_trace(written(tmp_path, f"{raw}\nx,a,http," + ",".join(["2"] * 1_440) + "\n"))
    assert kept.requests_count == 2 * 1_440
    assert not kept.notes


def test_one_function_of_many_can_be_taken(tmp_path: Path) -> None:
    path = written(tmp_path, "app,fn,trigger,c480,c481\nx,g,http,1,2\nx,h,http,5,0\n")
    assert list(load_trace(path, part="h").arrivals_s) == ["h"]
    with pytest.raises(NotFoundError, match="nearest: g"):
        load_trace(path, part="gg")


def test_scaled_counts_lose_no_request() -> None:
    counts = [3, 1, 0, 7, 2]
    assert len(times_of_counts(counts, 60.0, Process.EVEN, Random(0), scale=0.5)) == 6
    poisson = times_of_counts(counts, 60.0, Process.POISSON, Random(0))
    assert [sum(60 * i <= t < 60 * (i + 1) for t in poisson) for i in range(5)] == counts


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("count\n1\n-2\n", r"line 3, column count.*0 or more.*'-2'"),
        ("count\n1.5\n", "whole number"),
        ("fn,c0,c1,c3\na,1,2,3\n", "a column for each minute"),
        ("fn,c0,c1\na,1,\n", "column c1.*a gap"),
        ("fn,c0,c1\na,1\n", "line 2.*3 values"),
        ("x,y\n1,2\n", "columns t_s"),
        ("t_s,n\n", "at least one request"),
        ("count\n", "at least one count"),
        ("rps\n", "at least one stage"),
        ("set,source_index,rps\na,1,5\na,3,5\n", r"line 3, column source_index.*2, the stage after.*3: a gap"),
        ("t_s\n-1\n", "column t_s"),
        ("count\nnan\n", "column count"),
    ],
)
def test_bad_traces_are_named(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(InvalidError, match=words):
        load_trace(written(tmp_path, text))


def test_an_unknown_part_is_named(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="the file has a"):
        load_trace(written(tmp_path, "set,rps\na,1\n"), part="c")


def test_what_a_spreadsheet_puts_before_the_first_column_is_no_part_of_it(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes(b"\xef\xbb\xbfcount\r\n1\r\n2\r\n")
    assert load_trace(path).requests_count == 3


def test_a_trace_without_parts_and_a_file_that_is_not_there_are_told(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("count\n1\n")
    with pytest.raises(NotFoundError, match="is one trace, without parts"):
        load_trace(path, part="rps")
    with pytest.raises(InvalidError, match=r"got No such file or directory$"):
        load_trace(tmp_path / "none.csv")


def test_missing_cells_lie_between_their_neighbours() -> None:
    cells = {
        (b, s, q): 0.01 * b * 100 / s * 1000 / q for b in (1, 2, 4) for s in (20, 50, 100) for q in (200, 500, 1000)
    }
    truth = cells.pop((2, 50, 500))
    surface = filled_surface("m", "d", cells)
    assert surface.filled == {(2, 50, 500)}
    assert surface.cells_s[2, 50, 500] == pytest.approx(truth, rel=1e-9)  # powers are lines in logarithms
    assert surface.latency_s(3, 50, 500) == pytest.approx((truth + 2 * truth) / 2)
    assert surface.latency_s(1, 50, 100) == pytest.approx(2 * surface.latency_s(1, 50, 200))


def test_a_profile_says_what_it_lacks(tmp_path: Path) -> None:
    path = tmp_path / "latency.csv.gz"
    path.write_bytes(gzip.compress(b"model,batch,sm_pct,quota_pct,latency_ms\nm,1,100,100,5\n"))
    assert load_v100(tmp_path)["m"].reference_s == pytest.approx(0.005)
    with pytest.raises(NotFoundError, match="the profile has m"):
        load_v100(tmp_path, ["n"])
    path.write_bytes(gzip.compress(b"model,batch,sm_pct,quota_pct,latency_ms\nm,1,100,100,-5\n"))
    with pytest.raises(InvalidError, match=r"line 2.*above 0"):
        load_v100(tmp_path)
    path.write_bytes(gzip.compress(b"model,batch\n"))
    with pytest.raises(InvalidError, match="no sm_pct"):
        load_v100(tmp_path)


@pytest.mark.skipif(not DATA.is_dir(), reason="the measured profile and traces are not beside the checkout")
def test_the_published_data_are_read() -> None:
    surfaces = load_v100(DATA / "profiles" / "v100")
    assert len(surfaces) == 57
    assert all(len(s.cells_s) == len(s.batches) * len(s.sm_pcts) * len(s.quotas_permille) for s in surfaces.values())
    replay = load_trace(DATA / "traces" / "has_gpu_replay_5s.csv.gz", part="rps")
    assert (replay.requests_count, replay.duration_s) == (2690, 250.0)
    azure = load_trace(DATA / "traces" / "azure2019_raw_8h.csv.gz")
    assert (len(azure.arrivals_s), azure.duration_s) == (313, 28_800.0)
    assert 80 < azure.requests_count / azure.duration_s < 95
