"""ResNet-18 with seeded weights, as transformers builds it."""

from __future__ import annotations

import os
from collections.abc import Mapping

import numpy as np

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # noqa: TID251  read by transformers when it is imported

import torch
from transformers import ResNetConfig, ResNetForImageClassification

model: torch.nn.Module | None = None


def load(seed: str = "0") -> torch.nn.Module:
    """Builds the model; `seed` comes from the function's parameters (always strings)."""
    global model
    torch.manual_seed(int(seed))
    config = ResNetConfig(layer_type="basic", hidden_sizes=[64, 128, 256, 512], depths=[2, 2, 2, 2], num_labels=1000)
    model = ResNetForImageClassification(config).eval()
    return model


def infer(batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Takes `image` (n x 3 x 224 x 224, normalised), gives `logits` (n x 1000)."""
    with torch.inference_mode():
        logits = model(pixel_values=torch.from_numpy(np.ascontiguousarray(batch["image"]))).logits
    return {"logits": logits.numpy()}
