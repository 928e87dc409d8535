"""Operator rows of exported programs: FLOPs, bytes, groups and shapes."""

from __future__ import annotations

import pytest
import torch
from hasgpu_core.errors import InvalidError
from hasgpu_device.operators import as_table, export_model, operators_of, totals

pytestmark = pytest.mark.filterwarnings("ignore:.isinstance.treespec:FutureWarning")  # of torch itself


class Block(torch.nn.Module):
    """A residual block as resnet18 has."""

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.first = torch.nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.first_norm = torch.nn.BatchNorm2d(outside)
        self.second = torch.nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
        self.second_norm = torch.nn.BatchNorm2d(outside)
        self.short: torch.nn.Module = torch.nn.Identity()
        if stride > 1:
            self.short = torch.nn.Sequential(
                torch.nn.Conv2d(inside, outside, 1, stride, bias=False), torch.nn.BatchNorm2d(outside)
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.first_norm(self.first(x)))
        return torch.relu(self.second_norm(self.second(y)) + self.short(x))


def resnet18() -> torch.nn.Module:
    layers: list[torch.nn.Module] = [
        torch.nn.Conv2d(3, 64, 7, 2, 3, bias=False), torch.nn.BatchNorm2d(64), torch.nn.ReLU(),
        torch.nn.MaxPool2d(3, 2, 1),
    ]  # fmt: skip
    for inside, outside, stride in ((64, 64, 1), (64, 128, 2), (128, 256, 2), (256, 512, 2)):
        layers += [Block(inside, outside, stride), Block(outside, outside, 1)]
    layers += [torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(512, 1000)]
    return torch.nn.Sequential(*layers)


def test_flops_of_resnet18_are_the_published_ones() -> None:
    rows = operators_of(export_model(resnet18(), [torch.zeros(1, 3, 224, 224)]))
    sums = totals(rows)
    # 1.814 G multiply-adds are published for ResNet-18 at 224 x 224.
    assert sums["product_flops"] == pytest.approx(2 * 1.814e9, rel=0.02)
    assert sum(row.op == "convolution" for row in rows) == 20
    weights = sum(row.weight_bytes for row in rows if row.op in ("convolution", "addmm", "permute"))
    assert weights == pytest.approx(4 * 11.69e6, rel=0.02)
    first = next(row for row in rows if row.op == "convolution")
    assert first.output_shape == (1, 64, 112, 112)
    assert first.flops == 2 * 64 * 112 * 112 * 3 * 49
    assert first.input_bytes == 4 * 3 * 224 * 224
    assert as_table("m", rows)[0]["output_shape"] == "1x64x112x112"


def test_groups_tell_depthwise_from_grouped() -> None:
    module = torch.nn.Sequential(torch.nn.Conv2d(8, 8, 3, groups=8), torch.nn.Conv2d(8, 16, 1, groups=2))
    rows = operators_of(export_model(module, [torch.zeros(1, 8, 10, 10)]))
    assert [row.groups for row in rows] == [8, 2]
    assert [row.flops for row in rows] == [2 * 8 * 64 * 9, 2 * 16 * 64 * 4]


class Branching(torch.nn.Module):
    """Can't be exported: its way depends on values."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1 if x.sum() > 0 else x - 1


def test_what_cannot_be_exported_is_told() -> None:
    with pytest.raises(InvalidError, match=r"torch\.export"):
        export_model(Branching(), [torch.zeros(2)])
    with pytest.raises(InvalidError, match="got Linear"):
        operators_of(torch.nn.Linear(1, 1))
