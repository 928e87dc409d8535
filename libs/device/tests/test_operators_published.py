"""Operator rows beside the published table (../shared/data/profiles/v100), for architectures written in plain torch.

torchvision is not needed: the table's graphs are torchvision's, and these are the same architectures from their papers.
"""

from __future__ import annotations

import csv
import gzip
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
from hasgpu_device.operators import OperatorRow, export_model, operators_of
from torch import nn

TABLE = Path(__file__).resolve().parents[4] / "shared/data/profiles/v100/model_ops.csv.gz"
COLUMNS = ("flops", "input_bytes", "weight_bytes", "output_bytes")
TOLERANCE = 0.01
"""Relative, of the sum of each column over an operator class."""
pytestmark = [
    pytest.mark.skipif(not TABLE.exists(), reason=f"the published profiles are not there: {TABLE}"),
    pytest.mark.filterwarnings("ignore:.isinstance.treespec:FutureWarning"),  # of torch itself
]


class Residual(nn.Module):
    """Adds a shortcut to what its parts make."""

    def __init__(self, parts: Iterable[nn.Module], shortcut: nn.Module | None, *, relu: bool) -> None:
        super().__init__()
        self.parts = nn.Sequential(*parts)
        self.shortcut = shortcut
        self.relu = nn.ReLU() if relu else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made = self.parts(x)
        return self.relu(made + (x if self.shortcut is None else self.shortcut(x)))


class Mean(nn.Module):
    """Over the picture."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean([2, 3])


def unit(inside: int, outside: int, size: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    convolution = nn.Conv2d(inside, outside, size, stride, size // 2, groups=groups, bias=False)
    return [convolution, nn.BatchNorm2d(outside)]


def resnet(blocks: Iterable[int], *, bottleneck: bool, groups: int = 1, width: int = 64) -> nn.Module:
    layers: list[nn.Module] = [*unit(3, 64, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    inside = 64
    for stage, count in enumerate(blocks):
        planes = 64 << stage
        outside = planes * (4 if bottleneck else 1)
        for number in range(count):
            stride = 2 if stage and not number else 1
            short = nn.Sequential(*unit(inside, outside, 1, stride)) if stride > 1 or inside != outside else None
            if bottleneck:
                middle = planes * width // 64 * groups
                parts = [*unit(inside, middle, 1), nn.ReLU(), *unit(middle, middle, 3, stride, groups), nn.ReLU()]
                parts += unit(middle, outside, 1)
            else:
                parts = [*unit(inside, planes, 3, stride), nn.ReLU(), *unit(planes, planes, 3)]
            layers.append(Residual(parts, short, relu=True))
            inside = outside
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inside, 1000))


def mobilenet_v2() -> nn.Module:
    layers: list[nn.Module] = [*unit(3, 32, 3, 2), nn.ReLU6()]
    inside = 32
    for expand, outside, count, first in (
        (1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1),
    ):  # fmt: skip
        for number in range(count):
            stride, wide = first if not number else 1, inside * expand
            parts = [*unit(inside, wide, 1), nn.ReLU6()] if expand > 1 else []
            parts += [*unit(wide, wide, 3, stride, wide), nn.ReLU6(), *unit(wide, outside, 1)]
            same = stride == 1 and inside == outside
            layers.append(Residual(parts, None, relu=False) if same else nn.Sequential(*parts))
            inside = outside
    head = [*unit(inside, 1280, 1), nn.ReLU6(), Mean(), nn.Dropout(), nn.Linear(1280, 1000)]
    return nn.Sequential(*layers, *head)


def alexnet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 64, 11, 4, 2), nn.ReLU(), nn.MaxPool2d(3, 2), nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(),
        nn.MaxPool2d(3, 2), nn.Conv2d(192, 384, 3, padding=1), nn.ReLU(), nn.Conv2d(384, 256, 3, padding=1), nn.ReLU(),
        nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2), nn.AdaptiveAvgPool2d((6, 6)), nn.Flatten(),
        nn.Dropout(), nn.Linear(9216, 4096), nn.ReLU(), nn.Dropout(), nn.Linear(4096, 4096), nn.ReLU(),
        nn.Linear(4096, 1000),
    )  # fmt: skip


MODELS: dict[str, Callable[[], nn.Module]] = {
    "alexnet": alexnet,
    "resnet18": lambda: resnet((2, 2, 2, 2), bottleneck=False),
    "mobilenet_v2": mobilenet_v2,
    "resnext50_32x4d": lambda: resnet((3, 4, 6, 3), bottleneck=True, groups=32, width=4),
}
SLOW = ("resnext50_32x4d",)


@pytest.fixture(scope="module")
def published() -> dict[str, list[dict[str, str]]]:
    tables: dict[str, list[dict[str, str]]] = {}
    with gzip.open(TABLE, "rt", newline="") as file:
        for row in csv.DictReader(file):
            if row["model"] in MODELS:
                tables.setdefault(row["model"], []).append(row)
    return tables


def by_class(rows: Iterable[tuple[str, Iterable[float]]]) -> dict[str, list[float]]:
    """Count, then the sums of the columns, of each operator; views move nothing and are named as it pleases."""
    found: dict[str, list[float]] = {}
    for op, values in rows:
        if op not in ("view", "reshape", "_unsafe_view"):
            sums = found.setdefault(op, [0.0] * (1 + len(COLUMNS)))
            for index, value in enumerate((1.0, *values)):
                sums[index] += value
    return found


def rows_of(name: str) -> list[OperatorRow]:
    with torch.device("meta"):  # shapes are all that is looked at: no weight is made
        return operators_of(export_model(MODELS[name](), [torch.empty(1, 3, 224, 224)]))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in MODELS]
)
def test_rows_agree_with_the_published_table(name: str, published: dict[str, list[dict[str, str]]]) -> None:
    ours = rows_of(name)
    theirs = published[name]
    found = by_class((row.op, [getattr(row, column) for column in COLUMNS]) for row in ours)
    expected = by_class((row["op"], [float(row[column]) for column in COLUMNS]) for row in theirs)
    assert set(found) == set(expected)
    for op, sums in expected.items():
        assert found[op][0] == sums[0], f"count of {op}"
        assert found[op] == pytest.approx(sums, rel=TOLERANCE, abs=64), op
    shapes = [
        tuple(int(size) for size in row["output_shape"].split("x")) for row in theirs if row["op"] == "convolution"
    ]
    assert [(row.output_shape, row.groups) for row in ours if row.op == "convolution"] == list(
        zip(shapes, [int(row["groups"]) for row in theirs if row["op"] == "convolution"], strict=True)
    )
