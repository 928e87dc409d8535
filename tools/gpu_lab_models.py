"""The models that `make gpu-lab` profiles: plain torch, seeded weights, nothing to download.

`python gpu_lab_models.py NAME SIZE HALF FOLDER` makes an artifact of one: `model.pt2` (torch.export), or this file as
a Python handler where the model can't be exported; it prints which, as JSON.
"""

# mypy: allow-subclassing-any, no-warn-return-any
# torch is not followed by mypy.
from __future__ import annotations

import itertools
import json
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

VOCABULARY = 8_192
LABELS = 1_000


def _convolution(inside: int, outside: int, side: int, *, stride: int = 1, groups: int = 1) -> nn.Sequential:
    layer = nn.Conv2d(inside, outside, side, stride, side // 2, groups=groups, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(outside))


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions, or 1x1, 3x3, 1x1, beside a shortcut (He et al., 2016)."""

    def __init__(self, inside: int, width: int, *, stride: int, bottleneck: bool) -> None:
        super().__init__()
        outside = width * 4 if bottleneck else width
        if bottleneck:
            parts = [_convolution(inside, width, 1), nn.ReLU(), _convolution(width, width, 3, stride=stride), nn.ReLU()]
            parts += [_convolution(width, outside, 1)]
        else:
            parts = [_convolution(inside, width, 3, stride=stride), nn.ReLU(), _convolution(width, outside, 3)]
        self.body = nn.Sequential(*parts)
        same = stride == 1 and inside == outside
        self.shortcut = nn.Identity() if same else _convolution(inside, outside, 1, stride=stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns the block's output."""
        return functional.relu(self.body(x) + self.shortcut(x))


def resnet(depths: tuple[int, ...], width: int, *, bottleneck: bool) -> nn.Module:
    """A residual network."""
    parts: list[nn.Module] = [_convolution(3, width, 7, stride=2), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    inside = width
    for stage, depth in enumerate(depths):
        for index in range(depth):
            stride = 2 if stage and not index else 1
            parts.append(ResidualBlock(inside, width << stage, stride=stride, bottleneck=bottleneck))
            inside = (width << stage) * (4 if bottleneck else 1)
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inside, LABELS))


class InvertedResidual(nn.Module):
    """Expand, filter by channel, project (Sandler et al., 2018)."""

    def __init__(self, inside: int, outside: int, *, stride: int) -> None:
        super().__init__()
        wide = inside * 6
        filtered = _convolution(wide, wide, 3, stride=stride, groups=wide)
        parts = [_convolution(inside, wide, 1), nn.ReLU6(), filtered, nn.ReLU6(), _convolution(wide, outside, 1)]
        self.body = nn.Sequential(*parts)
        self.has_shortcut = stride == 1 and inside == outside

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns the block's output."""
        return x + self.body(x) if self.has_shortcut else self.body(x)


def mobilenet(widths: tuple[tuple[int, int, int], ...]) -> nn.Module:
    """A MobileNetV2-like network; stages are (channels, blocks, stride)."""
    inside = widths[0][0]
    parts: list[nn.Module] = [_convolution(3, inside, 3, stride=2), nn.ReLU6()]
    for outside, count, stride in widths:
        for index in range(count):
            parts.append(InvertedResidual(inside, outside, stride=1 if index else stride))
            inside = outside
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inside, LABELS))


class Layer(nn.Module):
    """One transformer layer, normalised before its parts."""

    def __init__(self, width: int, heads: int, *, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns the layer's output; x: (batch, tokens, width)."""
        parts = self.qkv(self.before(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        seen = functional.scaled_dot_product_attention(parts[0], parts[1], parts[2], is_causal=self.causal)
        x = x + self.out(seen.transpose(1, 2).flatten(-2))
        return x + self.mlp(self.between(x))


class TextModel(nn.Module):
    """Tokens in, a vector out: the mean of an encoder's, or the next token's logits of a decoder."""

    def __init__(self, width: int, depth: int, heads: int, tokens: int, *, causal: bool) -> None:
        super().__init__()
        self.causal = causal
        self.words, self.places = nn.Embedding(VOCABULARY, width), nn.Embedding(tokens, width)
        self.layers = nn.Sequential(*(Layer(width, heads, causal=causal) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.register_buffer("order", torch.arange(tokens))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Returns (batch, width) or (batch, VOCABULARY)."""
        x = self.norm(self.layers(self.words(ids.remainder(VOCABULARY)) + self.places(self.order)))
        return functional.linear(x[:, -1], self.words.weight) if self.causal else x.mean(1)


class VisionTransformer(nn.Module):
    """Patches as tokens (Dosovitskiy et al., 2021)."""

    def __init__(self, width: int, depth: int, heads: int, side_px: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 16, 16)
        self.places = nn.Parameter(torch.zeros(1, (side_px // 16) ** 2, width))
        self.layers = nn.Sequential(*(Layer(width, heads, causal=False) for _ in range(depth)))
        self.head = nn.Linear(width, LABELS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns logits."""
        x = self.patches(x).flatten(2).transpose(1, 2) + self.places
        return self.head(self.layers(x).mean(1))


class UNet(nn.Module):
    """Down and up again, with what was seen on the way down (Ronneberger et al., 2015)."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        widths = [width << level for level in range(depth)]
        self.down = nn.ModuleList(self._pair(low, high) for low, high in itertools.pairwise([3, *widths]))
        self.up = nn.ModuleList(self._pair(high + low, low) for low, high in itertools.pairwise(widths))
        self.head = nn.Conv2d(width, 3, 1)

    @staticmethod
    def _pair(inside: int, outside: int) -> nn.Sequential:
        return nn.Sequential(_convolution(inside, outside, 3), nn.ReLU(), _convolution(outside, outside, 3), nn.ReLU())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns an image's worth of values, averaged to 8 x 8."""
        seen = []
        for index, block in enumerate(self.down):
            x = block(functional.max_pool2d(x, 2) if index else x)
            seen.append(x)
        for block, before in zip(reversed(self.up), reversed(seen[:-1]), strict=True):
            x = block(torch.cat([functional.interpolate(x, scale_factor=2.0), before], 1))
        return functional.adaptive_avg_pool2d(self.head(x), 8).flatten(1)


class Recurrent(nn.Module):
    """LSTM layers over a sequence."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(64, width, depth, batch_first=True)
        self.head = nn.Linear(width, LABELS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns logits after the last step."""
        return self.head(self.lstm(x)[0][:, -1])


def mlp(width: int, depth: int) -> nn.Module:
    """Fully connected layers."""
    parts = [part for _ in range(depth) for part in (nn.Linear(width, width), nn.ReLU())]
    return nn.Sequential(*parts, nn.Linear(width, LABELS))


@dataclass(frozen=True, slots=True)
class Choice:
    """A model in one size."""

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    """Of an input row."""
    datatype: str = "FP32"


def choices(size: str) -> dict[str, Choice]:
    """Returns the models by name: "full", those of the papers; "tiny", the same shapes of network for a rehearsal."""
    tiny = size == "tiny"
    image = (3, 32, 32) if tiny else (3, 224, 224)
    tokens = 16 if tiny else 128
    stages = (
        ((8, 1, 1), (16, 1, 2)) if tiny else ((16, 1, 1), (24, 2, 2), (32, 3, 2), (64, 4, 2), (96, 3, 1), (160, 3, 2))
    )

    def text(width: int, depth: int, heads: int, count: int, *, causal: bool = False) -> Choice:
        sizes = (32, 1, 2) if tiny else (width, depth, heads)
        return Choice(lambda: TextModel(*sizes, count, causal=causal), (count,), "INT64")

    return {
        "resnet18": Choice(
            lambda: resnet((1, 1) if tiny else (2, 2, 2, 2), 8 if tiny else 64, bottleneck=False), image
        ),
        "resnet50": Choice(lambda: resnet((1, 1) if tiny else (3, 4, 6, 3), 8 if tiny else 64, bottleneck=True), image),
        "mobilenet-v2": Choice(lambda: mobilenet(stages), image),
        "vit-b-16": Choice(lambda: VisionTransformer(*((32, 1, 2) if tiny else (768, 12, 12)), image[1]), image),
        "unet": Choice(lambda: UNet(*((8, 2) if tiny else (64, 4))), image),
        "minilm": text(384, 6, 12, 16 if tiny else 32),
        "bert-base": text(768, 12, 12, tokens),
        "gpt2": text(768, 12, 12, tokens, causal=True),
        "lstm": Choice(lambda: Recurrent(*((16, 1) if tiny else (512, 2))), (tokens, 64)),
        "mlp": Choice(lambda: mlp(*((64, 2) if tiny else (4_096, 4))), (64,) if tiny else (4_096,)),
    }


class Served(nn.Module):
    """A model between FP32 inputs and outputs, whatever it computes in."""

    def __init__(self, model: nn.Module, *, half: bool) -> None:
        super().__init__()
        self.model = model
        self.half_inputs = half

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns the model's answer."""
        x = x.half() if self.half_inputs and x.is_floating_point() else x
        return self.model(x).float()


def build(name: str, size: str, *, half: bool, seed: int = 0) -> Served:
    """Makes a model with weights drawn from a seed."""
    torch.manual_seed(seed)
    model = choices(size)[name].build().eval()
    return Served(model.half() if half else model, half=half).eval()


def export(name: str, size: str, *, half: bool, path: Path, max_batch: int) -> None:
    """Writes a model as a torch.export program for batches up to a size; raises what torch raises."""
    choice = choices(size)[name]
    kind = torch.int64 if choice.datatype == "INT64" else torch.float32
    example = torch.zeros(2, *choice.shape, dtype=kind)
    batch = torch.export.Dim("batch", min=1, max=max_batch)
    with torch.no_grad():
        program = torch.export.export(build(name, size, half=half), (example,), dynamic_shapes=({0: batch},))
    torch.export.save(program, path)


class Handler:
    """What the worker calls when the model is served as Python."""

    def __init__(self, model: Served) -> None:
        self.model = model

    def infer(self, batch: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
        """Takes `x`, gives `y`."""
        return {"y": self.model(torch.from_numpy(np.ascontiguousarray(batch["x"])))}


def load(name: str, size: str, half: str) -> Handler:
    """The worker's way in; parameters are strings."""
    return Handler(build(name, size, half=half == "true"))


def main(arguments: list[str]) -> None:
    """Makes an artifact, prints what it is."""
    name, size, half, folder = arguments
    path = Path(folder)
    choice = choices(size)[name]
    document: dict[str, Any] = {"shape": list(choice.shape), "datatype": choice.datatype, "note": ""}
    try:
        export(name, size, half=half == "true", path=path / "model.pt2", max_batch=64)
        document |= {"format": "torch-export", "entry": "model.pt2"}
    except (RuntimeError, ValueError, TypeError, AssertionError, NotImplementedError) as error:
        reason = " ".join(str(error).split())[:200]
        shutil.copy(__file__, path / "handler.py")
        document |= {
            "format": "python",
            "entry": "handler.py",
            "note": f"not exported: {type(error).__name__}: {reason}",
        }
    with torch.no_grad():
        answer = build(name, size, half=False)(torch.zeros(1, *choice.shape).to(_kind(choice)))
    print(json.dumps(document | {"outputs": list(answer.shape[1:])}))


def _kind(choice: Choice) -> torch.dtype:
    return torch.int64 if choice.datatype == "INT64" else torch.float32


if __name__ == "__main__":
    main(sys.argv[1:])
