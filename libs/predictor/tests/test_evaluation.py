"""Files of profiles, what is refused of them, and the evaluation over them."""

from __future__ import annotations

import csv
import gzip
from itertools import count
from pathlib import Path

import pytest
from hasgpu_core.errors import InvalidError
from hasgpu_predictor.dataset import read_graph_probes, read_latencies, read_operators
from hasgpu_predictor.evaluation import Data, ProbeRows, evaluate
from hasgpu_predictor.model import TrainingSettings
from hasgpu_predictor.page import family_of, page
from hasgpu_predictor.transfer import TransferSettings

from .test_transfer import QUOTAS, samples

FAST = TransferSettings(trees_count=20, depth=4, folds_count=3)
SMALL = TrainingSettings(trees_count=30, folds_count=5, folds_evaluated=1)
HEADER = "model,batch,sm_pct,quota_pct,latency_ms\n"
OPS = "model,op_index,op,flops,input_bytes,weight_bytes,output_bytes,groups,output_shape\n"


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", r"line 1, column model: .*no header"),
        (HEADER, r"line 2: expected at least one row"),
        ("model,batch,sm_pct,latency_ms\na,1,5,1\n", r"line 1, column quota_pct"),
        ("model,batch,sm_pct,quota_pct,latency_us\na,1,5,10,1\n", r"column latency_ms.*latency_us, a unit"),
        (HEADER + "a,1,5,10,nan\n", r"line 2, column latency_ms.*'nan'"),
        (HEADER + "a,1,5,10,3\na,1,10,10,0\n", r"line 3, column latency_ms: expected a number above 0"),
        (HEADER + "a,1,5,10,-2\n", r"line 2, column latency_ms"),
        (HEADER + "a,1,5,10,3 ms\n", r"line 2, column latency_ms.*'3 ms'"),
        (HEADER + "a,1.5,5,10,3\n", r"line 2, column batch: expected a whole number"),
        (HEADER + "a,1,105,10,3\n", r"line 2, column sm_pct"),
        (HEADER + "a,1,5\n", r"line 2, column quota_pct: expected a value"),
        (HEADER + ",1,5,10,3\n", r"line 2, column model"),
        (HEADER + "a,1,5,10,3\nb,1,5,10,4\na,1,5,10,3.5\n", r"line 4, column latency_ms: expected 3 as in line 2"),
    ],
)
def test_bad_latencies_are_told_with_their_place(tmp_path: Path, text: str, told: str) -> None:
    with pytest.raises(InvalidError, match=told) as caught:
        read_latencies(write(tmp_path / "l.csv", text))
    assert "l.csv" in str(caught.value)


def test_equal_duplicates_count_once(tmp_path: Path) -> None:
    table = read_latencies(write(tmp_path / "l.csv", HEADER + "a,1,5,10,3\na,1,5,10,3.0\n"))
    assert table["a"].latency_ms.tolist() == [3.0]


def test_unreadable_and_cut_files_are_told(tmp_path: Path) -> None:
    with pytest.raises(InvalidError, match=r"nowhere\.csv"):
        read_latencies(tmp_path / "nowhere.csv")
    whole = gzip.compress((HEADER + "a,1,5,10,3\n").encode())
    (tmp_path / "cut.csv.gz").write_bytes(whole[:-12])
    with pytest.raises(InvalidError, match=r"cut\.csv\.gz"):
        read_latencies(tmp_path / "cut.csv.gz")
    (tmp_path / "no.csv.gz").write_bytes(b"plain")
    with pytest.raises(InvalidError, match=r"no\.csv\.gz"):
        read_latencies(tmp_path / "no.csv.gz")


def test_bad_operators_and_probes_are_told(tmp_path: Path) -> None:
    with pytest.raises(InvalidError, match=r"line 2, column output_shape.*'1xax3'"):
        read_operators(write(tmp_path / "o.csv", OPS + "a,0,relu,1,1,0,1,1,1xax3\n"))
    with pytest.raises(InvalidError, match=r"line 3, column op_index"):
        read_operators(write(tmp_path / "o.csv", OPS + "a,0,relu,1,1,0,1,1,1x3\na,0,add,1,1,0,1,1,1x3\n"))
    text = "model,batch,sm_pct,graph_latency_ms\na,1,5,2\na,1,5,9\n"
    with pytest.raises(InvalidError, match=r"line 3, column graph_latency_ms"):
        read_graph_probes(write(tmp_path / "p.csv", text))


@pytest.mark.parametrize(
    "text", ["", "batch=4", "batch=x,sm_pct=1,quota_pct=2", "batch=4,sm_pct=0,quota_pct=20", "a=1"]
)
def test_bad_probe_rows_are_told(text: str) -> None:
    with pytest.raises(InvalidError, match="--probe-rows"):
        ProbeRows.parse(text)


def test_probe_rows() -> None:
    rows = ProbeRows.parse("batch=4,sm_pct=100,quota_pct=20/40/60/80/100")
    assert rows == ProbeRows()


def files(folder: Path, which: slice, rows: slice = slice(None)) -> Data:
    """Writes made-up models as files and reads them again."""
    folder.mkdir()
    paths = [folder / name for name in ("latency.csv", "ops.csv", "probes.csv")]
    with paths[0].open("w") as latency, paths[1].open("w") as ops, paths[2].open("w") as probes:
        latency.write(HEADER)
        ops.write(OPS)
        probes.write("model,batch,sm_pct,graph_latency_ms\n")
        for number, sample in list(enumerate(samples(8)))[which]:
            for place, ms in zip(sample.configurations[rows], sample.latency_ms[rows], strict=True):
                csv.writer(latency).writerow([f"net{number}", *(f"{x:g}" for x in place), ms])
            for index, kernel in enumerate(sample.workload.kernels):
                op, shape = (
                    ("relu", "1x1") if kernel.kind == "element" else ("convolution", f"1x{kernel.columns:g}x28x28")
                )
                csv.writer(ops).writerow(
                    [
                        f"net{number}",
                        index,
                        op,
                        kernel.flops,
                        kernel.bytes / 2,
                        kernel.weight_bytes,
                        kernel.bytes / 2,
                        1,
                        shape,
                    ]
                )
            for sm, ms in sample.graph_ms.items():
                probes.write(f"net{number},1,{sm:g},{ms}\n")
    return Data.read(*paths)


def test_unseen_models_and_unseen_configurations_are_scored(tmp_path: Path) -> None:
    train = files(tmp_path / "train", slice(0, 6), slice(0, None, 2))
    test = files(tmp_path / "test", slice(5, 7))
    clock = count()
    result = evaluate(train, test, ProbeRows(), now_s=lambda: float(next(clock)), transfer=FAST, training=SMALL)
    figures = result.summary()
    assert figures["unseen_models"] == ["net6"]
    assert set(figures) >= {
        "mape", "median_ape", "p95_ape", "mape_by_model", "coverage_90", "n", "train_s", "predict_us_per_config"
    }  # fmt: skip
    rows = len(samples(1)[0].latency_ms)
    assert figures["already_trained_rows"] == rows // 2
    assert figures["n"] == rows - len(QUOTAS) + rows - rows // 2, "probes and trained rows are not scored"
    assert figures["train_s"] == 2.0
    assert figures["monotone_violations"] == 0
    assert isinstance(figures["mape"], float)
    assert figures["mape"] < 15
    text = page(result)
    assert "net6" in text
    assert "device_over_curve_log" in text


def test_unseen_model_without_operators_is_told(tmp_path: Path) -> None:
    train, test = files(tmp_path / "train", slice(0, 5)), files(tmp_path / "test", slice(6, 7))
    with pytest.raises(InvalidError, match="operators of net6"):
        evaluate(train, Data(test.latencies, {}, {}), ProbeRows(), now_s=lambda: 0.0, transfer=FAST)


def test_families() -> None:
    names = ("resnet50", "regnet_x_1_6gf", "convnext_base", "vgg11_bn", "wide_resnet50_2", "7")
    assert [family_of(m) for m in names] == ["resnet", "regnet", "convnext", "vgg", "wide_resnet", "7"]
